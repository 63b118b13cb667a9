"""The infer call's HTTP form, JSON and the binary tensor extension, to types and back.

Owns Triton's texts on that form. Pure: no sockets, no decisions about
models, whose checks are in `contract`. Called by the lanes that carry HTTP.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import orjson

from configs import dtypes
from configs.model import ModelConfig
from configs.server import ServerSettings

from . import tensors
from .errors import Internal, InvalidArgument
from .regions import memory_range
from .types import (
    InferRequest,
    InferResponse,
    LentInput,
    MemoryRange,
    ParameterValue,
    RequestedOutput,
    Tensor,
)

PATH = re.compile(r"/v2/models/([^/]+)(?:/versions/([0-9]+))?/infer")

_MISSING = object()
_NONE: dict[str, Any] = {}
_KINDS = {str: "string", bool: "boolean", int: "signed-integer", list: "array", dict: "object"}
_FLAGS = ("sequence_start", "sequence_end", "binary_data_output")
_COUNTS = ("priority", "timeout")
_SOURCES = ("binary_data_size", "shared_memory_region")
_ONE_SOURCE = (
    "Input must set only one of the following fields: 'data', 'binary_data_size' in 'parameters', "
    "'shared_memory_region' in 'parameters'. But set "
)


# --- JSON ----------------------------------------------------------------------------------------


def parse_json(text: bytes, max_depth: int) -> Any:
    """Any JSON, with the literals NaN and Infinity as Triton has them. Malformed is Internal."""
    try:
        document = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        if "depth" in error.msg or "recursion" in error.msg.lower():
            raise tensors.too_deep(max_depth) from None
        document = _parse_literals(text, error, max_depth)
    if text.count(b"[") + text.count(b"{") > max_depth:
        _check_depth(document, max_depth)
    return document


def dump_json(document: Any) -> bytes:
    """Arrays are written flat; NaN and Infinity as literals, which orjson would write as null."""
    try:
        return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    except orjson.JSONEncodeError:  # a lone surrogate that came in beside a literal
        return json.dumps(document, default=lambda array: array.tolist()).encode()


def dump_tensors(document: dict[str, Any], finite: bool) -> bytes:
    """The same where it is known whether all numbers are finite."""
    if finite:
        return dump_json(document)
    return json.dumps(document, default=lambda array: array.tolist()).encode()


def _parse_literals(text: bytes, error: orjson.JSONDecodeError, max_depth: int) -> Any:
    malformed = Internal(f"failed to parse the request JSON buffer: {error.msg}")
    if b"NaN" not in text and b"Infinity" not in text:
        raise malformed
    try:
        return json.loads(text)
    except RecursionError:
        raise tensors.too_deep(max_depth) from None
    except ValueError:
        raise malformed from None


def _check_depth(document: Any, max_depth: int) -> None:
    level = [document] if isinstance(document, (list, dict)) else []
    for _ in range(max_depth):
        if not level:
            return
        level = [
            child
            for parent in level
            for child in (parent.values() if type(parent) is dict else parent)
            if type(child) is list or type(child) is dict
        ]
    if level:
        raise tensors.too_deep(max_depth)


def member(of: Mapping[str, Any], key: str, kind: type, default: Any = _MISSING) -> Any:
    """A member of exactly this JSON type; type errors are Internal, as malformed JSON is."""
    value = of.get(key, _MISSING)
    if value is _MISSING:
        if default is not _MISSING:
            return default
        raise Internal(
            f"Unable to parse '{key}': attempt to access non-existing object member '{key}'"
        )
    if type(value) is not kind:
        raise wrong_type(key, _KINDS[kind])
    return value


def wrong_type(key: str, kind: str) -> Internal:
    return Internal(f"Unable to parse '{key}': attempt to access JSON non-{kind} as {kind}")


# --- requests ------------------------------------------------------------------------------------


def header_length(value: bytes | None, body_bytes: int) -> int | None:
    """Inference-Header-Content-Length, checked against the body; None when it was not sent."""
    if value is None:
        return None
    if not value.isdigit() or len(value) > 19:
        shown = value[:64].decode("latin-1")
        raise InvalidArgument(f"Unable to parse Inference-Header-Content-Length, got: {shown}")
    length = int(value)
    if length > body_bytes:
        raise InvalidArgument(
            f"inference header size should be in range (0, {body_bytes}), got: {length}"
        )
    return length


def decode(
    config: ModelConfig, version: str, body: bytes, json_bytes: int | None, settings: ServerSettings
) -> InferRequest:
    """A request from its whole body; `json_bytes` is the header's value, None if it was absent."""
    if json_bytes == 0:
        return _decode_raw(config, version, body, settings)
    text = body if json_bytes is None else body[:json_bytes]
    check_size("Request JSON size", len(text), settings)
    document = parse_json(text, settings.max_json_depth)
    if type(document) is not dict:
        raise Internal("failed to parse the request JSON buffer: not an object")
    outputs = _listed(document, "outputs", settings, [])
    binary = _Binary(memoryview(body)[len(text) :], config.name)
    entries = _listed(document, "inputs", settings)
    lent: tuple[LentInput, ...] = ()
    if settings.allow_client_shm:
        lent, entries = _split_lent(entries)
    inputs = tuple(_input(entry, binary, config.name, settings) for entry in entries)
    binary.check_empty()
    return InferRequest(
        model_name=config.name,
        model_version=version,
        id=member(document, "id", str, ""),
        inputs=inputs,
        outputs=tuple([_output(entry, settings.allow_client_shm) for entry in outputs]),
        parameters=check_parameters(member(document, "parameters", dict, {})),
        lent=lent,
    )


def check_size(what: str, size: int, settings: ServerSettings) -> None:
    limit = settings.http_max_input_size_bytes
    if size > limit:
        raise InvalidArgument(
            f"{what} of {size} bytes exceeds the maximum allowed value of {limit} bytes. Use "
            "--http-max-input-size to increase the limit."
        )


class _Binary:
    """The part of the body behind the JSON, handed out front to back."""

    def __init__(self, view: memoryview, model: str) -> None:
        self._view, self._at, self._model = view, 0, model

    def take(self, name: str, size: int) -> memoryview:
        start, self._at = self._at, self._at + size
        if self._at > len(self._view):
            raise InvalidArgument(
                f"unexpected size for input '{name}', expecting {self._at - len(self._view)} "
                f"additional bytes for model '{self._model}'"
            )
        return self._view[start : self._at]

    def check_empty(self) -> None:
        if self._at != len(self._view):
            raise InvalidArgument(f"unexpected additional input data for model '{self._model}'")


def _listed(
    document: dict[str, Any], key: str, settings: ServerSettings, default: Any = _MISSING
) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = member(document, key, list, default)
    if len(entries) > settings.max_tensors_per_request:
        raise InvalidArgument(
            f"request has {len(entries)} {key}, at most {settings.max_tensors_per_request} are "
            "allowed"
        )
    for entry in entries:
        if type(entry) is not dict:
            raise wrong_type(key, "object")
    return entries


def _input(entry: dict[str, Any], binary: _Binary, model: str, settings: ServerSettings) -> Tensor:
    name, datatype, shape = _described(entry)
    parameters = member(entry, "parameters", dict, _NONE)
    binary_bytes = parameters.get("binary_data_size")
    if len(parameters) > 1 or binary_bytes is None:
        _memory(name, parameters, settings.allow_client_shm)
    rank = settings.max_tensor_rank
    if binary_bytes is not None:
        if type(binary_bytes) is not int or binary_bytes < 0:
            raise wrong_type("binary_data_size", "unsigned-integer")
        if "data" in entry:
            raise InvalidArgument(
                f"must specify only one of 'data' or 'binary_data_size' for '{name}'"
            )
        view = binary.take(name, binary_bytes)
        return tensors.from_binary(name, datatype, shape, view, model, rank)
    if "data" not in entry and 0 not in shape:
        raise InvalidArgument(f"must specify 'data' or 'binary_data_size' for input '{name}'")
    size = tensors.byte_count(name, datatype, shape, rank)
    check_size(f"byte size of input '{name}'", size, settings)
    data = entry.get("data")
    return tensors.from_json(name, datatype, shape, data, rank, settings.max_json_depth)


def _described(entry: dict[str, Any]) -> tuple[str, str, tuple[int, ...]]:
    """Name, datatype and shape."""
    name, datatype = member(entry, "name", str), member(entry, "datatype", str)
    shape = tuple(member(entry, "shape", list))
    for size in shape:
        if type(size) is not int or size < 0:
            raise wrong_type("shape", "unsigned-integer")
    return name, datatype, shape


def _split_lent(
    entries: list[dict[str, Any]],
) -> tuple[tuple[LentInput, ...], list[dict[str, Any]]]:
    """Inputs that lie in the client's memory, and the entries of all others."""
    lent, others = [], []
    for position, entry in enumerate(entries):
        parameters = member(entry, "parameters", dict, _NONE)
        if "shared_memory_region" not in parameters:
            others.append(entry)
            continue
        name, datatype, shape = _described(entry)
        sources = ["data"] if "data" in entry else []
        sources += [key for key in _SOURCES if key in parameters]
        if len(sources) > 1:
            raise InvalidArgument(_ONE_SOURCE + " ".join(f"'{source}'" for source in sources))
        memory = _memory(name, parameters, True)
        assert memory is not None  # it names a region
        lent.append(LentInput(position, name, datatype, shape, memory))
    return tuple(lent), others


def _memory(tensor: str, parameters: dict[str, Any], allowed: bool) -> MemoryRange | None:
    return memory_range(tensor, parameters, allowed, _wrong_memory)


def _wrong_memory(tensor: str, key: str, wanted: type) -> Internal:
    return wrong_type(key, "unsigned-integer" if wanted is int else "string")


def _output(entry: dict[str, Any], allow_memory: bool) -> RequestedOutput:
    parameters = member(entry, "parameters", dict, _NONE)
    binary_data = parameters.get("binary_data")
    if len(parameters) == (type(binary_data) is bool):  # nothing else is asked for
        return RequestedOutput(member(entry, "name", str), binary_data is True)
    name, binary_data = member(entry, "name", str), member(parameters, "binary_data", bool, False)
    memory = _memory(name, parameters, allow_memory)
    if memory is not None and binary_data:
        raise InvalidArgument("Output can't set both 'shared_memory_region' and 'binary_data'")
    classification = member(parameters, "classification", int, 0)
    if classification < 0:
        raise InvalidArgument(f"invalid classification count {classification}")
    return RequestedOutput(name, binary_data, classification, memory)


def check_parameters(parameters: dict[str, Any]) -> dict[str, ParameterValue]:
    """Request parameters as they are, if they may be."""
    for key, value in parameters.items():
        if type(value) not in (int, bool, str, float):
            raise InvalidArgument(
                f"parameter '{key}' has invalid type. It should be either 'int', 'bool', or "
                "'string'."
            )
        if key in _FLAGS and type(value) is not bool:
            raise wrong_type(key, "boolean")
        if key in _COUNTS and (type(value) is not int or value < 0):
            raise wrong_type(key, "unsigned-integer")
    return parameters


def _decode_raw(
    config: ModelConfig, version: str, body: bytes, settings: ServerSettings
) -> InferRequest:
    """The whole body is the one tensor of a model with one input."""
    check_size("raw binary request", len(body), settings)
    if len(config.input) != 1:
        raise InvalidArgument(
            "Raw request must only have 1 input (found 1) to be deduced but got "
            f"{len(config.input)} inputs in '{config.name}' model configuration"
        )
    entry = config.input[0]
    kind = dtypes.from_config(entry.data_type)
    dims, view = entry.dims, memoryview(body)
    if kind.numpy is None:
        if dims != (1,):
            raise InvalidArgument(
                f"For BYTE datatype raw input '{entry.name}', the model must have input shape [1]"
            )
        view = tensors.encode_bytes([body]).data
    elif dims.count(-1) > 1:
        raise InvalidArgument(
            f"The shape of the raw input '{entry.name}' can not be deduced because there are more "
            "than one variable-sized dimension"
        )
    elif -1 in dims:
        fixed = tensors.byte_count(entry.name, kind.wire, tuple(d for d in dims if d != -1))
        dims = tuple(len(body) // max(fixed, 1) if d == -1 else d for d in dims)
    shape = (1, *dims) if config.max_batch_size else dims
    tensor = tensors.from_binary(entry.name, kind.wire, shape, view, config.name)
    return InferRequest(
        config.name, version, "", (tensor,), parameters={"binary_data_output": True}
    )


# --- responses -----------------------------------------------------------------------------------


def all_binary(request: InferRequest) -> bool:
    """Whether every output is asked for as bytes."""
    if not request.outputs:
        return bool(request.parameters.get("binary_data_output"))
    return all(output.binary_data for output in request.outputs)


def encode(request: InferRequest, response: InferResponse) -> tuple[bytes, list[memoryview]]:
    """The JSON part, and the binary parts that follow it in order."""
    binary_names = {output.name for output in request.outputs if output.binary_data}
    all_binary = not request.outputs and bool(request.parameters.get("binary_data_output"))
    parts: list[memoryview] = []
    outputs, finite = [], True
    for tensor in response.outputs:
        entry: dict[str, Any] = {
            "name": tensor.name,
            "datatype": tensor.datatype,
            "shape": tensor.shape,
        }
        if tensor.placed:
            pass  # it is told that it is there, and no more
        elif all_binary or tensor.name in binary_names:
            part = tensors.to_binary(tensor)
            entry["parameters"] = {"binary_data_size": len(part)}
            parts.append(part)
        else:
            data = tensors.to_json_data(tensor)
            finite = finite and tensors.all_finite(data)
            entry["data"] = data
        outputs.append(entry)
    document: dict[str, Any] = {"id": response.id} if response.id else {}
    document["model_name"] = response.model_name
    document["model_version"] = response.model_version
    if response.parameters:
        document["parameters"] = dict(response.parameters)
    document["outputs"] = outputs
    return dump_tensors(document, finite), parts
