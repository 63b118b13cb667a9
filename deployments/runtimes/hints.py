"""An eager module's `forward` as plain data: its parameters, defaults, and annotations as hints.

Python does not hold anybody to annotations, so they refuse nothing here: they tell a list from a
tuple, and what may be None. Called by `eager.py`.
"""

from __future__ import annotations

import collections.abc
import inspect
import types
import typing
from dataclasses import replace
from typing import Any, Literal

import torch

from deployments.structure import STRINGS, TENSOR, UNKNOWN, Argument, Forward, Structure

_LISTS = (list, collections.abc.Sequence)
_DICTS = (dict, collections.abc.Mapping)


def describe(module: torch.nn.Module) -> Forward:
    try:
        parameters = _signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return Forward((), frozenset(("ARGS", "KWARGS")), by_order=True)
    try:
        hints = typing.get_type_hints(module.forward)
    except Exception:  # they name what is not there, or are no types at all
        hints = {}
    arguments: list[Argument] = []
    rest: set[str] = set()
    for one in parameters:
        if one.kind is one.VAR_POSITIONAL:
            rest.add("ARGS")
        elif one.kind is one.VAR_KEYWORD:
            rest.add("KWARGS")
        else:
            only: Literal["", "position", "keyword"] = ""
            if one.kind is not one.POSITIONAL_OR_KEYWORD:
                only = "keyword" if one.kind is one.KEYWORD_ONLY else "position"
            required = one.default is one.empty
            default = None if required else one.default
            kind = structure_of(hints.get(one.name))
            arguments.append(Argument(one.name, kind, required, default, only))
    return Forward(tuple(arguments), frozenset(rest), by_order=True)


def _signature(forward: Any) -> inspect.Signature:
    """Of `forward` itself behind torch's decorators, such as no_grad. The author's own may bring
    arguments along, so that what they take counts."""

    def foreign(function: Any) -> bool:
        place = str(getattr(function, "__globals__", {}).get("__name__", ""))
        return place.partition(".")[0] != "torch"

    function = inspect.unwrap(getattr(forward, "__func__", forward), stop=foreign)
    if inspect.ismethod(forward):
        function = types.MethodType(function, forward.__self__)
    return inspect.signature(function, follow_wrapped=False)


def structure_of(hint: Any, depth: int = 0) -> Structure:
    """What cannot be told is UNKNOWN."""
    text = _text(hint)
    origin: Any = typing.get_origin(hint)
    origin = hint if origin is None else origin
    inner = typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        others = [each for each in inner if each is not type(None)]
        kind = structure_of(others[0], depth + 1) if len(others) == 1 else UNKNOWN
        return replace(kind, text=text, optional=len(others) < len(inner))
    if depth > 8 or not isinstance(origin, type):
        return UNKNOWN
    if issubclass(origin, torch.Tensor):
        return TENSOR
    if origin in _LISTS:
        if inner == (str,):
            return STRINGS
        item = structure_of(inner[0], depth + 1) if inner else UNKNOWN
        return Structure("list", text, (item,), whole=False)
    if origin in _DICTS:
        value = structure_of(inner[1], depth + 1) if len(inner) == 2 else UNKNOWN
        return Structure("dict", text, (value,), keys="int" if inner[:1] == (int,) else "str")
    if issubclass(origin, tuple):
        return _tuple(origin, inner, text, depth)
    return UNKNOWN


def _tuple(origin: Any, inner: tuple[Any, ...], text: str, depth: int) -> Structure:
    fields: tuple[str, ...] = getattr(origin, "_fields", ())
    if fields:
        hints = getattr(origin, "__annotations__", {})
        items = tuple(structure_of(hints.get(name), depth + 1) for name in fields)
        return Structure("tuple", text, items, fields, make=origin)
    if len(inner) == 2 and inner[1] is Ellipsis:
        return Structure("tuple", text, (structure_of(inner[0], depth + 1),), whole=False)
    if not inner:
        return Structure("tuple", text, (UNKNOWN,), whole=False)
    return Structure("tuple", text, tuple(structure_of(each, depth + 1) for each in inner))


def _text(hint: Any) -> str:
    return hint.__name__ if type(hint) is type else str(hint).replace("typing.", "")
