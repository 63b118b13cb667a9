from __future__ import annotations

import pickle

import pytest
from google.protobuf import json_format
from tritonclient.grpc import service_pb2

from deployments.aggregate import Aggregator
from deployments.autoscaler import Load
from deployments.statistics import BatchTotals, Legacy, Recorder, VersionKey
from deployments.windows import quantiles

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


def test_a_version_that_never_ran_reports_zeros():
    aggregator = Aggregator()
    aggregator.open(KEY, 0)
    report = reported(aggregator)
    assert report["last_inference"] == report["inference_count"] == 0
    assert report["batch_stats"] == []


def test_an_unknown_version_is_a_key_error():
    with pytest.raises(KeyError):
        Aggregator().report("m", "1")


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


def test_the_load_is_what_routers_say_that_were_heard_of_late():
    aggregator = Aggregator()
    aggregator.open(KEY, 0)
    for name, now_s in (("a", 10.0), ("b", 12.0)):
        router = recorder()
        two_in_a_batch(router.counters(KEY))
        aggregator.apply(name, router.flush(1, {KEY: 5, OTHER: 0}, {KEY: 2}), now_s)
    assert aggregator.load(KEY, 9.0) == Load(queued=10, running=4, finished=4)
    assert aggregator.load(KEY, 11.0) == Load(queued=5, running=2, finished=4)
    aggregator.retire("b")
    assert aggregator.load(KEY, 11.0) == Load(finished=4)
    assert aggregator.load(OTHER) == Load()


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


def test_versions_are_listed_by_name_and_version():
    aggregator = Aggregator()
    aggregator.open(OTHER, 0.25)
    aggregator.open(KEY, 1.5)
    assert [(v.key.model, v.load_s) for v in aggregator.loaded()] == [("m", 1.5), ("other", 0.25)]


def test_the_tags_of_a_version_are_those_of_its_generation():
    aggregator = Aggregator()
    aggregator.open(KEY, 0, {"site": "north"})
    assert aggregator.loaded()[0].tags == {"site": "north"}
    aggregator.open(NEXT, 0)
    assert aggregator.loaded()[0].tags == {}


def test_buckets_are_summed_over_routers_and_their_lives():
    aggregator = Aggregator()
    aggregator.open(KEY, 0)
    for sequence, name in enumerate(("a", "b", "a"), 1):  # the last one began again at zero
        router = recorder()
        for _ in range(4 - sequence):
            two_in_a_batch(router.counters(KEY))
        aggregator.apply(name, router.flush(sequence))
    totals = aggregator.loaded()[0].totals
    assert totals.request_buckets[0] == sum(totals.request_buckets) == totals.success == 12
    assert totals.compute_buckets[0] == sum(totals.compute_buckets) == totals.execution_count == 6


def test_the_last_minute_is_that_of_all_routers_that_live():
    """Quantiles of two Routers' quantiles would be wrong: counts are added."""
    aggregator = Aggregator()
    aggregator.open(KEY, 0)
    for name, count, ms in (("fast", 90, 1), ("slow", 10, 100)):
        router = Recorder(clock, summaries=True)
        for _ in range(count):
            router.counters(KEY).succeeded(1, ms * 10**6, 0, 0, 0, 0)
        aggregator.apply(name, router.flush(1))
    requests = aggregator.loaded()[0].recent[0]
    half, most, nearly = quantiles(requests, (0.5, 0.9, 0.95))
    assert (abs(half - 1000) <= 10, abs(most - 1000) <= 10) == (True, True)
    assert abs(nearly - 100_000) <= 1000
    aggregator.retire("slow")
    assert abs(quantiles(aggregator.loaded()[0].recent[0], (0.95,))[0] - 1000) <= 10
    aggregator.retire("fast")
    assert aggregator.loaded()[0].recent == ()


def test_a_late_delta_does_not_bring_the_last_minute_back():
    aggregator = Aggregator()
    aggregator.open(KEY, 0)
    router = Recorder(clock, summaries=True)
    router.counters(KEY).succeeded(1, 10**6, 0, 0, 0, 0)
    old = router.flush(1)
    router.counters(KEY).windows[0].turn(6)
    new = router.flush(2)
    aggregator.apply("r", new)
    aggregator.apply("r", old)
    assert aggregator.loaded()[0].recent[0] == {}


# --- the legacy of the dead ----------------------------------------------------------------------


def dead_and_alive():
    """An aggregator whose Router `dead` is gone, and a Router that heard of it."""
    aggregator, dead, alive = Aggregator(), recorder(), recorder()
    aggregator.open(KEY, 0)
    two_in_a_batch(dead.counters(KEY))
    two_in_a_batch(alive.counters(KEY))
    aggregator.apply("dead", dead.flush(5))
    assert aggregator.apply("alive", alive.flush(1)) is None
    alive.acknowledge(1)
    aggregator.retire("dead")
    legacy = aggregator.apply("alive", alive.flush(2))
    assert legacy is not None and legacy.number == 1
    alive.acknowledge(2, pickle.loads(pickle.dumps(legacy)))
    assert aggregator.apply("alive", alive.flush(3)) is None
    alive.acknowledge(3)
    return aggregator, dead, alive


def test_what_a_dead_router_counted_outlives_the_controller_too():
    before, _, alive = dead_and_alive()
    assert reported(before)["inference_count"] == 4
    alive.resend()
    after = Aggregator()
    after.open(KEY, 0)
    assert after.apply("alive", alive.flush(4)) == Legacy(1, alive._legacy.shares)
    assert reported(after)["inference_count"] == 4
    after.apply("other", recorder().flush(1))
    after.apply("alive", alive.flush(5))  # not acknowledged: it comes again
    assert reported(after)["inference_count"] == 4


def test_control_without_the_legacy_the_sum_goes_back():
    _, _, alive = dead_and_alive()
    alive._legacy = Legacy()
    alive.resend()
    after = Aggregator()
    after.open(KEY, 0)
    after.apply("alive", alive.flush(4))
    assert reported(after)["inference_count"] == 2


def test_a_router_that_was_only_silent_is_not_counted_twice():
    aggregator, dead, alive = dead_and_alive()
    two_in_a_batch(dead.counters(KEY))
    aggregator.apply("dead", dead.flush(6))
    assert reported(aggregator)["inference_count"] == 6
    assert aggregator.apply("alive", alive.flush(4)) == Legacy(2)  # there is none any more
    # And with a new Controller, whoever speaks first.
    assert alive._legacy == Legacy(1, ((KEY, "dead", 5, before_it_woke()),))
    alive.resend()
    dead.resend()
    after = Aggregator()
    after.open(KEY, 0)
    after.apply("alive", alive.flush(5))
    after.apply("dead", dead.flush(7))
    assert reported(after)["inference_count"] == 6


def before_it_woke():
    router = recorder()
    two_in_a_batch(router.counters(KEY))
    return router.counters(KEY).totals()


def test_what_is_unloaded_leaves_no_legacy():
    aggregator, _, alive = dead_and_alive()
    aggregator.drop(KEY)
    assert aggregator.apply("alive", alive.flush(4)) == Legacy(2)


# --- a node that takes a Router and the Controller at once ---------------------------------------


def two_that_live():
    """An aggregator of two Routers, of which `alive` has heard what `dead` has counted."""
    aggregator, dead, alive = Aggregator(), recorder(), recorder()
    aggregator.open(KEY, 0)
    for sequence in (1, 2):
        two_in_a_batch(dead.counters(KEY))
        aggregator.apply("dead", dead.flush(sequence))
    two_in_a_batch(alive.counters(KEY))
    tell(aggregator, alive, 1)
    return aggregator, dead, alive


def tell(aggregator, router, sequence, name="alive"):
    """One flush, as Ledger and Controller do it; what was news about the others."""
    delta = router.flush(sequence)
    legacy = aggregator.apply(name, delta)
    peers = pickle.loads(pickle.dumps(aggregator.peers(name, delta.heard)))
    router.acknowledge(sequence, legacy, peers)
    return [(other, totals.success) for _, other, _, totals in peers.shares]


def test_what_a_router_counted_that_dies_with_the_controller_is_not_lost():
    _, _, alive = two_that_live()
    alive.resend()
    after = Aggregator()
    after.open(KEY, 0)
    tell(after, alive, 2)
    assert reported(after)["inference_count"] == 6
    alive.resend()  # and that one dies as well
    after = Aggregator()
    after.open(KEY, 0)
    tell(after, alive, 3)
    assert reported(after)["inference_count"] == 6


def test_control_who_has_not_heard_of_it_cannot_tell():
    _, _, alive = two_that_live()
    alive._peers.clear()
    alive.resend()
    after = Aggregator()
    after.open(KEY, 0)
    tell(after, alive, 2)
    assert reported(after)["inference_count"] == 2


def test_when_only_the_controller_dies_nobody_is_counted_twice():
    for first in ("alive", "dead"):
        _, other, alive = two_that_live()
        routers = {"alive": alive, "dead": other}
        two_in_a_batch(other.counters(KEY))
        for router in routers.values():
            router.resend()
        after = Aggregator()
        after.open(KEY, 0)
        for sequence in (5, 6):
            for name in sorted(routers, key=lambda name: name != first):
                tell(after, routers[name], sequence, name)
        assert reported(after)["inference_count"] == 8
        after.retire("dead")
        assert reported(after)["inference_count"] == 8


def test_only_news_of_the_others_is_told():
    aggregator, dead, alive = two_that_live()
    assert tell(aggregator, alive, 2) == []
    two_in_a_batch(dead.counters(KEY))
    assert tell(aggregator, dead, 3, "dead") == [("alive", 2)]
    assert tell(aggregator, alive, 3) == [("dead", 6)]
    assert tell(aggregator, alive, 4) == []


def test_what_is_unloaded_is_not_kept_of_the_others_either():
    aggregator, dead, alive = two_that_live()
    alive.discard(KEY)
    aggregator.drop(KEY)
    two_in_a_batch(dead.counters(KEY))
    tell(aggregator, dead, 3, "dead")
    assert tell(aggregator, alive, 2) == []
    assert not alive._peers


def test_a_router_that_is_gone_is_kept_once():
    """By the legacy, with whatever it told last; its peers' share of it would only grow old."""
    aggregator, dead, alive = two_that_live()
    two_in_a_batch(dead.counters(KEY))
    tell(aggregator, dead, 3, "dead")
    aggregator.retire("dead")
    assert alive._peers
    tell(aggregator, alive, 2)
    assert not alive._peers
    alive.resend()
    after = Aggregator()
    after.open(KEY, 0)
    tell(after, alive, 3)
    assert reported(after)["inference_count"] == 8
    tell(after, alive, 4)
    assert [share[1] for share in alive._legacy.shares] == ["dead"] and not alive._peers


def test_a_router_that_was_only_silent_is_a_peer_again():
    """Although it has counted nothing since."""
    aggregator, dead, alive = two_that_live()
    dead.acknowledge(2)
    aggregator.retire("dead")
    tell(aggregator, alive, 2)
    tell(aggregator, dead, 3, "dead")
    tell(aggregator, alive, 3)
    assert not alive._legacy.shares
    assert [place[1] for place in alive._peers] == ["dead"]
    alive.resend()
    after = Aggregator()
    after.open(KEY, 0)
    tell(after, alive, 4)
    assert reported(after)["inference_count"] == 6
