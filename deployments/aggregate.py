"""The sums over all Routers: what the statistics verb and the metrics page tell.

Takes the deltas of the Routers' Recorders (`statistics`), each once, however often and in whatever
order they come. Owned by the Controller; moves nothing itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from . import windows
from .autoscaler import Load
from .statistics import Delta, Legacy, Peers, Recent, Totals, VersionKey, add

# Late totals of an unloaded generation must not bring it back; this many are remembered.
_REMEMBERED_DROPS = 4096


@dataclass(frozen=True, slots=True)
class LoadedVersion:
    """A loaded version with its sums over all Routers. `tags` are its config's `metric_tags`;
    `recent` is empty where no summaries are kept, and where nothing ran in the last minute.
    The replicas are the Controller's to fill in."""

    key: VersionKey
    load_s: float
    totals: Totals
    pending: int
    tags: Mapping[str, str] = field(default_factory=dict)
    recent: Recent = ()
    replicas_wanted: int = 0
    replicas_running: int = 0


@dataclass(slots=True)
class _Share:
    """One Router's part in one version; `base` is what it had before it began again at zero.
    `change` is the number of the latest change of it, among all shares'."""

    sequence: int = -1
    change: int = 0
    base: Totals = field(default_factory=Totals)
    totals: Totals = field(default_factory=Totals)


class _Open(NamedTuple):
    key: VersionKey
    load_s: float
    tags: Mapping[str, str]


class _Gauges(NamedTuple):
    """What one Router said last of what is now, and when."""

    sequence: int
    pending: Mapping[VersionKey, int]
    recent: Mapping[VersionKey, Recent]
    running: Mapping[VersionKey, int]
    heard_s: float


_NOTHING = _Gauges(-1, {}, {}, {}, 0.0)


class Aggregator:
    """The sums over all Routers, dead ones too. Only versions that are open are reported."""

    def __init__(self) -> None:
        self._open: dict[tuple[str, str], _Open] = {}
        self._shares: dict[VersionKey, dict[str, _Share]] = {}
        self._gauges: dict[str, _Gauges] = {}
        self._dropped: dict[VersionKey, None] = {}
        self._gone: set[str] = set()
        self._legacy = Legacy()
        self._changes = 0

    def open(self, key: VersionKey, load_s: float, tags: Mapping[str, str] | None = None) -> None:
        """This generation now serves the version; its statistics are reported, from zero on."""
        self._open[(key.model, key.version)] = _Open(key, load_s, tags or {})
        self._dropped.pop(key, None)

    def drop(self, key: VersionKey) -> None:
        """This generation is unloaded; what still comes of it is ignored."""
        if self._shares.pop(key, None):
            self._inherit()
        opened = self._open.get((key.model, key.version))
        if opened is not None and opened.key == key:
            del self._open[(key.model, key.version)]
        self._dropped[key] = None
        if len(self._dropped) > _REMEMBERED_DROPS:
            del self._dropped[next(iter(self._dropped))]

    def apply(self, router_id: str, delta: Delta, now_s: float = 0.0) -> Legacy | None:
        """Counts each state of a Router once, however often and in whatever order it comes.

        The answer is what the Router should keep, unless it has it.
        """
        for key, totals in delta.versions:
            self._count(key, router_id, delta.sequence, totals)
        for key, gone, sequence, totals in delta.legacy.shares:
            self._count(key, gone, sequence, totals)
            self._gone.add(gone)
        if router_id in self._gone:  # it was only silent
            self._gone.discard(router_id)
            self._tell_again(router_id)
            self._inherit()
        elif delta.legacy.shares:
            self._inherit()
        if delta.sequence > self._gauges.get(router_id, _NOTHING).sequence:
            self._gauges[router_id] = _Gauges(
                delta.sequence,
                dict(delta.pending),
                dict(delta.recent),
                dict(delta.running),
                now_s,
            )
        return None if delta.legacy.number == self._legacy.number else self._legacy

    def _count(self, key: VersionKey, router_id: str, sequence: int, totals: Totals) -> None:
        if key not in self._dropped:
            share = self._shares.setdefault(key, {}).setdefault(router_id, _Share())
            if sequence > share.sequence:
                _advance(share, sequence, totals)
                self._changes += 1
                share.change = self._changes

    def peers(self, router_id: str, heard: int) -> Peers:
        """What the others have counted, where it has changed since that Router has heard of it."""
        return Peers(
            self._changes,
            tuple(
                (key, other, share.sequence, add(share.base, share.totals))
                for key, by_router in self._shares.items()
                for other, share in by_router.items()
                if share.change > heard and other != router_id and other not in self._gone
            ),
        )

    def _tell_again(self, router_id: str) -> None:
        """Others have kept what it counted with the legacy, and do so no longer."""
        self._changes += 1
        for by_router in self._shares.values():
            if router_id in by_router:
                by_router[router_id].change = self._changes

    def _inherit(self) -> None:
        """What Routers that are gone have counted is another than before."""
        shares = tuple(
            (key, router_id, share.sequence, add(share.base, share.totals))
            for key, by_router in self._shares.items()
            for router_id, share in by_router.items()
            if router_id in self._gone
        )
        if shares != self._legacy.shares:
            self._legacy = Legacy(self._legacy.number + 1, shares)

    def retire(self, router_id: str) -> None:
        """That Router is gone: nothing waits in it any more; what it counted stays."""
        self._gauges.pop(router_id, None)
        self._gone.add(router_id)
        self._inherit()

    def load(self, key: VersionKey, since_s: float = 0.0) -> Load:
        """What waits for a version and runs of it in the Routers that were heard since then, and
        what has ended in all of them."""
        heard = [gauges for gauges in self._gauges.values() if gauges.heard_s >= since_s]
        ended = [
            totals.success + totals.fail
            for share in self._shares.get(key, {}).values()
            for totals in (share.base, share.totals)
        ]
        return Load(
            queued=sum(gauges.pending.get(key, 0) for gauges in heard),
            running=sum(gauges.running.get(key, 0) for gauges in heard),
            finished=sum(ended),
        )

    def loaded(self) -> tuple[LoadedVersion, ...]:
        """Every open version, by name and version."""
        return tuple(self._loaded(self._open[place]) for place in sorted(self._open))

    def report(self, name: str, version: str) -> dict[str, Any]:
        """Triton's JSON form, which `json_format.ParseDict` makes a ModelStatistics of.

        Raises KeyError for a version that is not open.
        """
        opened = self._open[(name, version)]
        return _json(opened.key, self._totals(opened.key))

    def _totals(self, key: VersionKey) -> Totals:
        totals = Totals()
        for share in self._shares.get(key, {}).values():
            totals = add(totals, add(share.base, share.totals))
        return totals

    def _loaded(self, opened: _Open) -> LoadedVersion:
        key = opened.key
        pending = sum(gauges.pending.get(key, 0) for gauges in self._gauges.values())
        parts = [gauges.recent[key] for gauges in self._gauges.values() if key in gauges.recent]
        recent = tuple(windows.added(each) for each in zip(*parts, strict=True))
        return LoadedVersion(key, opened.load_s, self._totals(key), pending, opened.tags, recent)


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
