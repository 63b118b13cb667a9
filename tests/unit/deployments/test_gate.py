from __future__ import annotations

import asyncio
import contextvars
from types import SimpleNamespace

import pytest

from deployments.batcher import MemberResult
from deployments.errors import (
    Internal,
    QueueFull,
    QueueTimeout,
)

from .gates import MS, Model, drive, make, submit
from .virtual_time import settle


@drive
async def test_a_free_slot_starts_at_once_and_the_rest_fills_a_batch(clock):
    gate, model, _ = make(clock)
    futures = [submit(gate, n) for n in range(5)]
    assert (gate.in_flight, gate.pending) == (1, 4)
    await settle()
    assert model.calls == [[0]]
    model.finish()
    await settle()
    assert model.calls == [[0], [1, 2, 3, 4]]
    assert futures[0].done() and not futures[1].done()
    model.finish()
    await settle()
    assert all(isinstance(f.result(), MemberResult) for f in futures)
    assert (gate.in_flight, gate.pending) == (0, 0)


@drive
async def test_each_slot_takes_a_batch_and_no_more(clock):
    gate, model, _ = make(clock, slots=2)
    [submit(gate, n) for n in range(4)]
    await settle()
    assert model.calls == [[0], [1]]
    model.finish(1)
    await settle()
    assert model.calls == [[0], [1], [2, 3]]


@drive
async def test_a_held_batch_goes_when_the_delay_is_over(clock):
    gate, model, _ = make(clock, delay_ns=5 * MS)
    submit(gate, 0)
    await asyncio.sleep(0.002)
    submit(gate, 1)
    assert model.calls == []
    await asyncio.sleep(0.002)
    assert model.calls == []
    await asyncio.sleep(0.0011)
    assert model.calls == [[0, 1]]


@drive
async def test_a_held_batch_goes_when_it_is_full(clock):
    gate, model, _ = make(clock, delay_ns=5 * MS)
    [submit(gate, n) for n in range(8)]
    await settle()
    assert clock() == 0
    assert len(model.calls[0]) == 8


@drive
async def test_a_held_batch_does_not_wait_for_the_timer_of_the_expiry(clock):
    gate, model, _ = make(clock, slots=0, delay_ns=5 * MS, max_queue_ns=60_000 * MS)
    submit(gate, 0)  # no slot: only the expiry is timed
    await asyncio.sleep(0.001)
    gate.resize(1)
    assert model.calls == []
    await asyncio.sleep(0.0041)
    assert model.calls == [[0]]


@drive
async def test_queue_time_is_from_arrival_to_release(clock):
    gate, model, counters = make(clock)
    futures = [submit(gate, n) for n in range(2)]
    await asyncio.sleep(0.007)
    model.finish()
    await settle()
    await asyncio.sleep(0.004)
    model.finish()
    await settle()
    assert futures[0].result().queue_ns == 0
    assert futures[1].result().queue_ns == pytest.approx(7 * MS, abs=10)
    totals = counters.totals()
    assert totals.queue_ns == pytest.approx(7 * MS, abs=10)
    assert totals.success_ns == pytest.approx(18 * MS, abs=20)


@drive
async def test_a_full_queue_refuses_and_counts_nothing(clock):
    gate, model, counters = make(clock, max_requests=2)
    [submit(gate, n) for n in range(3)]
    with pytest.raises(QueueFull) as refused:
        submit(gate, 3)
    assert str(refused.value) == "Exceeds maximum queue size: 2 requests wait for model 'm'"
    assert counters.totals().fail == 0
    await settle()
    model.finish()
    await settle()
    submit(gate, 4)


@drive
async def test_without_slots_requests_wait_and_time_out(clock):
    gate, model, counters = make(clock, slots=0, max_queue_ns=20 * MS)
    first = submit(gate, 0)
    await asyncio.sleep(0.015)
    second = submit(gate, 1)
    with pytest.raises(QueueTimeout):
        await first
    assert clock() == pytest.approx(20 * MS, abs=10)
    assert gate.pending == 1
    gate.resize(1)
    await settle()
    assert model.calls == [[1]]
    model.finish()
    await second
    assert dict(counters.totals().failures) == {"REJECTED": 1}


@drive
async def test_requests_time_out_while_every_slot_is_busy(clock):
    gate, model, _ = make(clock, max_queue_ns=20 * MS)
    running = submit(gate, 0)
    waiting = submit(gate, 1)
    with pytest.raises(QueueTimeout):
        await waiting
    model.finish()
    await running
    assert model.calls == [[0]]


@drive
async def test_a_cancelled_request_never_runs(clock):
    gate, model, counters = make(clock)
    futures = [submit(gate, n) for n in range(4)]
    futures[2].cancel()
    await settle()
    assert gate.pending == 2
    model.finish()
    await settle()
    assert model.calls == [[0], [1, 3]]
    model.finish()
    await settle()
    assert dict(counters.totals().failures) == {"CANCELED": 1}
    assert counters.totals().success == 3


@drive
async def test_a_request_cancelled_in_the_tick_of_its_release_never_runs(clock):
    gate, model, counters = make(clock, slots=0)
    futures = [submit(gate, n) for n in range(3)]
    futures[0].cancel()
    gate.resize(1)  # before the loop has told the gate of the cancellation
    await settle()
    assert model.calls == [[1, 2]]
    assert dict(counters.totals().failures) == {"CANCELED": 1}


@drive
async def test_a_request_cancelled_while_it_runs_leaves_its_mates_alone(clock):
    gate, model, counters = make(clock, slots=0)
    futures = [submit(gate, n) for n in range(8)]
    gate.resize(1)
    await settle()
    futures[3].cancel()
    await settle()
    model.finish()
    await settle()
    assert sum(f.cancelled() for f in futures) == 1
    assert sum(not f.cancelled() and f.exception() is None for f in futures) == 7
    assert dict(counters.totals().failures) == {"CANCELED": 1}


@drive
async def test_a_cancellation_lets_the_rest_go_if_it_is_complete_now(clock):
    gate, model, _ = make(clock, preferred=(5, 8), delay_ns=5 * MS)
    futures = [submit(gate, n, rows) for n, rows in enumerate((2, 1, 3))]
    await settle()
    assert model.calls == []
    futures[1].cancel()
    await settle()
    assert (model.calls, clock()) == ([[0, 2]], 0)


@drive
async def test_a_batch_does_not_see_the_context_of_a_client(clock):
    secret = contextvars.ContextVar("secret", default="none")
    seen = []
    model = Model()

    async def execute(group, place):
        seen.append(secret.get())
        return await model.execute(group, place)

    gate, _, _ = make(clock, model=SimpleNamespace(execute=execute))
    secret.set("client 1")
    future = submit(gate, 0)
    await settle()
    model.finish()
    await future
    assert seen == ["none"]


@drive
async def test_a_client_that_disconnects_cancels_only_itself(clock):
    gate, model, _ = make(clock)

    async def client(number):
        return await submit(gate, number)

    clients = [asyncio.ensure_future(client(n)) for n in range(3)]
    await settle()
    clients[0].cancel()  # it started the batch that runs
    clients[1].cancel()
    await settle()
    model.finish()
    await settle()
    assert model.calls == [[0], [2]]
    model.finish()
    assert await clients[2]


@drive
async def test_a_full_batch_waits_beside_the_one_that_runs(clock):
    gate, model, _ = make(clock, max_rows=2, preferred=(2,))
    futures = [submit(gate, n) for n in range(7)]
    await settle()
    # The first found a free slot; one full batch was sent ahead, and no second one.
    assert model.calls == [[0], [1, 2]]
    model.finish()
    await settle()
    assert model.calls == [[0], [1, 2], [3, 4]]
    while model.replies:
        model.finish()
        await settle()
    assert model.calls[-1] == [5, 6]
    assert all(future.done() for future in futures)


@drive
async def test_a_partial_batch_is_not_sent_ahead(clock):
    """The control: what might still grow waits for the slot."""
    gate, model, _ = make(clock, max_rows=4, preferred=(4,))
    [submit(gate, n) for n in range(4)]
    await settle()
    assert model.calls == [[0]]
    model.finish()
    await settle()
    assert model.calls == [[0], [1, 2, 3]]
    model.finish()


@drive
async def test_nothing_is_sent_ahead_while_a_slot_rests(clock):
    gate, model, _ = make(clock, max_rows=2, preferred=(2,))
    [submit(gate, n) for n in range(5)]
    await settle()
    model.finish(refused=True)
    await settle()
    assert model.calls == [[0], [1, 2]]
    model.finish()
    await settle()
    assert model.calls == [[0], [1, 2]]  # the refused slot still rests
    await asyncio.sleep(0.006)
    assert model.calls[2] == [0, 3]
    while model.replies:
        model.finish()
        await settle()


class Reluctant(Model):
    """Takes some turns of the loop to send a group that is not the first, or fails to."""

    def __init__(self, fails=False):
        super().__init__()
        self.fails = fails

    async def execute(self, group, place):
        if self.calls:
            await asyncio.sleep(0.001)
            if self.fails:
                raise ValueError("not sent")
        return await super().execute(group, place)


@pytest.mark.parametrize("fails", [False, True])
def test_answers_wait_until_the_next_batch_is_sent(fails):
    @drive
    async def check(clock):
        gate, model, _ = make(clock, model=Reluctant(fails))
        first, second = submit(gate, 0), submit(gate, 1)
        await settle()
        model.finish()
        await settle()
        assert not first.done(), "its client would send more, and the instance wait for that"
        await asyncio.sleep(0.0011)
        assert first.done() and (gate.in_flight, second.done()) == ((0, True) if fails else (1, 0))
        if fails:
            assert isinstance(second.exception(), Internal)
            return
        drained = asyncio.ensure_future(gate.drain())
        await settle()
        assert not drained.done()
        model.finish()
        await drained
        assert second.done()

    check()


@drive
async def test_answers_wait_for_no_batch_but_the_next(clock):
    """With many instances some batch is always on its way."""
    gate, model, _ = make(clock, slots=2, model=Reluctant())
    first, *_ = [submit(gate, number) for number in range(2)]
    await asyncio.sleep(0.0005)
    submit(gate, 2)
    model.finish()  # of the first, and the third is under way
    await asyncio.sleep(0.0006)  # the second has been sent
    submit(gate, 3)
    model.finish()  # of the second, and the fourth is under way
    await asyncio.sleep(0.0005)
    assert first.done() and len(model.calls) == 3


@drive
async def test_control_without_a_next_batch_answers_wait_for_nothing(clock):
    gate, model, _ = make(clock, model=Reluctant())
    first = submit(gate, 0)
    await settle()
    model.finish()
    await settle()
    assert first.done() and gate.in_flight == 0


@drive
async def test_what_waits_is_handed_over_and_what_runs_is_not(clock):
    old, running, _ = make(clock, max_rows=1, preferred=(1,))
    futures = [submit(old, n) for n in range(4)]
    await settle()
    new, model, counters = make(clock, max_rows=1, preferred=(1,))
    old.hand_over(new)
    await settle()
    assert (old.pending, old.in_flight, new.pending) == (0, 1, 2)
    assert model.calls == [[1]]
    futures[2].cancel()  # a client that leaves is found where it waits now
    await settle()
    assert new.pending == 1 and counters.totals().failures == {"CANCELED": 1}
    running.finish()
    model.finish()
    await settle()
    model.finish()
    await settle()
    assert all(future.done() for future in futures)
    await old.drain()
    await new.drain()


@drive
async def test_a_gate_without_slots_hands_over_all_it_has(clock):
    old, _, _ = make(clock, slots=0)
    futures = [submit(old, n) for n in range(3)]
    new, model, _ = make(clock)
    old.hand_over(new)
    await settle()
    assert model.calls == [[0, 1, 2]]
    model.finish()
    await settle()
    assert all(future.done() for future in futures)
