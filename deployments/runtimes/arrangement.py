"""From inputs in config order to the arguments of one call, nested as the model takes them.

What is the same for all calls is worked out at load. An optional input that a request left out is
None here: its argument's default takes its place. Used by TorchScript and eager models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

from configs.model import ModelConfig
from deployments.signature import Binding
from deployments.structure import UNKNOWN, Argument, Forward, Structure, inside

from . import Value


class _Container(NamedTuple):
    """Builds a list, a tuple (or its class `make`) or a dictionary of what is inside."""

    what: str
    inside: tuple[tuple[Any, _Node], ...]
    make: Any = None


# A number is an index into the inputs; None is a place that no input fills.
_Node: TypeAlias = "int | _Container | None"


class Arrangement:
    def __init__(self, config: ModelConfig, binding: Binding, forward: Forward) -> None:
        given: dict[Any, Any] = {}
        for index, slot in enumerate(binding.inputs):
            place = given
            for step in slot.path[:-1]:
                place = place.setdefault(step, {})
            place[slot.path[-1]] = index
        positional, keywords = given.get("ARGS", {}), dict(given.get("KWARGS", {}))
        known = forward.positional
        self._positional: list[tuple[_Node, Argument | None]] = [
            (_node(positional.get(index), argument.structure), argument)
            for index, argument in enumerate(known)
        ]
        for extra in range(len(known), max(positional, default=-1) + 1):
            self._positional.append((_node(positional[extra], UNKNOWN), None))
        self._keywords: list[tuple[str, _Node, Argument | None]] = []
        for argument in forward.arguments:
            if argument.only == "keyword" and argument.name in keywords:
                node = _node(keywords.pop(argument.name), argument.structure)
                self._keywords.append((argument.name, node, argument))
        self._keywords += [(name, _node(at, UNKNOWN), None) for name, at in keywords.items()]
        self._order = self._plain_order(config)

    def _plain_order(self, config: ModelConfig) -> list[int] | None:
        """Where each argument is an input that is always there, their order is all."""
        nodes = [node for node, _ in self._positional]
        while nodes and nodes[-1] is None:
            nodes.pop()
        if self._keywords or any(tensor.optional for tensor in config.input):
            return None
        order = [node for node in nodes if isinstance(node, int)]
        return order if len(order) == len(nodes) else None

    def pack(self, inputs: Sequence[Value | None]) -> tuple[list[Any], dict[str, Any]]:
        if self._order is not None:
            return [inputs[index] for index in self._order], {}
        arguments: list[Any] = []
        held: list[Any] = []  # defaults, which are passed only where something follows
        for node, argument in self._positional:
            value = _build(node, inputs)
            if value is None and argument is not None and not argument.required:
                held.append(argument.default)
                continue
            arguments += (*held, value)
            held.clear()
        keywords = {}
        for name, node, argument in self._keywords:
            value = _build(node, inputs)
            if value is not None or (argument is not None and argument.required):
                keywords[name] = value
        return arguments, keywords


def _node(given: Any, structure: Structure) -> _Node:
    if not isinstance(given, dict):
        return None if given is None else int(given)
    nodes = {
        step: _node(each, inside(structure, (step,)) or UNKNOWN) for step, each in given.items()
    }
    numbered = all(isinstance(step, int) for step in nodes)
    what = structure.what if structure.what in ("list", "tuple", "dict") else "unknown"
    if what == "unknown" or (what != "dict" and not numbered):
        what = "tuple" if numbered else "dict"
    if what == "dict":
        return _Container(what, tuple(nodes.items()))
    size = max(len(structure.items) if structure.whole else 0, *(step + 1 for step in nodes))
    ordered = tuple((place, nodes.get(place)) for place in range(size))
    return _Container(what, ordered, structure.make)


def _build(node: _Node, inputs: Sequence[Value | None]) -> Any:
    if node is None:
        return None
    if isinstance(node, int):
        return inputs[node]
    if node.what == "dict":
        return {key: _build(each, inputs) for key, each in node.inside}
    items = [_build(each, inputs) for _, each in node.inside]
    if node.what == "list":
        return items
    return tuple(items) if node.make is None else node.make(*items)
