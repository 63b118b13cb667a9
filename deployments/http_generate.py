"""/generate and /generate_stream: flat JSON to a request, by the model's own inputs, and back.

Owns Triton's mapping, its texts, and the form of server-sent events. What a request may be is the
business of `contract`. Pure; called by `http`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from configs import dtypes
from configs.model import ModelConfig, ModelInput
from configs.server import ServerSettings

from . import http_coding, http_infer, tensors
from .errors import Internal, InvalidArgument, MantaError, Unsupported
from .http_body import BodyRefused, Headers
from .http_replies import Field
from .types import InferRequest, InferResponse, ParameterValue, Tensor

EVENTS: Field = (b"content-type", b"text/event-stream; charset=utf-8")
# A member that holds more of the same.
_NESTED = "parameters"
# Only in bodies up to this size is an input noticed that is given twice: it takes a second parser.
MAX_CHECKED_BYTES = 1 << 20


# --- requests ------------------------------------------------------------------------------------


def check_coding(headers: Headers) -> None:
    """Triton inflates no such body, and says so with a 400. Raises BodyRefused: it is unread."""
    try:
        coding = http_coding.of_request(headers.get(b"content-encoding"))
    except Unsupported:
        coding = "unknown"
    if coding:
        raise BodyRefused(
            InvalidArgument("Unsupported content-encoding, only 'identity' is supported.")
        )


def decode(
    config: ModelConfig, version: str, body: bytes, settings: ServerSettings
) -> InferRequest:
    """Members named as an input are that tensor, all others are parameters of the request."""
    document = http_infer.parse_json(body, settings.max_json_depth)
    if type(document) is not dict:
        raise Internal("failed to parse the request JSON buffer: not an object")
    _check_repeated(body, config)
    taken = _Taken(config, settings)
    request_id = http_infer.member(document, "id", str, "")
    for key, value in document.items():
        if key == _NESTED:
            taken.nested(value)
        elif key != "id" or "id" in taken.inputs:
            taken.take(key, value)
    return InferRequest(
        model_name=config.name,
        model_version=version,
        id=request_id,
        inputs=tuple(taken.tensors),
        parameters=taken.parameters,
    )


class _Taken:
    """What has been understood so far, in the order of the members."""

    def __init__(self, config: ModelConfig, settings: ServerSettings) -> None:
        self.inputs: Mapping[str, ModelInput] = {entry.name: entry for entry in config.input}
        self.tensors: list[Tensor] = []
        self.parameters: dict[str, ParameterValue] = {}
        self._batched = config.max_batch_size > 0
        self._settings = settings

    def take(self, key: str, value: Any) -> None:
        entry = self.inputs.get(key)
        if entry is None:
            self.parameters.update(http_infer.check_parameters({key: value}))
        else:
            self.tensors.append(self._tensor(entry, value))

    def nested(self, members: Any) -> None:
        if _NESTED in self.inputs:
            raise InvalidArgument(
                f"Keyword '{_NESTED}' for nested schema also given as input tensor name"
            )
        if type(members) is not dict:
            raise Internal(
                f"Expected JSON object for keyword: '{_NESTED}': attempt to access JSON non-object "
                "as object"
            )
        for key, value in members.items():
            try:
                self.take(key, value)
            except MantaError as error:
                raise type(error)(f"Converting keyword: '{_NESTED}': {error}") from None

    def _tensor(self, entry: ModelInput, value: Any) -> Tensor:
        flat = value if type(value) is list else [value]
        if list in set(map(type, flat)):
            raise _no_shape(entry.name)
        datatype = dtypes.from_config(entry.data_type).wire
        dims = (-1, *entry.dims) if self._batched else entry.dims
        shape = _shape(entry.name, dims, len(flat))
        size = tensors.byte_count(entry.name, datatype, shape)
        http_infer.check_size(f"byte size of input '{entry.name}'", size, self._settings)
        return tensors.from_json(entry.name, datatype, shape, flat)


def _shape(name: str, dims: tuple[int, ...], count: int) -> tuple[int, ...]:
    """`dims` for so many elements: the innermost variable one takes what is left."""
    for size in dims:
        if size != -1:
            count, rest = divmod(count, size)
            if rest:
                raise _no_shape(name)
    shape = []
    for size in reversed(dims):
        if size == -1:
            size, count = count, 1
        shape.append(size)
    if count != 1:
        raise _no_shape(name)
    return tuple(reversed(shape))


def _no_shape(name: str) -> InvalidArgument:
    return InvalidArgument(f"The schema can not convert input '{name}' to tensor with proper shape")


def _check_repeated(body: bytes, config: ModelConfig) -> None:
    """A dictionary keeps only the last of equal names, and an input may be given once."""
    names = {entry.name for entry in config.input}
    if len(body) > MAX_CHECKED_BYTES:
        return
    if all(body.count(b'"%b"' % name.encode()) < 2 for name in names):
        return

    def check(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: set[str] = set()
        for key, _ in pairs:
            if key in names and key in seen:
                raise InvalidArgument(f"input '{key}' already exists in request")
            seen.add(key)
        return dict(pairs)

    json.loads(body, object_pairs_hook=check)


# --- responses -----------------------------------------------------------------------------------


def encode(response: InferResponse) -> bytes:
    """One JSON object with a member per output: its elements, or its only one."""
    document: dict[str, Any] = {"id": response.id} if response.id else {}
    document["model_name"] = response.model_name
    document["model_version"] = response.model_version
    document.update(
        {key: value for key, value in response.parameters.items() if key not in document}
    )
    finite = True
    for tensor in response.outputs:
        data = tensors.to_json_data(tensor)
        finite = finite and tensors.all_finite(data)
        document.setdefault(tensor.name, data[0] if len(data) == 1 else data)
    return http_infer.dump_tensors(document, finite)


def event(text: bytes) -> bytes:
    """One server-sent event; JSON has no line feeds of its own."""
    return b"data: " + text + b"\n\n"
