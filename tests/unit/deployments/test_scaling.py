"""What is asked of Serve, when, and what the catalogue then tells; Serve is a list of calls."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from configs.autoscaling import Autoscaling
from deployments.autoscaler import Load
from deployments.catalogue import Catalogue, Generation
from deployments.scaling import FRESH_S, RETRY_S, Scaling
from deployments.types import ModelState
from tests.unit.deployments.reports import CONFIG, report

LIMITS = Autoscaling(
    min_count=0,
    max_count=3,
    target_queued_requests=2,
    upscale_delay_s=1,
    downscale_delay_s=2,
)
WAKE_S = 30.0


class Serve:
    """Takes what it is asked for, and acts on it at the next turn of its loop, unless that is
    `stuck`. `down` deployments raise; those of `lost` do after they have taken it."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.remembered: list[str] = []
        self.down: set[str] = set()
        self.lost: set[str] = set()
        self.stuck = False
        self.wanted: dict[str, int] = {}
        self.running: dict[str, int] = {}

    def scale(self, name: str, deployment: str, count: int) -> None:
        if deployment in self.down:
            raise RuntimeError("the Serve controller is gone")
        self.calls.append((deployment, count))
        self.wanted[deployment] = count
        if deployment in self.lost:
            raise TimeoutError("no answer")

    def staying(self, name: str, deployments: Iterable[str]) -> int:
        if not self.stuck:
            self.running.update(self.wanted)
        return sum(self.running[one] for one in deployments)

    def remember(self, name: str, facts: bytes) -> None:
        assert facts
        self.remembered.append(name)


class Bench:
    """One version that serves with `count` instances on each of its deployments."""

    def __init__(
        self,
        count: int = 1,
        deployments: int = 1,
        limits: Autoscaling = LIMITS,
        stop_limit_s: float = 30.0,
    ) -> None:
        self.serve = Serve()
        self.catalogue = Catalogue(epoch=1)
        self.catalogue.started = True
        self.version = self.catalogue.version("m", 1)
        names = [f"m_{k}" for k in range(deployments)]
        self.serve.running = dict.fromkeys(names, count)
        self.generation = Generation("manta.m.1.7", CONFIG, "h", dict.fromkeys(names, count))
        self.generation.autoscaling = dict.fromkeys(names, limits)
        self.generation.settled = True
        self.version.current, self.version.state = self.generation, ModelState.READY
        for name in names:
            for k in range(count):
                self.report(f"{name}.{k}", deployment=name)
        self.locks: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self.told: list[str] = []
        self.asked_since_s: list[float] = []
        self.load = Load()
        self.now_s = 100.0
        self.scaling = Scaling(
            self.catalogue,
            self.locks.__getitem__,
            self._load,
            self._announce,
            self.told.append,
            WAKE_S,
            self.serve,
            stop_limit_s,
        )

    def report(
        self, replica: str, deployment: str = "m_0", error: str = "", draining: bool = False
    ) -> None:
        said = report(
            replica, deployment=deployment, error=error, loaded=not error, draining=draining
        )
        self.generation.note(said, 0.0)

    def _load(self, key: Any, since_s: float) -> Load:
        assert key == ("m", "1", "manta.m.1.7")
        self.asked_since_s.append(since_s)
        return self.load

    async def _announce(self) -> None:
        self.catalogue.sequence += 1

    async def look(self, seconds: int = 1, **load: int) -> list[tuple[str, int]]:
        """The calls that this many looks, one a second, have brought about."""
        self.load = Load(**load)
        self.serve.calls.clear()
        for _ in range(seconds):
            self.scaling.look(self.now_s)
            await asyncio.gather(*self.scaling._tasks)
            self.now_s += 1
        return list(self.serve.calls)


def drive(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def wrapper() -> None:
        asyncio.run(test())

    wrapper.__name__ = test.__name__
    return wrapper


@drive
async def test_a_queue_brings_replicas_and_quiet_sends_them_away() -> None:
    bench = Bench()
    assert await bench.look(1, queued=5) == []
    assert await bench.look(1, queued=5) == [("m_0", 3)]
    assert bench.generation.replicas == {"m_0": 3} and bench.catalogue.sequence == 1
    assert await bench.look(5, queued=5, running=3) == []
    assert await bench.look(3, running=2) == [("m_0", 2)]
    assert bench.told == [
        "model 'm' version 1 is scaled from 1 to 3 (5 requests wait, 0 batches run)",
        "model 'm' version 1 is scaled from 3 to 2 (0 requests wait, 2 batches run)",
    ]
    assert bench.asked_since_s[-1] == bench.now_s - 1 - FRESH_S


@drive
async def test_to_zero_and_back() -> None:
    bench = Bench()
    assert await bench.look(3) == [("m_0", 0)]
    assert bench.serve.remembered == ["manta.m.1.7"]
    assert bench.generation.resting and not bench.generation.reports
    assert await bench.look(9) == []
    assert await bench.look(1, queued=1) == [("m_0", 1)]  # at once
    assert bench.generation.waking and bench.generation.resting
    assert await bench.look(9, queued=1) == []
    bench.report("new")
    assert not bench.generation.resting and bench.generation.targets()[0].slots == 1


@drive
async def test_whoever_wakes_it_waits_until_serve_stops_what_it_had() -> None:
    """Asked for one again before that, Serve would keep the one that is not heard any more."""
    bench = Bench()
    assert await bench.look(2) == []
    bench.serve.stuck = True
    bench.scaling.look(bench.now_s)
    while not bench.generation.leaving:
        await asyncio.sleep(0.01)
    assert bench.generation.targets()[0].slots == 0  # Routers hear of it at once
    bench.load = Load(queued=1)
    bench.scaling.look(bench.now_s)
    await asyncio.sleep(0.2)
    assert bench.serve.calls == [("m_0", 0)] and bench.locks["m"].locked()
    bench.serve.stuck = False
    await asyncio.gather(*bench.scaling._tasks)
    assert bench.serve.running == {"m_0": 0} and not bench.locks["m"].locked()
    assert await bench.look(1, queued=1) == [("m_0", 1)]


@drive
async def test_a_replica_that_serve_keeps_serves_again() -> None:
    bench = Bench(stop_limit_s=0.05)
    bench.serve.stuck = True
    assert await bench.look(3) == [("m_0", 0)]
    assert bench.generation.resting and not bench.generation.reports
    assert await bench.look(int(RETRY_S), queued=1) == [("m_0", 1)]
    assert bench.serve.running == {"m_0": 1}  # the same as before
    bench.report("m_0.0")
    assert bench.generation.targets()[0].slots == 1 and not bench.generation.resting
    assert await bench.look(9, running=1) == []


@drive
async def test_control_one_that_serve_has_stopped_is_not_heard_any_more() -> None:
    bench = Bench()
    assert await bench.look(3) == [("m_0", 0)]
    assert await bench.look(1, queued=1) == [("m_0", 1)]
    bench.report("m_0.0")
    assert bench.generation.targets()[0].slots == 0 and bench.generation.resting


@drive
async def test_more_may_be_asked_for_while_the_first_is_awaited() -> None:
    bench = Bench(0)
    assert await bench.look(1, queued=1) == [("m_0", 1)]
    assert await bench.look(2, queued=9) == [("m_0", 3)]
    assert bench.generation.resting


@drive
async def test_a_half_woken_version_rests_until_a_replica_is_there() -> None:
    bench = Bench(0, deployments=2)
    bench.serve.down.add("m_1")
    assert await bench.look(1, queued=1) == [("m_0", 1)]
    assert bench.generation.resting
    bench.serve.down.clear()
    assert await bench.look(int(RETRY_S), queued=1) == [("m_0", 1), ("m_1", 1)]
    assert bench.generation.resting
    bench.report("new")
    assert not bench.generation.resting


@drive
async def test_one_that_does_not_wake_in_time_is_not_ready_any_more() -> None:
    bench = Bench(0)
    await bench.look(1, queued=1)
    sequence = bench.catalogue.sequence
    await bench.look(int(WAKE_S), queued=1)
    assert bench.generation.resting and bench.catalogue.sequence == sequence
    await bench.look(2, queued=1)
    assert not bench.generation.resting and bench.catalogue.sequence == sequence + 1
    assert "has no replica 30 s after the first request" in bench.told[-1]


@drive
async def test_one_whose_replicas_do_not_load_is_left_to_serve() -> None:
    bench = Bench(0)
    await bench.look(1, queued=1)
    bench.report("new", error="no such file")
    assert await bench.look(20) == []
    assert bench.version.snapshot().state is ModelState.UNAVAILABLE
    bench.report("new")  # the control
    assert await bench.look(20) == [("m_0", 0)]


@drive
async def test_not_while_the_model_is_loaded_or_leaves() -> None:
    bench = Bench()
    async with bench.locks["m"]:
        assert await bench.look(9, queued=9) == []
    assert await bench.look(1, queued=9) == []  # what holds on end begins anew
    bench.version.loading = bench.generation
    assert await bench.look(9, queued=9) == []
    bench.version.loading, bench.version.state = None, ModelState.UNLOADING
    assert await bench.look(9, queued=9) == []
    bench.version.state = ModelState.READY
    bench.catalogue.closing = True
    assert await bench.look(9, queued=9) == []
    bench.catalogue.closing = False
    assert await bench.look(9, queued=9) == [("m_0", 3)]


@drive
async def test_a_load_that_came_first_is_not_undone() -> None:
    """Decided, but the lock was another's, and there is a new generation when it is free."""
    bench = Bench()
    await bench.look(1, queued=9)
    bench.load = Load(queued=9)
    bench.scaling.look(bench.now_s)
    await bench.locks["m"].acquire()  # the task has not begun
    bench.version.current = Generation("manta.m.1.8", CONFIG, "h", {"m_0": 1})
    bench.locks["m"].release()
    await asyncio.gather(*bench.scaling._tasks)
    assert bench.serve.calls == [] and bench.generation.replicas == {"m_0": 1}


@drive
async def test_a_call_that_fails_is_made_again_later() -> None:
    bench = Bench()
    bench.serve.down.add("m_0")
    assert await bench.look(2, queued=5) == [] and bench.generation.replicas == {"m_0": 1}
    bench.serve.down.clear()
    assert await bench.look(int(RETRY_S) - 1, queued=5) == [] and bench.told == []
    assert await bench.look(3, queued=5) == [("m_0", 3)]


@drive
async def test_a_call_to_zero_whose_answer_is_lost_is_made_good_for_whoever_asks() -> None:
    bench = Bench()
    bench.serve.lost.add("m_0")
    assert await bench.look(3) == [("m_0", 0)] and bench.generation.replicas == {"m_0": 1}
    bench.serve.lost.clear()
    bench.report("m_0.0", draining=True)  # Serve has taken it
    assert await bench.look(int(RETRY_S) - 1, queued=1) == []
    assert await bench.look(1, queued=1) == [("m_0", 1)]
    assert bench.generation.waking and bench.told == []  # there is one, as before
    assert await bench.look(9, queued=1) == []
    bench.report("new")
    assert not bench.generation.resting and bench.generation.targets()[0].slots == 1


@drive
async def test_a_call_whose_answer_is_lost_is_made_again_for_nobody_too() -> None:
    bench = Bench()
    bench.serve.lost.add("m_0")
    await bench.look(3)
    bench.serve.lost.clear()
    assert await bench.look(int(RETRY_S)) == [("m_0", 0)]
    assert bench.generation.resting and "is scaled from 1 to 0" in bench.told[0]
    assert await bench.look(9) == []  # once


@drive
async def test_a_call_for_more_whose_answer_is_lost_takes_nobody_away() -> None:
    bench = Bench()
    bench.serve.lost.add("m_0")
    assert await bench.look(2, queued=9) == [("m_0", 3)]
    bench.serve.lost.clear()
    assert await bench.look(int(RETRY_S), queued=9) == [("m_0", 3)]
    assert bench.generation.replicas == {"m_0": 3}


@drive
async def test_what_is_asked_again_lies_within_new_bounds() -> None:
    bench = Bench()
    bench.serve.lost.add("m_0")
    assert await bench.look(2, queued=9) == [("m_0", 3)]
    bench.serve.lost.clear()
    bench.generation.autoscaling = {"m_0": LIMITS.model_copy(update={"max_count": 2})}
    assert await bench.look(int(RETRY_S) + 2, queued=9) == [("m_0", 2)]


@drive
async def test_deployments_come_to_the_same_count_also_when_one_call_failed() -> None:
    bench = Bench(deployments=2)
    bench.serve.down.add("m_1")
    assert await bench.look(2, queued=9) == [("m_0", 3)]
    bench.serve.down.clear()
    assert await bench.look(int(RETRY_S) + 2, queued=9) == [("m_0", 3), ("m_1", 3)]
    assert bench.generation.replicas == {"m_0": 3, "m_1": 3}


@drive
async def test_new_bounds_hold_at_once_and_versions_that_are_not_scaled_stay() -> None:
    bench = Bench()
    await bench.look(1, queued=1)
    low = LIMITS.model_copy(update={"min_count": 2})
    bench.generation.autoscaling = {"m_0": low}
    assert await bench.look(1, queued=1) == [("m_0", 2)]
    bench.generation.autoscaling = {}
    assert await bench.look(9, queued=99) == []
