"""What becomes of requests that wait for a version without replicas, when it goes or the server."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from configs import tracing
from configs.model import ModelConfig
from configs.server import ServerSettings
from deployments.client import Origin
from deployments.errors import MantaError, ShuttingDown
from deployments.lines import Lines
from deployments.statistics import Recorder
from deployments.tracers import Tracers
from deployments.types import (
    ChannelAddress,
    Endpoint,
    ModelState,
    Target,
    VersionSnapshot,
)
from tests import models

from .virtual_time import run, settle

CONFIG = models.config({"x": [2]}, {"y": [2]})
OTHER = models.config({"x": [3]}, {"y": [2]})
OLD, NEW = "manta.m.1.7", "manta.m.1.8"


class Bench:
    """A Router's lines; `lost` and `starved` are counted."""

    def __init__(self, silent: str) -> None:
        self.silent = silent
        self.starved = 0
        settings = ServerSettings(model_repository=("/models",), batching="direct")
        self.lines = Lines(
            settings,
            Origin("here", "r", use_channels=True, by_reference_bytes=1 << 20, limit_s=9.0),
            Recorder(),
            Tracers(tracing.parse(())),
            lambda application: None,
            self._starve,
        )

    def _starve(self) -> None:
        self.starved += 1

    def follow(self, *applications: str, config: ModelConfig = CONFIG, count: int = 0) -> None:
        """As the Router does with a snapshot: each of them has `count` replicas."""
        ends = tuple(
            Endpoint(f"r{k}", "here", 1, ChannelAddress(self.silent, "t")) for k in range(count)
        )
        versions = [
            VersionSnapshot(
                "m",
                1,
                ModelState.READY,
                config=config,
                application=application,
                targets=(Target("m_0", count, ends),),
            )
            for application in applications
        ]
        for application in self.lines.follow(versions):
            self.lines.let_go(application)

    def ask(self, application: str) -> asyncio.Future[Any]:
        return self.lines.gates()[application].submit(1, "k", (None,), ("y",))

    def waiting(self) -> list[int]:
        return list(self.lines.pending().values())


@pytest.fixture
def silent(tmp_path: Path) -> Iterator[str]:
    """Where a replica lets everybody in and answers nobody."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        yield str(tmp_path / "s")


def drive(test: Callable[[Bench], Coroutine[Any, Any, None]]) -> Callable[[str], None]:
    def wrapper(silent: str) -> None:
        run(lambda clock: test(Bench(silent)))

    wrapper.__name__ = test.__name__
    return wrapper


def error(reply: asyncio.Future[Any]) -> str:
    assert reply.done()
    failure = reply.exception()
    assert isinstance(failure, MantaError) and failure.code.name == "UNAVAILABLE"
    return str(failure)


@drive
async def test_what_waits_for_an_unloaded_version_without_replicas_fails_at_once(
    bench: Bench,
) -> None:
    bench.follow(OLD)
    reply = bench.ask(OLD)
    assert bench.starved == 1 and bench.waiting() == [1]
    bench.follow()
    await settle()
    assert error(reply) == "model 'm' was unloaded"
    assert bench.lines.in_use() == ()  # the Controller need not wait for this Router


@drive
async def test_what_waits_goes_to_the_next_generation(bench: Bench) -> None:
    bench.follow(OLD)
    reply = bench.ask(OLD)
    bench.follow(NEW)
    await settle()
    assert not reply.done() and bench.waiting() == [1]
    assert bench.lines.in_use() == (NEW,) and bench.starved == 2


@drive
async def test_what_waits_fails_where_the_next_generation_takes_other_requests(
    bench: Bench,
) -> None:
    bench.follow(OLD)
    reply = bench.ask(OLD)
    bench.follow(NEW, config=OTHER)
    await settle()
    assert error(reply) == "model 'm' was unloaded" and bench.waiting() == [0]


@drive
async def test_control_where_there_is_a_replica_it_is_waited_for(bench: Bench) -> None:
    bench.follow(OLD, count=1)
    reply = bench.ask(OLD)
    bench.follow()
    await settle()
    assert not reply.done() and bench.lines.in_use() == (OLD,) and bench.starved == 0


@drive
async def test_when_the_server_ends_nobody_waits_for_a_replica_that_does_not_come(
    bench: Bench,
) -> None:
    bench.follow(OLD)
    reply = bench.ask(OLD)
    bench.lines.give_up()
    assert isinstance(reply.exception(), ShuttingDown)
    with pytest.raises(ShuttingDown):
        bench.ask(OLD)
    await asyncio.wait_for(bench.lines.drain(), 1.0)


@drive
async def test_control_a_replica_that_is_there_answers_until_the_end(bench: Bench) -> None:
    bench.follow(OLD, count=1)
    reply = bench.ask(OLD)
    bench.lines.give_up()
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(bench.lines.drain(), 1.0)
    assert not reply.done()
