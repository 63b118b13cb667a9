"""Closed-loop load on one HTTP/1.1 endpoint: every connection sends, waits, and sends again.

Owns the two generators: `h2load` (Debian's nghttp2-client) and, where that is missing, our own
asyncio client. Knows nothing of the servers. Called by `bench.py`.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.mlp import HEADER, PATH, Request

WARM_UP_S = 1.0


@dataclass(frozen=True, slots=True)
class Load:
    """What one run gave, without its warm-up. Latencies in microseconds."""

    requests: int
    failed: int
    seconds: float
    latencies_us: np.ndarray

    @property
    def throughput(self) -> float:
        return self.requests / self.seconds

    def percentile_us(self, percent: float) -> float:
        return float(np.percentile(self.latencies_us, percent))


class LoadError(Exception):
    """The generator did not give a usable result."""


def generator() -> str:
    """Which generator `run` uses here."""
    return "h2load" if shutil.which("h2load") else "asyncio"


def run(port: int, request: Request, connections: int, seconds: float) -> Load:
    """Loads 127.0.0.1:`port` for `seconds` after a short warm-up."""
    if generator() == "h2load":
        return run_h2load(port, request, connections, seconds)
    return asyncio.run(run_asyncio(port, request, connections, seconds))


# --- h2load --------------------------------------------------------------------------------------


def run_h2load(port: int, request: Request, connections: int, seconds: float) -> Load:
    with tempfile.TemporaryDirectory() as temporary:
        body, log = Path(temporary) / "body", Path(temporary) / "log"
        body.write_bytes(request.body)
        command = ["h2load", "--h1", f"--clients={connections}", "--threads=1"]
        command += [f"--duration={int((seconds + WARM_UP_S) * 1e3)}ms", f"--data={body}"]
        command += [f"--header={HEADER}: {request.header_bytes}", f"--log-file={log}"]
        command += ["--header=Content-Type: application/octet-stream"]
        command += [f"http://127.0.0.1:{port}{PATH}"]
        limit = seconds + WARM_UP_S + 30
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
        if done.returncode != 0 or not log.is_file():
            raise LoadError(f"h2load ended with {done.returncode}: {done.stdout}{done.stderr}")
        return read_log(log.read_text())


def read_log(text: str) -> Load:
    """h2load's log: start in us since the epoch, status, us until the end of the response.

    The warm-up is cut off here, by end time, so that both generators count alike.
    """
    rows = [line.split("\t") for line in text.splitlines() if line]
    if not rows:
        raise LoadError("no request was answered")
    table = np.array([[int(cell) for cell in row[:3]] for row in rows], np.int64)
    ends = table[:, 0] + table[:, 2]
    begin = table[:, 0].min() + int(WARM_UP_S * 1e6)
    kept = ends >= begin
    good = kept & (table[:, 1] == 200)
    if not good.any():
        raise LoadError(f"no request succeeded after the warm-up; {int(kept.sum())} failed")
    seconds = float(ends[kept].max() - begin) / 1e6
    return Load(int(good.sum()), int((kept & ~good).sum()), seconds, table[good, 2])


# --- asyncio -------------------------------------------------------------------------------------


class Connection(asyncio.Protocol):
    """One connection of the closed loop. `ends_ns` and `took_ns` grow in step."""

    def __init__(self, message: bytes) -> None:
        self.message = message
        self.ends_ns: list[int] = []
        self.took_ns: list[int] = []
        self.failed = 0
        self.open = True
        self._buffer = bytearray()
        self._expected = 0
        self._sent_ns = 0
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.open:
            self.failed += 1
            self.open = False

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self._expected:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            self._expected = end + 4 + content_length(bytes(self._buffer[:end]))
        if len(self._buffer) < self._expected:
            return
        now = time.perf_counter_ns()
        if self._buffer.startswith(b"HTTP/1.1 200 "):
            self.ends_ns.append(now)
            self.took_ns.append(now - self._sent_ns)
        else:
            self.failed += 1
        self._send()

    def close(self) -> None:
        self.open = False
        if self._transport is not None:
            self._transport.close()

    def _send(self) -> None:
        self._buffer.clear()
        self._expected = 0
        if self.open and self._transport is not None:
            self._sent_ns = time.perf_counter_ns()
            self._transport.write(self.message)


def content_length(head: bytes) -> int:
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    raise LoadError("a response without Content-Length")


async def run_asyncio(port: int, request: Request, connections: int, seconds: float) -> Load:
    head = f"POST {PATH} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
    head += f"{HEADER}: {request.header_bytes}\r\nContent-Type: application/octet-stream\r\n"
    message = f"{head}Content-Length: {len(request.body)}\r\n\r\n".encode() + request.body
    loop = asyncio.get_running_loop()
    opened: list[Connection] = []
    try:
        for _ in range(connections):
            _, one = await loop.create_connection(lambda: Connection(message), "127.0.0.1", port)
            opened.append(one)
        begin = time.perf_counter_ns() + int(WARM_UP_S * 1e9)
        await asyncio.sleep(WARM_UP_S + seconds)
        finish = time.perf_counter_ns()
    finally:
        for one in opened:
            one.close()
    took = [
        duration
        for one in opened
        for end, duration in zip(one.ends_ns, one.took_ns, strict=True)
        if begin <= end <= finish
    ]
    failed = sum(one.failed for one in opened)
    if not took:
        raise LoadError(f"no request succeeded after the warm-up; {failed} failed")
    return Load(len(took), failed, (finish - begin) / 1e9, np.array(took) / 1e3)
