"""What a Router tells: with a real Aggregator behind a Controller that can die and be replaced."""

from __future__ import annotations

import asyncio
import logging

import pytest

from deployments.aggregate import Aggregator
from deployments.ledger import Ledger
from deployments.logs import Tap
from deployments.statistics import Recorder, VersionKey
from deployments.types import LogSettings, TraceChanges, TraceScope

KEY = VersionKey("m", "1", "manta.m.1.0")


class Push:
    """The handle's method; while it is `down`, calls fail."""

    def __init__(self):
        self.down = False
        self.begin(1)
        self.lines, self.lost, self.asked, self.calls = [], [], [], 0

    def begin(self, epoch):
        """A Controller's life."""
        self.epoch, self.aggregator = epoch, Aggregator()
        self.aggregator.open(KEY, 0)

    async def remote(self, router_id, delta, lost, lines, settings, asked, trace):
        self.calls += 1
        await asyncio.sleep(0)
        if self.down:
            raise RuntimeError("the Controller is gone")
        self.lines += lines
        self.lost += lost
        self.asked.append(asked)
        self.trace = trace
        legacy = self.aggregator.apply(router_id, delta)
        return self.epoch, legacy, self.aggregator.peers(router_id, delta.heard)

    def inferences(self):
        return self.aggregator.report("m", "1")["inference_count"]


class Controller:
    def __init__(self):
        self.push = Push()


class Router:
    """A ledger, and what it is about."""

    def __init__(self, name, controller):
        self.log = Tap(LogSettings())
        self.ledger = Ledger(name, controller, self.log, dict, Recorder())

    def count(self, requests):
        for _ in range(requests):
            self.ledger.recorder.counters(KEY).succeeded(1, 1, 1, 1, 1, 1)

    def flush(self):
        asyncio.run(self.ledger.flush())


@pytest.fixture
def controller():
    return Controller()


def test_counts_lines_and_lost_calls_are_told_once(controller):
    router, push = Router("r", controller), controller.push
    router.count(3)
    router.ledger.lost("manta.m.1.0")
    router.log.attach()
    logging.getLogger("manta.test").info("a line")
    router.log.detach()
    router.flush()
    router.flush()
    assert (push.inferences(), push.lost) == (3, ["manta.m.1.0"])
    assert [line.endswith("] a line") for line in push.lines] == [True]


def test_what_was_set_for_traces_is_told_to_whoever_listens(controller):
    router, push = Router("r", controller), controller.push
    router.ledger.trace = TraceChanges({"": TraceScope({"rate": 2}, 7)}, 7)
    router.flush()
    assert push.trace == router.ledger.trace


def test_what_was_not_heard_is_told_the_next_time(controller):
    router, push = Router("r", controller), controller.push
    router.flush()
    router.count(3)
    router.ledger.lost("a")
    router.log.give_back(("a line",))
    push.down = True
    with pytest.raises(RuntimeError):
        router.flush()
    push.down = False
    router.count(1)
    router.ledger.lost("b")
    router.flush()
    assert (push.inferences(), sorted(push.lost), push.lines) == (4, ["a", "b"], ["a line"])


def test_a_new_controller_hears_everything_at_once(controller):
    router, push = Router("r", controller), controller.push
    router.count(3)
    router.flush()
    push.begin(2)
    router.count(1)
    router.flush()
    assert push.inferences() == 4


def test_nothing_is_told_twice_without_need(controller):
    router, push = Router("r", controller), controller.push
    router.flush()
    calls = push.calls
    router.flush()
    assert push.calls == calls + 1


def test_what_a_dead_router_counted_is_there_in_the_next_controllers_life(controller):
    one, other, push = Router("one", controller), Router("other", controller), controller.push
    one.count(2)
    one.flush()
    other.count(5)
    other.flush()
    push.aggregator.retire("one")
    other.flush()
    push.begin(2)
    other.flush()
    assert push.inferences() == 7
    push.begin(3)  # and in the one after it
    other.flush()
    assert push.inferences() == 7


def test_what_a_router_counted_that_dies_with_its_controller_is_there_in_the_next_life(controller):
    one, other, push = Router("one", controller), Router("other", controller), controller.push
    one.count(2)
    one.flush()
    other.count(5)
    other.flush()
    for epoch in (2, 3):
        push.begin(epoch)
        other.flush()
        assert push.inferences() == 7


def test_two_flushes_at_a_time_count_once(controller):
    router, push = Router("r", controller), controller.push

    async def both():
        router.count(2)
        first = asyncio.ensure_future(router.ledger.flush())
        await asyncio.sleep(0)
        router.count(1)
        await asyncio.gather(first, router.ledger.flush())

    asyncio.run(both())
    assert push.inferences() == 3
    router.flush()
    assert push.inferences() == 3


def test_what_was_asked_for_says_so_to_a_new_controller_too(controller):
    router, push = Router("r", controller), controller.push
    asyncio.run(router.ledger.flush(asked=True))
    router.flush()
    assert push.asked == [True, True, False]
