"""Cumulative statistics per model version, as Triton counts: the Router's half.

`Recorder` counts in a Router; what it sends are running totals of what changed, so a delta that is
lost, repeated or overtaken never makes a sum wrong. The sums over all Routers are `aggregate`'s.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple, TypeAlias

from .buckets import BOUNDS_NS, EMPTY, summed
from .windows import SLICE_S, Window


class Reason(str, Enum):
    """Why a request failed: the label of nv_inference_request_failure."""

    REJECTED = "REJECTED"
    CANCELED = "CANCELED"
    BACKEND = "BACKEND"
    OTHER = "OTHER"


class VersionKey(NamedTuple):
    """One life of a model version: a reload has another `generation` (its application's name)."""

    model: str
    version: str
    generation: str


class BatchTotals(NamedTuple):
    """Executions of one batch size."""

    executions: int = 0
    input_ns: int = 0
    infer_ns: int = 0
    output_ns: int = 0


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums since the start: queue and compute per successful request, `batches` per execution.

    The last three count by `buckets.BOUNDS_NS`: successful requests by how long they took in all
    and in the queue, executions by their compute time.
    """

    success: int = 0
    success_ns: int = 0
    queue_ns: int = 0
    input_ns: int = 0
    infer_ns: int = 0
    output_ns: int = 0
    inference_count: int = 0
    execution_count: int = 0
    last_ms: int = 0
    fail_ns: int = 0
    failures: Mapping[str, int] = field(default_factory=dict)
    batches: Mapping[int, BatchTotals] = field(default_factory=dict)
    request_buckets: tuple[int, ...] = EMPTY
    queue_buckets: tuple[int, ...] = EMPTY
    compute_buckets: tuple[int, ...] = EMPTY

    @property
    def fail(self) -> int:
        return sum(self.failures.values())

    @property
    def settled(self) -> tuple[int, int, int]:
        """Grows with everything that is counted: tells one state of a counter from an earlier."""
        return (self.success, self.fail, self.execution_count)


# The fields of Totals that Counters keeps in one list, which is what counting costs least in.
_SUMS = (
    "success",
    "success_ns",
    "queue_ns",
    "input_ns",
    "infer_ns",
    "output_ns",
    "inference_count",
    "execution_count",
)
_BUCKETS = ("request_buckets", "queue_buckets", "compute_buckets")


def add(one: Totals, other: Totals) -> Totals:
    """Sums, but the later of two times."""
    sums: dict[str, Any] = {
        name: getattr(one, name) + getattr(other, name) for name in (*_SUMS, "fail_ns")
    }
    sums |= {name: summed(getattr(one, name), getattr(other, name)) for name in _BUCKETS}
    reasons = dict.fromkeys([*one.failures, *other.failures])
    sizes = dict.fromkeys([*one.batches, *other.batches])
    none = BatchTotals()
    return Totals(
        **sums,
        last_ms=max(one.last_ms, other.last_ms),
        failures={r: one.failures.get(r, 0) + other.failures.get(r, 0) for r in reasons},
        batches={
            size: BatchTotals(
                *map(
                    sum,
                    zip(one.batches.get(size, none), other.batches.get(size, none), strict=True),
                )
            )
            for size in sizes
        },
    )


# The last minute's requests by duration: in all, in the queue, and the three parts of compute.
Recent: TypeAlias = tuple[Mapping[int, int], ...]


# A Router, the number of its last delta, and what it had counted of a version by then.
Share: TypeAlias = tuple[VersionKey, str, int, Totals]


@dataclass(frozen=True, slots=True)
class Legacy:
    """What Routers that are gone have counted. Those that live keep it, for a Controller that may
    follow this one; `number` grows with each change in one Controller's life."""

    number: int = 0
    shares: tuple[Share, ...] = ()


@dataclass(frozen=True, slots=True)
class Peers:
    """What other Routers that live have counted, as far as it is news: a node may take one of them
    and the Controller at once. `number` tells up to which change, in one Controller's life."""

    number: int = 0
    shares: tuple[Share, ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """What changed in one Router since the last acknowledged delta, as totals since its start.

    `pending` are the requests that wait now, `running` the batches that run or are sent ahead, and
    `recent` the windows of summaries where these are asked for: gauges, complete each time.
    `legacy` is complete for a Controller that is new, and else only the number of what this Router
    has; `heard` is that of its Peers.
    """

    sequence: int
    versions: tuple[tuple[VersionKey, Totals], ...]
    pending: tuple[tuple[VersionKey, int], ...] = ()
    recent: tuple[tuple[VersionKey, Recent], ...] = ()
    legacy: Legacy = Legacy()
    running: tuple[tuple[VersionKey, int], ...] = ()
    heard: int = 0


class Counters:
    """One version's counts in one Router. Called by its Gate."""

    __slots__ = (
        "_batches",
        "_clock",
        "_computes",
        "_fail_ns",
        "_failures",
        "_last_ms",
        "_queues",
        "_requests",
        "_sums",
        "windows",
    )

    def __init__(self, clock: Callable[[], int] = time.time_ns, summaries: bool = False) -> None:
        self._clock = clock
        self._sums = [0] * len(_SUMS)
        self._failures: dict[str, int] = {}
        self._fail_ns = 0
        self._batches: dict[int, list[int]] = {}
        self._last_ms = 0
        self._requests, self._queues, self._computes = ([0] * len(EMPTY) for _ in range(3))
        self.windows = tuple(Window() for _ in range(5)) if summaries else ()

    def succeeded(
        self, rows: int, total_ns: int, queue_ns: int, input_ns: int, infer_ns: int, output_ns: int
    ) -> None:
        """One request was answered; the compute times are those of its whole execution."""
        sums = self._sums
        sums[0] += 1
        sums[1] += total_ns
        sums[2] += queue_ns
        sums[3] += input_ns
        sums[4] += infer_ns
        sums[5] += output_ns
        sums[6] += rows
        self._requests[bisect_left(BOUNDS_NS, total_ns)] += 1
        self._queues[bisect_left(BOUNDS_NS, queue_ns)] += 1
        if self.windows:
            durations = (total_ns, queue_ns, input_ns, infer_ns, output_ns)
            for window, duration_ns in zip(self.windows, durations, strict=True):
                window.observe(duration_ns)

    def failed(self, reason: Reason, total_ns: int) -> None:
        """One request that had been queued was answered with an error or left."""
        self._failures[reason.value] = self._failures.get(reason.value, 0) + 1
        self._fail_ns += total_ns

    def executed(self, rows: int, input_ns: int, infer_ns: int, output_ns: int) -> None:
        """One execution that did not fail as a whole."""
        self._sums[7] += 1
        self._last_ms = max(self._last_ms, self._clock() // 1_000_000)
        batch = self._batches.get(rows)
        if batch is None:
            batch = self._batches[rows] = [0, 0, 0, 0]
        batch[0] += 1
        batch[1] += input_ns
        batch[2] += infer_ns
        batch[3] += output_ns
        self._computes[bisect_left(BOUNDS_NS, input_ns + infer_ns + output_ns)] += 1

    def totals(self) -> Totals:
        sums: dict[str, Any] = dict(zip(_SUMS, self._sums, strict=True))
        return Totals(
            **sums,
            last_ms=self._last_ms,
            fail_ns=self._fail_ns,
            failures=dict(self._failures),
            batches={size: BatchTotals(*batch) for size, batch in sorted(self._batches.items())},
            request_buckets=tuple(self._requests),
            queue_buckets=tuple(self._queues),
            compute_buckets=tuple(self._computes),
        )


class Recorder:
    """All versions' counters of one Router, and what the Controller has of them.

    `summaries`: the last minute is kept too, on the clock `now_s`.
    """

    def __init__(
        self,
        clock: Callable[[], int] = time.time_ns,
        summaries: bool = False,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._summaries = summaries
        self._now_s = now_s
        self._turned_s = now_s()
        self._counters: dict[VersionKey, Counters] = {}
        self._known: dict[VersionKey, tuple[int, int, int]] = {}
        self._sent: Delta | None = None
        self._legacy = Legacy()
        self._peers: dict[tuple[VersionKey, str], Share] = {}
        self._heard = 0
        self._owed = True

    def counters(self, key: VersionKey) -> Counters:
        """The same object for the same key."""
        if key not in self._counters:
            self._counters[key] = Counters(self._clock, self._summaries)
        return self._counters[key]

    def discard(self, key: VersionKey) -> None:
        """The version is gone for good: a later load has another generation."""
        self._counters.pop(key, None)
        self._known.pop(key, None)
        for place in [place for place in self._peers if place[0] == key]:
            del self._peers[place]

    def flush(
        self,
        sequence: int,
        pending: Mapping[VersionKey, int] | None = None,
        running: Mapping[VersionKey, int] | None = None,
    ) -> Delta:
        """`sequence` must grow. What is not acknowledged is in the next delta again."""
        changed = []
        for key, counters in self._counters.items():
            totals = counters.totals()
            if totals.settled != self._known.get(key, (0, 0, 0)):
                changed.append((key, totals))
        gauges = [
            tuple((key, count) for key, count in (gauge or {}).items() if count)
            for gauge in (pending, running)
        ]
        kept = self._legacy
        legacy = Legacy(kept.number)
        if self._owed:  # whoever lives says so itself, and counts for no longer gone
            legacy = Legacy(0, (*kept.shares, *self._peers.values()))
        recent = self._recent()
        self._sent = Delta(
            sequence, tuple(changed), gauges[0], recent, legacy, gauges[1], self._heard
        )
        return self._sent

    def _recent(self) -> tuple[tuple[VersionKey, Recent], ...]:
        if not self._summaries:
            return ()
        passed = int((self._now_s() - self._turned_s) / SLICE_S)
        self._turned_s += passed * SLICE_S
        found = []
        for key, counters in self._counters.items():
            for window in counters.windows:
                window.turn(passed)
            counts = tuple(window.counts() for window in counters.windows)
            if any(counts):
                found.append((key, counts))
        return tuple(found)

    def acknowledge(
        self, sequence: int, legacy: Legacy | None = None, peers: Peers | None = None
    ) -> None:
        """The Controller has that delta, and may have answered what to keep for the next one.
        Acknowledgements of older ones change nothing.
        """
        if self._sent is not None and self._sent.sequence == sequence:
            self._owed = False
            for key, totals in self._sent.versions:
                if key in self._counters:
                    self._known[key] = totals.settled
            if peers is not None:
                self._heard = peers.number
                self._peers |= {(share[0], share[1]): share for share in peers.shares}
            if legacy is not None:
                self._legacy = legacy
                for key, gone, _, _ in legacy.shares:  # which it has whole: no peer's any more
                    self._peers.pop((key, gone), None)

    def resend(self) -> None:
        """The Controller is new and knows nothing: the next delta holds everything."""
        self._known.clear()
        self._sent = None
        self._heard = 0
        self._owed = True


def reasons(totals: Totals) -> Iterable[tuple[str, int]]:
    """All reasons, also those that never happened: their series exist from load."""
    return ((reason.value, totals.failures.get(reason.value, 0)) for reason in Reason)
