"""What only a run tells of a compiled package: how its results look, and which batches it refuses.

Inputs are zeros of the smallest sizes that it takes, or take no memory at all. Called by `aoti.py`
when a model loads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from configs import dtypes
from configs.errors import ConfigError
from configs.model import ModelConfig
from deployments.signature import Binding

from . import faults
from .leaves import Leaf, Size, batch

_TOO_LARGE = re.compile(r"dim value is too large at 0, expected to be <= (\d+)")
_FIXED = re.compile(r"unmatched dim value at 0, expected: (\d+)")
_RESULT = "result"  # the symbol of a size that follows no input's first one

Choice = Callable[[Size], int]


def outputs(
    loader: Any, inputs: Mapping[int, Leaf], device: torch.device, where: str
) -> dict[int, Leaf]:
    """By position, from runs with different sizes: what changes with them is of any size. Raises
    ConfigError where it does not run on zeros."""
    first = batch(inputs.values())
    try:
        small = _run(loader, inputs, device, _small, _small)
        large = _run(loader, inputs, device, _large, _large)
        by_rows = _run(loader, inputs, device, _large, _small) if first is not None else small
    except RuntimeError as error:
        if faults.is_fatal(error):
            raise
        raise ConfigError(
            "its outputs are not known without a run, and it does not run on zeros: list them in "
            f"config.pbtxt ({faults.clean_text(error)})",
            file=where,
            field="output",
        ) from error
    found: dict[int, Leaf] = {}
    for position, (one, other, rows) in enumerate(zip(small, large, by_rows, strict=True)):
        if not isinstance(one, torch.Tensor):
            continue
        sizes = [
            Size(a, a) if a == b else Size(0, None, _RESULT)
            for a, b in zip(one.shape, other.shape, strict=True)
        ]
        if first is not None and sizes:
            if (one.shape[0], rows.shape[0]) == (_small(first), _large(first)):
                sizes[0] = first
        found[position] = Leaf(str(one.dtype).removeprefix("torch."), tuple(sizes))
    return found


def _small(size: Size) -> int:
    return max(size.low, 1) if size.high is None else min(max(size.low, 2), size.high)


def _large(size: Size) -> int:
    small = _small(size)
    if size.high is None or small < size.high:
        return small + 1
    return max(size.low, 1)


def _run(
    loader: Any, inputs: Mapping[int, Leaf], device: torch.device, rows: Choice, others: Choice
) -> list[Any]:
    given = []
    for position in sorted(inputs):
        leaf = inputs[position]
        sizes = [
            size.low if not size.symbol else (others if axis else rows)(size)
            for axis, size in enumerate(leaf.sizes or ())
        ]
        given.append(torch.zeros(sizes, dtype=getattr(torch, leaf.torch_type), device=device))
    return list(loader.run(given))


def check_rows(loader: Any, config: ModelConfig, binding: Binding, device: torch.device) -> None:
    """Raises ConfigError where a package without its source refuses the configured batch.

    Tensors of one element, stretched, take no memory; where their sizes pass, their strides do not.
    """
    given: list[Any] = [None] * len(binding.inputs)
    for tensor, slot in zip(config.input, binding.inputs, strict=True):
        name = str(dtypes.from_config(tensor.data_type).torch)
        sizes = [config.max_batch_size, *(2 if size < 0 else size for size in tensor.model_dims)]
        one = torch.zeros(1, dtype=getattr(torch, name), device=device)
        given[slot.position] = one.expand(sizes)
    try:
        loader.run(given)
    except RuntimeError as error:
        if faults.is_fatal(error):
            raise
        text = str(error)
        for pattern, reason in (
            (_TOO_LARGE, "was compiled for batches of at most"),
            (_FIXED, "was compiled without a dynamic batch dimension, for exactly"),
        ):
            if (found := pattern.search(text)) is not None:
                raise ConfigError(
                    f"max_batch_size is {config.max_batch_size}, and the package {reason} "
                    f"{found.group(1)} rows",
                    field="max_batch_size",
                ) from error
