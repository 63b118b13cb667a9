"""Ragged batches on the replica: inputs laid flat, and inputs that tell a model about its batch.

Owns the contents of `batch_input`, as Triton fills it, and where a model takes them. What comes
out is cut by the Router (`scatter`). Called by `execution` and by the runtimes' `load`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import accumulate

import torch

from configs import ragged
from configs.dtypes import from_config
from configs.errors import ConfigError
from configs.model import BatchInput, ModelConfig
from deployments.signature import Binding, Signature, bind, ordinal

Shape = tuple[int, ...]

_FIELD = re.compile(r"input\[(\d+)\]\.name")


class Ragged:
    """`flat`: the inputs whose members are joined flat. `sources`: those whose shapes are told."""

    def __init__(self, config: ModelConfig) -> None:
        self.flat = frozenset(
            index for index, tensor in enumerate(config.input) if tensor.allow_ragged_batch
        )
        self.sources = ragged.sources(config)
        self._made = config.batch_input

    def generate(
        self, shapes: Sequence[Sequence[Shape]], device: torch.device
    ) -> list[torch.Tensor]:
        """The batch inputs in their order; `shapes` has the members' shapes for each of them."""
        return [_made(one, of, device) for one, of in zip(self._made, shapes, strict=True)]


def of(config: ModelConfig) -> Ragged | None:
    """None for a model that needs none of this."""
    plain = not (config.batch_input or any(t.allow_ragged_batch for t in config.input))
    return None if plain else Ragged(config)


def _made(one: BatchInput, shapes: Sequence[Shape], device: torch.device) -> torch.Tensor:
    dtype = getattr(torch, str(from_config(one.data_type).torch))
    counts = [math.prod(shape) for shape in shapes]
    if one.kind == "BATCH_MAX_ELEMENT_COUNT_AS_SHAPE":  # its shape is all that it says
        return torch.zeros(max(counts), dtype=dtype, device=device)
    if one.kind in ragged.ITEM_KINDS:
        items = [size for shape in shapes for _ in range(shape[0]) for size in shape[1:]]
        flat = torch.tensor(items, dtype=dtype, device=device)
        if one.kind.endswith("FLATTEN"):
            return flat
        return flat.reshape(sum(shape[0] for shape in shapes), len(shapes[0]) - 1)
    if one.kind == "BATCH_ACCUMULATED_ELEMENT_COUNT":
        counts = [*accumulate(counts)]
    elif one.kind == "BATCH_ACCUMULATED_ELEMENT_COUNT_WITH_ZERO":
        counts = [*accumulate(counts, initial=0)]
    return torch.tensor(counts, dtype=dtype, device=device)


# --- where they go -------------------------------------------------------------------------------


def bind_all(config: ModelConfig, signature: Signature) -> Binding:
    """`bind`, with a slot for each batch input after those of the inputs. Raises ConfigError."""
    if not config.batch_input:
        return bind(config, signature)
    _check_targets(config, signature)
    try:
        return bind(ragged.widened(config), signature)
    except ConfigError as error:
        reason, file, field, line = error.args
        found = _FIELD.fullmatch(field or "")
        index = int(found[1]) - len(config.input) if found else -1
        if index < 0:
            raise
        field = f"batch_input[{index}].target_name"
        raise ConfigError(reason, file=file, field=field, line=line) from error


def _check_targets(config: ModelConfig, signature: Signature) -> None:
    """Targets follow the convention of the inputs' names: one that does not would be put by its
    place in the configuration, and the inputs with it."""
    if signature.inputs is None or signature.dict_input or signature.closed:
        return
    arguments = [slot.argument for slot in signature.inputs if slot.argument]
    by_name = all(tensor.name in arguments for tensor in config.input)
    by_index = all(ordinal(tensor.name) is not None for tensor in config.input)
    for index, one in enumerate(config.batch_input):
        target = one.target_name[0]
        if by_name and target not in arguments:
            wanted = f"an argument of forward, which takes {', '.join(arguments)}"
        elif by_index and not by_name and ordinal(target) is None:
            wanted = "of the form <name>__<index>"
        else:
            continue
        raise ConfigError(
            f"batch input '{target}' must be {wanted}, as the names of the inputs are",
            field=f"batch_input[{index}].target_name",
        )
