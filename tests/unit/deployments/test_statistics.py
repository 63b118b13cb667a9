from __future__ import annotations

import pickle

import pytest
from google.protobuf import json_format
from tritonclient.grpc import service_pb2

from deployments.statistics import (
    Aggregator,
    BatchTotals,
    Counters,
    Reason,
    Recorder,
    Totals,
    VersionKey,
    add,
)

KEY = VersionKey("m", "1", "manta.m.1.0")
NEXT = VersionKey("m", "1", "manta.m.1.1")
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


def reported(aggregator, name="m", version="1"):
    return aggregator.report(name, version)


def test_a_batch_of_two_single_rows():
    """Counts and times as Triton has them, to the letter."""
    router, aggregator = recorder(), Aggregator()
    aggregator.open(KEY, 1.5)
    two_in_a_batch(router.counters(KEY))
    aggregator.apply("r", router.flush(1))
    assert reported(aggregator) == {
        "name": "m",
        "version": "1",
        "last_inference": 1_700_000_000_123,
        "inference_count": 2,
        "execution_count": 1,
        "inference_stats": {
            "success": {"count": 2, "ns": 190},
            "fail": {"count": 0, "ns": 0},
            "queue": {"count": 2, "ns": 50},
            "compute_input": {"count": 2, "ns": 10},
            "compute_infer": {"count": 2, "ns": 100},
            "compute_output": {"count": 2, "ns": 14},
            "cache_hit": {"count": 0, "ns": 0},
            "cache_miss": {"count": 0, "ns": 0},
        },
        "response_stats": {},
        "batch_stats": [
            {
                "batch_size": 2,
                "compute_input": {"count": 1, "ns": 5},
                "compute_infer": {"count": 1, "ns": 50},
                "compute_output": {"count": 1, "ns": 7},
            }
        ],
        "memory_usage": [],
    }


def test_the_report_is_a_protobuf_message_too():
    router, aggregator = recorder(), Aggregator()
    aggregator.open(KEY, 0)
    two_in_a_batch(router.counters(KEY))
    aggregator.apply("r", router.flush(1))
    message = json_format.ParseDict(reported(aggregator), service_pb2.ModelStatistics())
    assert message.inference_stats.queue.count == message.inference_stats.success.count == 2
    assert message.batch_stats[0].compute_infer.ns == 50


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


def test_a_version_that_never_ran_reports_zeros():
    aggregator = Aggregator()
    aggregator.open(KEY, 0)
    report = reported(aggregator)
    assert report["last_inference"] == report["inference_count"] == 0
    assert report["batch_stats"] == []


def test_an_unknown_version_is_a_key_error():
    with pytest.raises(KeyError):
        Aggregator().report("m", "1")


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


def test_a_delta_that_comes_again_or_too_late_counts_once():
    router, aggregator = recorder(), Aggregator()
    aggregator.open(KEY, 0)
    two_in_a_batch(router.counters(KEY))
    old = router.flush(1)
    two_in_a_batch(router.counters(KEY))
    new = router.flush(2)
    for delta in (new, old, new, old):
        aggregator.apply("r", delta)
        assert reported(aggregator)["inference_count"] == 4


def test_control_a_new_state_is_counted():
    """The test above would also pass if nothing after the first were ever applied."""
    router, aggregator = recorder(), Aggregator()
    aggregator.open(KEY, 0)
    for sequence in range(1, 4):
        two_in_a_batch(router.counters(KEY))
        aggregator.apply("r", router.flush(sequence))
        assert reported(aggregator)["inference_count"] == 2 * sequence


def test_a_late_delta_still_brings_what_a_newer_one_left_out():
    router, aggregator = recorder(), Aggregator()
    aggregator.open(KEY, 0)
    aggregator.open(OTHER, 0)
    two_in_a_batch(router.counters(KEY))
    late = router.flush(1)
    router.acknowledge(1)
    two_in_a_batch(router.counters(OTHER))
    aggregator.apply("r", router.flush(2))
    aggregator.apply("r", late)
    assert reported(aggregator)["inference_count"] == 2
    assert reported(aggregator, "other", "2")["inference_count"] == 2


def test_routers_are_summed_and_dead_ones_are_not_forgotten():
    aggregator = Aggregator()
    aggregator.open(KEY, 0)
    for name in ("a", "b"):
        router = recorder()
        two_in_a_batch(router.counters(KEY))
        aggregator.apply(name, router.flush(1, {KEY: 5}))
    assert aggregator.loaded()[0].pending == 10
    aggregator.retire("a")
    (loaded,) = aggregator.loaded()
    assert (loaded.totals.inference_count, loaded.pending) == (4, 5)
    assert loaded.totals.batches == {2: BatchTotals(2, 10, 100, 14)}


def test_a_router_that_counts_anew_never_takes_the_sum_back():
    aggregator = Aggregator()
    aggregator.open(KEY, 0)
    seen = []
    sequence = 0
    for _ in range(3):
        router = recorder()  # the same Router by name, from zero
        for _ in range(2):
            sequence += 1
            two_in_a_batch(router.counters(KEY))
            aggregator.apply("r", router.flush(sequence))
            seen.append(reported(aggregator)["inference_count"])
    assert seen == [2, 4, 6, 8, 10, 12]


def test_a_reload_starts_at_zero_and_late_counts_of_the_old_life_are_ignored():
    router, aggregator = recorder(), Aggregator()
    aggregator.open(KEY, 1)
    two_in_a_batch(router.counters(KEY))
    aggregator.apply("r", router.flush(1))
    aggregator.open(NEXT, 2)
    assert reported(aggregator)["inference_count"] == 0
    aggregator.drop(KEY)
    two_in_a_batch(router.counters(KEY))
    two_in_a_batch(router.counters(NEXT))
    aggregator.apply("r", router.flush(2))
    assert reported(aggregator)["inference_count"] == 2
    aggregator.drop(NEXT)
    assert aggregator.loaded() == ()
    assert not aggregator._shares  # late counts do not pile up either


def test_a_new_controller_learns_everything_again():
    router = recorder()
    two_in_a_batch(router.counters(KEY))
    router.flush(1)
    router.acknowledge(1)
    router.resend()
    aggregator = Aggregator()
    aggregator.apply("r", router.flush(2))
    aggregator.open(KEY, 0)  # adopted after the Router's first word
    assert reported(aggregator)["inference_count"] == 2


def test_discarded_versions_are_no_longer_sent():
    router = recorder()
    two_in_a_batch(router.counters(KEY))
    router.discard(KEY)
    assert router.flush(1).versions == ()


def test_versions_are_listed_by_name_and_version():
    aggregator = Aggregator()
    aggregator.open(OTHER, 0.25)
    aggregator.open(KEY, 1.5)
    assert [(v.key.model, v.load_s) for v in aggregator.loaded()] == [("m", 1.5), ("other", 0.25)]


def test_adding_nothing_changes_nothing():
    counters = Counters(clock)
    two_in_a_batch(counters)
    counters.failed(Reason.OTHER, 4)
    assert add(Totals(), counters.totals()) == add(counters.totals(), Totals()) == counters.totals()
