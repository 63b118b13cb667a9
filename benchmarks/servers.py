"""Starts, asks and stops one server under test, in a process group of its own.

Owns: ports, readiness, the one checked answer, the v2 statistics, the end. Measures no time and
knows no server by name: what to start is a `Launch`. Called by `matrix.py`.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from benchmarks import processes, wire
from benchmarks.wire import GRPC_PREFIX_BYTES, Request

START_LIMIT_S, STOP_LIMIT_S, ANSWER_LIMIT_S = 180.0, 60.0, 60.0
KILL_LIMIT_S = 10.0
THREADS = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


class ServerError(Exception):
    """A server that did not start, answer or stop as it should."""


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start a server; `ports` by protocol. It is ready when GET `ready_path` gives 200."""

    command: tuple[str, ...]
    ports: Mapping[str, int]
    ready_path: str
    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Server:
    """`exit_code` is None while it runs."""

    name: str
    launch: Launch
    process: subprocess.Popen[bytes]
    log: Path
    exit_code: int | None = None

    @property
    def root(self) -> int:
        return self.process.pid


@dataclass(frozen=True, slots=True)
class Answer:
    """`size` is what came back in one body; for gRPC with its prefix, as h2load counts it."""

    error: float
    size: int


@dataclass(frozen=True, slots=True)
class Statistics:
    """Cumulative; durations are ns summed over requests (the v2 statistics extension)."""

    inference_count: int
    execution_count: int
    success: int
    queue_ns: int
    input_ns: int
    infer_ns: int
    output_ns: int

    def since(self, before: Statistics) -> Statistics:
        earlier = asdict(before)
        return Statistics(**{name: value - earlier[name] for name, value in asdict(self).items()})


# --- life ----------------------------------------------------------------------------------------


def free_ports(count: int) -> list[int]:
    """Ports that nobody holds right now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def start(name: str, launch: Launch, log: Path) -> Server:
    """The server, ready; ServerError with the end of its log where it does not get so far."""
    environment = os.environ | THREADS | dict(launch.environment)
    with log.open("wb") as sink:
        try:
            process = subprocess.Popen(
                launch.command,
                stdout=sink,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=launch.folder,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            raise ServerError(f"{name}: {error}") from error
    server = Server(name, launch, process, log)
    try:
        wait_ready(server)
    except BaseException:
        stop(server)
        raise
    return server


def wait_ready(server: Server) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            break
        with contextlib.suppress(OSError, http.client.HTTPException):
            if get(server.launch.ports["http"], server.launch.ready_path)[0] == 200:
                return
        time.sleep(0.1)
    tail = "\n".join(server.log.read_text(errors="replace").splitlines()[-15:])
    code = server.process.poll()
    state = "not ready" if code is None else f"exit code {code}"
    raise ServerError(f"{server.name}: {state}; the end of its log:\n{tail}")


def stop(server: Server) -> int:
    """SIGTERM to the process that we started; SIGKILL to what is left of its tree in the end."""
    processes.thaw(server.root)
    left = processes.tree(server.root)
    if server.process.poll() is None:
        server.process.terminate()
    try:
        server.exit_code = server.process.wait(STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        server.exit_code = -signal.SIGKILL
    for process in left:
        with contextlib.suppress(*processes.GONE):
            process.kill()  # psutil refuses when the id is somebody else's by now
    if server.process.poll() is None:
        server.process.wait()
    processes.wait_gone(left, KILL_LIMIT_S)
    return server.exit_code


@contextlib.contextmanager
def running(name: str, launch: Launch, log: Path) -> Iterator[Server]:
    """Stopped at the end, whatever happened in between."""
    server = start(name, launch, log)
    try:
        yield server
    finally:
        stop(server)


# --- questions -----------------------------------------------------------------------------------


def get(port: int, path: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def post(server: Server, path: str) -> None:
    """An empty POST to its HTTP port; ServerError with what it says where that is not a 200."""
    connection = http.client.HTTPConnection(
        "127.0.0.1", server.launch.ports["http"], timeout=START_LIMIT_S
    )
    try:
        connection.request("POST", path)
        response = connection.getresponse()
        body = response.read()
    except (OSError, http.client.HTTPException) as problem:
        raise ServerError(f"{server.name}, {path}: {problem!r}") from problem
    finally:
        connection.close()
    if response.status != 200:
        raise ServerError(f"{server.name}, {path}: status {response.status}: {body[:500]!r}")


def check(server: Server, request: Request, expected: np.ndarray, tolerance: float) -> Answer:
    """One request, compared with torch's own answer; ServerError where it is not the same."""
    port = server.launch.ports[request.protocol]
    call = _call_grpc if request.protocol == "grpc" else _call_http
    try:
        headers, body = call(port, request)
        error = wire.error_of(request.read(headers, body), expected)
    except (OSError, http.client.HTTPException, ValueError, KeyError, wire.WireError) as problem:
        raise ServerError(f"{server.name}, {request.protocol}: {problem!r}") from problem
    if not error <= tolerance:
        raise ServerError(f"{server.name}, {request.protocol}: the answer is off by {error:.2e}")
    prefix = GRPC_PREFIX_BYTES if request.protocol == "grpc" else 0
    return Answer(error, len(body) + prefix)


def _call_http(port: int, request: Request) -> tuple[Mapping[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_LIMIT_S)
    try:
        connection.request("POST", request.path, request.body, dict(request.headers))
        response = connection.getresponse()
        body = response.read()
    finally:
        connection.close()
    if response.status != 200:
        raise ServerError(f"status {response.status}: {body[:500]!r}")
    return {name.lower(): value for name, value in response.getheaders()}, body


def _call_grpc(port: int, request: Request) -> tuple[Mapping[str, str], bytes]:
    """The same bytes as h2load sends, through gRPC's own client: status 0 or an exception."""
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
        method = channel.unary_unary(request.path)
        try:
            body = method(
                request.body[GRPC_PREFIX_BYTES:], timeout=ANSWER_LIMIT_S, wait_for_ready=True
            )
        except grpc.RpcError as error:
            raise ServerError(f"gRPC {error.code().name}: {error.details()}") from error
    return {}, body


def statistics(port: int, model: str) -> Statistics:
    """The model's counters, as the v2 statistics extension gives them."""
    status, body = get(port, f"/v2/models/{model}/stats")
    if status != 200:
        raise ServerError(f"/v2/models/{model}/stats: {status} {body[:500]!r}")
    (found,) = json.loads(body)["model_stats"]
    parts: dict[str, Any] = found["inference_stats"]
    return Statistics(
        inference_count=int(found["inference_count"]),
        execution_count=int(found["execution_count"]),
        success=int(parts["success"]["count"]),
        queue_ns=int(parts["queue"]["ns"]),
        input_ns=int(parts["compute_input"]["ns"]),
        infer_ns=int(parts["compute_infer"]["ns"]),
        output_ns=int(parts["compute_output"]["ns"]),
    )
