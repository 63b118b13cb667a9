"""Starts, watches and stops the two servers under test, each in a process group of its own.

Owns: ports, readiness, memory by role, the server's own statistics, the one checked answer.
Measures no time. Called by `bench.py`.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.mlp import HEADER, PATH, Request, read_answer

START_LIMIT_S, STOP_LIMIT_S = 180.0, 60.0
MIB = 1 << 20


class ServerError(Exception):
    """A server that did not start, answer or stop as it should."""


@dataclass(slots=True)
class Server:
    """`exit_code` is None while it runs."""

    name: str
    port: int
    process: subprocess.Popen[bytes]
    log: Path
    exit_code: int | None = None


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident memory of one process; `pss` counts what is shared by its share."""

    role: str
    pid: int
    title: str
    rss_mib: float
    pss_mib: float


@dataclass(frozen=True, slots=True)
class Statistics:
    """Cumulative; durations are ns summed over requests (spec/server.md §5.1)."""

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


def manta_command(repository: Path, ports: Sequence[int], batching: str) -> list[str]:
    http_port, grpc_port, metrics_port = ports
    return [
        str(Path(sys.executable).parent / "manta"),
        "serve",
        f"--model-repository={repository}",
        f"--http-port={http_port}",
        f"--grpc-port={grpc_port}",
        f"--metrics-port={metrics_port}",
        f"--batching={batching}",
    ]


def baseline_command(model_file: Path, port: int, executor: str) -> list[str]:
    script = str(Path(__file__).with_name("baseline.py"))
    flags = [f"--model={model_file}", f"--port={port}", f"--executor={executor}"]
    return [sys.executable, script, *flags]


@contextlib.contextmanager
def running(name: str, command: Sequence[str], port: int, logs: Path) -> Iterator[Server]:
    """The server, ready; stopped at the end, whatever happened in between."""
    log = logs / f"{name}.log"
    with log.open("wb") as sink:
        try:
            process = subprocess.Popen(
                command, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            raise ServerError(f"{name}: {error}") from error
    server = Server(name, port, process, log)
    try:
        wait_ready(server)
        yield server
    finally:
        server.exit_code = stop(server)


def wait_ready(server: Server) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            break
        with contextlib.suppress(OSError, http.client.HTTPException):
            if get(server.port, "/v2/health/ready")[0] == 200:
                return
        time.sleep(0.2)
    tail = "\n".join(server.log.read_text(errors="replace").splitlines()[-30:])
    code = server.process.poll()
    state = "not ready" if code is None else f"exit code {code}"
    raise ServerError(f"{server.name}: {state}; the end of {server.log}:\n{tail}")


def stop(server: Server) -> int:
    """SIGTERM to the process that we started; SIGKILL to its group if it does not end in time."""
    if server.process.poll() is None:
        server.process.terminate()
    try:
        return server.process.wait(STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.process.pid, signal.SIGKILL)
        return server.process.wait()


# --- questions -----------------------------------------------------------------------------------


def get(port: int, path: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def largest_error(server: Server, request: Request) -> float:
    """One request, compared with torch's own answer; ServerError beyond 1e-5."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        connection.request("POST", PATH, request.body, {HEADER: str(request.header_bytes)})
        response = connection.getresponse()
        body = response.read()
    finally:
        connection.close()
    if response.status != 200:
        raise ServerError(f"{server.name}: {response.status} {body[:500]!r}")
    result = read_answer(body, int(response.headers[HEADER]))
    if result.shape != request.expected.shape:
        raise ServerError(f"{server.name}: the answer has shape {result.shape}")
    error = float(np.abs(result - request.expected).max())
    if not error <= 1e-5:
        raise ServerError(f"{server.name}: the answer is off by {error:.2e}")
    return error


def statistics(server: Server) -> Statistics:
    """The mlp's counters, once they stand still: they reach the server's books a little later."""
    last = _read_statistics(server.port)
    for _ in range(10):
        time.sleep(0.5)
        now = _read_statistics(server.port)
        if now == last:
            return now
        last = now
    return last


def _read_statistics(port: int) -> Statistics:
    status, body = get(port, "/v2/models/mlp/stats")
    if status != 200:
        raise ServerError(f"/v2/models/mlp/stats: {status} {body[:500]!r}")
    (model,) = json.loads(body)["model_stats"]
    parts: dict[str, Any] = model["inference_stats"]
    return Statistics(
        inference_count=int(model["inference_count"]),
        execution_count=int(model["execution_count"]),
        success=int(parts["success"]["count"]),
        queue_ns=int(parts["queue"]["ns"]),
        input_ns=int(parts["compute_input"]["ns"]),
        infer_ns=int(parts["compute_infer"]["ns"]),
        output_ns=int(parts["compute_output"]["ns"]),
    )


# --- processes -----------------------------------------------------------------------------------


def role(title: str) -> str | None:
    """Who a process is, from Serve's title for it: ray::ServeReplica:<app>:<deployment>."""
    _, found, rest = title.partition("ServeReplica:")
    if not found:
        return None
    for name in ("Router", "Controller"):
        if name in rest:
            return name
    return "model replica"


def tree(server: Server) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(server.process.pid)
        return [parent, *parent.children(recursive=True)]
    return []


def memory(server: Server) -> list[Memory]:
    """One entry per process whose role is known."""
    found = []
    for process in tree(server):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            title = " ".join(process.cmdline())
            if (name := role(title)) is not None:
                full = process.memory_full_info()
                sizes = (full.rss / MIB, full.pss / MIB)
                found.append(Memory(name, process.pid, title.strip(), *sizes))
    return sorted(found, key=lambda one: (one.role, one.pid))


def cpu_seconds(server: Server) -> float:
    """CPU time of all its processes so far."""
    total = 0.0
    for process in tree(server):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            times = process.cpu_times()
            total += times.user + times.system
    return total
