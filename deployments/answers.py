"""What becomes of requests: each waiter hears of it once, and each end is counted.

Owns delivery, and its order under `preserve_ordering`. When something runs is the Gate's business,
which calls this and is the only one to. Lives on the Gate's event loop.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from functools import partial

from .batcher import MemberResult, Outcome
from .errors import Cancelled, MantaError, QueueTimeout
from .scheduler import Entry, Group
from .statistics import Counters, Reason
from .tracing import Trace, Waiter

logger = logging.getLogger("manta.gate")


class Answers:
    """Each as soon as there is one."""

    def __init__(self, model_name: str, counters: Counters) -> None:
        self._model_name = model_name
        self._counters = counters

    def settle(self, group: Group, outcome: Outcome, now_ns: int) -> None:
        """A batch has run; `outcome` has a result for each member."""
        for run in outcome.executions:
            self._counters.executed(run.rows, run.input_ns, run.infer_ns, run.output_ns)
        for entry, result in zip(group.members, outcome.results, strict=True):
            self.deliver(entry, result, Reason.BACKEND, now_ns)

    def fail(self, group: Group, error: MantaError, now_ns: int) -> None:
        """Those members that have no answer yet."""
        for entry in group.members:
            if entry.answer is None:
                self.deliver(entry, error, reason(error), now_ns)

    def deliver(
        self, entry: Entry, result: MemberResult | MantaError, cause: Reason, now_ns: int
    ) -> None:
        waited_ns = now_ns - entry.queued_ns
        if gone(entry):
            self.left(entry, now_ns)
            return
        if isinstance(result, MantaError):
            self._counters.failed(cause, waited_ns)
            result = copy(result)  # each waiter gets its own: a raised error collects a traceback
        else:
            self._counters.succeeded(
                entry.rows,
                waited_ns,
                result.queue_ns,
                result.input_ns,
                result.infer_ns,
                result.output_ns,
            )
        entry.answer = _answered
        try:
            entry.waiter.deliver(result)
        except Exception:  # one client's trouble is not the others'
            logger.exception("an answer of model '%s' was not delivered", self._model_name)

    def left(self, entry: Entry, now_ns: int) -> None:
        """Its client is gone."""
        self._counters.failed(Reason.CANCELED, now_ns - entry.queued_ns)
        entry.answer = _answered
        if isinstance(entry.waiter, Trace):
            entry.waiter.left()


class InOrder(Answers):
    """In the order in which the requests came, errors too. Who leaves the queue is not waited for;
    who leaves a batch that runs is, as its mates are."""

    def __init__(self, model_name: str, counters: Counters) -> None:
        super().__init__(model_name, counters)
        self._open: deque[Entry] = deque()

    def came(self, entry: Entry) -> None:
        self._open.append(entry)

    def deliver(
        self, entry: Entry, result: MemberResult | MantaError, cause: Reason, now_ns: int
    ) -> None:
        entry.answer = partial(super().deliver, entry, result, cause)
        self._release(now_ns)

    def left(self, entry: Entry, now_ns: int) -> None:
        super().left(entry, now_ns)
        self._release(now_ns)

    def withdraw(self, entries: Sequence[Entry]) -> None:
        """Others answer them."""
        moved = set(map(id, entries))
        self._open = deque(entry for entry in self._open if id(entry) not in moved)

    def follow(self, before: InOrder) -> None:
        """One order over both, from now on."""
        before._open.extend(self._open)
        self._open = before._open

    def _release(self, now_ns: int) -> None:
        while self._open and self._open[0].answer is not None:
            self._open.popleft().answer(now_ns)


def hand_over(before: Answers, after: Answers, entries: Sequence[Entry]) -> None:
    """`entries` have come to one and are answered by the other."""
    if isinstance(before, InOrder) and isinstance(after, InOrder):
        after.follow(before)
    elif isinstance(before, InOrder):
        before.withdraw(entries)
    elif isinstance(after, InOrder):
        for entry in entries:
            after.came(entry)


def gone(entry: Entry) -> bool:
    return entry.left or (entry.reply is not None and entry.reply.done())


def reason(error: MantaError) -> Reason:
    """Of an error that did not come from the model."""
    if isinstance(error, QueueTimeout):
        return Reason.REJECTED
    return Reason.CANCELED if isinstance(error, Cancelled) else Reason.OTHER


def refused(waiter: Waiter, error: MantaError) -> MantaError:
    """The error of a request that does not even wait."""
    if isinstance(waiter, Trace):
        waiter.refused(error)
    return error


def copy(error: MantaError) -> MantaError:
    return type(error)(*error.args)


def _answered(now_ns: int) -> None:
    """The answer of an entry that has been answered."""
