"""What a model takes and returns, as plain data: types as trees, and the grammar of names.

Owns `x__N`, `ARGS[..]`, `KWARGS[..]`, `RESULT[..]` as text and as paths, and the walk along a path.
Which name means what is `signature.py` and `arguments.py`; runtimes describe themselves with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

Path: TypeAlias = tuple[str | int, ...]
What: TypeAlias = Literal["tensor", "strings", "list", "dict", "tuple", "other", "unknown"]

_ACCESSOR = re.compile(r'\[([^\[\]"\s]+)\]')
_ROOTS = ("ARGS", "KWARGS", "RESULT")
OFFERS_LIMIT = 24  # so many names are told in an error


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
class Structure:
    """The type of a value. `items` are those of a tuple, or the one of all in a list or dict.

    `fields` are the names in a named tuple, and `make` its class where a plain tuple will not do.
    `whole` is False for a list or a tuple of any length. `optional`: None will do.
    """

    what: What
    text: str
    items: tuple[Structure, ...] = ()
    fields: tuple[str, ...] = ()
    whole: bool = True
    keys: Literal["str", "int"] = "str"
    optional: bool = False
    make: Any = None

    @property
    def is_leaf(self) -> bool:
        return self.what in ("tensor", "strings", "unknown")


TENSOR = Structure("tensor", "Tensor")
STRINGS = Structure("strings", "List[str]")
UNKNOWN = Structure("unknown", "anything")


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument of `forward`. Where it has a `default` it may be left out (`required` False)."""

    name: str
    structure: Structure = TENSOR
    required: bool = True
    default: Any = None
    only: Literal["", "position", "keyword"] = ""

    @property
    def leavable(self) -> bool:
        return not self.required or self.structure.optional


@dataclass(frozen=True, slots=True)
class Forward:
    """What `forward` takes and returns. `rest`: "ARGS" for *args, "KWARGS" for **kwargs.

    `by_order`: inputs go by the order of the configuration whatever they are called, unless they
    are called ARGS[..] or KWARGS[..]; types are then the author's hints and refuse nothing.
    """

    arguments: tuple[Argument, ...]
    rest: frozenset[str] = frozenset()
    by_order: bool = False
    result: Structure = UNKNOWN

    @property
    def positional(self) -> tuple[Argument, ...]:
        return tuple(one for one in self.arguments if one.only != "keyword")

    def path_of(self, argument: Argument) -> Path:
        if argument.only == "keyword":
            return ("KWARGS", argument.name)
        return ("ARGS", self.positional.index(argument))

    def at(self, path: Path) -> Argument | None:
        """The argument that a path leads into; None for what only *args or **kwargs take."""
        root, head = path[0], path[1]
        if root == "ARGS":
            positional = self.positional
            inside = isinstance(head, int) and head < len(positional)
            return positional[int(head)] if inside else None
        named = {one.name: one for one in self.arguments if one.only == "keyword"}
        return named.get(str(head))

    def offers(self) -> list[str]:
        """What inputs may be called, for an error's text."""
        told = []
        for argument in self.arguments:
            path = self.path_of(argument)
            for leaf in names_inside(argument.structure, canonical(path)):
                alias = f" ({argument.name})" if path[0] == "ARGS" and argument.name else ""
                told.append(leaf + alias)
        told += [f"{root}[..]" for root in ("ARGS", "KWARGS") if root in self.rest]
        return told


# --- names ---------------------------------------------------------------------------------------


def ordinal(name: str) -> int | None:
    """`n` of `anything__n`; nothing after the first `__` means 0, as in Triton."""
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


def told(offers: Iterable[str]) -> str:
    """The end of an error's text: what there is instead."""
    listed = list(offers)
    if not listed:
        return "; it offers nothing"
    more = f" and {len(listed) - OFFERS_LIMIT} more" if len(listed) > OFFERS_LIMIT else ""
    return "; it offers " + ", ".join(listed[:OFFERS_LIMIT]) + more


# --- walks ---------------------------------------------------------------------------------------


def inside(structure: Structure, path: Path) -> Structure | None:
    """What lies at the end of `path`; None when the type says that nothing does."""
    for step in path:
        if structure.what == "unknown":
            return UNKNOWN
        if structure.what == "dict":
            if structure.keys == "int" and not isinstance(step, int):
                return None
            structure = structure.items[0]
            continue
        index = _index(structure, step)
        if index is None:
            return None
        if structure.what == "list" or not structure.whole:
            structure = structure.items[0]
        elif structure.what == "tuple" and index < len(structure.items):
            structure = structure.items[index]
        else:
            return None
    return structure


def settled(structure: Structure, path: Path) -> Path:
    """The same way with numbers for a named tuple's fields, and keys of the dictionaries' type."""
    steps: list[str | int] = []
    for step in path:
        if structure.what == "dict" and structure.keys == "str":
            step = str(step)
        elif structure.what == "tuple" and step in structure.fields:
            step = structure.fields.index(str(step))
        steps.append(step)
        structure = inside(structure, (step,)) or UNKNOWN
    return tuple(steps)


def _index(structure: Structure, step: str | int) -> int | None:
    if isinstance(step, int):
        return step
    return structure.fields.index(step) if step in structure.fields else None


def names_inside(structure: Structure, prefix: str, depth: int = 0) -> Iterator[str]:
    """The tensors in a structure by name; `<n>` and `<key>` where the configuration decides."""
    if structure.what in ("list", "dict", "tuple") and depth < 4:
        if structure.what == "tuple" and structure.whole:
            for index, item in enumerate(structure.items):
                yield from names_inside(item, f"{prefix}[{index}]", depth + 1)
        elif structure.items:
            step = "<key>" if structure.what == "dict" else "<n>"
            yield from names_inside(structure.items[0], f"{prefix}[{step}]", depth + 1)
    elif structure.what != "other":
        yield prefix
