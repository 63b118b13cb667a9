"""Inputs to try a model with: from its configuration, or from the user's file.

Owns what values are valid (token ids must lie in their table) and what sizes are tried. Values come
from a seed, so that two runs judge alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from configs import dtypes, ragged
from configs.errors import ConfigError
from configs.model import ModelConfig, ModelInput

from .target import OptimizeError

ROWS_LEAST, SIZES = 2, (16, 5)
_SEED = 0


@dataclass(frozen=True)
class Samples:
    """`tensors` holds the inputs in config order, with `rows` rows each where the model batches;
    `shorter` the same with every free dimension cut, where there is one."""

    tensors: tuple[torch.Tensor, ...]
    shorter: tuple[torch.Tensor, ...] | None
    batching: bool

    def batch(self, rows: int, shorter: bool = False) -> list[torch.Tensor]:
        tensors = self.shorter if shorter and self.shorter is not None else self.tensors
        return [t[:rows].contiguous() if self.batching else t for t in tensors]


def default_sizes(config: ModelConfig) -> tuple[int, ...]:
    """The batch sizes that are measured; (0,) for a model without a batch dimension."""
    largest = config.max_batch_size
    return tuple(sorted({1, min(8, largest), largest})) if largest else (0,)


def checked_sizes(config: ModelConfig, measured: Sequence[int]) -> tuple[int, ...]:
    """Those and the ones where a wrong batch dimension shows: 1, 2, 3, one less than all, all."""
    largest = config.max_batch_size
    if not largest:
        return (0,)
    return tuple(
        sorted({*measured, *(n for n in (1, 2, 3, largest - 1, largest) if 1 <= n <= largest)})
    )


def check_config(config: ModelConfig) -> None:
    try:
        ragged.check_kind(config, "aoti")
    except ConfigError as error:
        raise OptimizeError(str(error)) from None
    types = [(tensor.name, tensor.data_type) for tensor in config.input]
    types += [(tensor.name, tensor.data_type) for tensor in config.output]
    for name, data_type in types:
        if data_type == "TYPE_STRING":
            raise OptimizeError(f"'{name}' is TYPE_STRING: compiled models have only tensors")
    for tensor in config.input:
        if tensor.optional:
            reason = "is optional: a compiled model always takes all its inputs"
            raise OptimizeError(f"input '{tensor.name}' {reason}")


def build(
    config: ModelConfig,
    call: Callable[[Sequence[torch.Tensor]], object],
    device: torch.device,
    file: Path | None = None,
) -> Samples:
    """`call` is the original model: it is run once to see which input indexes which table."""
    check_config(config)
    if file is not None:
        return _from_file(config, file, device)
    rows = max(ROWS_LEAST, config.max_batch_size) if config.max_batch_size else 0
    made = [_generate(t, rows, SIZES[0], 2).to(device) for t in config.input]
    bounds = _table_sizes(call, [t[:1] if rows else t for t in made])
    free = any(size < 0 for t in config.input for size in t.model_dims)
    pairs = list(zip(config.input, bounds, strict=True))
    return Samples(
        tuple(_generate(t, rows, SIZES[0], bound).to(device) for t, bound in pairs),
        tuple(_generate(t, rows, SIZES[1], bound).to(device) for t, bound in pairs)
        if free
        else None,
        bool(rows),
    )


def _generate(tensor: ModelInput, rows: int, free: int, bound: int) -> torch.Tensor:
    """Integers lie in [0, bound)."""
    shape = [size if size >= 0 else free for size in tensor.model_dims]
    shape = [rows, *shape] if rows else shape
    generator = torch.Generator().manual_seed(_SEED)
    dtype: torch.dtype = getattr(torch, str(dtypes.from_config(tensor.data_type).torch))
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).to(dtype)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    bound = 256 if dtype == torch.uint8 and bound == 2 else bound  # pictures
    return torch.randint(0, min(bound, torch.iinfo(dtype).max), shape, generator=generator).to(
        dtype
    )


class _Lookups(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every table that is indexed, in scripted code too."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[tuple[int, int]] = []  # address of the indices, rows of the table

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        at = {"embedding": (0, 1), "index_select": (0, 2), "_embedding_bag": (0, 1)}
        name = func.overloadpacket.__name__
        if name in at:
            table, indices = (args[place] for place in at[name])
            rows = table.shape[args[1] if name == "index_select" else 0]
            self.found.append((_address(indices), int(rows)))
        return func(*args, **(kwargs or {}))


def _table_sizes(
    call: Callable[[Sequence[torch.Tensor]], object], ones: Sequence[torch.Tensor]
) -> list[int]:
    """Per input, the size of the smallest table that it indexes; 2 for all others, because 0 and 1
    suit a mask, and token ids that are converted on their way to the table."""
    zeros = [torch.zeros_like(t) for t in ones]
    lookups = _Lookups()
    if any(not t.is_floating_point() and t.dtype != torch.bool for t in zeros):
        try:
            with lookups:
                call(zeros)
        except Exception as error:
            words = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            raise OptimizeError(
                f"the model fails on generated inputs ({words}): give real ones with "
                "--samples FILE.npz"
            ) from None
    return [
        min((rows for place, rows in lookups.found if place == _address(t)), default=2)
        for t in zeros
    ]


def _address(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage().data_ptr())


def _from_file(config: ModelConfig, file: Path, device: torch.device) -> Samples:
    """Arrays by input name, with at least one row each; rows are repeated up to a full batch."""
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays: Mapping[str, Any] = {name: archive[name] for name in archive.files}
    except (OSError, ValueError) as error:
        raise OptimizeError(f"cannot read {file}: {error}") from None
    rows = max(ROWS_LEAST, config.max_batch_size) if config.max_batch_size else 0
    tensors = tuple(_checked(t, arrays, rows, file.name).to(device) for t in config.input)
    shorter = tuple(_cut(t, config.input[k], bool(rows)) for k, t in enumerate(tensors))
    same = all(a.shape == b.shape for a, b in zip(tensors, shorter, strict=True))
    return Samples(tensors, None if same else shorter, bool(rows))


def _checked(tensor: ModelInput, arrays: Mapping[str, Any], rows: int, file: str) -> torch.Tensor:
    datatype = dtypes.from_config(tensor.data_type)
    if tensor.name not in arrays:
        raise OptimizeError(f"{file} has no array '{tensor.name}', only {', '.join(arrays)}")
    array = arrays[tensor.name]
    carried = np.float32 if datatype.wire == "BF16" else np.dtype(str(datatype.numpy))
    if array.dtype != carried:
        raise OptimizeError(f"{file}: '{tensor.name}' is {array.dtype}, and {carried} is wanted")
    shape, dims = array.shape[1 if rows else 0 :], tensor.model_dims
    fits = len(shape) == len(dims) and all(d in (-1, s) for d, s in zip(dims, shape, strict=True))
    if not fits or (rows and not array.shape[0]):
        wanted = ", ".join(map(str, (("rows", *dims) if rows else dims)))
        raise OptimizeError(f"{file}: '{tensor.name}' has shape {array.shape}, not [{wanted}]")
    if rows:
        array = np.resize(array, (rows, *shape))  # repeats the rows
    dtype: torch.dtype = getattr(torch, str(datatype.torch))
    return torch.from_numpy(np.ascontiguousarray(array)).to(dtype)


def _cut(tensor: torch.Tensor, described: ModelInput, batching: bool) -> torch.Tensor:
    """Half of every free dimension."""
    for place, size in enumerate(described.model_dims, start=int(batching)):
        if size < 0 and tensor.shape[place] > 1:
            tensor = tensor.narrow(place, 0, tensor.shape[place] // 2)
    return tensor.contiguous()
