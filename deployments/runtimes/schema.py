"""A TorchScript module's `forward` as a Signature: its schema's types, names and defaults.

Owns the reading of torch's types and of the names that a file gives the fields of its named tuples,
which torch's Python side does not tell. Decides nothing about names; called by `torchscript.py`.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from configs.errors import ConfigError
from deployments import archives
from deployments.signature import Signature
from deployments.structure import STRINGS, TENSOR, Argument, Forward, Slot, Structure, canonical

Fields: TypeAlias = Mapping[str, tuple[str, ...]]

_CODE_LIMIT_BYTES = 1 << 24
_NAMED_TUPLE = re.compile(r"^class (\w+)\(NamedTuple\):\n((?:  .*\n)+)", re.MULTILINE)
_FIELD = re.compile(r"^  (\w+) : ", re.MULTILINE)


def describe(module: Any, model: str, fields: Fields | None = None) -> Signature:
    """Raises ConfigError where there is no `forward`. `fields`: see `named_fields`."""
    forward = getattr(module, "forward", None)
    if forward is None:
        raise ConfigError(f"model '{model}' has no method forward", field="input")
    schema, names = forward.schema, fields or {}
    arguments = tuple(
        Argument(
            one.name,
            structure_of(one.type, names),
            required=not one.has_default_value(),
            default=one.default_value if one.has_default_value() else None,
        )
        for one in schema.arguments
        if one.type.kind() != "ClassType"  # self
    )
    returns = schema.returns
    result = structure_of(returns[0].type, names) if len(returns) == 1 else _unknown(str(returns))
    described = Forward(arguments, result=result)
    if len(arguments) == 1 and arguments[0].structure.text == "Dict[str, Tensor]":
        return Signature(None, dict_input=True, forward=described)
    if any(one.structure.what not in ("tensor", "strings") for one in arguments):
        return Signature(None, forward=described)
    slots = []
    for position, one in enumerate(arguments):
        path = ("ARGS", position)
        strings = one.structure.what == "strings"
        slots.append(Slot(position, canonical(path), path, one.name, strings))
    return Signature(tuple(slots), forward=described)


def structure_of(kind: Any, fields: Fields) -> Structure:
    text, word = str(kind), kind.kind()
    if word == "OptionalType":
        return replace(structure_of(kind.getElementType(), fields), text=text, optional=True)
    if word == "TensorType":
        return TENSOR
    if word == "ListType":
        item = kind.getElementType()
        if item.kind() == "StringType":
            return STRINGS
        return Structure("list", text, (structure_of(item, fields),), whole=False)
    if word == "DictType" and str(kind.getKeyType()) in ("str", "int"):
        keys: Any = str(kind.getKeyType())
        return Structure("dict", text, (structure_of(kind.getValueType(), fields),), keys=keys)
    if word == "TupleType":
        items = tuple(structure_of(item, fields) for item in kind.elements())
        names = fields.get(kind.annotation_str, ())
        return Structure("tuple", text, items, names if len(names) == len(items) else ())
    return _unknown(text) if word in ("AnyType", "UnionType") else Structure("other", text)


def _unknown(text: str) -> Structure:
    return Structure("unknown", text)


def named_fields(path: Path) -> dict[str, tuple[str, ...]]:
    """Qualified names of the named tuples in a TorchScript file, and their fields."""
    found: dict[str, tuple[str, ...]] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                inner = entry.filename.partition("/code/")[2]
                if not inner.endswith(".py") or entry.file_size > _CODE_LIMIT_BYTES:
                    continue
                module = inner.removesuffix(".py").replace("/", ".")
                code = archive.read(entry).decode("utf-8", "replace")
                for name, body in _NAMED_TUPLE.findall(code):
                    found[f"{module}.{name}"] = tuple(_FIELD.findall(body))
    except (OSError, *archives.UNREADABLE):
        return {}  # torch reads what it can; fields then have numbers only
    return found
