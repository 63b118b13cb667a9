from __future__ import annotations

from types import SimpleNamespace

import pytest

from configs.model import DynamicBatching, ModelConfig
from deployments.scheduler import Entry, Scheduler, Wait, policy

from .queues import MS, fill, limits, rows_of, take

# --- the policy, from a config -------------------------------


def config(max_batch_size, batching=None):
    return ModelConfig(name="m", max_batch_size=max_batch_size, dynamic_batching=batching)


SETTINGS = SimpleNamespace(max_queue_requests=7, max_queue_s=1.5)


def test_policy_without_dynamic_batching_never_merges():
    result = policy(config(8), SETTINGS)
    assert (result.max_rows, result.merge, result.delay_ns) == (8, False, 0)
    assert (result.max_requests, result.max_queue_ns) == (7, 1_500_000_000)


def test_policy_of_dynamic_batching():
    batching = DynamicBatching(
        preferred_batch_size=(8, 4), max_queue_delay_microseconds=100, preserve_ordering=True
    )
    result = policy(config(8, batching), SETTINGS)
    assert (result.merge, result.preferred, result.delay_ns) == (True, (4, 8), 100_000)
    assert result.preserve_ordering


def test_policy_prefers_the_full_batch_when_nothing_is_preferred():
    assert policy(config(8, DynamicBatching()), SETTINGS).preferred == (8,)


@pytest.mark.parametrize("max_batch_size", [0, 1])
def test_policy_of_a_model_that_takes_one_row_never_merges(max_batch_size):
    result = policy(config(max_batch_size, DynamicBatching()), SETTINGS)
    assert (result.max_rows, result.merge) == (1, False)


# --- what goes together -------------------------------


def test_empty_gives_nothing():
    assert Scheduler(limits()).next(0) is None


def test_takes_all_that_fits_in_order():
    scheduler = Scheduler(limits())
    entries = fill(scheduler, 3, 2, 3, 1)
    group = take(scheduler, 5)
    assert list(group.members) == entries[:3]
    assert group.released_ns == 5
    assert scheduler.pending == 1
    assert rows_of(scheduler.next(5)) == [1]


def test_what_does_not_fit_stays_at_the_front_and_nothing_overtakes_it():
    scheduler = Scheduler(limits())
    fill(scheduler, 5, 4, 1)
    assert rows_of(scheduler.next(0)) == [5]  # the 1 would fit, but the 4 is before it
    assert rows_of(scheduler.next(0)) == [4, 1]


def test_only_equal_keys_share_a_batch():
    scheduler = Scheduler(limits())
    fill(scheduler, 1, 1, key="a")
    fill(scheduler, 1, key="b")
    fill(scheduler, 1, key="a")
    assert [rows_of(scheduler.next(0)) for _ in range(3)] == [[1, 1], [1], [1]]


def test_without_merging_each_goes_alone():
    scheduler = Scheduler(limits(merge=False, preferred=(8,), delay_ns=5 * MS))
    fill(scheduler, 1, 2)
    assert rows_of(scheduler.next(0)) == [1]
    assert rows_of(scheduler.next(0)) == [2]


# --- held back -------------------------------


def test_delay_zero_goes_at_once_whatever_is_preferred():
    scheduler = Scheduler(limits(preferred=(4, 8)))
    fill(scheduler, 1)
    assert rows_of(scheduler.next(0)) == [1]


def test_a_partial_batch_waits_for_the_delay_of_its_oldest():
    scheduler = Scheduler(limits(delay_ns=5 * MS))
    fill(scheduler, 1, now=10)
    fill(scheduler, 1, now=3 * MS)
    assert scheduler.next(3 * MS) == Wait(10 + 5 * MS)
    assert scheduler.next(10 + 5 * MS - 1) == Wait(10 + 5 * MS)
    assert rows_of(scheduler.next(10 + 5 * MS)) == [1, 1]


def test_a_full_batch_goes_before_the_delay():
    scheduler = Scheduler(limits(delay_ns=5 * MS))
    fill(scheduler, *[1] * 7)
    assert isinstance(scheduler.next(0), Wait)
    fill(scheduler, 1)
    assert len(rows_of(scheduler.next(0))) == 8


def test_a_preferred_size_goes_before_the_delay():
    scheduler = Scheduler(limits(preferred=(4, 8), delay_ns=5 * MS))
    fill(scheduler, 3)
    assert isinstance(scheduler.next(0), Wait)
    fill(scheduler, 1)
    assert rows_of(scheduler.next(0)) == [3, 1]


def test_a_preferred_size_does_not_cut_off_what_already_waits():
    scheduler = Scheduler(limits(preferred=(4,), delay_ns=5 * MS))
    fill(scheduler, *[1] * 6)
    assert len(rows_of(scheduler.next(0))) == 6


def test_more_than_the_largest_preferred_size_goes_now():
    scheduler = Scheduler(limits(preferred=(4,), delay_ns=5 * MS))
    fill(scheduler, 3, 2)
    assert rows_of(scheduler.next(0)) == [3, 2]


def test_a_jumped_preferred_size_is_not_reached():
    scheduler = Scheduler(limits(preferred=(4, 8), delay_ns=5 * MS))
    fill(scheduler, 3, 3)
    assert isinstance(scheduler.next(0), Wait)


@pytest.mark.parametrize("follower", [{"rows": 1, "key": "b"}, {"rows": 7, "key": "a"}])
def test_a_follower_that_cannot_join_ends_the_waiting(follower):
    scheduler = Scheduler(limits(delay_ns=5 * MS))
    fill(scheduler, 2)
    assert isinstance(scheduler.next(0), Wait)
    scheduler.add(Entry(queued_ns=0, **follower))
    assert rows_of(scheduler.next(0)) == [2]
    assert scheduler.pending == 1


def test_a_withdrawal_can_complete_a_preferred_size():
    scheduler = Scheduler(limits(preferred=(5, 8), delay_ns=5 * MS))
    _, middle, _ = fill(scheduler, 2, 1, 3)
    assert isinstance(scheduler.next(0), Wait)
    scheduler.withdraw(middle)
    assert rows_of(scheduler.next(0)) == [2, 3]
