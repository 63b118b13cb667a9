"""What a Router traces: settings that change, and samplers that count on or anew."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from configs import tracing
from deployments.trace_settings import changed
from deployments.tracers import Tracers
from deployments.types import TraceChanges

from .test_tracing import MODEL, Kept

CONFIG = tracing.parse(["triton,file=/t.json", "rate=2"])


class Router:
    """Follows a Controller's settings, for the models a and b."""

    def __init__(self, config=CONFIG):
        self.config, self.changes, self.clock = config, TraceChanges(), 0
        self.tracers = Tracers(config, Kept())
        self.of: dict[str, Any] = dict.fromkeys("ab")

    def change(self, model="", **changes):
        self.clock += 1
        self.changes = changed(self.config, self.changes, model, changes, self.clock)
        self.tracers.follow(self.changes)
        return self.look()

    def look(self):
        before = dict(self.of)
        self.of = {m: self.tracers.tracer(m, "1", MODEL, self.of[m]) for m in "ab"}
        return [self.of[m] is before[m] for m in "ab"]


def test_nothing_is_made_while_nothing_is_traced(tmp_path):
    path = tmp_path / "t.json"
    tracers = Tracers(tracing.parse([f"triton,file={path}"]))
    assert tracers.tracer("a", "1", MODEL, None) is None
    asyncio.run(tracers.aclose())
    assert list(tmp_path.iterdir()) == []


def test_models_without_settings_of_their_own_are_counted_together():
    router = Router()
    router.change(level=("TIMESTAMPS",))
    assert router.of["a"].sampler is router.of["b"].sampler
    router.change("a", rate=1)
    assert router.of["a"].sampler is not router.of["b"].sampler
    assert (router.of["a"].settings.rate, router.of["b"].settings.rate) == (1, 2)
    router.change("a", rate=None)
    assert router.of["a"].sampler is router.of["b"].sampler


def test_a_change_for_one_leaves_the_others_counts():
    router = Router()
    router.change(level=("TIMESTAMPS",), rate=1, count=2)
    assert router.of["b"].sampler.take()
    assert router.change("a", rate=5) == [False, True]
    assert router.look() == [True, True]  # nothing new
    assert router.of["b"].sampler.take() and not router.of["b"].sampler.take()
    router.change(count=2)  # the same once more counts anew
    assert router.of["b"].sampler.take()


def test_one_model_alone_may_be_traced_or_left_out():
    router = Router()
    router.change("a", level=("TIMESTAMPS",))
    assert router.of["a"] is not None and router.of["b"] is None
    router.change(level=("TENSORS",))
    router.change("a", level=())
    one, other = router.of.values()
    assert one is None and other.tensors and not other.stamped


def test_an_older_word_changes_nothing():
    router = Router()
    router.change(level=("TIMESTAMPS",))
    router.tracers.follow(TraceChanges())  # of a Controller that has just begun
    assert router.look() == [True, True] and router.tracers.changes == router.changes


def test_traces_of_all_models_have_numbers_of_their_own():
    router = Router()
    router.change(level=("TIMESTAMPS",))
    assert router.of["a"].numbers is router.of["b"].numbers


def test_a_node_without_the_packages_serves_untraced_and_says_so_once(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, f"{tracing.EXPORTER}.trace_exporter", None)
    config = tracing.parse(["mode=opentelemetry", "level=TIMESTAMPS"])
    tracers = Tracers(config)
    assert [tracers.tracer(model, "1", MODEL, None) for model in "abc"] == [None] * 3
    assert [record.getMessage() for record in caplog.records] == ["nothing can be traced"]
    asyncio.run(tracers.aclose())
    assert Tracers(config, Kept()).tracer("a", "1", MODEL, None) is not None  # control
