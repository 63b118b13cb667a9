"""One request in the forms that the servers take, and how to read their answers.

Bodies are encoded once, before any load: what is measured is the servers. Knows no server; used by
the contestants and by `servers.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2

from benchmarks.models import INPUT, NUMPY, OUTPUT, Model

HEADER = "Inference-Header-Content-Length"
GRPC_PATH = "/inference.GRPCInferenceService/ModelInfer"
GRPC_PREFIX_BYTES = 5  # a flag, then the length of the message
BINARY = ("Content-Type", "application/octet-stream")
JSON = ("Content-Type", "application/json")

Reader = Callable[[Mapping[str, str], bytes], np.ndarray]


class WireError(Exception):
    """An answer that cannot be read, or a form that a server does not have."""


@dataclass(frozen=True, slots=True)
class Request:
    """`body` as h2load sends it: for gRPC with its prefix. `read` takes lower-case headers."""

    protocol: str
    path: str
    headers: tuple[tuple[str, str], ...]
    body: bytes
    read: Reader

    @property
    def one_size(self) -> bool:
        """Whether every right answer has as many bytes as the next; numbers as text have not."""
        return JSON not in self.headers


# --- v2 over HTTP --------------------------------------------------------------------------------


def v2_path(model: Model) -> str:
    return f"/v2/models/{model.name}/infer"


def _v2_input(model: Model, row: np.ndarray) -> dict[str, Any]:
    return {"name": INPUT, "shape": list(row.shape), "datatype": model.datatype}


def v2_binary(model: Model, row: np.ndarray) -> Request:
    raw = row.tobytes()
    head = {
        "inputs": [_v2_input(model, row) | {"parameters": {"binary_data_size": len(raw)}}],
        "outputs": [{"name": OUTPUT, "parameters": {"binary_data": True}}],
    }
    text = json.dumps(head, separators=(",", ":")).encode()
    headers = ((HEADER, str(len(text))), BINARY)
    return Request("http", v2_path(model), headers, text + raw, read_v2)


def v2_json(model: Model, row: np.ndarray) -> Request:
    """For servers without the binary extension; numbers as short as float32 allows."""
    head = {"inputs": [_v2_input(model, row) | {"data": numbers(row)}]}
    text = json.dumps(head, separators=(",", ":")).encode()
    return Request("http", v2_path(model), (JSON,), text, read_v2)


def numbers(array: np.ndarray) -> list[Any]:
    """Flat, every float with as few digits as give the same float32 again."""
    flat = array.reshape(-1)
    if array.dtype == np.float32:
        return [float(str(value)) for value in flat]
    return list(flat.tolist())


def read_v2(headers: Mapping[str, str], body: bytes) -> np.ndarray:
    length = int(headers.get(HEADER.lower(), len(body)))
    (output,) = json.loads(body[:length])["outputs"]
    if "data" in output:
        return np.array(output["data"], np.float32).reshape(output["shape"])
    return np.frombuffer(body, np.float32, offset=length).reshape(output["shape"])


# --- v2 over gRPC --------------------------------------------------------------------------------


def framed(message: bytes) -> bytes:
    """gRPC's prefix (not compressed, length) and the message."""
    return b"\0" + len(message).to_bytes(4, "big") + message


def v2_grpc(model: Model, row: np.ndarray) -> Request:
    request = service_pb2.ModelInferRequest(model_name=model.name)
    request.inputs.add(name=INPUT, datatype=model.datatype, shape=row.shape)
    request.outputs.add(name=OUTPUT)
    request.raw_input_contents.append(row.tobytes())
    headers = (("content-type", "application/grpc"), ("te", "trailers"))
    return Request("grpc", GRPC_PATH, headers, framed(request.SerializeToString()), read_grpc)


def read_grpc(headers: Mapping[str, str], body: bytes) -> np.ndarray:
    """`body` without the prefix."""
    reply = service_pb2.ModelInferResponse.FromString(body)
    if len(reply.outputs) != 1:
        raise WireError(f"{len(reply.outputs)} outputs")
    shape = tuple(reply.outputs[0].shape)
    if reply.raw_output_contents:
        return np.frombuffer(reply.raw_output_contents[0], np.float32).reshape(shape)
    return np.array(reply.outputs[0].contents.fp32_contents, np.float32).reshape(shape)


# --- servers with no v2 protocol -----------------------------------------------------------------


def raw_bytes(model: Model, row: np.ndarray, path: str) -> Request:
    """The row's bytes, and the answer's bytes back: the shape is known to both sides."""
    return Request("http", path, (BINARY,), row.tobytes(), reader_of_rows(model))


def reader_of_rows(model: Model) -> Reader:
    def read(headers: Mapping[str, str], body: bytes) -> np.ndarray:
        return np.frombuffer(body, NUMPY["FP32"]).reshape(1, *model.output)

    return read


# --- the check -----------------------------------------------------------------------------------


def error_of(answer: np.ndarray, expected: np.ndarray) -> float:
    """Largest deviation over the largest value expected; WireError where shapes differ."""
    if answer.shape != expected.shape:
        raise WireError(f"the answer has shape {answer.shape}, not {expected.shape}")
    scale = max(1.0, float(np.abs(expected).max()))
    return float(np.abs(answer - expected).max()) / scale
