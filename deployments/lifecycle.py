"""Load-new, flip, drain-old: how model versions come to serve and leave.

Owns the order of steps. The Controller calls it; bookkeeping is the Catalogue's, what Routers have
heard of it the Followers', Serve's side is `applications`, the disk is the Repository's.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from functools import partial
from typing import Any

from configs.errors import ConfigError
from configs.server import ServerSettings

from . import applications
from .applications import BindModel
from .catalogue import Catalogue, Generation, Version
from .errors import Internal, LoadFailed, MantaError, Unsupported
from .followers import Followers
from .planner import UNEXPECTED, Plan, Planner
from .repository import Repository
from .types import ModelState, ReplicaReport

logger = logging.getLogger("ray.serve")

POLL_S = 0.1
ADOPTION_S = 5.0
# Beyond the limits of queue and execution, which a Router keeps itself.
DRAIN_MARGIN_S = 10.0


class Lifecycle:
    def __init__(
        self,
        settings: ServerSettings,
        repository: Repository,
        catalogue: Catalogue,
        followers: Followers,
        bind_model: BindModel,
        application: str,
        announce: Callable[[], Awaitable[None]],
        tell: Callable[[str], None],
    ) -> None:
        self._settings = settings
        self._repository = repository
        self._catalogue = catalogue
        self._followers = followers
        self._planner = Planner(settings, repository, application, applications)
        self._bind_model = bind_model
        self._announce = announce
        self._tell = tell
        self._locks: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._threads = asyncio.Semaphore(settings.model_load_thread_count)
        self._strays: dict[str, dict[str, ReplicaReport]] = defaultdict(dict)
        self._tasks: set[asyncio.Task[None]] = set()

    # --- the first pass --------------------------------------------------------------------------

    async def start(self) -> None:
        """Adopt what an earlier Controller left running, then load what the settings ask for."""
        running = await asyncio.to_thread(applications.live)
        await self._await_strays(running)
        for name in running:
            self._adopt(name, running[name])
        # Asked of the catalogue: a pass that is tried again has adopted some before.
        left_over = [name for name in running if self._catalogue.find(name) is None]
        self._strays.clear()
        if running:  # Routers know what is adopted; the rest of the pass is like any other load
            self._catalogue.started = True
            await self._announce()
        found = await asyncio.to_thread(self._repository.scan)
        names = self._wanted([one.name for one in found], list(running))
        for one in found:
            if one.name not in names:
                self._catalogue.version(one.name, 0)
        plans = await asyncio.gather(*(self._prepare_noting(name) for name in names))
        cpu_instances = sum(plan.cpu_instances for model in plans for plan in model)
        await asyncio.gather(
            *(self._load_all(name, p, cpu_instances) for name, p in zip(names, plans, strict=True))
        )
        for name in left_over:
            self._own(self._drain(name, None, self._catalogue.sequence))

    def _wanted(self, found: list[str], running: list[str]) -> list[str]:
        if self._settings.model_control_mode == "none":
            return sorted(found)
        if running:  # a restart: what clients have loaded and unloaded since counts
            return sorted({name for name, _ in map(applications.parse_application, running)})
        if self._settings.load_model == ("*",):
            return sorted(found)
        return sorted(set(self._settings.load_model))

    async def _await_strays(self, running: Mapping[str, Mapping[str, int]]) -> None:
        """Replicas report every second; give those of running applications time to be heard."""
        deadline_s = time.monotonic() + ADOPTION_S
        while time.monotonic() < deadline_s and not all(self._strays[name] for name in running):
            await asyncio.sleep(POLL_S)

    def stray(self, report: ReplicaReport) -> None:
        """A replica of an application that no version claims (yet)."""
        if not self._catalogue.started and not report.draining:
            self._strays[report.application][report.replica_id] = report

    def _adopt(self, application: str, replicas: Mapping[str, int]) -> None:
        """Take over a running application as it is; whether it is still what is wanted, and what
        is on disk, the load that follows finds out."""
        reports = [r for r in self._strays[application].values() if r.loaded]
        name, number = applications.parse_application(application)
        version = self._catalogue.version(name, number)
        if not reports or version.current is not None:
            return
        first = reports[0]
        generation = Generation(application, first.config, first.fingerprint, dict(replicas))
        generation.settled = True
        for report in reports:
            generation.note(report, time.monotonic())
        version.current, version.state, version.reason = generation, ModelState.READY, ""
        self._tell(f"model '{name}' version {number} is adopted")

    async def _prepare_noting(self, name: str) -> list[Plan]:
        try:
            return await self._prepare(name)
        except (ConfigError, MantaError) as error:
            self._note_failure(name, str(error))
        except Exception:
            logger.exception("model %s could not be read", name)
            self._note_failure(name, UNEXPECTED)
        return []

    async def _prepare(self, name: str) -> list[Plan]:
        """The versions to load; those that cannot be are noted. Raises ConfigError or ours."""
        plans, failed = await asyncio.to_thread(self._planner.plan, name)
        self._forget_others(name, {plan.number for plan in plans} | set(failed))
        for number, reason in failed.items():
            version = self._catalogue.version(name, number)
            if version.current is None:
                version.state, version.reason = ModelState.UNAVAILABLE, reason
            self._tell(f"model '{name}' version {number}: {reason}")
        return plans

    def _forget_others(self, name: str, selected: set[int]) -> None:
        """What the policy no longer selects and nothing serves has no say any more."""
        for version in self._catalogue.versions(name):
            idle = version.current is None and version.loading is None
            if version.number not in selected and idle and version.reason != "unloaded":
                if version.state is not ModelState.UNLOADING:
                    self._catalogue.forget(name, version.number)

    # --- load and unload -------------------------------------------------------------------------

    async def load(self, name: str, parameters: Mapping[str, Any]) -> None:
        """All versions that the policy selects; succeeds only if each of them is READY.

        A caller that leaves does not stop it: half a load would be neither.
        """
        if parameters:
            raise Unsupported(f"load parameter '{next(iter(parameters))}' is not supported")
        if not await asyncio.to_thread(self._repository.contains, name):
            raise Internal(f"failed to load '{name}', failed to poll from model repository")
        await asyncio.shield(self._own(self._load(name)))

    async def _load(self, name: str) -> None:
        try:
            plans = await self._prepare(name)
        except ConfigError as error:
            self._note_failure(name, str(error))
            await self._announce()
            raise LoadFailed(name, str(error)) from error
        others = sum(sum(g.replicas.values()) for _, g in self._catalogue.generations())
        failed = await self._load_all(name, plans, others + sum(p.cpu_instances for p in plans))
        # Also after a failure: the index that a client asks for next is a Router's.
        await self._followers.reach(self._catalogue.sequence)
        if failed:
            raise LoadFailed(name, " ".join(failed))

    async def _load_all(self, name: str, plans: list[Plan], cpu_instances: int) -> list[str]:
        """Loads the plans of one model, retires what is not among them; what failed, in words."""
        async with self._locks[name]:
            reasons = await asyncio.gather(*(self._load_version(p, cpu_instances) for p in plans))
            for plan, reason in zip(plans, reasons, strict=True):
                if reason:
                    self._tell(f"model '{name}' version {plan.number}: {reason}")
            planned = {plan.number for plan in plans}
            failed = {p.number: r for p, r in zip(plans, reasons, strict=True) if r}
            for version in self._catalogue.versions(name):
                if version.number in planned:
                    continue
                if version.current is not None and plans and not failed:
                    await self._retire_version(version)
                elif version.state is ModelState.UNAVAILABLE and version.reason != "unloaded":
                    failed[version.number] = version.reason
            await self._announce()
        return [f"version {n} is at UNAVAILABLE state: {r};" for n, r in sorted(failed.items())]

    def _note_failure(self, name: str, reason: str) -> None:
        """A configuration that cannot be read: what serves goes on serving."""
        if not any(version.current for version in self._catalogue.versions(name)):
            version = self._catalogue.version(name, 0)
            version.state, version.reason = ModelState.UNAVAILABLE, reason
        self._tell(f"model '{name}': {reason}")

    async def unload(self, name: str) -> None:
        """Begin to unload all versions; returns at once, the model drains behind."""
        known = self._catalogue.versions(name)
        if not known:
            return
        async with self._locks[name]:
            for version in self._catalogue.versions(name):
                if version.current is not None:
                    await self._retire_version(version)
                elif version.state is not ModelState.UNLOADING and version.number:
                    version.state, version.reason = ModelState.UNAVAILABLE, "unloaded"
            self._catalogue.forget(name, 0)
            await self._announce()
        await self._followers.reach(self._catalogue.sequence)

    async def _retire_version(self, version: Version) -> None:
        generation, version.current = version.current, None
        version.state, version.reason = ModelState.UNLOADING, ""
        await self._announce()
        if generation is not None:
            self._own(self._drain(generation.application, version, self._catalogue.sequence))

    async def _load_version(self, plan: Plan, cpu_instances: int) -> str:
        """One version to READY, beside whatever serves; "" or why it did not come about."""
        version = self._catalogue.version(plan.found.name, plan.number)
        version.labels = plan.labels
        if version.current is not None and version.current.fingerprint == plan.fingerprint:
            return ""
        if version.current is None:
            version.state, version.reason = ModelState.LOADING, ""
        generation = self._generation(plan)
        version.loading = generation
        await self._announce()
        reason = UNEXPECTED
        try:
            async with self._threads:
                started_s = time.monotonic()
                reason = await self._bring_up(generation, plan, cpu_instances)
        except Exception:
            logger.exception("loading %s failed", generation.application)
        finally:
            version.loading = None
            if reason:
                self._own(self._drain(generation.application, None, 0))
        if reason:
            if version.current is None:
                version.state, version.reason = ModelState.UNAVAILABLE, reason
            return reason
        old, version.current = version.current, generation
        version.state, version.reason = ModelState.READY, ""
        version.load_duration_s = time.monotonic() - started_s
        self._tell_loaded(plan, generation, version.load_duration_s)
        await self._announce()
        if old is not None:
            self._own(self._drain(old.application, None, self._catalogue.sequence))
        return ""

    def _tell_loaded(self, plan: Plan, generation: Generation, duration_s: float) -> None:
        """Once per version, however many replicas said the same."""
        place = f"model '{plan.found.name}' version {plan.number}"
        lines = dict.fromkeys(line for r in generation.reports.values() for line in r.log)
        for line in lines:
            self._tell(f"{place}: {line}")
        passive = {r.deployment for r in generation.reports.values() if r.passive}
        groups = ", ".join(
            f"{t.deployment} passive" if t.deployment in passive else f"{t.deployment} x {t.slots}"
            for t in generation.targets()
        )
        self._tell(f"{place} is READY after {duration_s:.1f} s ({groups})")

    def _generation(self, plan: Plan) -> Generation:
        number = applications.generation_number()
        name = applications.application_name(plan.found.name, plan.number, number)
        replicas = {p.deployment: p.replicas for p in plan.placements}
        return Generation(name, plan.config, plan.fingerprint, replicas)

    async def _bring_up(self, generation: Generation, plan: Plan, cpu_instances: int) -> str:
        """Deploy and wait for every replica's word; the reason when it does not come about."""
        specs = self._planner.specs(plan, generation.application, cpu_instances)
        bind = partial(self._bind_model, specs, plan.placements, self._settings)
        try:
            await asyncio.to_thread(applications.deploy, generation.application, bind)
        except Exception:
            logger.exception("application %s was not accepted", generation.application)
            return "Ray Serve did not accept the model's application"
        deadline_s = time.monotonic() + self._settings.model_load_timeout_s
        next_look_s = time.monotonic() + 1.0
        while not generation.complete():
            if generation.error():
                return generation.error()
            now_s = time.monotonic()
            if now_s > deadline_s:
                wants = applications.waiting_for(plan.placements)
                limit_s = self._settings.model_load_timeout_s
                return f"not loaded within {limit_s:g} s; it asks Ray for {wants}"
            if now_s > next_look_s:
                next_look_s = now_s + 1.0
                failure = await asyncio.to_thread(applications.failure, generation.application)
                if failure:
                    return failure
            await asyncio.sleep(POLL_S)
        return generation.settle()

    # --- what may go -----------------------------------------------------------------------------

    def _own(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task that nobody's leaving cancels."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            if not isinstance(error, MantaError):
                logger.error("a task of the lifecycle failed", exc_info=error)

    async def _drain(self, application: str, version: Version | None, sequence: int) -> None:
        """Delete once every Router has let go, or its limits are over; then tell the version."""
        settings = self._settings
        limit_s = settings.max_queue_s + settings.max_execution_s + DRAIN_MARGIN_S
        deadline_s = time.monotonic() + limit_s
        while time.monotonic() < deadline_s and self._followers.use(application, sequence):
            await asyncio.sleep(POLL_S)
        await self._delete(application, settings.exit_timeout_s + DRAIN_MARGIN_S)
        if version is not None and version.current is None and version.loading is None:
            if version.state is ModelState.UNLOADING:
                version.state, version.reason = ModelState.UNAVAILABLE, "unloaded"
            await self._announce()

    async def _delete(self, application: str, limit_s: float) -> None:
        deadline_s = time.monotonic() + limit_s
        while time.monotonic() < deadline_s:
            try:
                await asyncio.to_thread(applications.delete, application)
                if not await asyncio.to_thread(applications.exists, application):
                    return
            except Exception as error:  # Serve's controller may be restarting
                logger.warning("application %s is not deleted yet: %s", application, error)
            await asyncio.sleep(POLL_S * 5)
