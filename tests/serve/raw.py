"""HTTP as it goes over a socket, for requests that no client would make."""

from __future__ import annotations

import contextlib
import json
import socket
from typing import Any

from tests.serve.clients import rows
from tests.serve.server import Server

MIB = 1 << 20
LIMIT = 64 * MIB  # of a body that is JSON
LENGTH = "Inference-Header-Content-Length"
ANSWER_S = 60.0
X = rows(1, 8)
TENSOR: dict[str, Any] = {"name": "INPUT__0", "datatype": "FP32", "shape": [1, 8]}
SENT = {**TENSOR, "data": X.tolist()}


def body(*inputs: dict[str, Any], **more: Any) -> bytes:
    return json.dumps({"inputs": list(inputs), **more}).encode()


def connect(server: Server) -> socket.socket:
    host, port = server.http.split(":")
    client = socket.create_connection((host, int(port)), 30)
    client.settimeout(ANSWER_S)
    return client


def head(*fields: str, path: str = "/v2/models/mlp/infer", close: bool = True) -> bytes:
    last = ["Connection: close"] if close else []
    lines = [f"POST {path} HTTP/1.1", "Host: x", *fields, *last, "", ""]
    return "\r\n".join(lines).encode("latin-1")


def rest(client: socket.socket) -> bytes:
    """What comes until the server closes; a reset ends it too."""
    got = b""
    with contextlib.suppress(ConnectionError):
        while piece := client.recv(1 << 16):
            got += piece
    return got


def ask(server: Server, *pieces: bytes) -> tuple[int, str]:
    """Status and error of the first answer."""
    with connect(server) as client:
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                client.sendall(piece)
        return parsed(rest(client))


def parsed(got: bytes) -> tuple[int, str]:
    first, _, body = got.partition(b"\r\n\r\n")
    assert first.startswith(b"HTTP/1.1 "), got[:200]
    status = int(first.split()[1])
    if status == 200:
        return status, ""
    document = json.loads(body)
    assert list(document) == ["error"] and "Traceback" not in document["error"]
    return status, document["error"]
