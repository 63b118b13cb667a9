"""JSON schemas of what goes over HTTP: of the protocol as such, and of one model's infer call.

A model's schema says what its metadata says: names, datatypes, shapes. Pure. Read by `openapi`, and
by `openapi_settings`, which has those of what can be changed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from configs import dtypes
from configs.model import ModelConfig

Schema: TypeAlias = dict[str, Any]
# An entry of a model's metadata: name, datatype, shape (-1 is any size).
Entry: TypeAlias = Mapping[str, Any]

# A request with more elements is no example that one reads.
_EXAMPLE_ELEMENTS = 64
# What JSON cannot carry: binary only.
_BINARY_ONLY = ("FP16", "BF16")


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def listed(items: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": items, **more}


def record(required: Sequence[str] = (), /, **properties: Schema) -> Schema:
    schema: Schema = {"type": "object", "properties": properties}
    return {**schema, "required": list(required)} if required else schema


TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
_SIZE: Schema = {"type": "integer", "minimum": -1}
_DATATYPE: Schema = {"type": "string", "enum": [each.wire for each in dtypes.DATATYPES]}
_PARAMETERS: Schema = {
    "type": "object",
    "additionalProperties": {"type": ["string", "boolean", "integer", "number"]},
}
_DATA: Schema = listed(
    {"type": ["array", "boolean", "number", "string"]},
    description="Elements in row-major order, flat or nested; FP16 and BF16 are binary only.",
)
_INPUT_PARAMETERS: Schema = {
    **record(
        binary_data_size={**COUNT, "description": "Bytes of this tensor behind the JSON."},
        shared_memory_region=TEXT,
        shared_memory_byte_size=COUNT,
        shared_memory_offset=COUNT,
    ),
    "additionalProperties": True,
}
_OUTPUT_PARAMETERS: Schema = {
    **record(
        binary_data={**FLAG, "description": "Send this tensor behind the JSON."},
        classification={**COUNT, "description": "Send so many best classes instead."},
        shared_memory_region=TEXT,
        shared_memory_byte_size=COUNT,
        shared_memory_offset=COUNT,
    ),
    "additionalProperties": True,
}
_SENT_PARAMETERS: Schema = {
    **record(binary_data_size={**COUNT, "description": "Bytes of this tensor behind the JSON."}),
    "additionalProperties": True,
}
_NOT_YET: Schema = {**COUNT, "maximum": 0, "description": "Not supported: other than 0 is 501."}
_REQUEST_PARAMETERS: Schema = {
    **_PARAMETERS,
    "properties": {
        "binary_data_output": {**FLAG, "description": "Send all outputs behind the JSON."},
        "priority": _NOT_YET,
        "timeout": _NOT_YET,
    },
}
_DURATION: Schema = record(("count", "ns"), count=COUNT, ns=COUNT)
_TENSOR_METADATA: Schema = record(
    ("name", "datatype", "shape"),
    name=TEXT,
    datatype=_DATATYPE,
    shape=listed(_SIZE, description="-1 is any size; the first is the batch's where there is one."),
)
_MODEL_STATISTICS: Schema = record(
    ("name", "version"),
    name=TEXT,
    version=TEXT,
    last_inference={**COUNT, "description": "Milliseconds since 1970."},
    inference_count=COUNT,
    execution_count=COUNT,
    inference_stats={"type": "object", "additionalProperties": _DURATION},
    batch_stats=listed(
        record(
            ("batch_size",),
            batch_size=COUNT,
            compute_input=_DURATION,
            compute_infer=_DURATION,
            compute_output=_DURATION,
        )
    ),
    response_stats={"type": "object"},
    memory_usage=listed({"type": "object"}),
)
_LOAD_PARAMETERS: Schema = {
    **record(config={**TEXT, "description": "A ModelConfig as JSON text."}),
    "patternProperties": {"^file:": {**TEXT, "description": "The bytes of a file, in base64."}},
    "additionalProperties": True,
}

SCHEMAS: Mapping[str, Schema] = {
    "Error": record(("error",), error=TEXT),
    "Text": TEXT,
    "OpenApi": record(("openapi", "info", "paths"), openapi=TEXT, info={}, paths={}),
    "ServeRoutes": {"type": "object", "additionalProperties": TEXT},
    "ServerMetadata": record(
        ("name", "version", "extensions"), name=TEXT, version=TEXT, extensions=listed(TEXT)
    ),
    "ModelMetadata": record(
        ("name", "versions", "platform", "inputs", "outputs"),
        name=TEXT,
        versions=listed(TEXT),
        platform=TEXT,
        inputs=listed(_TENSOR_METADATA),
        outputs=listed(_TENSOR_METADATA),
    ),
    "ModelConfig": {
        "type": "object",
        "description": "Triton's ModelConfig: its proto's names, with numbers as numbers.",
    },
    "Statistics": record(("model_stats",), model_stats=listed(_MODEL_STATISTICS)),
    "RepositoryIndexRequest": record(ready={**FLAG, "description": "Only what is READY."}),
    "RepositoryIndex": listed(
        record(
            ("name",),
            name=TEXT,
            version=TEXT,
            state={
                "type": "string",
                "enum": ["UNKNOWN", "LOADING", "READY", "UNLOADING", "UNAVAILABLE"],
            },
            reason=TEXT,
        )
    ),
    "RepositoryModelLoadRequest": record(parameters=_LOAD_PARAMETERS),
    "RepositoryModelUnloadRequest": record(
        parameters={**record(unload_dependents=FLAG), "additionalProperties": True}
    ),
    "GenerateRequest": {
        "type": "object",
        "description": "Inputs by name, each a value or an array of values; all else is a "
        "parameter of the request.",
    },
    "GenerateResponse": {
        **record(("model_name", "model_version"), model_name=TEXT, model_version=TEXT),
        "description": "Outputs by name, each a value or an array of values.",
    },
    "SharedMemoryStatus": listed(
        record(("name", "byte_size"), name=TEXT, key=TEXT, offset=COUNT, byte_size=COUNT)
    ),
    "SharedMemoryRegisterRequest": record(
        ("byte_size",),
        key={**TEXT, "description": "Of system shared memory."},
        offset=COUNT,
        byte_size=COUNT,
        raw_handle={**record(b64=TEXT), "description": "Of CUDA memory."},
        device_id=COUNT,
    ),
    "InferRequest": record(
        ("inputs",),
        id=TEXT,
        parameters=_REQUEST_PARAMETERS,
        inputs=listed(
            record(
                ("name", "datatype", "shape"),
                name=TEXT,
                datatype=_DATATYPE,
                shape=listed(COUNT),
                parameters=_INPUT_PARAMETERS,
                data=_DATA,
            )
        ),
        outputs=listed(record(("name",), name=TEXT, parameters=_OUTPUT_PARAMETERS)),
    ),
    "InferResponse": record(
        ("model_name", "model_version", "outputs"),
        id=TEXT,
        model_name=TEXT,
        model_version=TEXT,
        parameters=_PARAMETERS,
        outputs=listed(
            record(
                ("name", "datatype", "shape"),
                name=TEXT,
                datatype=_DATATYPE,
                shape=listed(COUNT),
                parameters=_SENT_PARAMETERS,
                data=_DATA,
            )
        ),
    ),
}


# --- one model -----------------------------------------------------------------------------------


def request(config: ModelConfig, inputs: Sequence[Entry], outputs: Sequence[Entry]) -> Schema:
    """The body of an infer call, as JSON; `inputs` and `outputs` are the model's metadata."""
    required = [entry.name for entry in config.input if not entry.optional]
    tensors = [
        _tensor(entry, config.max_batch_size, _INPUT_PARAMETERS, _one_source(entry))
        for entry in inputs
    ]
    names = [entry["name"] for entry in outputs]
    schema = record(
        ("inputs",),
        id=TEXT,
        parameters=_REQUEST_PARAMETERS,
        inputs=listed(
            {"anyOf": tensors},
            minItems=len(required),
            maxItems=len(tensors),
            **({"allOf": [{"contains": _named(name)} for name in required]} if required else {}),
        ),
        outputs=listed(
            record(
                ("name",), name={"type": "string", "enum": names}, parameters=_OUTPUT_PARAMETERS
            ),
            maxItems=len(names),
        ),
    )
    example = _example([entry for entry in inputs if entry["name"] in required])
    return {**schema, "examples": [example]} if example else schema


def response(name: str, version: str, outputs: Sequence[Entry]) -> Schema:
    """The answer to it, as JSON; sizes that only the model knows are any."""
    return record(
        ("model_name", "model_version", "outputs"),
        id=TEXT,
        model_name={"const": name},
        model_version={"const": version},
        parameters=_PARAMETERS,
        outputs=listed(
            {"anyOf": [_tensor(entry, 0, _SENT_PARAMETERS, {}) for entry in outputs]},
            maxItems=len(outputs),
        ),
    )


def _tensor(entry: Entry, max_batch_size: int, parameters: Schema, more: Schema) -> Schema:
    """`x-shape` is the metadata's own; `prefixItems` say the same for validators."""
    shape, datatype = list(entry["shape"]), entry["datatype"]
    sizes: list[Schema] = [COUNT if size < 0 else {"const": size} for size in shape]
    if max_batch_size:
        sizes[0] = {"type": "integer", "minimum": 1, "maximum": max_batch_size}
    schema = record(
        ("name", "datatype", "shape"),
        name={"const": entry["name"]},
        datatype={"const": datatype},
        shape={
            "type": "array",
            **({"prefixItems": sizes} if sizes else {}),
            "minItems": len(sizes),
            "maxItems": len(sizes),
            "description": f"{shape}; -1 is any size.",
            "x-shape": shape,
        },
        parameters=parameters,
    )
    if datatype not in _BINARY_ONLY:
        schema["properties"]["data"] = listed(
            {"anyOf": [_element(datatype), {"type": "array"}]},
            description="Elements in row-major order, flat or nested.",
        )
    return {**schema, **more}


def _one_source(entry: Entry) -> Schema:
    if entry["datatype"] in _BINARY_ONLY:
        return {"required": ["name", "datatype", "shape", "parameters"]}
    return {"anyOf": [{"required": ["data"]}, {"required": ["parameters"]}]}


def _element(datatype: str) -> Schema:
    kind = dtypes.from_wire(datatype).numpy
    if kind is None:
        return TEXT
    if kind[1] == "b":
        return FLAG
    if kind[1] == "f":
        return {"type": "number"}
    bits = 8 * int(kind[2:])
    low, high = (0, 2**bits - 1) if kind[1] == "u" else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return {"type": "integer", "minimum": low, "maximum": high}


def _named(name: str) -> Schema:
    return record(("name",), name={"const": name})


def _example(inputs: Sequence[Entry]) -> Schema | None:
    """A request that the model takes: one row of zeros, "" or false."""
    tensors = []
    for entry in inputs:
        shape = [1 if size < 0 else size for size in entry["shape"]]
        count = math.prod(shape)
        if count > _EXAMPLE_ELEMENTS or entry["datatype"] in _BINARY_ONLY:
            return None
        zero = {"BOOL": False, "BYTES": ""}.get(entry["datatype"], 0)
        data = [zero] * count
        tensors.append({**_plain(entry), "shape": shape, "data": data})
    return {"inputs": tensors}


def _plain(entry: Entry) -> Schema:
    return {"name": entry["name"], "datatype": entry["datatype"]}
