"""Everything at once, for ten minutes: `make soak`, or MANTA_SOAK_S seconds of it.

Good requests over both protocols, large ones, malformed ones, models that raise, deadlines, and
clients that leave or die in the middle of a request. Then the books: every error was one that was
asked for, the counters say what was sent, and no process grows.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import torch
from tritonclient.utils import InferenceServerException

from tests.serve import repository
from tests.serve.clients import aio_client, infer_aio, rows, statistics
from tests.serve.server import Server, manta_serve, wait_for

SECONDS = float(os.environ.get("MANTA_SOAK_S", "600"))
# Caches fill, allocators find their size; what grows after that is a leak.
SETTLE_S = min(120.0, SECONDS / 3)
SAMPLE_S = 1.0
# Of this long the smallest size counts: what requests hold comes and goes, a leak lifts the floor.
FLOOR_S = 20.0
LIMIT_MIB_PER_MINUTE = 1.0
pytestmark = [pytest.mark.soak, pytest.mark.timeout(SECONDS + 600)]

MODELS = ("mlp", "eager_mlp", "picky", "slow", "big")
LENGTH = "Inference-Header-Content-Length"
# Body, headers and the status that it must have.
MALFORMED: tuple[tuple[bytes, dict[str, str], int], ...] = (
    (b'{"inputs": [', {}, 500),
    (b"", {}, 500),
    (b'{"inputs": []}', {}, 400),
    (b'{"inputs": [{"name":"INPUT__0","datatype":"FP32","shape":[1,7],"data":[1]}]}', {}, 500),
    (b'{"inputs": [{"name":"z","datatype":"FP32","shape":[1,1],"data":[1]}]}', {}, 400),
    (b"{}", {LENGTH: "-3"}, 400),
    (b"{}", {LENGTH: "99999999999"}, 400),
    (b"[" * 5000, {}, 400),
    (bytes(1000), {"Content-Encoding": "br"}, 501),
)
# A client of its own, which is killed while its requests are on the way.
DOOMED = """
import socket, sys, time
head, body = sys.argv[2].encode().decode("unicode_escape").encode(), bytes(400_000)
connections = [socket.create_connection(("127.0.0.1", int(sys.argv[1]))) for _ in range(8)]
for one in connections:
    one.sendall(head + body[: 100_000])
time.sleep(60)
"""


class Books:
    """What was sent, by kind, and every answer that was not the one to expect."""

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()
        self.wrong: list[str] = []

    def note(self, kind: str, right: bool, what: object = "") -> None:
        self.sent[kind] += 1
        if not right:
            self.wrong.append(f"{kind}: {what}"[:300])


@pytest.fixture(scope="module")
def soaked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = repository.build(tmp_path_factory.mktemp("soak"), None)
    loads = [f"--load-model={name}" for name in MODELS]
    with manta_serve(root, "--model-control-mode=explicit", *loads) as server:
        server.wait_ready()
        yield server
        assert server.stop() == 0, server.output()[-3000:]


async def good(server: Server, books: Books, protocol: str, seed: int) -> None:
    """Rows of which each has its own answer."""
    x = rows(4096, 8, seed)
    with torch.inference_mode():
        expected = repository.mlp()(torch.from_numpy(x)).numpy()
    chance = random.Random(seed)
    async with aio_client(server, protocol) as client:
        while True:
            at, count = chance.randrange(4000), chance.randint(1, 4)
            reply = await infer_aio(client, "mlp", {"INPUT__0": x[at : at + count]})
            right = np.allclose(reply.as_numpy("OUTPUT__0"), expected[at : at + count], atol=1e-5)
            books.note("good", right, f"rows {at} to {at + count} over {protocol}")
            await asyncio.sleep(0.005)


async def large(server: Server, books: Books, protocol: str) -> None:
    chance = random.Random(7)
    async with aio_client(server, protocol) as client:
        while True:
            x = np.full((1, chance.randint(1, 1 << 20)), chance.random(), np.float32)
            reply = await infer_aio(client, "big", {"x": x})
            books.note("large", bool(np.array_equal(reply.as_numpy("OUTPUT__0"), x)))
            await asyncio.sleep(0.2)


async def malformed(server: Server, books: Books) -> None:
    url = f"http://{server.http}/v2/models/mlp/infer"
    async with httpx.AsyncClient(timeout=30) as client:
        while True:
            for content, headers, status in MALFORMED:
                reply = await client.post(url, content=content, headers=headers)
                right = reply.status_code == status and list(reply.json()) == ["error"]
                books.note("malformed", right, f"{content[:40]!r} {reply.status_code} {reply.text}")
                await asyncio.sleep(0.01)


async def raising(server: Server, books: Books, protocol: str) -> None:
    """The model itself raises, in a batch of its own."""
    async with aio_client(server, protocol) as client:
        while True:
            error = await refused(infer_aio(client, "picky", {"x": -np.ones((1, 2), np.float32)}))
            books.note("raising", error in ("500", "StatusCode.INTERNAL"), error)


async def late(server: Server, books: Books) -> None:
    """Deadlines that pass, in the queue or while the model sleeps."""
    async with aio_client(server, "grpc") as client:
        nap = {"s": np.full((1, 1), 0.05, np.float32)}
        while True:
            error = await refused(infer_aio(client, "slow", nap, client_timeout=0.02))
            books.note("late", "DEADLINE" in error, error)


async def refused(call: Awaitable[Any]) -> str:
    try:
        await call
    except InferenceServerException as error:
        return str(error.status())
    return "answered"


async def leaving(server: Server, books: Books) -> None:
    """Connections that end within a head, within a body, or before the answer; half of them by a
    reset."""
    x = rows(1, 8)
    body = b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1,8],"data":%b}]}' % (
        str(x[0].tolist()).encode()
    )
    head = b"POST /v2/models/eager_mlp/infer HTTP/1.1\r\nHost: m\r\nContent-Length: %d\r\n\r\n" % (
        len(body)
    )
    whole = head + body
    cuts = (0, 10, len(head) - 1, len(head), len(head) + 20, len(whole) - 1, len(whole))
    while True:
        for cut in cuts:
            for reset in (False, True):
                _, writer = await asyncio.open_connection("127.0.0.1", server.http_port)
                writer.write(whole[:cut])
                await writer.drain()
                if reset:
                    option = struct.pack("ii", 1, 0)
                    raw = writer.get_extra_info("socket")
                    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, option)
                writer.close()
                books.note("leaving", True)
                await asyncio.sleep(0.02)


async def dying(server: Server, books: Books) -> None:
    head = (
        "POST /v2/models/big/infer HTTP/1.1\\r\\nHost: m\\r\\n"
        f"{LENGTH}: 100\\r\\nContent-Length: 400000\\r\\n\\r\\n"
    )
    while True:
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", DOOMED, str(server.http_port), head
        )
        await asyncio.sleep(2)
        child.send_signal(signal.SIGKILL)
        await child.wait()
        books.note("dying", True)
        await asyncio.sleep(8)


async def everything(server: Server, books: Books, seconds: float) -> None:
    """All of it side by side; an exception in any of it ends it all."""
    kinds: list[Callable[[], Awaitable[None]]] = [
        *(
            lambda p=protocol, n=number: good(server, books, p, n)
            for number, protocol in enumerate(("http", "http", "grpc", "grpc"))
        ),
        *(lambda p=p: large(server, books, p) for p in ("http", "grpc")),
        *(lambda p=p: raising(server, books, p) for p in ("http", "grpc")),
        lambda: malformed(server, books),
        lambda: late(server, books),
        lambda: leaving(server, books),
        lambda: dying(server, books),
    ]
    tasks = [asyncio.ensure_future(kind()) for kind in kinds]
    done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    for task, result in zip(tasks, ended, strict=True):
        assert task not in done, f"ended early: {result!r}"


class Scale:
    """The resident memory of every process of the server, taken again and again."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.taken: dict[int, list[tuple[float, float]]] = {}
        self.names: dict[int, str] = {}

    async def watch(self) -> None:
        while True:
            await asyncio.to_thread(self.take)
            await asyncio.sleep(SAMPLE_S)

    def take(self) -> None:
        now_min = time.monotonic() / 60
        for process in self._server.descendants():
            with contextlib.suppress(psutil.Error):
                size_mib = process.memory_info().rss / 2**20
                self.taken.setdefault(process.pid, []).append((now_min, size_mib))
                title = " ".join(process.cmdline())[:200]
                self.names[process.pid] = title.replace(str(Path(sys.prefix)), "")[:60]

    def slopes(self, settle_s: float) -> dict[str, tuple[float, float, float]]:
        """MiB a minute after the settling, first and last floor of who was there all the time."""
        longest = max(len(each) for each in self.taken.values())
        found = {}
        for pid, each in sorted(self.taken.items()):
            if len(each) >= longest - 2:
                kept = floors([one for one in each if one[0] >= each[0][0] + settle_s / 60])
                name = f"{pid} {self.names[pid]}"
                found[name] = (slope(kept), kept[0][1], kept[-1][1])
                if found[name][0] >= LIMIT_MIB_PER_MINUTE:
                    print(f"floors of {name}:", *(f"{size:.1f}" for _, size in kept))
        return found


def floors(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The smallest of each whole window, at the time that it was seen."""
    windows: dict[int, list[tuple[float, float]]] = {}
    for at, size in points:
        windows.setdefault(int((at - points[0][0]) * 60 / FLOOR_S), []).append((at, size))
    last = max(windows)
    return [min(each, key=lambda one: one[1]) for n, each in windows.items() if n < max(last, 1)]


def slope(points: list[tuple[float, float]]) -> float:
    times, sizes = np.array(points).T
    return float(np.polyfit(times - times[0], sizes, 1)[0])


def test_control_a_leak_has_a_slope() -> None:
    """Also under what large requests hold for a moment."""
    minutes = [i * SAMPLE_S / 60 for i in range(480)]
    chance = np.random.default_rng(0)
    held = chance.exponential(20, 480)
    leaking = [(at, 150 + 1.5 * at + more) for at, more in zip(minutes, held, strict=True)]
    steady = [(at, 150 + more) for at, more in zip(minutes, held, strict=True)]
    assert slope(floors(leaking)) > LIMIT_MIB_PER_MINUTE > slope(floors(steady))


def test_ten_minutes_of_everything(soaked: Server) -> None:
    import tritonclient.http as httpclient

    client = httpclient.InferenceServerClient(soaked.http, network_timeout=60)
    before = {name: statistics(client, name) for name in MODELS}
    books, scale = Books(), Scale(soaked)

    async def run() -> None:
        watch = asyncio.create_task(scale.watch())
        await everything(soaked, books, SECONDS)
        watch.cancel()

    asyncio.run(run())
    print("sent", dict(books.sent))
    slopes = scale.slopes(SETTLE_S)
    for name, (each, first, last) in sorted(slopes.items(), key=lambda item: -item[1][0]):
        print(f"{each:7.2f} MiB/min  {first:7.1f} to {last:7.1f} MiB  {name}")
    assert not books.wrong, books.wrong[:10]
    assert soaked.ready()

    def gained(name: str, what: str) -> int:
        return statistics(client, name)[what] - before[name][what]

    # Whoever was cut off at the end may or may not have been counted.
    wait_for(lambda: gained("mlp", "success") >= books.sent["good"], 30, "all are counted")
    assert gained("mlp", "success") - books.sent["good"] <= 4
    assert gained("mlp", "fail") <= 4  # what is malformed never gets into a queue
    assert gained("picky", "success") == 0
    assert 0 <= gained("picky", "fail") - books.sent["raising"] <= 2
    page = httpx.get(f"http://127.0.0.1:{soaked.metrics_port}/metrics").text
    for name in MODELS:
        counted = statistics(client, name)["success"]
        assert f'nv_inference_request_success{{model="{name}",version="1"}} {counted}\n' in page
        assert f'nv_inference_pending_request_count{{model="{name}",version="1"}} 0\n' in page
    client.close()
    growing = {name: each for name, each in slopes.items() if each[0] >= LIMIT_MIB_PER_MINUTE}
    assert not growing
