"""The pull gate: releases a batch when an instance slot is free, never before (design: the gate).

Owns the waiting futures of one model version, the slots and the timers, and counts what becomes of
each request. Asks the Scheduler what goes and hands it to `execute` (the Batcher). Called by
`inference` (`submit`) and by the Router (`resize`, `close`, `drain`). Lives on one event loop.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Hashable
from functools import partial

from .batcher import MemberResult, Outcome
from .errors import Cancelled, Internal, MantaError, QueueFull, QueueTimeout
from .scheduler import BatchPolicy, Entry, Group, Scheduler, Wait
from .statistics import Counters, Reason
from .types import Array

__all__ = ["Gate", "MemberResult"]

logger = logging.getLogger("manta.gate")

# How long a slot rests whose replica refused a batch: it was promised to another Router.
_BACKOFF_S = 0.005
_BACKOFF_MAX_S = 0.080


class Gate:
    """`execute` runs one group; what it raises fails the members of that group and nothing else."""

    def __init__(
        self,
        model_name: str,
        policy: BatchPolicy,
        execute: Callable[[Group], Awaitable[Outcome]],
        slots: int,
        counters: Counters | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._model_name = model_name
        self._policy = policy
        self._execute = execute
        self._slots = slots
        self._counters = counters or Counters()
        self._clock = clock
        self._scheduler = Scheduler(policy)
        self._in_flight = 0
        self._frozen = 0
        self._backoff_s = _BACKOFF_S
        self._timer: asyncio.TimerHandle | None = None
        self._timer_ns = 0
        self._pumping = False
        self._closed: MantaError | None = None
        self._ordered: deque[Entry] = deque()  # unanswered, with preserve_ordering only
        self._drains: list[asyncio.Future[None]] = []
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def pending(self) -> int:
        """Requests that wait."""
        return self._scheduler.pending

    @property
    def in_flight(self) -> int:
        """Batches that run."""
        return self._in_flight

    @property
    def slots(self) -> int:
        return self._slots

    def submit(
        self,
        rows: int,
        key: Hashable,
        inputs: tuple[Array | None, ...],
        outputs: tuple[str, ...],
    ) -> asyncio.Future[MemberResult]:
        """Queues a valid request; with a free slot and nothing to wait for it starts at once.

        Raises QueueFull, or what the gate was closed with. The future fails with a MantaError;
        cancelling it withdraws the request.
        """
        if self._closed is not None:
            raise _copy(self._closed)
        if self._scheduler.full:
            raise QueueFull(self._model_name, self._policy.max_requests)
        reply: asyncio.Future[MemberResult] = asyncio.get_running_loop().create_future()
        entry = Entry(rows, key, self._clock(), inputs, outputs, reply, self)
        if self._policy.preserve_ordering:
            self._ordered.append(entry)
        self._scheduler.add(entry)
        self._pump()
        if entry.waiting:
            reply.add_done_callback(partial(_leave, entry))
        return reply

    def resize(self, slots: int) -> None:
        """Batches that run go on, also above the new number."""
        self._slots = slots
        self._pump()

    def hand_over(self, successor: Gate) -> None:
        """What waits here waits there from now on; what runs is answered here.

        Both must take the same requests, and the successor must not have any yet.
        """
        for entry in self._scheduler.clear():
            entry.owner = successor
            successor._scheduler.add(entry)
        self._rest()
        successor._pump()

    def close(self, error: MantaError) -> None:
        """Fails what waits and refuses what comes; batches that run are answered."""
        self._closed = error
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now_ns = self._clock()
        for entry in self._scheduler.clear():
            self._deliver(entry, error, _reason(error), now_ns)
        self._release(now_ns)
        self._rest()

    async def drain(self) -> None:
        """Returns when nothing waits and nothing runs. Accepts go on: stop them first."""
        while self.pending or self._in_flight:
            drained = asyncio.get_running_loop().create_future()
            self._drains.append(drained)
            await drained

    # --- what goes -----------------------------------------

    def _pump(self) -> None:
        now_ns = self._clock()
        for entry in self._scheduler.expired(now_ns):
            self._deliver(entry, QueueTimeout(self._model_name), Reason.REJECTED, now_ns)
        due_ns = None
        while self._in_flight + self._frozen < self._slots:
            step = self._scheduler.next(now_ns)
            if isinstance(step, Group):
                self._start(step, now_ns)
                continue
            if isinstance(step, Wait):
                due_ns = step.until_ns
            break
        self._release(now_ns)
        self._prefetch(now_ns)
        expiry_ns = self._scheduler.next_expiry_ns
        if expiry_ns is not None:
            due_ns = expiry_ns if due_ns is None else min(due_ns, expiry_ns)
        if due_ns is not None:
            self._arm(due_ns, now_ns)
        else:
            self._rest()

    def _prefetch(self, now_ns: int) -> None:
        """One full batch per instance may wait beside it: it is there when the one before ends."""
        while not self._frozen and self._slots <= self._in_flight < 2 * self._slots:
            group = self._scheduler.next_full(now_ns)
            if group is None:
                return
            self._start(group, now_ns)

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
        self._pump()

    def _start(self, group: Group, now_ns: int) -> None:
        living = tuple(entry for entry in group.members if not entry.reply.done())
        if len(living) < len(group.members):
            for entry in group.members:
                if entry.reply.done():
                    self._left(entry, now_ns)
            if not living:
                return
            group = Group(living, group.released_ns)
        self._in_flight += 1
        # An empty context: one client's disconnect, deadline or trace must not reach the others.
        loop = asyncio.get_running_loop()
        task: asyncio.Task[None] = contextvars.Context().run(loop.create_task, self._run(group))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, group: Group) -> None:
        """Whatever happens here, every member is answered and the slot is free again."""
        try:
            await self._attempt(group)
        except MantaError as error:
            self._failed(group, error)
        except (Exception, asyncio.CancelledError):
            logger.exception("a batch of model '%s' failed", self._model_name)
            self._failed(
                group, Internal(f"the server failed to execute model '{self._model_name}'")
            )
        finally:
            self._in_flight -= 1
            self._pump()

    async def _attempt(self, group: Group) -> None:
        outcome = await self._execute(group)
        if outcome.refused:
            self._refused(group)
            return
        if len(outcome.results) != len(group.members):
            raise ValueError(f"{len(outcome.results)} results for {len(group.members)} members")
        self._settle(group, outcome)

    def _failed(self, group: Group, error: MantaError) -> None:
        now_ns = self._clock()
        for entry in group.members:
            if entry.answer is None:
                self._answer(entry, error, _reason(error), now_ns)

    def _refused(self, group: Group) -> None:
        """Nothing ran: to the front of the queue. The slot rests, longer each time in a row."""
        now_ns = self._clock()
        again = []
        for entry in group.members:
            if entry.reply.done():
                self._left(entry, now_ns)
            elif self._closed is not None:
                self._deliver(entry, self._closed, _reason(self._closed), now_ns)
            else:
                again.append(entry)
        self._scheduler.put_back(Group(tuple(again), group.released_ns))
        for entry in again:
            entry.reply.add_done_callback(partial(_leave, entry))
        self._frozen += 1
        loop = asyncio.get_running_loop()
        loop.call_later(self._backoff_s, self._thaw, context=contextvars.Context())
        self._backoff_s = min(2 * self._backoff_s, _BACKOFF_MAX_S)

    def _thaw(self) -> None:
        self._frozen -= 1
        self._pump()

    # --- what becomes of it -----------------------------------------

    def _settle(self, group: Group, outcome: Outcome) -> None:
        self._backoff_s = _BACKOFF_S
        now_ns = self._clock()
        for run in outcome.executions:
            self._counters.executed(run.rows, run.input_ns, run.infer_ns, run.output_ns)
        for entry, result in zip(group.members, outcome.results, strict=True):
            self._answer(entry, result, Reason.BACKEND, now_ns)

    def _answer(
        self, entry: Entry, result: MemberResult | MantaError, reason: Reason, now_ns: int
    ) -> None:
        """The answer of an execution: at once, or in its turn with preserve_ordering."""
        if self._policy.preserve_ordering:
            entry.answer = partial(self._deliver, entry, result, reason)
        else:
            self._deliver(entry, result, reason, now_ns)

    def _release(self, now_ns: int) -> None:
        while self._ordered and self._ordered[0].answer is not None:
            self._ordered.popleft().answer(now_ns)

    def _deliver(
        self, entry: Entry, result: MemberResult | MantaError, reason: Reason, now_ns: int
    ) -> None:
        """Now. What never ran is answered out of turn."""
        waited_ns = now_ns - entry.queued_ns
        if entry.reply.done():
            self._counters.failed(Reason.CANCELED, waited_ns)
        elif isinstance(result, MantaError):
            self._counters.failed(reason, waited_ns)
            # Each waiter gets its own: a raised error collects a traceback.
            entry.reply.set_exception(_copy(result))
        else:
            self._counters.succeeded(
                entry.rows,
                waited_ns,
                result.queue_ns,
                result.input_ns,
                result.infer_ns,
                result.output_ns,
            )
            entry.reply.set_result(result)
        entry.answer = _answered

    def _left(self, entry: Entry, now_ns: int) -> None:
        self._counters.failed(Reason.CANCELED, now_ns - entry.queued_ns)
        entry.answer = _answered

    def _withdraw(self, entry: Entry, reply: asyncio.Future[MemberResult]) -> None:
        if not self._scheduler.withdraw(entry):
            return
        self._left(entry, self._clock())
        # Without it the rest may be a preferred size. Once per tick: clients can leave in crowds.
        if not self._pumping:
            self._pumping = True
            reply.get_loop().call_soon(self._pump_once, context=contextvars.Context())

    def _pump_once(self) -> None:
        self._pumping = False
        self._pump()

    def _rest(self) -> None:
        if not self.pending and not self._in_flight:
            drains, self._drains = self._drains, []
            for drained in drains:
                if not drained.done():
                    drained.set_result(None)


def _leave(entry: Entry, reply: asyncio.Future[MemberResult]) -> None:
    """A client is gone, or its request answered, while it may still wait; in whichever gate."""
    entry.owner._withdraw(entry, reply)


def _answered(now_ns: int) -> None:
    """The answer of an entry that has been answered out of turn."""


def _reason(error: MantaError) -> Reason:
    """Of an error that did not come from the model."""
    if isinstance(error, QueueTimeout):
        return Reason.REJECTED
    return Reason.CANCELED if isinstance(error, Cancelled) else Reason.OTHER


def _copy(error: MantaError) -> MantaError:
    return type(error)(*error.args)
