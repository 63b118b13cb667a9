"""What is loaded, as plain data: versions, their generations, and the replicas that vouch for them.

No ray, no asyncio, no clock of its own. Owned by the Controller, which acts on it; Routers get
`snapshot()`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from configs.autoscaling import PARAMETER, Autoscaling, unscaled
from configs.model import ModelConfig

from .types import (
    Endpoint,
    LogSettings,
    ModelState,
    Override,
    ReplicaReport,
    Snapshot,
    Target,
    TraceChanges,
    VersionSnapshot,
)

# A replica reports every second; after this long without a word it counts for no slot.
STALE_S = 5.0
# After a Router has lost a call, a replica must speak up again this soon.
SUSPECT_S = 1.5
DISAGREE = "the model's replicas complete its configuration differently; write it out"


@dataclass
class Generation:
    """One application of one model version. `replicas` is how many each deployment wants; where
    `autoscaling` has it, that changes by itself (`scaling`).

    `config` is what was planned until the replicas have completed it, and then what clients see:
    once `settled`, a replica that comes to another one does not count. `override`: what it was made
    of, where that is not what is on disk. `waking`: it had no replica, and the first is awaited;
    `leaving` are those that it had.
    """

    application: str
    config: ModelConfig
    fingerprint: str
    replicas: Mapping[str, int]
    reports: dict[str, ReplicaReport] = field(default_factory=dict)
    seen_s: dict[str, float] = field(default_factory=dict)
    settled: bool = False
    override: Override | None = None
    autoscaling: Mapping[str, Autoscaling] = field(default_factory=dict)
    waking: bool = False
    leaving: frozenset[str] = frozenset()

    @property
    def count(self) -> int:
        """Of each deployment that is scaled; they have the same."""
        return max((self.replicas.get(name, 0) for name in self.autoscaling), default=0)

    @property
    def resting(self) -> bool:
        """It has no replica because nobody asks, or none yet: whoever asks is answered."""
        return bool(self.autoscaling) and (self.waking or not self.count)

    @property
    def running(self) -> int:
        """Replicas that are loaded and healthy, passive ones too."""
        return sum(1 for name in self.replicas for _ in self._live(name))

    @property
    def folder(self) -> str:
        """That of the files which it was given, "" where there are none."""
        return self.override.folder if self.override else ""

    def note(self, report: ReplicaReport, now_s: float) -> bool:
        """Take a report; true when it changes what Routers or a waiting load should know."""
        before = self.targets(), self.error(), self.complete()
        if report.draining or report.replica_id in self.leaving:
            self.reports.pop(report.replica_id, None)
            self.seen_s.pop(report.replica_id, None)
        else:
            if self.settled and report.loaded and not _alike(report.config, self.config):
                report = replace(report, loaded=False, error=DISAGREE)
            self.reports[report.replica_id] = report
            self.seen_s[report.replica_id] = now_s
            if report.deployment in self.autoscaling:
                self.waking = self.waking and not (report.loaded or report.error)
        return before != (self.targets(), self.error(), self.complete())

    def rest(self) -> None:
        """None of its replicas stays: from now on they get nothing, and are not heard any more."""
        gone = [one for one in self.reports.values() if one.deployment in self.autoscaling]
        self.leaving = frozenset(one.replica_id for one in gone)
        for name in self.leaving:
            del self.reports[name], self.seen_s[name]

    def restore(self, replicas: Mapping[str, int]) -> None:
        """How many there are to be, after all; where that is none, none is awaited."""
        self.replicas = replicas
        self.waking = self.waking and self.count > 0

    def adjust(self, planned: ModelConfig) -> bool:
        """Take over what may change while its replicas serve on; true if something has."""
        parameters = {k: v for k, v in self.config.parameters.items() if k != PARAMETER}
        if PARAMETER in planned.parameters:
            parameters[PARAMETER] = planned.parameters[PARAMETER]
        config = self.config.model_copy(
            update={
                "version_policy": planned.version_policy,
                "instance_group": planned.instance_group,
                "parameters": parameters,
            }
        )
        changed, self.config = config != self.config, config
        return changed

    def drop_stale(self, now_s: float) -> bool:
        stale = [name for name, seen_s in self.seen_s.items() if now_s - seen_s > STALE_S]
        for name in stale:
            del self.reports[name], self.seen_s[name]
        return bool(stale)

    def suspect(self, now_s: float) -> None:
        """A call was lost: whoever still lives says so within SUSPECT_S, the others drop out."""
        limit_s = now_s - STALE_S + SUSPECT_S
        for name, seen_s in self.seen_s.items():
            self.seen_s[name] = min(seen_s, limit_s)

    def _live(self, deployment: str) -> Iterator[ReplicaReport]:
        for report in self.reports.values():
            if report.deployment == deployment and report.loaded and report.healthy:
                yield report

    def targets(self) -> tuple[Target, ...]:
        return tuple(self._target(name) for name in self.replicas)

    def _target(self, deployment: str) -> Target:
        endpoints = tuple(
            Endpoint(one.replica_id, one.node_id, one.instances, one.channel)
            for one in sorted(self._live(deployment), key=lambda one: one.replica_id)
            if not one.passive
        )
        return Target(deployment, sum(one.instances for one in endpoints), endpoints)

    def complete(self) -> bool:
        return all(
            sum(1 for _ in self._live(name)) >= count for name, count in self.replicas.items()
        )

    def settle(self) -> str:
        """Take over what the replicas have made of the configuration; why not, if they differ."""
        configs = [report.config for report in self.reports.values() if report.loaded]
        if any(config != configs[0] for config in configs):
            return DISAGREE
        self.config = configs[0] if configs else self.config
        self.settled = True
        return ""

    def broken(self) -> bool:
        """Replacements of dead replicas do not load, and nobody else serves."""
        return bool(self.error()) and not any(target.slots for target in self.targets())

    def error(self) -> str:
        return next((report.error for report in self.reports.values() if report.error), "")


def _alike(one: ModelConfig, other: ModelConfig) -> bool:
    """Whether they make the same replica: what `adjust` takes over may differ."""
    if one == other:
        return True
    return unscaled(one) == unscaled(other)


@dataclass
class Version:
    """One model version. `current` serves; `loading` will replace it once it is complete."""

    model_name: str
    number: int
    state: ModelState = ModelState.UNKNOWN
    reason: str = ""
    current: Generation | None = None
    loading: Generation | None = None
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    load_duration_s: float = 0.0

    def snapshot(self) -> VersionSnapshot:
        current = self.current
        state, reason = self.state, self.reason
        if state is ModelState.READY and current is not None and current.broken():
            state, reason = ModelState.UNAVAILABLE, current.error()
        return VersionSnapshot(
            model_name=self.model_name,
            version=self.number,
            state=state,
            reason=reason,
            config=current.config if current else None,
            application=current.application if current else "",
            targets=current.targets() if current else (),
            labels=self.labels,
            load_duration_s=self.load_duration_s,
            resting=current is not None and current.resting,
        )


class Catalogue:
    """All versions that have a state, and the number of the latest change among them."""

    def __init__(self, epoch: int, log: LogSettings | None = None) -> None:
        self.epoch = epoch
        self.log = log or LogSettings()
        self.trace = TraceChanges()
        self.sequence = 0
        self.started = False
        self.closing = False
        self._versions: dict[tuple[str, int], Version] = {}

    def version(self, model_name: str, number: int) -> Version:
        """The record of a version, made on first use. Number 0 stands for the model itself."""
        key = (model_name, number)
        if key not in self._versions:
            self._versions[key] = Version(model_name, number)
        return self._versions[key]

    def forget(self, model_name: str, number: int) -> None:
        self._versions.pop((model_name, number), None)

    def versions(self, model_name: str | None = None) -> list[Version]:
        return [
            version
            for (name, _), version in sorted(self._versions.items())
            if model_name is None or name == model_name
        ]

    def generations(self) -> Iterator[tuple[Version, Generation]]:
        for version in self._versions.values():
            for generation in (version.current, version.loading):
                if generation is not None:
                    yield version, generation

    def find(self, application: str) -> Generation | None:
        for _, generation in self.generations():
            if generation.application == application:
                return generation
        return None

    def failed(self) -> list[Version]:
        """Versions that should serve and do not."""
        return [
            version
            for version in self.versions()
            if version.state is ModelState.UNAVAILABLE and version.reason != "unloaded"
        ]

    def ready(self, strict: bool) -> bool:
        """True once the first pass is over; strictly, only while all that should serve can."""
        if not self.started or self.closing:
            return False
        if not strict:
            return True
        return not self.failed() and all(
            version.current.resting or any(target.slots for target in version.current.targets())
            for version in self.versions()
            if version.state is ModelState.READY and version.current is not None
            if not version.current.config.passive
        )

    def snapshot(self, strict: bool) -> Snapshot:
        return Snapshot(
            epoch=self.epoch,
            sequence=self.sequence,
            started=self.started,
            ready=self.ready(strict),
            versions=tuple(version.snapshot() for version in self.versions()),
            closing=self.closing,
            log=self.log,
            trace=self.trace,
        )
