from __future__ import annotations

import pickle

from deployments.buckets import BOUNDS_NS, EMPTY
from deployments.statistics import (
    BatchTotals,
    Counters,
    Legacy,
    Reason,
    Recorder,
    Totals,
    VersionKey,
    add,
)
from deployments.windows import quantiles

KEY = VersionKey("m", "1", "manta.m.1.0")
OTHER = VersionKey("other", "2", "manta.other.2.0")


def clock():
    return 1_700_000_000_123_456_789


def recorder():
    return Recorder(clock)


def two_in_a_batch(counters):
    """Two requests of one row each in one execution, as the Gate counts it."""
    counters.executed(2, 5, 50, 7)
    counters.succeeded(1, 100, 30, 5, 50, 7)
    counters.succeeded(1, 90, 20, 5, 50, 7)


def test_failures_count_their_reason_and_nothing_else():
    counters = Counters(clock)
    two_in_a_batch(counters)
    before = counters.totals()
    for reason in Reason:
        counters.failed(reason, 10)
    counters.failed(Reason.CANCELED, 10)
    after = counters.totals()
    assert (after.fail, after.fail_ns) == (5, 50)
    assert after.failures == {"REJECTED": 1, "CANCELED": 2, "BACKEND": 1, "OTHER": 1}
    assert (after.success, after.inference_count, after.execution_count, after.batches) == (
        before.success,
        before.inference_count,
        before.execution_count,
        before.batches,
    )


def test_batch_sizes_are_kept_apart_and_sorted():
    counters = Counters(clock)
    for rows in (8, 2, 8):
        counters.executed(rows, 1, 2, 3)
    assert list(counters.totals().batches.items()) == [
        (2, BatchTotals(1, 1, 2, 3)),
        (8, BatchTotals(2, 2, 4, 6)),
    ]


def test_a_delta_holds_what_changed_until_it_is_acknowledged():
    router = recorder()
    router.counters(OTHER)
    two_in_a_batch(router.counters(KEY))
    first = router.flush(1)
    assert [key for key, _ in first.versions] == [KEY]
    assert router.flush(2).versions == first.versions  # the first was lost
    router.acknowledge(1)  # late, and no longer the one that counts
    assert router.flush(3).versions
    router.acknowledge(3)
    assert router.flush(4).versions == ()
    router.counters(OTHER).failed(Reason.OTHER, 1)
    assert [key for key, _ in router.flush(5).versions] == [OTHER]


def test_what_changes_between_flush_and_acknowledgement_is_not_forgotten():
    router = recorder()
    two_in_a_batch(router.counters(KEY))
    router.flush(1)
    router.counters(KEY).failed(Reason.BACKEND, 1)
    router.acknowledge(1)
    ((_, totals),) = router.flush(2).versions
    assert totals.fail == 1


def test_a_delta_is_picklable_and_does_not_change_afterwards():
    router = recorder()
    counters = router.counters(KEY)
    two_in_a_batch(counters)
    delta = router.flush(1, {KEY: 3, OTHER: 0})
    copied = pickle.loads(pickle.dumps(delta))
    two_in_a_batch(counters)
    assert copied == delta
    assert delta.versions[0][1].success == 2
    assert delta.pending == ((KEY, 3),)
    assert len(pickle.dumps(delta)) < 1000


def test_discarded_versions_are_no_longer_sent():
    router = recorder()
    two_in_a_batch(router.counters(KEY))
    router.discard(KEY)
    assert router.flush(1).versions == ()


def test_adding_nothing_changes_nothing():
    counters = Counters(clock)
    two_in_a_batch(counters)
    counters.failed(Reason.OTHER, 4)
    assert add(Totals(), counters.totals()) == add(counters.totals(), Totals()) == counters.totals()


def at(bound_s):
    """The bucket whose upper bound is this many seconds."""
    return BOUNDS_NS.index(round(bound_s * 1e9))


def test_requests_and_executions_are_counted_by_duration():
    """A duration belongs to the first bound that is not below it: Prometheus's `le`."""
    counters = Counters(clock)
    counters.succeeded(1, 1_000_000, 999, 1, 2, 3)  # 1 ms to the nanosecond, hardly a queue
    counters.succeeded(1, 1_000_001, 100_001, 1, 2, 3)
    counters.succeeded(1, 10**12, 0, 1, 2, 3)  # beyond all bounds
    counters.executed(4, 10_000_000, 30_000_000, 20_000_000)
    totals = counters.totals()
    requests, queues, computes = ([0] * len(EMPTY) for _ in range(3))
    requests[at(0.001)] = requests[at(0.0025)] = requests[-1] = 1
    queues[0], queues[1] = 2, 1
    computes[at(0.1)] = 1
    assert totals.request_buckets == tuple(requests)
    assert totals.queue_buckets == tuple(queues)
    assert totals.compute_buckets == tuple(computes)
    assert sum(totals.request_buckets) == sum(totals.queue_buckets) == totals.success
    assert sum(totals.compute_buckets) == totals.execution_count


def test_a_failure_is_in_no_bucket():
    counters = Counters(clock)
    counters.failed(Reason.OTHER, 10**9)
    assert counters.totals().request_buckets == EMPTY


def test_buckets_add_up():
    counters = Counters(clock)
    two_in_a_batch(counters)
    doubled = add(counters.totals(), counters.totals())
    assert doubled.request_buckets[0] == doubled.queue_buckets[0] == 4
    assert doubled.compute_buckets[0] == 2
    assert len(doubled.request_buckets) == len(EMPTY)


# --- summaries -----------------------------------------------------------------------------------


class Now:
    """A clock that stands."""

    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


def medians(delta):
    ((key, recent),) = delta.recent
    assert key == KEY
    return [quantiles(counts, (0.5,))[0] for counts in recent]


def test_without_summaries_nothing_is_kept_of_the_last_minute():
    router = recorder()
    two_in_a_batch(router.counters(KEY))
    assert router.counters(KEY).windows == ()
    assert router.flush(1).recent == ()


def test_the_last_minute_is_in_every_delta_until_it_is_over():
    now = Now()
    router = Recorder(clock, summaries=True, now_s=now)
    us = 1000
    router.counters(KEY).succeeded(1, 1000 * us, 500 * us, 10 * us, 400 * us, 90 * us)
    assert router.flush(1).versions
    router.acknowledge(1)
    for sequence, later_s in ((2, 0.0), (3, 9.0), (4, 59.0)):
        now.now_s = 100 + later_s
        delta = router.flush(sequence)
        assert delta.versions == ()  # a gauge, whatever else is known
        for median, wanted in zip(medians(delta), (1000, 500, 10, 400, 90), strict=True):
            assert abs(median - wanted) <= wanted / 100 + 0.1
    now.now_s = 160.0
    assert router.flush(5).recent == ()


def test_the_last_minute_moves_on_though_nobody_asks_for_long():
    now = Now()
    router = Recorder(clock, summaries=True, now_s=now)
    router.counters(KEY).succeeded(1, 10**6, 0, 0, 0, 0)
    now.now_s = 10_000.0
    assert router.flush(1).recent == ()
    router.counters(KEY).succeeded(1, 10**9, 0, 0, 0, 0)
    now.now_s += 9
    assert abs(medians(router.flush(2))[0] - 10**6) < 10**4


# --- the legacy ----------------------------------------------------------------------------------


def test_what_the_dead_have_counted_goes_to_a_new_controller_once():
    router = recorder()
    legacy = Legacy(3, ((KEY, "dead", 9, Totals(success=4)),))
    router.flush(1)
    router.acknowledge(1, legacy)
    assert router.flush(2).legacy == Legacy(3)  # only that it is known
    router.acknowledge(2)
    router.resend()
    for sequence in (3, 4):  # until it has arrived
        assert router.flush(sequence).legacy == Legacy(0, legacy.shares)
    router.acknowledge(4)
    assert router.flush(5).legacy == Legacy(3)


def test_an_answer_to_an_older_delta_says_nothing_of_what_to_keep():
    """Of a Controller that had just begun, say, and knew of nobody who died."""
    router = recorder()
    legacy = Legacy(3, ((KEY, "dead", 9, Totals(success=4)),))
    router.flush(1)
    router.acknowledge(1, legacy)
    router.flush(2)
    router.resend()
    router.acknowledge(2, Legacy())
    router.flush(3)
    router.acknowledge(2, Legacy())
    assert router.flush(4).legacy == Legacy(0, legacy.shares)
