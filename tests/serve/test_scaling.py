"""Autoscaling by queue depth: up with a burst, down when it is quiet, to zero where a model may,
and never a lost request. Two Routers; models that answer with the process that ran them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tritonclient.utils import InferenceServerException

from tests import models
from tests.serve import repository
from tests.serve.clients import aio_client, infer_aio
from tests.serve.server import Server, manta_serve, wait_equal, wait_for

# Each waits for several processes to start, one after the other.
pytestmark = pytest.mark.timeout(600)

BURST = {
    "min_count": 1,
    "max_count": 3,
    "target_queued_requests": 2,
    "upscale_delay_s": 1,
    "downscale_delay_s": 3,
}
ZERO = {"min_count": 0, "max_count": 2, "downscale_delay_s": 1}
TWO = "instance_group [ { kind: KIND_CPU count: 2 } ]\n"
SECONDS = 0.05
LONG_S = 7.0
MOST_PAUSES = 30


def scaled(**fields: Any) -> str:
    return repository.parameter("AUTOSCALING", json.dumps(fields).replace('"', '\\"'))


@pytest.fixture(scope="module")
def scaling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("scaling")
    repository.write_who(root, "burst", scaled(**BURST))
    repository.write_who(root, "fixed", "")
    for name in ("sleeper", "brittle", "woken"):
        repository.write_who(root, name, scaled(**ZERO))
    flags = ["--router-replicas=2", "--model-control-mode=explicit", "--load-model=*"]
    # What waits for a replica to start, and what is held, is not judged by how long that takes.
    flags += ["--max-queue-secs=240", "--max-execution-secs=240"]
    with manta_serve(root, *flags) as one:
        one.wait_ready()
        wait_for(lambda: len(one.replica_pids("manta:Router")) == 2, 60, "two Routers")
        yield one


def replicas(server: Server, name: str) -> tuple[int, int]:
    """Wanted and running, as the metrics tell."""
    page = httpx.get(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=30).text
    values = {
        family.name: sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.labels.get("model") == name
    }
    return int(values["manta_replicas_wanted"]), int(values["manta_replicas_running"])


def settles(server: Server, name: str, wanted: tuple[int, int]) -> None:
    """A replica that is busy may count as gone until it speaks again."""
    wait_equal(lambda: replicas(server, name), wanted, 60)


def processes(server: Server, name: str) -> int:
    """Those that Serve runs."""
    running = server.peek()["running"]
    return sum(sum(app.values()) for key, app in running.items() if f".{name}." in key)


class Clients:
    """So many of them, one request after another, half over HTTP and half over gRPC."""

    def __init__(self, server: Server, name: str) -> None:
        self._server, self._name = server, name
        self._tasks: list[asyncio.Task[None]] = []
        self._pause_s = 0.0
        self.stopped = False
        self.sent = 0
        self.pids: list[int] = []
        self.errors: list[str] = []

    async def begin(self, count: int, pause_s: float = 0.0) -> None:
        """In place of those that there are; what they have sent is waited for."""
        await self.end()
        self.stopped = False
        for number in range(count):
            work = self._run("http" if number % 2 else "grpc", pause_s)
            self._tasks.append(asyncio.create_task(work))

    async def _run(self, protocol: str, pause_s: float) -> None:
        asked = {"s": np.full((1, 1), SECONDS, np.float32)}
        async with aio_client(self._server, protocol) as client:
            while not self.stopped:
                self.sent += 1
                try:
                    reply = await infer_aio(client, self._name, asked)
                    self.pids.append(int(reply.as_numpy("pid")[0, 0]))
                except InferenceServerException as error:
                    self.errors.append(str(error))
                await asyncio.sleep(pause_s)

    async def end(self) -> None:
        self.stopped = True
        await asyncio.gather(*self._tasks)
        self._tasks = []


@contextlib.asynccontextmanager
async def clients(server: Server, name: str, count: int) -> AsyncIterator[Clients]:
    one = Clients(server, name)
    await one.begin(count)
    try:
        yield one
    finally:
        await one.end()


def told(server: Server, pattern: str) -> None:
    """`manta serve` asks the Controller now and then what there is to tell."""
    wait_for(lambda: re.search(pattern, server.output()), 60, f"the log has {pattern}")


async def until(server: Server, name: str, wanted: tuple[int, int]) -> list[tuple[int, int]]:
    """All that was seen on the way."""
    seen: list[tuple[int, int]] = []

    def reached() -> bool:
        seen.append(replicas(server, name))
        return seen[-1] == wanted

    await asyncio.to_thread(wait_for, reached, 120, f"{name} has {wanted}")
    return seen


def test_a_burst_scales_up_quiet_scales_down_and_no_request_is_lost(scaling: Server) -> None:
    async def run() -> None:
        settles(scaling, "burst", (1, 1))
        settles(scaling, "fixed", (1, 1))
        async with clients(scaling, "burst", 12) as burst, clients(scaling, "fixed", 12) as fixed:
            began = time.monotonic()
            await until(scaling, "burst", (3, 3))
            print(f"three replicas READY {time.monotonic() - began:.1f} s after the burst began")
            before = len(burst.pids)
            await asyncio.to_thread(
                wait_for, lambda: len(set(burst.pids[before:])) == 3, 60, "all three answer"
            )
            await asyncio.to_thread(settles, scaling, "fixed", (1, 1))  # the control
            await asyncio.gather(burst.begin(2), fixed.end())
            # Whoever leaves first may be at work.
            await asyncio.to_thread(
                wait_for, lambda: replicas(scaling, "burst") != (3, 3), 60, "one leaves"
            )
            await burst.begin(1, pause_s=0.3)
            seen = await until(scaling, "burst", (1, 1))
            assert all(1 <= wanted <= 3 for wanted, _ in seen)
            before = len(burst.pids)
            await asyncio.to_thread(
                wait_for, lambda: len(burst.pids) > before + 5, 60, "it goes on"
            )
            await burst.begin(12)  # and again, while replicas have just left
            await until(scaling, "burst", (3, 3))
            await burst.end()
        for one in (burst, fixed):
            assert one.errors == [] and len(one.pids) == one.sent
        assert len(set(fixed.pids)) == 1

    asyncio.run(run())
    # By way of 2 where the burst is slow to come.
    told(scaling, r"model 'burst' version 1 is scaled from 1 to [23] \(")
    told(scaling, r"model 'burst' version 1 is scaled from [12] to 3 \(")
    assert "model 'fixed' version 1 is scaled" not in scaling.output()


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_model_at_zero_is_ready_and_answers_whoever_asks(scaling: Server, protocol: str) -> None:
    async def run() -> None:
        await until(scaling, "sleeper", (0, 0))
        await asyncio.to_thread(
            wait_for, lambda: processes(scaling, "sleeper") == 0, 60, "no process is left"
        )
        for path in ("/v2/health/ready", "/v2/models/sleeper/ready", "/v2/models/sleeper/stats"):
            assert scaling.get(path).status_code == 200, path
        began = time.monotonic()
        asked = {"s": np.full((1, 1), SECONDS, np.float32)}
        async with aio_client(scaling, protocol) as client:
            index = await client.get_model_repository_index()
            assert "READY" in str(index) and "UNAVAILABLE" not in str(index)
            first = asyncio.create_task(infer_aio(client, "sleeper", asked))
            more = [infer_aio(client, "sleeper", asked) for _ in range(10)]
            assert (await first).as_numpy("pid")[0, 0] > 0
            print(f"first answer over {protocol} after {time.monotonic() - began:.2f} s")
            assert len(await asyncio.gather(*more)) == 10
            assert await client.is_model_ready("sleeper")

    asyncio.run(run())


def test_requests_that_come_just_when_the_last_replica_goes_are_answered(
    scaling: Server,
) -> None:
    """Pauses about as long as it takes to fall asleep: ten, and longer ones until it has done so
    before a request."""
    asleep = re.compile(r"model 'sleeper' version 1 is scaled from [12] to 0 \(")

    def slept() -> int:
        return len(asleep.findall(scaling.output()))

    async def run() -> int:
        asked = {"s": np.full((1, 1), SECONDS, np.float32)}
        async with aio_client(scaling, "http") as client:
            assert (await infer_aio(client, "sleeper", asked)).as_numpy("pid")[0, 0] > 0
            before = slept()
            for number in range(MOST_PAUSES):
                await asyncio.sleep(1.0 + 0.15 * number)
                found = slept() - before
                assert (await infer_aio(client, "sleeper", asked)).as_numpy("pid")[0, 0] > 0
                if number >= 9 and found:
                    break
        return found

    assert asyncio.run(run())


def test_what_wakes_and_does_not_load_fails_its_requests_clearly(scaling: Server) -> None:
    """Its files have changed since the Controller has read them."""

    async def run() -> None:
        await until(scaling, "brittle", (0, 0))
        source = scaling.repository / "brittle" / "1" / "model.py"
        source.write_text(source.read_text() + "\n# another\n")
        asked = {"s": np.full((1, 1), SECONDS, np.float32)}
        async with aio_client(scaling, "http") as client:
            with pytest.raises(InferenceServerException, match="not at ready state: .*differs"):
                await infer_aio(client, "brittle", asked)
            assert not await client.is_model_ready("brittle")
            await client.load_model("brittle")
            assert (await infer_aio(client, "brittle", asked)).as_numpy("pid")[0, 0] > 0

    asyncio.run(run())


def test_new_bounds_are_taken_over_without_a_new_process(scaling: Server) -> None:
    async def run() -> None:
        await until(scaling, "burst", (1, 1))
        async with clients(scaling, "burst", 1) as burst:
            repository.write_who(
                scaling.repository, "burst", scaled(**{**BURST, "min_count": 2}) + TWO
            )
            async with aio_client(scaling, "http") as client:
                await client.load_model("burst")
            assert replicas(scaling, "burst") == (2, 2)
            before = set(burst.pids)
            await burst.begin(4)
            await asyncio.to_thread(wait_for, lambda: len(set(burst.pids)) > 1, 60, "both answer")
        assert burst.errors == [] and before <= set(burst.pids)

    asyncio.run(run())


def test_a_long_request_outlives_the_replica_that_is_sent_away(scaling: Server) -> None:
    """Both replicas are at work when one of them is too many."""
    folder = scaling.repository / "long"

    def write(most: int) -> None:
        bounds = scaled(**{**BURST, "max_count": most, "downscale_delay_s": 300})
        count = f"instance_group [ {{ kind: KIND_CPU count: {most} }} ]\n"
        text = repository.config(
            [repository.tensor("s", "1")],
            [repository.tensor("t", "1")],
            engine='backend: "pytorch"\nruntime: "model.py"',
            max_batch_size=1,
            more=count + bounds + repository.EAGER,
        )
        repository.write_config(scaling.repository, "long", text)

    def hold(count: int) -> None:
        wait_for(lambda: len(repository.held(folder)) == count, 60, f"{count} hold a request")

    async def run(go: Callable[[], None]) -> None:
        asked = {"s": np.full((1, 1), -1.0, np.float32)}
        async with aio_client(scaling, "http") as client:
            await client.load_model("long")
            replies = []
            for count in (1, 2):  # the second knows that one replica is busy
                replies.append(asyncio.create_task(infer_aio(client, "long", asked)))
                await asyncio.to_thread(hold, count)
            write(1)
            await client.load_model("long")
            await asyncio.to_thread(
                wait_for, lambda: processes(scaling, "long") == 1, 60, "one is sent away"
            )
            await asyncio.sleep(LONG_S)
            assert [reply for reply in replies if reply.done()] == []
            go()
            for reply in await asyncio.gather(*replies):
                assert reply.as_numpy("t")[0, 0] == -2.0
            await client.unload_model("long")

    models.save_eager(repository.SLOW, scaling.repository, "long")
    write(2)
    with repository.holding(folder) as go:
        asyncio.run(run(go))
    told(scaling, r"model 'long' version 1 is resized \(")
    loaded = scaling.output().count("model 'long' version 1 is READY after")
    assert loaded == 1  # the same processes


def test_another_controller_finds_a_model_at_zero_and_wakes_it(scaling: Server) -> None:
    async def run() -> None:
        await until(scaling, "woken", (0, 0))
        [old] = scaling.replica_pids("manta:Controller")
        os.kill(old, signal.SIGKILL)
        asked = {"s": np.full((1, 1), SECONDS, np.float32)}
        async with aio_client(scaling, "http") as client:
            assert await client.is_model_ready("woken")
            assert (await infer_aio(client, "woken", asked)).as_numpy("pid")[0, 0] > 0

    asyncio.run(run())
    told(scaling, "model 'woken' version 1 is adopted")
    assert scaling.output().count("model 'woken' version 1 is READY after") == 1
    wait_for(scaling.ready, 60, "the server is ready")
    assert scaling.stop() == 0
