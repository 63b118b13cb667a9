"""The pull gate: releases a batch when a place for it is free, never before.

Owns who waits for one model version and the timers. Asks the Scheduler what goes, `places` where,
and hands both to `execute` (the Batcher); `answers` tells the waiters. Called by the lanes
(`enqueue`), by `inference` (`submit`) and by the Router. Lives on one event loop.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections.abc import Awaitable, Callable, Hashable
from functools import partial
from typing import Protocol

from . import answers
from .answers import Answers, InOrder, gone
from .batcher import Executor, MemberResult, Outcome
from .errors import Internal, MantaError, QueueFull, QueueTimeout
from .places import Place
from .scheduler import BatchPolicy, Entry, Group, Scheduler, Wait
from .sending import Sending
from .statistics import Counters, Reason
from .tracing import Tracer, Waiter
from .types import Array, RequestFacts

__all__ = ["Gate", "MemberResult", "Waiter"]

logger = logging.getLogger("manta.gate")


class FreePlaces(Protocol):
    """Where batches may run now; see `places`."""

    def idle(self) -> Place | None: ...

    def ahead(self) -> Place | None: ...

    def want(self) -> None: ...

    def spare(self) -> None: ...


Execute = Callable[[Group, Executor], Awaitable[Outcome]]


class _FutureWaiter:
    """A future as a waiter."""

    __slots__ = ("_future",)

    def __init__(self, future: asyncio.Future[MemberResult]) -> None:
        self._future = future

    def deliver(self, result: MemberResult | MantaError) -> None:
        if self._future.done():
            return
        if isinstance(result, MantaError):
            self._future.set_exception(result)
        else:
            self._future.set_result(result)


class Gate:
    """`execute` runs one group; what it raises fails the members of that group and nothing else."""

    def __init__(
        self,
        model_name: str,
        policy: BatchPolicy,
        execute: Execute,
        places: FreePlaces,
        counters: Counters | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._model_name = model_name
        self._policy = policy
        self._execute = self._untraced = execute
        self.tracer: Tracer | None = None  # the roads ask for it
        self._places = places
        self._clock = clock
        self._scheduler = Scheduler(policy)
        self._answers = Answers(model_name, counters or Counters())
        self._in_order: InOrder | None = None
        if policy.preserve_ordering:
            self._answers = self._in_order = InOrder(model_name, counters or Counters())
        self._in_flight = 0
        self._timer: asyncio.TimerHandle | None = None
        self._timer_ns = 0
        self._pumping = False
        self._closed: MantaError | None = None
        self._drains: list[asyncio.Future[None]] = []
        self._running: set[asyncio.Future[Outcome]] = set()
        self._latest: Sending | None = None

    @property
    def pending(self) -> int:
        """Requests that wait."""
        return self._scheduler.pending

    @property
    def in_flight(self) -> int:
        """Batches that run, or wait beside one that runs."""
        return self._in_flight

    def trace(self, tracer: Tracer | None) -> None:
        """From now on; None for not at all."""
        self.tracer, run = tracer, self._untraced
        self._execute = run if tracer is None else partial(tracer.execute, run)

    def enqueue(
        self,
        waiter: Waiter,
        rows: int,
        key: Hashable,
        inputs: tuple[Array | None, ...],
        outputs: tuple[str, ...],
        facts: RequestFacts | None = None,
    ) -> Entry:
        """Queues a valid request; with a free place and nothing to wait for it starts at once.

        Raises QueueFull, or what the gate was closed with.
        """
        if self._closed is not None:
            raise answers.refused(waiter, answers.copy(self._closed))
        if self._scheduler.full:
            full = QueueFull(self._model_name, self._policy.max_requests)
            raise answers.refused(waiter, full)
        now_ns = self._clock()
        entry = Entry(rows, key, now_ns, inputs, outputs, waiter, facts)
        entry.owner = self
        if self._in_order is not None:
            self._in_order.came(entry)
        self._scheduler.add(entry)
        try:
            self._pump(now_ns)
        except BaseException:
            entry.left = True  # its waiter hears of it now, and may soon wait for something else
            if self._scheduler.withdraw(entry):
                self._answers.left(entry, now_ns)
            raise
        return entry

    def withdraw(self, entry: Entry) -> None:
        """The client is gone: its waiter hears nothing any more, and what waits is not run."""
        entry.left = True
        owner: Gate = entry.owner
        owner._withdraw(entry)

    def submit(
        self,
        rows: int,
        key: Hashable,
        inputs: tuple[Array | None, ...],
        outputs: tuple[str, ...],
        facts: RequestFacts | None = None,
        wrap: Callable[[Waiter], Waiter] | None = None,
    ) -> asyncio.Future[MemberResult]:
        """As `enqueue`, for those who wait on a future: it fails with a MantaError, and cancelling
        it withdraws the request. `wrap` puts another waiter before it, which tells it."""
        reply: asyncio.Future[MemberResult] = asyncio.get_running_loop().create_future()
        waiter: Waiter = _FutureWaiter(reply)
        if wrap is not None:
            waiter = wrap(waiter)
        entry = self.enqueue(waiter, rows, key, inputs, outputs, facts)
        entry.reply = reply
        if entry.waiting:
            reply.add_done_callback(partial(_leave, entry))
        return reply

    def pump(self) -> None:
        """More places may be free than when a request came or a batch ended."""
        self._pump(self._clock())
        if not self._scheduler.pending:
            self._places.spare()

    def hand_over(self, successor: Gate) -> None:
        """What waits here waits there from now on; what runs is answered here.

        Both must take the same requests, and the successor must not have any yet.
        """
        waiting = self._scheduler.clear()
        for entry in waiting:
            entry.owner = successor
            successor._scheduler.add(entry)
        answers.hand_over(self._answers, successor._answers, waiting)
        self._rest()
        successor.pump()

    def close(self, error: MantaError) -> None:
        """Fails what waits and refuses what comes; batches that run are answered."""
        self._closed = error
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.refuse(error)

    def refuse(self, error: MantaError) -> None:
        """Fails what waits; what comes may wait again."""
        now_ns = self._clock()
        for entry in self._scheduler.clear():
            self._answers.deliver(entry, error, answers.reason(error), now_ns)
        self._rest()

    async def drain(self) -> None:
        """Returns when nothing waits and nothing runs. Accepts go on: stop them first."""
        while self.pending or self._in_flight:
            drained = asyncio.get_running_loop().create_future()
            self._drains.append(drained)
            await drained

    # --- what goes -----------------------------------------

    def _pump(self, now_ns: int) -> None:
        scheduler, places = self._scheduler, self._places
        for entry in scheduler.expired(now_ns):
            self._answers.deliver(entry, QueueTimeout(self._model_name), Reason.REJECTED, now_ns)
        due_ns = None
        while scheduler.pending:
            place = places.idle()
            if place is None:
                break
            step = scheduler.next(now_ns)
            if isinstance(step, Group):
                self._start(step, place, now_ns)
                continue
            if isinstance(step, Wait):
                due_ns = step.until_ns
            break
        self._prefetch(now_ns)
        if scheduler.pending:
            self._wait(due_ns, now_ns)
        elif not self._in_flight:
            self._rest()

    def _prefetch(self, now_ns: int) -> None:
        """One full batch per instance may wait beside it: it is there when the one before ends."""
        scheduler = self._scheduler
        while scheduler.may_be_full:
            place = self._places.ahead()
            group = None if place is None else scheduler.next_full(now_ns)
            if place is None or group is None:
                return
            self._start(group, place, now_ns)

    def _wait(self, due_ns: int | None, now_ns: int) -> None:
        """Until a held batch is due, the oldest request expires, or a place becomes free."""
        if due_ns is None:
            self._places.want()
        expiry_ns = self._scheduler.next_expiry_ns
        if expiry_ns is not None:
            due_ns = expiry_ns if due_ns is None else min(due_ns, expiry_ns)
        if due_ns is not None:
            self._arm(due_ns, now_ns)

    def _arm(self, due_ns: int, now_ns: int) -> None:
        """One timer, replaced only by an earlier one: if it rings too early, it is set anew."""
        if self._timer is not None:
            if self._timer_ns <= due_ns:
                return
            self._timer.cancel()
        loop = asyncio.get_running_loop()
        self._timer_ns = due_ns
        self._timer = loop.call_later(
            max(0, due_ns - now_ns) / 1e9, self._ring, context=contextvars.Context()
        )

    def _ring(self) -> None:
        self._timer = None
        self._pump(self._clock())

    def _start(self, group: Group, place: Place, now_ns: int) -> None:
        if any(gone(entry) for entry in group.members):
            living = []
            for entry in group.members:
                if gone(entry):
                    self._answers.left(entry, now_ns)
                else:
                    living.append(entry)
            if not living:
                return
            group = Group(tuple(living), group.released_ns)
        self._in_flight += 1
        place.running += 1
        self._latest = sending = Sending(place)
        # An empty context: one client's disconnect, deadline or trace must not reach the others.
        context = contextvars.Context()
        future = context.run(self._run, group, sending)
        self._running.add(future)  # the loop itself holds tasks only weakly
        future.add_done_callback(partial(self._done, group, sending), context=context)

    def _run(self, group: Group, sending: Sending) -> asyncio.Future[Outcome]:
        try:
            return asyncio.ensure_future(self._execute(group, sending))
        except Exception as error:
            failed: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
            failed.set_exception(error)
            return failed

    def _done(self, group: Group, sending: Sending, future: asyncio.Future[Outcome]) -> None:
        """Whatever happened, the place is free again, and every member is answered.

        But the instance waits neither for the answers nor for what their clients send next: what
        goes now goes first, and with @serve.batch it takes a few turns of the loop to get there.
        """
        place = sending.place
        self._running.discard(future)
        place.running -= 1
        sending.over()
        try:
            outcome = future.result()
            if outcome.refused:
                place.refused()
                self._put_back(group)
            elif len(outcome.results) != len(group.members):
                raise ValueError(f"{len(outcome.results)} results for {len(group.members)} members")
            else:
                place.accepted()
                before = self._latest
                if self._scheduler.pending:
                    self._pump(self._clock())
                if self._latest is not before and self._latest and self._latest.under_way:
                    self._latest.then.append(partial(self._settle, group, outcome))
                    return
                self._answers.settle(group, outcome, self._clock())
        except MantaError as error:
            self._answers.fail(group, error, self._clock())
        except (Exception, asyncio.CancelledError):
            self._broken(group)
        self._in_flight -= 1
        self._pump(self._clock())

    def _settle(self, group: Group, outcome: Outcome) -> None:
        """What was held back in `_done`."""
        try:
            self._answers.settle(group, outcome, self._clock())
        except Exception:
            self._broken(group)
        self._in_flight -= 1
        self._pump(self._clock())

    def _broken(self, group: Group) -> None:
        """By something that is nobody's answer."""
        logger.exception("a batch of model '%s' failed", self._model_name)
        failure = Internal(f"the server failed to execute model '{self._model_name}'")
        self._answers.fail(group, failure, self._clock())

    def _put_back(self, group: Group) -> None:
        """Nothing ran: to the front of the queue."""
        now_ns = self._clock()
        again = []
        for entry in group.members:
            if gone(entry):
                self._answers.left(entry, now_ns)
            elif self._closed is not None:
                self._answers.deliver(entry, self._closed, answers.reason(self._closed), now_ns)
            else:
                again.append(entry)
        self._scheduler.put_back(Group(tuple(again), group.released_ns))
        for entry in again:
            if entry.reply is not None:
                entry.reply.add_done_callback(partial(_leave, entry))

    def _withdraw(self, entry: Entry) -> None:
        if not self._scheduler.withdraw(entry):
            return
        self._answers.left(entry, self._clock())
        # Without it the rest may be a preferred size. Once per tick: clients can leave in crowds.
        if not self._pumping:
            self._pumping = True
            loop = asyncio.get_running_loop()
            loop.call_soon(self._pump_once, context=contextvars.Context())

    def _pump_once(self) -> None:
        self._pumping = False
        self.pump()

    def _rest(self) -> None:
        if not self.pending and not self._in_flight:
            drains, self._drains = self._drains, []
            for drained in drains:
                if not drained.done():
                    drained.set_result(None)


def _leave(entry: Entry, reply: asyncio.Future[MemberResult]) -> None:
    """A client is gone, or its request answered, while it may still wait; in whichever gate."""
    entry.owner._withdraw(entry)
