"""Which argument of `forward`, or which place inside one, each configured input goes to.

Owns the choice of a naming convention for the whole model, and every case in which names leave a
hole, meet or lead nowhere: a load error that names the input and lists what the model offers.
Called by `signature.bind` for TorchScript and eager models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from configs.errors import ConfigError
from configs.model import ModelConfig, ModelInput

from .structure import (
    UNKNOWN,
    Argument,
    Forward,
    Path,
    Slot,
    Structure,
    accessors,
    canonical,
    inside,
    ordinal,
    settled,
    told,
)


def bind_inputs(config: ModelConfig, forward: Forward) -> tuple[Slot, ...]:
    """A slot per configured input. Raises ConfigError."""
    _check_count(config, forward)
    paths = _paths(config, forward)
    slots = tuple(
        _slot(tensor, path, forward, f"input[{index}]")
        for index, (tensor, path) in enumerate(zip(config.input, paths, strict=True))
    )
    check_overlaps(config, slots, told(forward.offers()))
    _check_holes(config, slots, forward)
    for index, (tensor, slot) in enumerate(zip(config.input, slots, strict=True)):
        if tensor.optional and not _leavable(slot.path, forward):
            raise refuse_optional(index, tensor.name, ", and forward has no default for it")
    return slots


def refuse_optional(index: int, name: str, why: str = "") -> ConfigError:
    reason = f"input '{name}': the PyTorch backend does not support optional input{why}"
    return ConfigError(reason, field=f"input[{index}].optional")


def _check_count(config: ModelConfig, forward: Forward) -> None:
    """Where each argument is one input, their number is wrong before any name is."""
    flat = [one for one in forward.arguments if one.structure.what in ("tensor", "strings")]
    rest = [one for one in forward.arguments if one not in flat]
    if forward.rest or any(one.required or one.structure.what != "other" for one in rest):
        return
    count = len(config.input)
    if not sum(one.required for one in flat) <= count <= len(flat):
        raise ConfigError(
            f"unable to load model '{config.name}', configuration expects {count} inputs, "
            f"model provides {len(flat)}" + told(forward.offers()),
            field="input",
        )


# --- the convention ------------------------------------------------------------------------------


def _paths(config: ModelConfig, forward: Forward) -> list[Path]:
    names = [tensor.name for tensor in config.input]
    named = {argument.name: argument for argument in forward.arguments if argument.name}
    if not forward.by_order and all(name in named for name in names):
        return [forward.path_of(named[name]) for name in names]
    roots = {path[0] for path in map(accessors, names) if path}
    by_number = not forward.by_order and all(ordinal(name) is not None for name in names)
    if by_number or roots & {"ARGS", "KWARGS"}:
        return [_explicit(index, name, forward) for index, name in enumerate(names)]
    return [_in_order(index, name, forward) for index, name in enumerate(names)]


def _explicit(index: int, name: str, forward: Forward) -> Path:
    """A name that says where it goes: `__n`, ARGS, KWARGS, or beside those an argument's own."""
    path, number = accessors(name), ordinal(name)
    named = {argument.name: argument for argument in forward.arguments if argument.name}
    if path is None and name in named:
        return forward.path_of(named[name])
    if path is None and number is not None:
        path = ("ARGS", number)
    if path is not None and len(path) > 1 and path[0] == "KWARGS":
        argument = named.get(str(path[1]))
        if argument is not None and argument.only != "position":
            return (*forward.path_of(argument), *path[2:])
        if argument is None and "KWARGS" in forward.rest:
            return ("KWARGS", str(path[1]), *path[2:])
    if path is not None and len(path) > 1 and path[0] == "ARGS" and isinstance(path[1], int):
        if path[1] < len(forward.positional) or "ARGS" in forward.rest:
            return path
    raise _unresolved(index, name, forward)


def _in_order(index: int, name: str, forward: Forward) -> Path:
    if forward.by_order and (index < len(forward.positional) or "ARGS" in forward.rest):
        return ("ARGS", index)
    if not forward.by_order and index < len(forward.arguments):
        return forward.path_of(forward.arguments[index])
    raise _unresolved(index, name, forward)


def _unresolved(index: int, name: str, forward: Forward) -> ConfigError:
    return ConfigError(
        f"input '{name}' is not an input of the model" + told(forward.offers()),
        field=f"input[{index}].name",
    )


# --- what lies there -----------------------------------------------------------------------------


def _slot(tensor: ModelInput, path: Path, forward: Forward, field: str) -> Slot:
    argument = forward.at(path)
    whole = UNKNOWN if argument is None else argument.structure
    path = (*path[:2], *settled(whole, path[2:]))
    structure = inside(whole, path[2:])
    offers = told(forward.offers())
    if structure is None and forward.by_order:
        structure = UNKNOWN  # a hint that does not hold
    if structure is None:
        reason = f"input '{tensor.name}' is not an input of the model" + offers
        raise ConfigError(reason, field=f"{field}.name")
    if structure.what == "other" and argument is not None and len(path) == 2:
        raise _foreign(argument)
    if not structure.is_leaf and not forward.by_order:
        raise ConfigError(
            f"input '{tensor.name}': the model takes {structure.text} for {canonical(path)}, "
            "which is no Tensor and no List[str]" + offers,
            field=f"{field}.name",
        )
    strings = None if structure.what not in ("tensor", "strings") else structure.what == "strings"
    if strings is not None and not forward.by_order:
        _check_strings(tensor, canonical(path), strings, field)
    position = int(path[1]) if len(path) == 2 and path[0] == "ARGS" else -1
    name = None if argument is None else argument.name or None
    return Slot(position, canonical(path), path, name, strings)


def _check_strings(tensor: ModelInput, where: str, strings: bool, field: str) -> None:
    if strings == (tensor.data_type == "TYPE_STRING"):
        return
    wanted = "List[str]" if strings else "Tensor"
    raise ConfigError(
        f"input '{tensor.name}' is {tensor.data_type}, and the model takes {wanted} for {where}",
        field=f"{field}.data_type",
    )


def _leavable(path: Path, forward: Forward) -> bool:
    argument = forward.at(path)
    if argument is None:
        return path[0] == "KWARGS" and len(path) == 2
    if len(path) == 2:
        return argument.leavable
    structure = inside(argument.structure, path[2:])
    return structure is not None and structure.optional


def check_overlaps(config: ModelConfig, slots: Sequence[Slot], offers: str) -> None:
    taken: dict[Path, str] = {}
    for index, (tensor, slot) in enumerate(zip(config.input, slots, strict=True)):
        for path, other in taken.items():
            shorter = min(len(path), len(slot.path))
            if path[:shorter] == slot.path[:shorter]:
                raise ConfigError(
                    f"input '{tensor.name}' and input '{other}' are the same input of the model, "
                    f"{slot.name}" + offers,
                    field=f"input[{index}].name",
                )
        taken[slot.path] = tensor.name


# --- holes ---------------------------------------------------------------------------------------


def _check_holes(config: ModelConfig, slots: Sequence[Slot], forward: Forward) -> None:
    """Every required argument is there, and every list and tuple is whole."""
    given: dict[Any, Any] = {}
    for slot in slots:
        node = given
        for step in slot.path:
            node = node.setdefault(step, {})
    listed = ", ".join(f"'{tensor.name}'" for tensor in config.input)
    for argument in forward.arguments:
        path = forward.path_of(argument)
        if path[1] in given.get(path[0], {}):
            _check_inside(argument.structure, path, given[path[0]][path[1]], forward, listed)
        elif argument.required:
            foreign = argument.structure.what == "other"
            raise _foreign(argument) if foreign else _missing(path, forward, listed)
    _check_rest(given, forward, listed)


def _check_rest(given: dict[Any, Any], forward: Forward, listed: str) -> None:
    """What *args and **kwargs take."""
    positions = [step for step in given.get("ARGS", {}) if step >= len(forward.positional)]
    for place in range(len(forward.positional), max(positions, default=-1)):
        if place not in positions:
            raise _missing(("ARGS", place), forward, listed)
    for root, nodes in given.items():
        for step, node in nodes.items():
            if forward.at((root, step)) is None:
                _check_inside(UNKNOWN, (root, step), node, forward, listed)


def _foreign(argument: Argument) -> ConfigError:
    without = " without a default" if argument.required else ""
    return ConfigError(
        f"forward takes '{argument.name}' of type {argument.structure.text}{without}; requests "
        "bring Tensor and List[str], alone or in lists, tuples and dictionaries with str keys",
        field="input",
    )


def _missing(path: Path, forward: Forward, listed: str) -> ConfigError:
    return ConfigError(
        f"no input is named {canonical(path)}, which the model needs; got {listed}"
        + told(forward.offers()),
        field="input",
    )


def _check_inside(
    structure: Structure, path: Path, given: dict[Any, Any], forward: Forward, listed: str
) -> None:
    if not given:
        return
    numbered = [step for step in given if isinstance(step, int)]
    loose = structure.is_leaf  # a type that is not known: a tuple where all steps are numbers
    if loose and numbered and len(numbered) < len(given):
        raise ConfigError(
            f"{canonical(path)} has both numbers and keys inside; got {listed}", field="input"
        )
    if structure.what in ("list", "tuple") or (loose and numbered):
        size = max(numbered, default=-1) + 1
        if structure.what == "tuple" and structure.whole and not forward.by_order:
            size = len(structure.items)
        for place in range(size):
            item = inside(structure, (place,))
            if place not in numbered and not (item is not None and item.optional):
                raise _missing((*path, place), forward, listed)
    for step, node in given.items():
        child = inside(structure, (step,))
        _check_inside(child or UNKNOWN, (*path, step), node, forward, listed)
