"""What fails, is refused or ends: nothing may kill the gate."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace

import pytest

from deployments.batcher import MemberResult
from deployments.errors import (
    ExecutionFailed,
    Internal,
    NoReplica,
    QueueTimeout,
    ReplicaLost,
    ShuttingDown,
)

from .gates import MS, drive, make, submit
from .virtual_time import run, settle


@drive
async def test_a_lost_replica_fails_its_batch_and_no_other(clock):
    gate, model, counters = make(clock)
    futures = [submit(gate, n) for n in range(3)]
    await settle()
    model.finish()
    await settle()
    model.finish(error=ReplicaLost("m"))
    await settle()
    errors = [futures[n].exception() for n in (1, 2)]
    assert all(isinstance(e, ReplicaLost) for e in errors)
    assert errors[0] is not errors[1]
    last = submit(gate, 3)
    await settle()
    model.finish()
    assert await last
    assert dict(counters.totals().failures) == {"OTHER": 2}


@pytest.mark.parametrize(
    "error", [RuntimeError("secret /path"), asyncio.CancelledError(), KeyError("x")]
)
def test_nothing_kills_the_gate(error, caplog):
    async def main(clock):
        gate, model, _ = make(clock)
        first = submit(gate, 0)
        await settle()
        with caplog.at_level(logging.ERROR):
            model.finish(error=error)
            await settle()
        failed = first.exception()
        assert type(failed) is Internal
        assert "secret" not in str(failed)
        second = submit(gate, 1)
        await settle()
        model.finish()
        assert await second
        assert (gate.in_flight, gate.pending) == (0, 0)

    run(main)
    (record,) = [record for record in caplog.records if record.name == "manta.gate"]
    assert record.exc_info  # the traceback is in the log


@pytest.mark.parametrize("broken", [lambda group: 1 / 0, lambda group: None])
def test_an_execute_that_is_no_coroutine_does_not_kill_the_gate(broken, caplog):
    async def main(clock):
        gate, _, _ = make(clock, model=SimpleNamespace(execute=broken))
        for _ in range(3):
            with pytest.raises(Internal):
                await submit(gate, 0)
        assert gate.in_flight == 0

    run(main)


@pytest.mark.parametrize("results", [[None, None], [MemberResult({}, 0, 0, 0, 0)]])
def test_a_broken_outcome_fails_its_members_and_frees_the_slot(results, caplog):
    async def main(clock):
        gate, model, _ = make(clock, slots=0)
        futures = [submit(gate, n) for n in range(2)]
        gate.resize(1)
        await settle()
        model.finish(results=results)
        await settle()
        assert all(isinstance(f.exception(), Internal) for f in futures)
        assert gate.in_flight == 0

    run(main)


@drive
async def test_an_error_of_one_member_is_its_own(clock):
    gate, model, counters = make(clock, slots=0)
    futures = [submit(gate, n) for n in range(3)]
    gate.resize(1)
    await settle()
    good = MemberResult({}, 0, 1, 2, 3)
    model.finish(results=[good, ExecutionFailed("bad row"), good])
    await settle()
    assert [type(f.exception()) for f in futures] == [type(None), ExecutionFailed, type(None)]
    assert dict(counters.totals().failures) == {"BACKEND": 1}
    assert counters.totals().inference_count == 2


@drive
async def test_a_refused_batch_goes_first_again_after_a_rest(clock):
    gate, model, _ = make(clock, max_rows=1, preferred=(1,))
    [submit(gate, n) for n in range(2)]
    rests = []
    for _ in range(6):
        await settle()
        began = clock()
        model.finish(refused=True)
        calls = len(model.calls)
        for _ in range(100):
            if len(model.calls) > calls:
                break
            await asyncio.sleep(0.001)
        rests.append(round((clock() - began) / MS))
    assert model.calls == [[0]] * 7
    assert rests == [5, 10, 20, 40, 80, 80]
    model.finish()
    await settle()
    assert model.calls[-1] == [1]
    began = clock()
    model.finish(refused=True)
    await asyncio.sleep(0.0055)
    assert model.calls[-2:] == [[1], [1]]  # the rest is short again


@drive
async def test_members_of_a_refused_batch_can_leave_and_expire(clock):
    gate, model, counters = make(clock, max_queue_ns=4 * MS)
    first = submit(gate, 0)
    await settle()
    model.finish(refused=True)
    await settle()
    assert (gate.in_flight, gate.pending) == (0, 1)
    with pytest.raises(QueueTimeout):
        await first
    second = submit(gate, 1)
    second.cancel()
    await asyncio.sleep(0.01)
    assert model.calls == [[0]]
    assert dict(counters.totals().failures) == {"REJECTED": 1, "CANCELED": 1}


@drive
async def test_shrinking_below_what_runs_starts_no_more(clock):
    gate, model, _ = make(clock, slots=2)
    [submit(gate, n) for n in range(4)]
    await settle()
    gate.resize(1)
    model.finish(1)  # of the place that is gone
    await settle()
    assert len(model.calls) == 2
    model.finish()
    await settle()
    assert model.calls[2] == [2, 3]


@drive
async def test_close_fails_what_waits_and_answers_what_runs(clock):
    gate, model, _ = make(clock)
    futures = [submit(gate, n) for n in range(3)]
    await settle()
    gate.close(ShuttingDown())
    with pytest.raises(ShuttingDown):
        submit(gate, 9)
    assert all(isinstance(f.exception(), ShuttingDown) for f in futures[1:])
    model.finish()
    assert await futures[0]
    await gate.drain()


@drive
async def test_what_waits_is_refused_and_what_comes_may_wait_again(clock):
    gate, model, _ = make(clock)
    futures = [submit(gate, n) for n in range(3)]
    await settle()
    gate.refuse(NoReplica("m", 1, "no such file"))
    assert all(isinstance(f.exception(), NoReplica) for f in futures[1:])
    again = submit(gate, 9)
    model.finish()
    assert await futures[0]
    await settle()
    model.finish()
    assert await again
    await gate.drain()


@drive
async def test_a_batch_refused_after_close_is_failed(clock):
    gate, model, _ = make(clock)
    first = submit(gate, 0)
    await settle()
    gate.close(ShuttingDown())
    model.finish(refused=True)
    with pytest.raises(ShuttingDown):
        await first
    await gate.drain()


@drive
async def test_drain_waits_for_what_waits_and_what_runs(clock):
    gate, model, _ = make(clock)
    [submit(gate, n) for n in range(2)]
    drained = asyncio.ensure_future(gate.drain())
    await settle()
    model.finish()
    await settle()
    assert not drained.done()
    model.finish()
    await settle()
    assert drained.done()
    await gate.drain()  # empty already


@drive
async def test_drain_ends_when_the_last_one_leaves(clock):
    gate, _, _ = make(clock, slots=0)
    future = submit(gate, 0)
    drained = asyncio.ensure_future(gate.drain())
    await settle()
    future.cancel()
    await settle()
    assert drained.done()


@drive
async def test_a_request_that_is_refused_by_accident_is_not_answered_later(clock):
    """Its waiter may be a connection that has another request by then."""
    gate, model, counters = make(clock, slots=0)
    heard: list[object] = []
    waiter = SimpleNamespace(deliver=heard.append)
    broken = gate.slots.idle
    gate.slots.idle = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        gate.enqueue(waiter, 1, "k", (0,), ("y",))
    gate.slots.idle = broken
    assert gate.pending == 0
    kept = gate.enqueue(waiter, 1, "k", (1,), ("y",))
    gate.resize(1)
    await settle()
    assert model.calls == [[1]]
    model.finish()
    await settle()
    assert len(heard) == 1 and kept.answer is not None


@drive
async def test_a_withdrawn_request_is_not_run_and_hears_nothing(clock):
    gate, model, counters = make(clock, slots=0)
    heard: list[object] = []
    waiter = SimpleNamespace(deliver=heard.append)
    gone, stays = [gate.enqueue(waiter, 1, "k", (n,), ("y",)) for n in range(2)]
    gate.withdraw(gone)
    gate.resize(1)
    await settle()
    gate.withdraw(stays)  # it runs already: only its answer is dropped
    model.finish()
    await settle()
    assert model.calls == [[1]] and heard == []
    assert dict(counters.totals().failures) == {"CANCELED": 2}
