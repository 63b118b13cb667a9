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
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from configs.autoscaling import Autoscaling
from configs.model import ModelConfig

from . import applications
from .catalogue import Catalogue, Generation
from .overrides import Overrides
from .types import ModelState, Override, ReplicaReport

logger = logging.getLogger("ray.serve")

POLL_S = 0.1
# Routers serve on meanwhile, as they did before. Longer than a replica waits for an answer of the
# Controller before (`replica.HEARTBEAT_S` * 10): a node that is lost without a word leaves calls to
# it open.
ADOPTION_S = 12.0


class Serve(Protocol):
    """What is asked of Ray Serve: `applications`."""

    def live(self) -> dict[str, dict[str, int]]: ...

    def started(self) -> Collection[str]: ...

    def recall(self, name: str) -> bytes | None: ...


@dataclass(frozen=True)
class _Facts:
    """What replicas would report of a generation that has none."""

    config: ModelConfig
    fingerprint: str
    override: Override | None
    autoscaling: Mapping[str, Autoscaling]


def facts(generation: Generation) -> bytes:
    """For `applications.remember`, before the last replica goes because nobody asks."""
    return pickle.dumps(
        _Facts(
            generation.config,
            generation.fingerprint,
            generation.override,
            dict(generation.autoscaling),
        )
    )


def lasting_facts(generation: Generation) -> bytes:
    """The same for one that serves, should it lose its replicas and the Controller at once: a new
    Controller then keeps what waits for it. It is not ready before it has a replica again."""
    return facts(replace(generation, autoscaling={}))


class Adoption:
    def __init__(
        self,
        catalogue: Catalogue,
        overrides: Overrides,
        tell: Callable[[str], None],
        serve: Serve = applications,
    ) -> None:
        self._serve = serve
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
        running = await asyncio.to_thread(self._serve.live)
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
        """Replicas report every second; give those that run time to be heard of. Not what still
        loads: there is no telling how long that takes."""
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + ADOPTION_S
        started = await asyncio.to_thread(self._serve.started)
        awaited = [name for name in running if name in started]
        while loop.time() < deadline_s and not all(self._strays[name] for name in awaited):
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
        kept = await asyncio.to_thread(self._serve.recall, application)
        try:
            return None if kept is None else pickle.loads(kept)
        except Exception:  # written by another version of this code: it is loaded anew
            logger.exception("what is remembered of %s cannot be read", application)
            return None
