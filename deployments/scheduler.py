"""When a batch goes and what is in it: queue policy as plain data.

Owns the order of waiting requests of one model version, rows, preferred sizes, delay and limits.
Has no clock (times are int nanoseconds given by the caller), no asyncio and no idea of what runs a
batch. Called by the Gate, which asks `next` only when an instance slot is free.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from configs.model import ModelConfig

from .types import Array, RequestFacts

# Withdrawn entries stay in the deque until they reach the front; beyond this many more than the
# living ones, the deque is rebuilt.
_SPARE_DEAD = 64


class QueueLimits(Protocol):
    """The part of ServerSettings that bounds a queue."""

    @property
    def max_queue_requests(self) -> int: ...

    @property
    def max_queue_s(self) -> float: ...


@dataclass(frozen=True, slots=True)
class BatchPolicy:
    """`merge` False: one request per batch. `max_requests` and `max_queue_ns` 0: no limit."""

    max_rows: int
    merge: bool
    preferred: tuple[int, ...]
    delay_ns: int
    max_requests: int
    max_queue_ns: int
    preserve_ordering: bool = False


def policy(config: ModelConfig, settings: QueueLimits) -> BatchPolicy:
    """Without a `dynamic_batching` block requests are never merged, as in Triton."""
    batching = config.dynamic_batching
    max_rows = max(1, config.max_batch_size)
    return BatchPolicy(
        max_rows=max_rows,
        merge=batching is not None and max_rows > 1,
        preferred=tuple(sorted(batching.preferred_batch_size if batching else ())) or (max_rows,),
        delay_ns=batching.max_queue_delay_microseconds * 1000 if batching else 0,
        max_requests=settings.max_queue_requests,
        max_queue_ns=int(settings.max_queue_s * 1e9),
        preserve_ordering=batching is not None and batching.preserve_ordering,
    )


@dataclass(slots=True, eq=False)
class Entry:
    """One waiting request. Only entries with equal `key` may share a batch.

    `inputs`, `outputs` and `facts` are what the batch call needs; `waiter`, `reply`, `left`,
    `owner` and `answer` belong to the Gate: none of them is looked at here. `order` and `waiting`
    belong to the Scheduler.
    """

    rows: int
    key: Hashable
    queued_ns: int
    inputs: tuple[Array | None, ...] = ()
    outputs: tuple[str, ...] = ()
    waiter: Any = None
    facts: RequestFacts | None = None
    reply: Any = None
    left: bool = False
    owner: Any = None
    answer: Any = None
    order: int = 0
    waiting: bool = False


@dataclass(frozen=True, slots=True)
class Group:
    """The members of one batch, in arrival order."""

    members: tuple[Entry, ...]
    released_ns: int


@dataclass(frozen=True, slots=True)
class Wait:
    """A partial batch is held back until then, unless what arrives completes it."""

    until_ns: int


Step: TypeAlias = Group | Wait | None


class Scheduler:
    """A FIFO queue. `queued_ns` of added entries must not decrease."""

    def __init__(self, policy: BatchPolicy) -> None:
        self._policy = policy
        self._queue: deque[Entry] = deque()
        self._live = 0
        self._dead = 0
        self._late: list[Entry] = []
        self._orders = 0
        # The candidate batch: the first `_scanned` of the deque. It is kept between calls so that a
        # held batch costs each arrival one step and not a scan from the front.
        self._scanned = 0
        self._rows = 0
        self._ready = False
        self._closed = False

    @property
    def pending(self) -> int:
        return self._live

    @property
    def full(self) -> bool:
        return 0 < self._policy.max_requests <= self._live

    @property
    def next_expiry_ns(self) -> int | None:
        """When the oldest waiting entry expires."""
        if not self._live or not self._policy.max_queue_ns:
            return None
        return self._front().queued_ns + self._policy.max_queue_ns

    def add(self, entry: Entry) -> None:
        """Ask `full` first: what is added here waits, limit or not."""
        self._orders += 1
        entry.order = self._orders
        entry.waiting = True
        self._queue.append(entry)
        self._live += 1

    def withdraw(self, entry: Entry) -> bool:
        """False when the entry no longer waits: it is in a group, expired or withdrawn."""
        if not entry.waiting:
            return False
        entry.waiting = False
        self._live -= 1
        self._dead += 1
        self._forget()
        if self._dead > self._live + _SPARE_DEAD:
            self._queue = deque(entry for entry in self._queue if entry.waiting)
            self._dead = 0
        return True

    def clear(self) -> list[Entry]:
        """Takes out everything that waits, in order."""
        entries = [entry for entry in self._queue if entry.waiting]
        for entry in entries:
            entry.waiting = False
        self._queue.clear()
        self._live = self._dead = 0
        self._forget()
        return entries

    def expired(self, now_ns: int) -> list[Entry]:
        """Takes out the entries that have waited too long; each is returned once."""
        self._expire(now_ns)
        late, self._late = self._late, []
        return late

    def put_back(self, group: Group) -> None:
        """Members of a batch that was refused wait again, before everything that came later."""
        if not group.members:
            return
        last = group.members[-1].order
        front = list(group.members)
        while self._queue and self._queue[0].order < last:
            front.append(self._queue.popleft())
        front.sort(key=lambda entry: entry.order)
        self._queue.extendleft(reversed(front))
        for entry in group.members:
            entry.waiting = True
        self._live += len(group.members)
        self._forget()

    def next(self, now_ns: int) -> Step:
        """The batch for a free slot: now, not before a given time, or none."""
        self._expire(now_ns)
        if not self._live:
            return None
        until_ns = self._front().queued_ns + self._policy.delay_ns
        self._scan()
        if not self._ready and now_ns < until_ns:
            return Wait(until_ns)
        return self._take(now_ns)

    @property
    def may_be_full(self) -> bool:
        """Cheap to ask: False when `next_full` would find nothing, True promises nothing."""
        return self._policy.merge and self._policy.max_rows > 1 and self._live > 0

    def next_full(self, now_ns: int) -> Group | None:
        """A batch that waiting could not make larger, for an instance that still runs another.

        Only where requests are merged: one that goes alone gains nothing by leaving early.
        """
        self._expire(now_ns)
        if not self._live or not self._policy.merge or self._policy.max_rows < 2:
            return None
        self._front()
        self._scan()
        return self._take(now_ns) if self._closed else None

    def _scan(self) -> None:
        """Extends the candidate as far as it goes.

        Held is only what has not reached a preferred size on its way and might still grow: sizes
        never cut off what already waits, so the whole candidate goes, not the preferred prefix.
        """
        policy = self._policy
        head = self._queue[0]
        for index in range(self._scanned, len(self._queue)):
            entry = self._queue[index]
            if self._closed:
                return
            if entry.waiting:
                if entry is not head and not self._fits(entry, head.key):
                    self._ready = self._closed = True
                    return
                self._rows += entry.rows
                if self._rows in policy.preferred or self._rows >= policy.preferred[-1]:
                    self._ready = True
                if self._rows >= policy.max_rows or not policy.merge:
                    self._ready = self._closed = True
            self._scanned = index + 1

    def _fits(self, entry: Entry, key: Hashable) -> bool:
        return self._rows + entry.rows <= self._policy.max_rows and entry.key == key

    def _take(self, now_ns: int) -> Group:
        members = []
        for _ in range(self._scanned):
            entry = self._queue.popleft()
            if entry.waiting:
                entry.waiting = False
                members.append(entry)
            else:
                self._dead -= 1
        self._live -= len(members)
        self._forget()
        return Group(tuple(members), now_ns)

    def _expire(self, now_ns: int) -> None:
        limit_ns = self._policy.max_queue_ns
        while limit_ns and self._live and self._front().queued_ns + limit_ns <= now_ns:
            entry = self._queue.popleft()
            entry.waiting = False
            self._live -= 1
            self._late.append(entry)
            self._forget()

    def _front(self) -> Entry:
        """The first living entry; there must be one."""
        while not self._queue[0].waiting:
            self._queue.popleft()
            self._dead -= 1
        return self._queue[0]

    def _forget(self) -> None:
        self._scanned = self._rows = 0
        self._ready = self._closed = False
