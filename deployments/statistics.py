"""Cumulative statistics per model version, as Triton counts.

`Recorder` counts in a Router, `Aggregator` sums the Routers in the Controller and answers the
statistics verb and the metrics. What travels between them are running totals of what changed, so a
delta that is lost, repeated or overtaken never makes a sum wrong. Moves nothing itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

# Late totals of an unloaded generation must not bring it back; this many are remembered.
_REMEMBERED_DROPS = 4096


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
    """Sums since the start: queue and compute per successful request, `batches` per execution."""

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


def add(one: Totals, other: Totals) -> Totals:
    """Sums, but the later of two times."""
    sums: dict[str, Any] = {
        name: getattr(one, name) + getattr(other, name) for name in (*_SUMS, "fail_ns")
    }
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


@dataclass(frozen=True, slots=True)
class Delta:
    """What changed in one Router since the last acknowledged delta, as totals since its start.

    `pending` are the requests that wait now: a gauge, complete each time.
    """

    sequence: int
    versions: tuple[tuple[VersionKey, Totals], ...]
    pending: tuple[tuple[VersionKey, int], ...] = ()


class Counters:
    """One version's counts in one Router. Called by its Gate."""

    __slots__ = ("_batches", "_clock", "_failures", "_sums", "_fail_ns", "_last_ms")

    def __init__(self, clock: Callable[[], int] = time.time_ns) -> None:
        self._clock = clock
        self._sums = [0] * len(_SUMS)
        self._failures: dict[str, int] = {}
        self._fail_ns = 0
        self._batches: dict[int, list[int]] = {}
        self._last_ms = 0

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

    def totals(self) -> Totals:
        sums: dict[str, Any] = dict(zip(_SUMS, self._sums, strict=True))
        return Totals(
            **sums,
            last_ms=self._last_ms,
            fail_ns=self._fail_ns,
            failures=dict(self._failures),
            batches={size: BatchTotals(*batch) for size, batch in sorted(self._batches.items())},
        )


class Recorder:
    """All versions' counters of one Router, and what the Controller has of them."""

    def __init__(self, clock: Callable[[], int] = time.time_ns) -> None:
        self._clock = clock
        self._counters: dict[VersionKey, Counters] = {}
        self._known: dict[VersionKey, tuple[int, int, int]] = {}
        self._sent: Delta | None = None

    def counters(self, key: VersionKey) -> Counters:
        """The same object for the same key."""
        if key not in self._counters:
            self._counters[key] = Counters(self._clock)
        return self._counters[key]

    def discard(self, key: VersionKey) -> None:
        """The version is gone for good: a later load has another generation."""
        self._counters.pop(key, None)
        self._known.pop(key, None)

    def flush(self, sequence: int, pending: Mapping[VersionKey, int] | None = None) -> Delta:
        """`sequence` must grow. What is not acknowledged is in the next delta again."""
        changed = []
        for key, counters in self._counters.items():
            totals = counters.totals()
            if totals.settled != self._known.get(key, (0, 0, 0)):
                changed.append((key, totals))
        waiting = tuple((key, count) for key, count in (pending or {}).items() if count)
        self._sent = Delta(sequence, tuple(changed), waiting)
        return self._sent

    def acknowledge(self, sequence: int) -> None:
        """The Controller has that delta. Acknowledgements of older ones change nothing."""
        if self._sent is not None and self._sent.sequence == sequence:
            for key, totals in self._sent.versions:
                if key in self._counters:
                    self._known[key] = totals.settled

    def resend(self) -> None:
        """The Controller is new and knows nothing: the next delta holds everything."""
        self._known.clear()
        self._sent = None


@dataclass(frozen=True, slots=True)
class LoadedVersion:
    """A loaded version with its sums over all Routers."""

    key: VersionKey
    load_s: float
    totals: Totals
    pending: int


@dataclass(slots=True)
class _Share:
    """One Router's part in one version; `base` is what it had before it began again at zero."""

    sequence: int = -1
    base: Totals = field(default_factory=Totals)
    totals: Totals = field(default_factory=Totals)


class Aggregator:
    """The sums over all Routers, dead ones too. Only versions that are open are reported."""

    def __init__(self) -> None:
        self._open: dict[tuple[str, str], tuple[VersionKey, float]] = {}
        self._shares: dict[VersionKey, dict[str, _Share]] = {}
        self._pending: dict[str, tuple[int, dict[VersionKey, int]]] = {}
        self._dropped: dict[VersionKey, None] = {}

    def open(self, key: VersionKey, load_s: float) -> None:
        """This generation now serves the version; its statistics are reported, from zero on."""
        self._open[(key.model, key.version)] = (key, load_s)
        self._dropped.pop(key, None)

    def drop(self, key: VersionKey) -> None:
        """This generation is unloaded; what still comes of it is ignored."""
        self._shares.pop(key, None)
        if self._open.get((key.model, key.version), (None,))[0] == key:
            del self._open[(key.model, key.version)]
        self._dropped[key] = None
        if len(self._dropped) > _REMEMBERED_DROPS:
            del self._dropped[next(iter(self._dropped))]

    def apply(self, router_id: str, delta: Delta) -> None:
        """Counts each state of a Router once, however often and in whatever order it comes."""
        for key, totals in delta.versions:
            if key not in self._dropped:
                share = self._shares.setdefault(key, {}).setdefault(router_id, _Share())
                if delta.sequence > share.sequence:
                    _advance(share, delta.sequence, totals)
        if delta.sequence > self._pending.get(router_id, (-1, {}))[0]:
            self._pending[router_id] = (delta.sequence, dict(delta.pending))

    def retire(self, router_id: str) -> None:
        """That Router is gone: nothing waits in it any more; what it counted stays."""
        self._pending.pop(router_id, None)

    def loaded(self) -> tuple[LoadedVersion, ...]:
        """Every open version, by name and version."""
        return tuple(self._loaded(*self._open[place]) for place in sorted(self._open))

    def report(self, name: str, version: str) -> dict[str, Any]:
        """Triton's JSON form, which `json_format.ParseDict` makes a ModelStatistics of.

        Raises KeyError for a version that is not open.
        """
        key, load_s = self._open[(name, version)]
        return _json(key, self._loaded(key, load_s).totals)

    def _loaded(self, key: VersionKey, load_s: float) -> LoadedVersion:
        totals = Totals()
        for share in self._shares.get(key, {}).values():
            totals = add(totals, add(share.base, share.totals))
        pending = sum(waiting.get(key, 0) for _, waiting in self._pending.values())
        return LoadedVersion(key, load_s, totals, pending)


def _advance(share: _Share, sequence: int, totals: Totals) -> None:
    if any(new < old for new, old in zip(totals.settled, share.totals.settled, strict=True)):
        share.base = add(share.base, share.totals)  # counted anew from zero: nothing goes backwards
    share.sequence = sequence
    share.totals = totals


def _measure(count: int, ns: int) -> dict[str, int]:
    return {"count": count, "ns": ns}


def _json(key: VersionKey, totals: Totals) -> dict[str, Any]:
    ok = totals.success
    return {
        "name": key.model,
        "version": key.version,
        "last_inference": totals.last_ms,
        "inference_count": totals.inference_count,
        "execution_count": totals.execution_count,
        "inference_stats": {
            "success": _measure(ok, totals.success_ns),
            "fail": _measure(totals.fail, totals.fail_ns),
            "queue": _measure(ok, totals.queue_ns),
            "compute_input": _measure(ok, totals.input_ns),
            "compute_infer": _measure(ok, totals.infer_ns),
            "compute_output": _measure(ok, totals.output_ns),
            "cache_hit": _measure(0, 0),
            "cache_miss": _measure(0, 0),
        },
        "response_stats": {},
        "batch_stats": [
            {
                "batch_size": size,
                "compute_input": _measure(batch.executions, batch.input_ns),
                "compute_infer": _measure(batch.executions, batch.infer_ns),
                "compute_output": _measure(batch.executions, batch.output_ns),
            }
            for size, batch in sorted(totals.batches.items())
        ],
        "memory_usage": [],
    }


def reasons(totals: Totals) -> Iterable[tuple[str, int]]:
    """All reasons, also those that never happened: their series exist from load."""
    return ((reason.value, totals.failures.get(reason.value, 0)) for reason in Reason)
