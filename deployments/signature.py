"""Naming: which model input or output a configured tensor means. One grammar for all runtimes.

Owns names of outputs and of packages, dictionary keys and what strings may be; the inputs of
`forward` are `arguments.py`, the grammar itself `structure.py`. Knows no torch: runtimes describe
themselves as a `Signature` and call `bind`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from configs.errors import ConfigError
from configs.model import ModelConfig

from . import arguments
from .structure import (
    STRINGS,
    TENSOR,
    Argument,
    Forward,
    Path,
    Slot,
    Structure,
    accessors,
    canonical,
    inside,
    names_inside,
    ordinal,
    told,
)

__all__ = ["Binding", "Path", "Signature", "Slot", "accessors", "bind", "canonical", "ordinal"]


@dataclass(frozen=True, slots=True)
class Signature:
    """What a loaded model offers. None: unknown until it runs.

    `closed` means that the names are all there is (AOTI), so that nothing falls back to the
    order of the configuration. `forward` says more of models that are called by their arguments.
    `objects`: strings are object arrays of any shape, not lists.
    """

    inputs: tuple[Slot, ...] | None
    outputs: tuple[Slot, ...] | None = None
    dict_input: bool = False
    closed: bool = False
    strings: bool = True
    forward: Forward | None = None
    objects: bool = False

    @property
    def called(self) -> Forward:
        """`forward` as far as it is known."""
        if self.forward is not None:
            return self.forward
        if self.inputs is None:
            return Forward((), frozenset(("ARGS", "KWARGS")), by_order=True)
        return Forward(tuple(Argument(slot.argument or "", _leaf(slot)) for slot in self.inputs))


@dataclass(frozen=True, slots=True)
class Binding:
    """The slot of each configured input and of each configured output, in config order."""

    inputs: tuple[Slot, ...]
    outputs: tuple[Slot, ...]


def _leaf(slot: Slot) -> Structure:
    return STRINGS if slot.strings else TENSOR


def bind(config: ModelConfig, signature: Signature) -> Binding:
    """Raises ConfigError that names the tensor's field and lists what the model offers."""
    if not config.output:
        reason = "model configuration must contain at least one output, none were specified"
        raise ConfigError(reason, field="output")
    if signature.closed:
        _check_count(config, signature)
    for kind, tensors in (("input", config.input), ("output", config.output)):
        for index, tensor in enumerate(tensors):
            _check_strings(config, signature, f"{kind}[{index}]", tensor)
    inputs = bind_inputs(config, signature)
    if not config.input:
        raise ConfigError("model configuration must contain at least one input", field="input")
    return Binding(inputs, _bind_outputs(config, signature))


def _check_count(config: ModelConfig, signature: Signature) -> None:
    expected, provided = len(config.input), len(signature.inputs or ())
    if expected != provided:
        raise ConfigError(
            f"unable to load model '{config.name}', configuration expects {expected} inputs, "
            f"model provides {provided}" + _offer(signature.inputs),
            field="input",
        )


def _check_strings(config: ModelConfig, signature: Signature, field: str, tensor: Any) -> None:
    if tensor.data_type != "TYPE_STRING":
        return
    if not signature.strings:
        reason = f"'{tensor.name}' is TYPE_STRING, and a model of this kind has only tensors"
        raise ConfigError(reason, field=f"{field}.data_type")
    if signature.objects:
        return
    kind = field.partition("[")[0]
    if signature.dict_input and kind == "input":
        reason = f"'{tensor.name}' is TYPE_STRING, and a dictionary input holds only tensors"
        raise ConfigError(reason, field=f"{field}.data_type")
    shape = tensor.dims if tensor.reshape is None else tensor.reshape.shape
    if len(shape) + (config.max_batch_size > 0) > 1:
        raise ConfigError(
            f"only 1-dimensional List of String is supported as {kind} for '{tensor.name}'",
            field=f"{field}.dims",
        )


# --- inputs --------------------------------------------------------------------------------------


def bind_inputs(config: ModelConfig, signature: Signature) -> tuple[Slot, ...]:
    names = [tensor.name for tensor in config.input]
    if not (signature.closed or signature.dict_input):
        return arguments.bind_inputs(config, signature.called)
    if signature.closed:
        slots = tuple(
            _lookup(name, signature.inputs or (), "INPUT", f"input[{i}].name")
            for i, name in enumerate(names)
        )
    else:
        slots = tuple(_dict_slot(i, name) for i, name in enumerate(names))
    arguments.check_overlaps(config, slots, _offer(signature.inputs))
    for index, tensor in enumerate(config.input):
        if tensor.optional:
            raise arguments.refuse_optional(index, tensor.name)
    return slots


def _dict_slot(index: int, name: str) -> Slot:
    path = accessors(name)
    if path is not None and path[:2] == ("ARGS", 0) and len(path) == 3:
        return Slot(index, name, ("ARGS", 0, str(path[2])))
    return Slot(index, canonical(("ARGS", 0, name)), ("ARGS", 0, name))


# --- outputs -------------------------------------------------------------------------------------


def _bind_outputs(config: ModelConfig, signature: Signature) -> tuple[Slot, ...]:
    names = [tensor.name for tensor in config.output]
    if signature.closed:
        return tuple(
            _lookup(name, signature.outputs or (), "OUTPUT", f"output[{i}].name")
            for i, name in enumerate(names)
        )
    result = signature.called.result
    if any(path and path[0] == "RESULT" for path in map(accessors, names)):
        slots = tuple(_result(i, name) for i, name in enumerate(names))
    else:
        numbers = [ordinal(name) for name in names]
        # Eager results go by config order, as in Triton.
        by_order = signature.called.by_order and not signature.dict_input
        if by_order or any(number is None for number in numbers):
            numbers = [*range(len(names))]
        slots = tuple(Slot(number or 0, f"OUTPUT__{number}") for number in numbers)
    for index, (name, slot) in enumerate(zip(names, slots, strict=True)):
        _check_output(name, slot, result, f"output[{index}].name")
    return slots


def _result(index: int, name: str) -> Slot:
    path, number = accessors(name), ordinal(name)
    if path is not None and path[0] == "RESULT":
        return Slot(-1, name, path[1:])
    if number is not None:
        return Slot(number, f"OUTPUT__{number}")
    raise ConfigError(
        f"output '{name}' is neither RESULT[..] nor OUTPUT__n, and other outputs are",
        field=f"output[{index}].name",
    )


def _check_output(name: str, slot: Slot, result: Structure, field: str) -> None:
    """As far as the return type tells. What it leaves open shows in the first run."""
    if slot.position >= 0:
        count = 1 if result.what in ("tensor", "strings") else len(result.items)
        known = result.what in ("tensor", "strings", "tuple") and result.whole
        if known and slot.position >= count:
            raise ConfigError(
                f"The output {name} in the model configuration refers to an output index which "
                f"doesn't exist. This model has {count} outputs" + _results(result),
                field=field,
            )
        return
    found = inside(result, slot.path)
    if found is None:
        raise ConfigError(
            f"The output {name} in the model configuration refers to an output which doesn't "
            f"exist. This model returns {result.text}" + _results(result),
            field=field,
        )
    if not found.is_leaf:
        raise ConfigError(
            f"output '{name}': the model returns {found.text} there, which is no Tensor and no "
            "List[str]" + _results(result),
            field=field,
        )


def _results(result: Structure) -> str:
    return told(names_inside(result, "RESULT"))


def _lookup(name: str, slots: Sequence[Slot], word: str, field: str) -> Slot:
    table = {slot.name: slot for slot in slots}
    table |= {f"{word}__{slot.position}": slot for slot in slots}
    if name not in table:
        raise ConfigError(
            f"{word.lower()} '{name}' is not found in the model" + _offer(slots, word), field=field
        )
    return table[name]


def _offer(slots: Sequence[Slot] | None, word: str = "INPUT") -> str:
    if slots is None:
        return ""
    return told(f"{slot.name} ({slot.argument or f'{word}__{slot.position}'})" for slot in slots)
