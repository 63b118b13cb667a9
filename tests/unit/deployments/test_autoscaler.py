"""The policy, on a clock that the test turns."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.autoscaling import Autoscaling
from deployments.autoscaler import Autoscaler, Load

LIMITS = Autoscaling(min_count=1, max_count=4, upscale_delay_s=3, downscale_delay_s=10)
ZERO = LIMITS.model_copy(update={"min_count": 0})


class Run:
    """A version that has at once what was wanted of it; a look each second."""

    def __init__(self, limits: Autoscaling = LIMITS, count: int = 1, deployments: int = 1) -> None:
        self.scaler = Autoscaler(limits, 2.0, deployments)
        self.count, self.now_s = count, 100.0

    def look(self, seconds: int = 1, **load: int) -> list[int]:
        seen = []
        for _ in range(seconds):
            self.count = self.scaler.wanted(Load(**load), self.count, self.now_s)
            self.now_s += 1
            seen.append(self.count)
        return seen


def test_a_burst_scales_up_after_the_delay_and_no_further() -> None:
    run = Run()
    assert run.look(3, queued=5) == [1, 1, 1]
    assert run.look(4, queued=5) == [3] * 4


def test_a_short_burst_changes_nothing() -> None:
    run = Run()
    assert run.look(3, queued=50) == [1] * 3
    assert run.look(1, queued=0) == [1]
    assert run.look(3, queued=50) == [1] * 3  # it begins anew


def test_it_grows_by_the_least_that_was_asked_for() -> None:
    run = Run()
    run.look(2, queued=50)
    run.look(1, queued=3)
    assert run.look(1, queued=50) == [2]


def test_quiet_scales_down_after_its_delay_to_what_was_needed_meanwhile() -> None:
    run = Run(count=4)
    run.look(5, queued=0)
    run.look(1, running=2)
    assert run.look(4) == [4] * 4
    assert run.look(1) == [2]
    assert run.look(10) == [2] * 10
    assert run.look(1) == [1]


def test_one_busy_moment_holds_what_there_is() -> None:
    run = Run(count=3)
    for _ in range(5):
        assert run.look(9) == [3] * 9
        assert run.look(1, running=3) == [3]


def test_what_works_is_not_taken_away_though_nothing_waits() -> None:
    assert Run(count=3).look(50, running=3)[-1] == 3
    assert Run(count=3).look(50, running=6)[-1] == 3  # sent ahead: no reason for more


def test_a_steady_load_finds_one_count_and_stays() -> None:
    """Eight clients, one request each at a time: what runs does not wait."""
    run = Run()
    seen = []
    for _ in range(100):
        running = min(8, run.count)
        seen += run.look(1, queued=8 - running, running=running)
    changes = [one for one, other in zip(seen, seen[1:], strict=False) if one != other]
    assert seen[-1] == 4 and len(changes) <= 2


def test_to_zero_only_where_it_is_written_and_only_without_requests() -> None:
    assert Run().look(50)[-1] == 1
    run = Run(ZERO)
    assert run.look(11) == [1] * 10 + [0]
    assert run.look(50) == [0] * 50


def test_requests_that_nobody_saw_waiting_keep_it_awake() -> None:
    run = Run(ZERO)
    finished = 0
    for _ in range(20):
        finished += 1
        assert run.look(1, finished=finished) == [1]
        assert run.look(8, finished=finished) == [1] * 8
    assert run.look(20, finished=finished)[-1] == 0  # the control


def test_counts_of_another_life_are_no_requests() -> None:
    """The first look tells only where the counter stands."""
    run = Run(ZERO)
    assert run.look(11, finished=7)[-1] == 0
    assert run.look(3, finished=7) == [0] * 3


def test_what_was_counted_late_wakes_nobody() -> None:
    run = Run(ZERO, count=0)
    run.look(1, finished=7)
    assert run.look(1, finished=8) == [0] and run.look(1, finished=8, queued=1) == [1]


@pytest.mark.parametrize(("queued", "count"), [(1, 1), (2, 1), (5, 3), (500, 4)])
def test_from_zero_at_once(queued: int, count: int) -> None:
    assert Run(ZERO, count=0).look(1, queued=queued) == [count]


@pytest.mark.parametrize(("count", "bounded"), [(9, 4), (0, 1)])
def test_into_changed_bounds_at_once(count: int, bounded: int) -> None:
    assert Run(count=count).look(1) == [bounded]


def test_deployments_grow_together() -> None:
    run = Run(LIMITS.model_copy(update={"upscale_delay_s": 0}), deployments=2)
    assert run.look(1, queued=4) == [1]  # two instances, two requests each
    assert run.look(1, queued=5) == [2]
    assert run.look(1, queued=5, running=4) == [2]


LOADS = st.builds(
    Load,
    queued=st.integers(0, 10_000),
    running=st.integers(0, 100),
    finished=st.integers(0, 5),
)


@settings(deadline=None)
@given(
    bounds=st.tuples(st.integers(0, 6), st.integers(1, 6)).filter(lambda b: b[0] <= b[1]),
    delays=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    target=st.floats(0.1, 50),
    deployments=st.integers(1, 3),
    looks=st.lists(st.tuples(LOADS, st.integers(0, 3)), max_size=60),
    first=st.integers(0, 8),
)
def test_bounds_and_delays_hold_whatever_comes(
    bounds: tuple[int, int],
    delays: tuple[int, int],
    target: float,
    deployments: int,
    looks: list[tuple[Load, int]],
    first: int,
) -> None:
    limits = Autoscaling(
        min_count=bounds[0],
        max_count=bounds[1],
        upscale_delay_s=float(delays[0]),
        downscale_delay_s=float(delays[1]),
    )
    scaler = Autoscaler(limits, target, deployments)
    count, now_s, changed_s = first, 0.0, 0.0
    for load, pause in looks:
        now_s += pause
        new = scaler.wanted(load, count, now_s)
        assert limits.min_count <= new <= limits.max_count
        if limits.bounded(count) == count and count and new != count:
            delay_s = delays[0] if new > count else delays[1]
            assert now_s - changed_s >= delay_s
        if count == 0 and load.queued:
            assert new > 0
        if new == 0 and count:
            assert load.queued == load.running == 0
        changed_s = now_s if new != count else changed_s
        count = new
