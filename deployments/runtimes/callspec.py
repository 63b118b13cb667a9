"""An AOTI package's call spec: two JSON trees as a closed signature.

Owns what structures are refused. Pure, no torch; called by `aoti.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from configs.errors import ConfigError
from deployments.signature import Path, Signature, Slot, canonical

_DICTS = ("builtins.dict", "collections.OrderedDict")
_CONTAINERS = ("builtins.tuple", "builtins.list", *_DICTS)


def parse_call_spec(input_spec: str, output_spec: str) -> Signature:
    """Raises ConfigError when the package cannot be served."""
    root = _root(input_spec, "input")
    halves = root.get("children_spec") or []
    kinds = [half.get("type") for half in halves]
    if root.get("type") != "builtins.tuple" or kinds != ["builtins.tuple", "builtins.dict"]:
        raise _spec_error("input", "its root is not a tuple and a dict")
    paths: list[Path] = []
    for half, name in zip(halves, ("ARGS", "KWARGS"), strict=True):
        if half.get("children_spec"):
            paths += _leaves(half, (name,), "input")
    if not paths:
        raise _spec_error("input", "the model has no inputs")
    inputs = tuple(Slot(i, canonical(path), path, strings=False) for i, path in enumerate(paths))
    outputs = tuple(
        Slot(i, canonical(path), path[1:])
        for i, path in enumerate(_leaves(_root(output_spec, "output"), ("RESULT",), "output"))
    )
    return Signature(inputs, outputs, closed=True, strings=False)


def _root(text: str, kind: str) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except ValueError as error:
        raise _spec_error(kind, "it is not JSON") from error
    if not (isinstance(document, list) and len(document) == 2 and isinstance(document[1], dict)):
        raise _spec_error(kind, "it is not a version and a tree")
    return document[1]


def _leaves(node: dict[str, Any], path: Path, kind: str) -> Iterator[Path]:
    """Depth first, children in the spec's order."""
    type_name, children = node.get("type"), node.get("children_spec") or []
    if type_name is None:
        yield path
        return
    at = canonical(path)
    if type_name not in _CONTAINERS:
        raise _spec_error(kind, f"{at} is a {type_name}; only dict, tuple and list are supported")
    if not children:
        raise _spec_error(kind, f"{at} is an empty {type_name.partition('.')[2]}")
    keys: Sequence[str | int] = range(len(children))
    if type_name in _DICTS:
        keys = _keys(node.get("context"), at, kind)
        if len(keys) != len(children):
            raise _spec_error(kind, f"{at} has {len(keys)} keys and {len(children)} values")
    for key, child in zip(keys, children, strict=True):
        yield from _leaves(child, (*path, key), kind)


def _keys(context: Any, at: str, kind: str) -> list[str]:
    try:
        keys = json.loads(context)
    except (TypeError, ValueError) as error:
        raise _spec_error(kind, f"the keys of {at} cannot be read") from error
    for key in keys:
        if not isinstance(key, str):
            raise _spec_error(kind, f"key {key!r} of {at} is not a string")
        if not key or not key.isprintable() or any(c in '"[]' or c.isspace() for c in key):
            raise _spec_error(
                kind, f'key {key!r} of {at} is empty or has ", [, ], a blank or a non-printable'
            )
    return list(keys)


def _spec_error(kind: str, why: str) -> ConfigError:
    return ConfigError(f"failed to parse {kind} call spec: {why}", field=kind)
