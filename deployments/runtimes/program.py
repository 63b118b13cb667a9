"""What an archive of torch.export.save holds, read from its JSON: nothing is unpickled or run.

Owns names, datatypes, sizes and bounds of the program's inputs and outputs. Whether it may be
loaded is `vetting.py`. No torch. Called by `exported.py` and `autocomplete.py`.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import ConfigError
from deployments import archives
from deployments.signature import Signature

from .callspec import parse_call_spec
from .leaves import Leaf, Size

_JSON_LIMIT_BYTES = 512 << 20
_SYMBOL = re.compile(r"Symbol\('(\w+)'(?:, \w+=True)*\)")
# The numbers that the archive's schema gives to datatypes.
_TYPES = {
    1: "uint8",
    2: "int8",
    3: "int16",
    4: "int32",
    5: "int64",
    6: "float16",
    7: "float32",
    8: "float64",
    12: "bool",
    13: "bfloat16",
    28: "uint16",
    34: "uint32",
    35: "uint64",
}
_CONSTANTS = ("as_int", "as_float", "as_bool", "as_string")


@dataclass(frozen=True, slots=True)
class Program:
    """`inputs` and `outputs` are tensors by flattened position; `constants` are the inputs that are
    none, which a program takes as they were when it was exported. `count` is that of all inputs.
    `updates` names the buffers that a run changes, `device` is the
    kind of device that it was exported on."""

    signature: Signature
    inputs: Mapping[int, Leaf]
    outputs: Mapping[int, Leaf]
    constants: Mapping[int, object]
    count: int
    updates: tuple[str, ...]
    device: str


def read(path: Path, where: str) -> Program:
    """Raises ConfigError, whose file is `where`."""
    document = _document(path, where)
    try:
        return _parse(document)
    except ConfigError as error:
        raise error.located(where) from None
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"the program's description cannot be read ({type(error).__name__}); it was saved by "
            f"torch {document.get('torch_version', 'of an unknown version')}",
            file=where,
        ) from error


def _document(path: Path, where: str) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:
        names = [n for n in archive.namelist() if n.partition("/")[2] == "models/model.json"]
        if not names or archive.getinfo(names[0]).file_size > _JSON_LIMIT_BYTES:
            raise ConfigError("the archive has no program that can be read", file=where)
        try:
            document = json.loads(archive.read(names[0]))
        except archives.UNREADABLE as error:
            raise ConfigError("the program's description cannot be read", file=where) from error
    return document if isinstance(document, dict) else {}


def _parse(document: dict[str, Any]) -> Program:
    module = document["graph_module"]
    graph, signature = module["graph"], module["signature"]
    call = module["module_call_graph"][0]["signature"]
    ranges = document["range_constraints"]
    slots = parse_call_spec(call["in_spec"], call["out_spec"])
    inputs: dict[int, Leaf] = {}
    devices: set[str] = set()
    constants: dict[int, object] = {}
    given = [s for s in signature["input_specs"] if "user_input" in s or "constant_input" in s]
    for position, spec in enumerate(given):
        if "constant_input" in spec:
            constants[position] = _constant(spec["constant_input"]["value"])
        elif "as_tensor" in spec["user_input"]["arg"]:
            name = spec["user_input"]["arg"]["as_tensor"]["name"]
            meta = graph["tensor_values"][name]
            inputs[position] = _leaf(meta, ranges)
            devices.add(meta["device"]["type"])
        else:
            kind = next(iter(spec["user_input"]["arg"])).removeprefix("as_")
            raise ConfigError(
                f"input {position} of the program is a {kind}, and only tensors can be served",
                field="input",
            )
    if len(given) != len(slots.inputs or ()):
        raise ValueError("another number of inputs")
    results = [s["user_output"]["arg"] for s in signature["output_specs"] if "user_output" in s]
    outputs = {
        position: _leaf(graph["tensor_values"][result["as_tensor"]["name"]], ranges)
        for position, result in enumerate(results)
        if "as_tensor" in result
    }
    kept = tuple(slot for slot in slots.inputs or () if slot.position in inputs)
    if not kept:
        raise ConfigError("the program takes no tensor", field="input")
    return Program(
        signature=Signature(kept, slots.outputs, closed=True, strings=False),
        inputs=inputs,
        outputs=outputs,
        constants=constants,
        count=len(given),
        updates=_updates(graph, signature),
        device="cpu" if devices == {"cpu"} else max(devices),
    )


def _constant(value: Mapping[str, Any]) -> object:
    return next((value[kind] for kind in _CONSTANTS if kind in value), None)


def _leaf(meta: Mapping[str, Any], ranges: Mapping[str, Any]) -> Leaf:
    sizes = tuple(_size(size, ranges) for size in meta["sizes"])
    return Leaf(_TYPES.get(meta["dtype"], ""), sizes)


def _size(size: Mapping[str, Any], ranges: Mapping[str, Any]) -> Size:
    if "as_int" in size:
        return Size(size["as_int"], size["as_int"])
    text = size["as_expr"]["expr_str"]
    symbol = _SYMBOL.fullmatch(text)
    if symbol is None or symbol.group(1) not in ranges:
        return Size(0, None, text)  # worked out from others, which have bounds
    bounds = ranges[symbol.group(1)]
    return Size(max(0, bounds["min_val"] or 0), bounds["max_val"], symbol.group(1))


def _updates(graph: Mapping[str, Any], signature: Mapping[str, Any]) -> tuple[str, ...]:
    """Buffers that the program writes to: it would give other answers to whoever runs beside."""
    buffers = {
        spec["buffer"]["arg"]["name"]: spec["buffer"]["buffer_name"]
        for spec in signature["input_specs"]
        if "buffer" in spec
    }
    found = {
        spec["buffer_mutation"]["buffer_name"]
        for spec in signature["output_specs"]
        if "buffer_mutation" in spec
    }
    for node in graph["nodes"]:
        operator = node["target"].split(".")[3:4] or [""]
        first = (node["inputs"] or [{}])[0].get("arg", {}).get("as_tensor", {}).get("name")
        if operator[0].endswith("_") and not operator[0].endswith("__") and first in buffers:
            found.add(buffers[first])
    return tuple(sorted(found))
