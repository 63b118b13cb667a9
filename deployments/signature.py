"""Naming: which model input or output a configured tensor means. One grammar for all runtimes.

Owns names (spec/backend.md §2.2, §2.3, §3): `x__N`, forward arguments, `ARGS[..]`, `KWARGS[..]`,
`RESULT[..]` and dictionary keys. Knows no torch: runtimes describe themselves as a `Signature` and
call `bind`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from configs.errors import ConfigError
from configs.model import ModelConfig

Path: TypeAlias = tuple[str | int, ...]

_ACCESSOR = re.compile(r'\[([^\[\]"\s]+)\]')
_ROOTS = ("ARGS", "KWARGS", "RESULT")


@dataclass(frozen=True, slots=True)
class Slot:
    """One tensor that goes into or comes out of the model.

    `position` counts flattened tensors; -1 where only `path` says where it is. `path` is the way
    from the root ("ARGS", 2, "keyA"), without the word RESULT for outputs. `argument` is the name
    in `forward`, `strings` whether that takes a list of strings, each as far as it is known.
    """

    position: int
    name: str
    path: Path = ()
    argument: str | None = None
    strings: bool | None = None


@dataclass(frozen=True, slots=True)
class Signature:
    """What a loaded model offers. None: unknown until it runs.

    `closed` means that the names are all there is (AOTI), so that nothing falls back to the
    order of the configuration.
    """

    inputs: tuple[Slot, ...] | None
    outputs: tuple[Slot, ...] | None = None
    dict_input: bool = False
    closed: bool = False
    strings: bool = True


@dataclass(frozen=True, slots=True)
class Binding:
    """The slot of each configured input and of each configured output, in config order."""

    inputs: tuple[Slot, ...]
    outputs: tuple[Slot, ...]


def ordinal(name: str) -> int | None:
    """`n` of `anything__n`; nothing after the first `__` means 0 (spec §2.2)."""
    _, mark, digits = name.partition("__")
    if not mark or (digits and not (digits.isascii() and digits.isdigit())):
        return None
    return int(digits or 0)


def accessors(name: str) -> Path | None:
    """`ARGS[2][keyA]` as ("ARGS", 2, "keyA"), or None when the name is not of that form."""
    root = name.partition("[")[0]
    if root not in _ROOTS:
        return None
    rest = name[len(root) :]
    steps = _ACCESSOR.findall(rest)
    if sum(len(step) + 2 for step in steps) != len(rest):
        return None
    return (root, *(int(step) if step.isascii() and step.isdigit() else step for step in steps))


def canonical(path: Path) -> str:
    return str(path[0]) + "".join(f"[{step}]" for step in path[1:])


def bind(config: ModelConfig, signature: Signature) -> Binding:
    """Raises ConfigError that names the tensor's field and lists what the model offers."""
    if not config.output:
        reason = "model configuration must contain at least one output, none were specified"
        raise ConfigError(reason, field="output")
    _check_count(config, signature)
    for kind, tensors in (("input", config.input), ("output", config.output)):
        for index, tensor in enumerate(tensors):
            _check_strings(config, signature, f"{kind}[{index}]", tensor)
    inputs = _bind_inputs(config, signature)
    outputs = _bind_outputs(config, signature)
    _check_inputs(config, signature, inputs)
    return Binding(inputs, outputs)


def _check_count(config: ModelConfig, signature: Signature) -> None:
    if signature.inputs is not None and not signature.dict_input:
        expected, provided = len(config.input), len(signature.inputs)
        if expected != provided:
            raise ConfigError(
                f"unable to load model '{config.name}', configuration expects {expected} inputs, "
                f"model provides {provided}" + _offer(signature.inputs),
                field="input",
            )
    if not config.input:
        raise ConfigError("model configuration must contain at least one input", field="input")


def _check_strings(config: ModelConfig, signature: Signature, field: str, tensor: Any) -> None:
    if tensor.data_type != "TYPE_STRING":
        return
    if not signature.strings:
        reason = f"'{tensor.name}' is TYPE_STRING, and a model of this kind has only tensors"
        raise ConfigError(reason, field=f"{field}.data_type")
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


def _bind_inputs(config: ModelConfig, signature: Signature) -> tuple[Slot, ...]:
    names = [tensor.name for tensor in config.input]
    paths = [accessors(name) for name in names]
    if signature.closed:
        return tuple(
            _lookup(name, signature.inputs or (), "INPUT", f"input[{i}].name")
            for i, name in enumerate(names)
        )
    if signature.dict_input:
        return tuple(_dict_slot(i, name) for i, name in enumerate(names))
    arguments = {slot.argument: slot for slot in signature.inputs or () if slot.argument}
    if arguments and all(name in arguments for name in names):
        return tuple(arguments[name] for name in names)
    if any(path and path[0] in ("ARGS", "KWARGS") for path in paths):
        return tuple(_explicit(i, name, signature) for i, name in enumerate(names))
    if signature.inputs is None:  # eager: called in config order whatever the names are (§1.4)
        return tuple(
            Slot(i, canonical(("ARGS", i)), ("ARGS", i)) for i, _ in enumerate(config.input)
        )
    numbers = [ordinal(name) for name in names]
    if all(number is not None for number in numbers):
        return tuple(_explicit(i, name, signature) for i, name in enumerate(names))
    return signature.inputs


def _dict_slot(index: int, name: str) -> Slot:
    path = accessors(name)
    if path is not None and path[:2] == ("ARGS", 0) and len(path) == 3:
        return Slot(index, name, path)
    return Slot(index, canonical(("ARGS", 0, name)), ("ARGS", 0, name))


def _explicit(index: int, name: str, signature: Signature) -> Slot:
    """A name that says where it goes: `__n`, ARGS or KWARGS."""
    field = f"input[{index}].name"
    path, number = accessors(name), ordinal(name)
    if path is not None and path[0] in ("ARGS", "KWARGS") and len(path) > 1:
        if signature.inputs is None:
            return Slot(-1, name, path)
        for slot in signature.inputs:
            if path in (slot.path, ("KWARGS", slot.argument)):
                return slot
    elif path is None and number is not None:
        if signature.inputs is None:
            return Slot(number, canonical(("ARGS", number)), ("ARGS", number))
        if number < len(signature.inputs):
            return signature.inputs[number]
    raise ConfigError(
        f"input '{name}' is not an input of the model" + _offer(signature.inputs), field=field
    )


def _check_inputs(config: ModelConfig, signature: Signature, slots: Sequence[Slot]) -> None:
    taken: dict[Path, str] = {}
    for index, (tensor, slot) in enumerate(zip(config.input, slots, strict=True)):
        field = f"input[{index}]"
        for path, other in taken.items():
            shorter = min(len(path), len(slot.path))
            if path[:shorter] == slot.path[:shorter]:
                raise ConfigError(
                    f"input '{tensor.name}' and input '{other}' are the same input of the model, "
                    f"{slot.name}" + _offer(signature.inputs),
                    field=f"{field}.name",
                )
        taken[slot.path] = tensor.name
        if tensor.optional and (signature.inputs is not None or signature.dict_input):
            reason = f"input '{tensor.name}': the PyTorch backend does not support optional input"
            raise ConfigError(reason, field=f"{field}.optional")
        is_string = tensor.data_type == "TYPE_STRING"
        if slot.strings is not None and slot.strings != is_string:
            wanted = "List[str]" if slot.strings else "Tensor"
            raise ConfigError(
                f"input '{tensor.name}' is {tensor.data_type}, and the model takes {wanted} "
                f"for {slot.name}",
                field=f"{field}.data_type",
            )
    _check_positional_gaps(slots, signature)


def _check_positional_gaps(slots: Sequence[Slot], signature: Signature) -> None:
    if signature.inputs is not None or signature.dict_input:
        return
    given = {slot.path[1] for slot in slots if slot.path[0] == "ARGS"}
    for place in range(len(given)):
        if place not in given:
            listed = ", ".join(slot.name for slot in slots)
            raise ConfigError(f"no input is named ARGS[{place}]; got {listed}", field="input")


# --- outputs -------------------------------------------------------------------------------------


def _bind_outputs(config: ModelConfig, signature: Signature) -> tuple[Slot, ...]:
    names = [tensor.name for tensor in config.output]
    if signature.closed:
        return tuple(
            _lookup(name, signature.outputs or (), "OUTPUT", f"output[{i}].name")
            for i, name in enumerate(names)
        )
    if any(path and path[0] == "RESULT" for path in map(accessors, names)):
        return tuple(_result(i, name) for i, name in enumerate(names))
    numbers = [ordinal(name) for name in names]
    # Only a signature of known inputs is TorchScript; eager results go by config order (§1.4).
    known = signature.inputs is not None or signature.dict_input
    if known and all(number is not None for number in numbers):
        return tuple(Slot(number or 0, f"OUTPUT__{number}") for number in numbers)
    return tuple(Slot(index, f"OUTPUT__{index}") for index, _ in enumerate(names))


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
    offers = [f"{slot.name} ({slot.argument or f'{word}__{slot.position}'})" for slot in slots]
    return "; it offers " + (", ".join(offers) or "nothing")
