"""The order of answers: as they come, or as the requests came with `preserve_ordering`."""

from __future__ import annotations

import asyncio

from deployments.errors import ReplicaLost, Unavailable

from .gates import MS, drive, make, submit
from .virtual_time import settle

ALONE = {"max_rows": 1, "preferred": (1,)}
ORDERED = {**ALONE, "preserve_ordering": True}


def watch(futures, names=None):
    """The numbers of the futures, in the order in which they are answered."""
    answered: list[int] = []
    for n, future in enumerate(futures):
        future.add_done_callback(lambda _, n=n: answered.append(n))
    return answered


def failures(futures):
    return [type(f.exception()).__name__ if f.exception() else "" for f in futures]


@drive
async def test_preserve_ordering_answers_in_arrival_order(clock):
    gate, model, counters = make(clock, slots=3, **ORDERED)
    futures = [submit(gate, n) for n in range(3)]
    answered = watch(futures)
    await settle()
    model.finish(2)
    model.finish(1)
    await settle()
    assert answered == [] and counters.totals().success == 0
    model.finish(0)
    await settle()
    assert answered == [0, 1, 2] and counters.totals().success == 3


@drive
async def test_control_without_it_the_faster_is_answered_first(clock):
    gate, model, _ = make(clock, slots=2, **ALONE)
    futures = [submit(gate, n) for n in range(2)]
    await settle()
    model.finish(1)
    await settle()
    assert [f.done() for f in futures] == [False, True]


@drive
async def test_a_batch_is_answered_in_its_own_order(clock):
    gate, model, _ = make(clock, slots=0, max_rows=4, preferred=(4,), preserve_ordering=True)
    futures = [submit(gate, n) for n in range(6)]
    answered = watch(futures)
    gate.resize(2)
    await settle()
    assert model.calls == [[0, 1, 2, 3], [4, 5]]
    model.finish(1)
    await settle()
    assert answered == []
    model.finish(0)
    await settle()
    assert answered == [0, 1, 2, 3, 4, 5]


@drive
async def test_errors_keep_their_turn_and_stop_nobody(clock):
    gate, model, _ = make(clock, slots=3, **ORDERED)
    futures = [submit(gate, n) for n in range(3)]
    answered = watch(futures)
    await settle()
    model.finish(1, error=ReplicaLost("m"))
    await settle()
    assert answered == []
    model.finish(0)
    await settle()
    assert answered == [0, 1]
    model.finish(0)
    await settle()
    assert answered == [0, 1, 2] and failures(futures) == ["", "ReplicaLost", ""]


@drive
async def test_who_waited_too_long_hears_of_it_in_turn(clock):
    gate, model, counters = make(clock, max_queue_ns=5 * MS, **ORDERED)
    futures = [submit(gate, n) for n in range(2)]
    answered = watch(futures)
    await asyncio.sleep(0.006)
    assert gate.pending == 0 and answered == []
    model.finish()
    await settle()
    assert answered == [0, 1] and failures(futures) == ["", "QueueTimeout"]
    assert dict(counters.totals().failures) == {"REJECTED": 1}


@drive
async def test_who_leaves_the_queue_is_not_waited_for(clock):
    gate, model, counters = make(clock, slots=2, **ORDERED)
    futures = [submit(gate, n) for n in range(4)]
    await settle()
    futures[2].cancel()
    await settle()
    model.finish()
    await settle()
    assert model.calls == [[0], [1], [3]]
    model.finish(1)
    await settle()
    assert not futures[3].done()  # the one before it still runs
    model.finish(0)
    await settle()
    assert futures[3].done() and dict(counters.totals().failures) == {"CANCELED": 1}


@drive
async def test_who_leaves_while_it_runs_is_counted_once(clock):
    gate, model, counters = make(clock, slots=2, **ORDERED)
    futures = [submit(gate, n) for n in range(2)]
    await settle()
    futures[0].cancel()
    model.finish(1)
    await settle()
    model.finish(0)
    await settle()
    assert futures[1].done() and futures[1].exception() is None
    assert dict(counters.totals().failures) == {"CANCELED": 1}
    assert counters.totals().success == 1


@drive
async def test_a_batch_that_is_refused_keeps_its_place(clock):
    gate, model, _ = make(clock, slots=2, **ORDERED)
    futures = [submit(gate, n) for n in range(2)]
    answered = watch(futures)
    await settle()
    model.finish(0, refused=True)
    model.finish(0)
    await settle()
    assert answered == []
    await asyncio.sleep(0.006)
    assert model.calls == [[0], [1], [0]]
    model.finish()
    await settle()
    assert answered == [0, 1]


@drive
async def test_a_gate_that_closes_answers_what_runs_before_what_waits(clock):
    gate, model, _ = make(clock, **ORDERED)
    futures = [submit(gate, n) for n in range(2)]
    answered = watch(futures)
    gate.close(Unavailable("model 'm' was unloaded"))
    await settle()
    assert answered == []
    model.finish()
    await gate.drain()
    await settle()
    assert answered == [0, 1] and failures(futures) == ["", "Unavailable"]


@drive
async def test_what_is_handed_over_keeps_its_turn(clock):
    old, running, _ = make(clock, **ORDERED)
    futures = [submit(old, n) for n in range(2)]
    await settle()
    new, model, _ = make(clock, slots=3, **ORDERED)
    old.hand_over(new)
    futures.append(submit(new, 2))
    answered = watch(futures)
    await settle()
    assert model.calls == [[1], [2]]
    model.finish(1)
    model.finish(0)
    await settle()
    assert answered == []
    running.finish()
    await settle()
    assert answered == [0, 1, 2]
    await old.drain()
    await new.drain()


@drive
async def test_a_version_may_begin_or_end_to_keep_the_order(clock):
    for before, after in ((ORDERED, ALONE), (ALONE, ORDERED)):
        old, running, _ = make(clock, **before)
        futures = [submit(old, n) for n in range(3)]
        await settle()
        new, model, _ = make(clock, slots=2, **after)
        old.hand_over(new)
        answered = watch(futures)
        await settle()
        model.finish(1)
        await settle()
        assert answered == ([2] if after is ALONE else [])
        model.finish(0)
        await settle()
        running.finish()
        await settle()
        assert sorted(answered) == [0, 1, 2]


@drive
async def test_who_could_not_be_queued_is_not_waited_for(clock):
    gate, model, _ = make(clock, slots=0, **ORDERED)
    real = gate._places
    gate._places = None  # asking for a place fails
    failed = None
    try:
        submit(gate, 0)
    except AttributeError as error:
        failed = error
    assert failed is not None
    gate._places = real
    future = submit(gate, 1)
    gate.resize(1)
    await settle()
    model.finish()
    assert await future
