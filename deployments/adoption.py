"""What an earlier Controller has left running is taken over as it is, by what its replicas report.

Whether it is still what is wanted, and what is on disk, the load that follows finds out. Called by
the lifecycle, when it starts.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from configs.autoscaling import Autoscaling
from configs.model import ModelConfig

from . import applications
from .catalogue import Catalogue, Generation
from .overrides import Overrides
from .types import ModelState, Override, ReplicaReport

logger = logging.getLogger("ray.serve")

POLL_S = 0.1
# Routers serve on meanwhile, and what waits for a model without replicas goes on waiting, which it
# would not if the model were loaded anew. Where a node took the Controller and all replicas of a
# model, new ones are loading now; and where it was lost without a word, replicas wait for an answer
# of the Controller before for a while (`replica.HEARTBEAT_S` * 10).
ADOPTION_S = 45.0


@dataclass(frozen=True)
class _Facts:
    """What replicas would report of a generation that has none."""

    config: ModelConfig
    fingerprint: str
    override: Override | None
    autoscaling: Mapping[str, Autoscaling]


def facts(generation: Generation) -> bytes:
    """For `applications.remember`, before the last replica goes."""
    return pickle.dumps(
        _Facts(
            generation.config,
            generation.fingerprint,
            generation.override,
            dict(generation.autoscaling),
        )
    )


class Adoption:
    def __init__(
        self, catalogue: Catalogue, overrides: Overrides, tell: Callable[[str], None]
    ) -> None:
        self._catalogue = catalogue
        self._overrides = overrides
        self._tell = tell
        self._strays: dict[str, dict[str, ReplicaReport]] = defaultdict(dict)

    def stray(self, report: ReplicaReport) -> None:
        """A replica of an application that no version claims (yet)."""
        if not self._catalogue.started and not report.draining:
            self._strays[report.application][report.replica_id] = report

    async def adopt(self) -> tuple[list[str], dict[str, str]]:
        """The applications that run, newest first, and those that nobody can use, with the folder
        of their files. Such a folder is held until it is released."""
        running = await asyncio.to_thread(applications.live)
        await self._await_strays(running)
        for name in running:
            await self._take(name, running[name])
        # Asked of the catalogue: a pass that is tried again has adopted some before.
        left_over = {
            name: self._folder(name) for name in running if self._catalogue.find(name) is None
        }
        for folder in left_over.values():
            self._overrides.hold(folder)
        self._strays.clear()
        return list(running), left_over

    async def _await_strays(self, running: Mapping[str, Mapping[str, int]]) -> None:
        """Replicas report every second; give those of running applications time to be heard of."""
        deadline_s = time.monotonic() + ADOPTION_S
        awaited = [name for name, replicas in running.items() if any(replicas.values())]
        while time.monotonic() < deadline_s and not all(self._strays[name] for name in awaited):
            await asyncio.sleep(POLL_S)

    def _folder(self, application: str) -> str:
        given = [r.override.folder for r in self._strays[application].values() if r.override]
        return given[0] if given else ""

    async def _take(self, application: str, replicas: Mapping[str, int]) -> None:
        reports = [r for r in self._strays[application].values() if r.loaded]
        name, number = applications.parse_application(application)
        version = self._catalogue.version(name, number)
        if version.current is not None:
            return
        known = await self._facts(application, reports)
        if known is None:
            return
        newest = not any(one.current for one in self._catalogue.versions(name))
        generation = Generation(
            application,
            known.config,
            known.fingerprint,
            dict(replicas),
            override=known.override,
            autoscaling=known.autoscaling,
        )
        generation.settled = True
        generation.waking = bool(generation.autoscaling) and not reports and generation.count > 0
        for report in reports:
            generation.note(report, time.monotonic())
        version.current, version.state, version.reason = generation, ModelState.READY, ""
        self._overrides.hold(generation.folder)
        if newest:
            await self._overrides.put(name, known.override)
        self._tell(f"model '{name}' version {number} is adopted")

    async def _facts(self, application: str, reports: list[ReplicaReport]) -> _Facts | None:
        """By its replicas, or, where it has none, by what was remembered of it. How it is scaled is
        then found out by the load that follows."""
        if reports:
            first = reports[0]
            return _Facts(first.config, first.fingerprint, first.override, {})
        kept = await asyncio.to_thread(applications.recall, application)
        try:
            return None if kept is None else pickle.loads(kept)
        except Exception:  # written by another version of this code: it is loaded anew
            logger.exception("what is remembered of %s cannot be read", application)
            return None
