"""What a model offers, as plain data, and how a configuration is completed from it.

Pure: no torch, no files. What the user wrote wins; what contradicts the model is an error. Called
by deployments/runtimes, which find out what a model offers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from .checks import tensors
from .complete import DEFAULT_MAX_BATCH_SIZE, RuntimeKind, finish
from .errors import ConfigError
from .model import ModelConfig, ModelInput, ModelOutput, Reshape

Shape = tuple[int, ...]
Tensor = TypeVar("Tensor", ModelInput, ModelOutput)


@dataclass(frozen=True, slots=True)
class Offered:
    """One tensor of the model. The first of `names` is the one that it gets when nobody has named
    it. `shape` is the whole of it, -1 where any size goes; None and "" are not known. `batched`:
    whether the first dimension of an output is the batch's."""

    names: tuple[str, ...]
    data_type: str = ""
    shape: Shape | None = None
    batched: bool | None = None


@dataclass(frozen=True, slots=True)
class Offer:
    """`outputs` None: not known. `batching`: all inputs have a first dimension of any size; None is
    not known. `most_rows` is its largest size, 0 without a bound; without a batch, the size
    that the first dimension of all inputs has. `by_order`: tensors may have names of their own."""

    inputs: tuple[Offered, ...]
    outputs: tuple[Offered, ...] | None
    batching: bool | None
    most_rows: int = 0
    by_order: bool = False


def fill(config: ModelConfig, kind: RuntimeKind, offer: Offer) -> ModelConfig:
    """The whole configuration; raises ConfigError for what is missing or contradicts."""
    rows = _batch_size(config, offer) if config.open_batch else config.max_batch_size
    check_batch(config.model_copy(update={"max_batch_size": rows}), offer)
    usable = [one for one in offer.outputs or () if _usable(one)]
    filled = config.model_copy(
        update={
            "input": _tensors(config.input, offer.inputs, offer, rows > 0, ModelInput),
            "output": _tensors(
                config.output,
                (offer.outputs or ()) if config.output else usable,
                offer,
                rows > 0,
                ModelOutput,
            ),
        }
    )
    check_tensors(filled, offer, rows > 0)
    return finish(filled, kind, rows)


def _usable(offered: Offered) -> bool:
    """An output that nobody has asked for is left out where no configuration can name it."""
    return bool(offered.data_type and offered.shape)


def check_batch(config: ModelConfig, offer: Offer) -> None:
    """Raises ConfigError where the configured batch is none that the model takes."""
    size = config.max_batch_size
    if not size or offer.batching is None:
        return
    for index, tensor in enumerate(config.output):
        found = _find(tensor.name, offer.outputs or ())
        if offer.batching and found is not None and found.batched is False:
            raise ConfigError(
                f"max_batch_size is {size}, and output '{tensor.name}' of the model has no batch "
                f"dimension: its shape is {list(found.shape or ())}",
                field=f"output[{index}].dims",
            )
    if not offer.batching and (size, offer.most_rows) != (1, 1):
        shapes = ", ".join(f"{one.names[0]} {list(one.shape or ())}" for one in offer.inputs)
        raise ConfigError(
            f"max_batch_size is {size}, and the model was exported without a dynamic batch "
            f"dimension: its inputs are {shapes}. Set max_batch_size to 0 and write whole shapes "
            "as dims, or export it with a Dim as first dimension of each input",
            field="max_batch_size",
        )
    if offer.batching and offer.most_rows and size > offer.most_rows:
        raise ConfigError(
            f"max_batch_size is {size}, and the model was exported for batches of at most "
            f"{offer.most_rows}",
            field="max_batch_size",
        )


def check_tensors(config: ModelConfig, offer: Offer, batching: bool) -> None:
    """Raises ConfigError for datatypes and dims that the model contradicts."""
    for side, field, tensor in tensors(config):
        found = _find(tensor.name, offer.inputs if side == "input" else offer.outputs or ())
        if found is not None:
            _check_tensor(field, tensor, found, batching)


def _check_tensor(
    field: str, tensor: ModelInput | ModelOutput, offered: Offered, batching: bool
) -> None:
    kind = field.partition("[")[0]
    if offered.data_type and tensor.data_type not in ("TYPE_INVALID", offered.data_type):
        raise ConfigError(
            f"{kind} '{tensor.name}' is {tensor.data_type}, and the model has {offered.data_type}",
            field=f"{field}.data_type",
        )
    if offered.shape is None or not tensor.dims:
        return
    dims, wanted = tensor.model_dims, offered.shape[batching:]
    fits = len(dims) == len(wanted) and all(
        -1 in (have, want) or have == want for have, want in zip(dims, wanted, strict=True)
    )
    if not fits:
        note = " behind the batch dimension" if batching else ""
        raise ConfigError(
            f"{kind} '{tensor.name}' has dims {list(dims)}, and the model has {list(wanted)}{note}",
            field=f"{field}.dims",
        )


def _batch_size(config: ModelConfig, offer: Offer) -> int:
    """What nobody has written. Dims that somebody has written tell whether a batch is part of
    them."""
    if not offer.batching:
        return 0
    asked = [_find(tensor.name, offer.outputs or ()) for tensor in config.output]
    results = asked or [one for one in offer.outputs or () if _usable(one)]
    if any(one is not None and one.batched is False for one in results):
        return 0
    for side, _, tensor in tensors(config):
        found = _find(tensor.name, offer.inputs if side == "input" else offer.outputs or ())
        if tensor.dims and found is not None and found.shape is not None:
            if len(tensor.model_dims) == len(found.shape):
                return 0
    return offer.most_rows or DEFAULT_MAX_BATCH_SIZE


def _tensors(
    written: Sequence[Tensor],
    offered: Sequence[Offered],
    offer: Offer,
    batching: bool,
    make: type[Tensor],
) -> tuple[Tensor, ...]:
    if not written:
        return tuple(_filled(make(name=one.names[0]), one, batching) for one in offered)
    found = [_find(tensor.name, offered) for tensor in written]
    if offer.by_order and len(written) == len(offered) and not any(found):
        found = [*offered]
    return tuple(
        tensor if one is None else _filled(tensor, one, batching)
        for tensor, one in zip(written, found, strict=True)
    )


def _filled(tensor: Tensor, offered: Offered, batching: bool) -> Tensor:
    update: dict[str, object] = {}
    if tensor.data_type == "TYPE_INVALID" and offered.data_type:
        update["data_type"] = offered.data_type
    if not tensor.dims and offered.shape is not None:
        update |= _dims(offered.shape[batching:])
    return tensor.model_copy(update=update)


def _dims(shape: Shape) -> dict[str, object]:
    """A scalar per row has no dims in the proto: it is one element, reshaped."""
    if shape:
        return {"dims": shape}
    return {"dims": (1,), "reshape": Reshape()}


def _find(name: str, offered: Sequence[Offered]) -> Offered | None:
    return next((one for one in offered if name in one.names), None)
