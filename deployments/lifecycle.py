"""Load-new, flip, drain-old: how model versions come to serve and leave (design: Reload).

Owns the order of steps and what each Router may still call. The Controller calls it; bookkeeping is
the Catalogue's, Serve's side is `applications`, the disk is the Repository's.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.complete import normalise
from configs.errors import ConfigError
from configs.model import ModelConfig
from configs.placement import GroupPlacement
from configs.server import ServerSettings

from . import applications
from .applications import BindModel
from .catalogue import Catalogue, Generation, Version
from .errors import Internal, LoadFailed, MantaError, Unsupported
from .repository import Found, Repository
from .types import ModelState, ReplicaReport, ReplicaSpec

logger = logging.getLogger("ray.serve")

POLL_S = 0.1
ADOPTION_S = 5.0
ROUTER_SILENT_S = 10.0


@dataclass(frozen=True)
class Plan:
    """One version, read and placed, ready to be deployed."""

    found: Found
    number: int
    config: ModelConfig
    placements: tuple[GroupPlacement, ...]
    content_hash: str
    labels: Mapping[str, tuple[str, ...]]

    @property
    def cpu_instances(self) -> int:
        return sum(p.replicas * p.instances for p in self.placements if p.kind == "KIND_CPU")


@dataclass(frozen=True)
class _Seen:
    at_s: float
    epoch: int
    sequence: int
    in_use: tuple[str, ...]


class Lifecycle:
    def __init__(
        self,
        settings: ServerSettings,
        repository: Repository,
        catalogue: Catalogue,
        bind_model: BindModel,
        application: str,
        announce: Callable[[], Awaitable[None]],
        tell: Callable[[str], None],
    ) -> None:
        self._settings = settings
        self._repository = repository
        self._catalogue = catalogue
        self._bind_model = bind_model
        self._application = application
        self._announce = announce
        self._tell = tell
        self._locks: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._threads = asyncio.Semaphore(settings.model_load_thread_count)
        self._routers: dict[str, _Seen] = {}
        self._strays: dict[str, dict[str, ReplicaReport]] = defaultdict(dict)
        self._retiring: set[asyncio.Task[None]] = set()

    # --- the first pass --------------------------------------------------------------------------

    async def start(self) -> None:
        """Load what the settings ask for; adopt applications that an earlier Controller left."""
        running = await asyncio.to_thread(applications.live)
        await self._await_strays(running)
        found = {one.name: one for one in await asyncio.to_thread(self._repository.scan)}
        names = self._wanted(found, running)
        for name in found:
            if name not in names:
                self._catalogue.version(name, 0)
        plans = await asyncio.gather(*(self._prepare_noting(name) for name in names))
        cpu_instances = sum(plan.cpu_instances for model in plans for plan in model)
        await asyncio.gather(
            *(self._load_version(plan, cpu_instances) for model in plans for plan in model),
            return_exceptions=True,
        )
        current = {g.application for _, g in self._catalogue.generations()}
        for name in running:
            if name not in current:
                await asyncio.to_thread(applications.delete, name)
        self._strays.clear()

    def _wanted(self, found: Mapping[str, Found], running: Sequence[str]) -> list[str]:
        if self._settings.model_control_mode == "none" or self._settings.load_model == ("*",):
            return sorted(found)
        left = [parsed[0] for parsed in map(applications.parse_application, running) if parsed]
        return sorted({*self._settings.load_model, *left})

    async def _await_strays(self, running: Sequence[str]) -> None:
        """Replicas report every second; give those of running applications time to be heard."""
        deadline_s = time.monotonic() + ADOPTION_S
        while time.monotonic() < deadline_s and not all(self._strays[name] for name in running):
            await asyncio.sleep(POLL_S)

    def stray(self, report: ReplicaReport) -> None:
        """A replica of an application that no version claims (yet)."""
        if not self._catalogue.started and not report.draining:
            self._strays[report.application][report.replica_id] = report

    async def _prepare_noting(self, name: str) -> list[Plan]:
        try:
            return await self._prepare(name)
        except (ConfigError, MantaError) as error:
            version = self._catalogue.version(name, 0)
            version.state, version.reason = ModelState.UNAVAILABLE, str(error)
            self._tell(f"model '{name}': {error}")
            return []

    async def _prepare(self, name: str) -> list[Plan]:
        """Read and place all versions that the policy selects. Raises ConfigError or ours."""
        found = await asyncio.to_thread(self._repository.find, name)
        if found.error:
            raise ConfigError(found.error)
        gpus = await asyncio.to_thread(applications.gpu_count)
        config = await asyncio.to_thread(self._repository.read_config, found)
        numbers, missing = self._repository.select_versions(config, found.versions)
        plans = []
        for number in numbers:
            try:
                plans.append(await asyncio.to_thread(self._plan, found, number, config, gpus))
            except (ConfigError, MantaError) as error:
                missing = {**missing, number: str(error)}
        for number, reason in missing.items():
            version = self._catalogue.version(name, number)
            if version.current is None:
                version.state, version.reason = ModelState.UNAVAILABLE, reason
            self._tell(f"model '{name}' version {number}: {reason}")
        if plans or missing:
            self._catalogue.forget(name, 0)
        return plans

    def _plan(self, found: Found, number: int, config: ModelConfig, gpus: int) -> Plan:
        repository = self._repository
        try:
            normal = normalise(config, repository.first_files(found), gpus > 0)
            placements = applications.place(normal, self._settings, gpus)
        except ConfigError as error:
            raise repository.explain(found, error) from None
        repository.artifact(found, number, normal)  # refuses a missing file by name
        return Plan(
            found=found,
            number=number,
            config=normal,
            placements=placements,
            content_hash=repository.content_hash(found, number, normal),
            labels=repository.labels(found, normal),
        )

    # --- load and unload -------------------------------------------------------------------------

    async def load(self, name: str, parameters: Mapping[str, Any]) -> None:
        """All versions that the policy selects; succeeds only if each of them is READY."""
        if parameters:
            raise Unsupported(f"load parameter '{next(iter(parameters))}' is not supported")
        async with self._locks[name]:
            if not await asyncio.to_thread(self._repository.contains, name):
                raise Internal(f"failed to load '{name}', failed to poll from model repository")
            try:
                plans = await self._prepare(name)
            except ConfigError as error:
                self._note_failure(name, str(error))
                await self._announce()
                raise LoadFailed(name, str(error)) from error
            others = sum(
                sum(generation.replicas.values()) for _, generation in self._catalogue.generations()
            )
            wanted = {plan.number for plan in plans}
            results = await asyncio.gather(
                *(self._load_version(p, others + p.cpu_instances) for p in plans),
                return_exceptions=True,
            )
            failed = [str(result) for result in results if isinstance(result, Exception)]
            failed += [
                f"version {v.number} is at UNAVAILABLE state: {v.reason};"
                for v in self._catalogue.versions(name)
                if v.number not in wanted and v.current is None and v.reason != "unloaded"
            ]
            if failed:
                await self._announce()
                raise LoadFailed(name, " ".join(failed))
            for version in self._catalogue.versions(name):
                if version.number not in wanted and version.current is not None:
                    await self._retire_version(version)

    def _note_failure(self, name: str, reason: str) -> None:
        """A configuration that cannot be read: what serves goes on serving."""
        if not any(version.current for version in self._catalogue.versions(name)):
            version = self._catalogue.version(name, 0)
            version.state, version.reason = ModelState.UNAVAILABLE, reason
        self._tell(f"model '{name}': {reason}")

    async def unload(self, name: str) -> None:
        """Begin to unload all versions; returns at once, the model drains behind."""
        async with self._locks[name]:
            for version in self._catalogue.versions(name):
                if version.current is not None:
                    await self._retire_version(version)
                elif version.number:
                    version.state, version.reason = ModelState.UNAVAILABLE, "unloaded"
            await self._announce()

    async def _retire_version(self, version: Version) -> None:
        generation, version.current = version.current, None
        version.state, version.reason = ModelState.UNLOADING, ""
        await self._announce()
        if generation is not None:
            self._retire(generation, version)

    async def _load_version(self, plan: Plan, cpu_instances: int) -> None:
        """One version to READY, beside whatever serves; raises MantaError when it fails."""
        version = self._catalogue.version(plan.found.name, plan.number)
        version.labels = plan.labels
        if version.current is not None and version.current.content_hash == plan.content_hash:
            return
        if self._adopt(version, plan):
            return
        if version.current is None:
            version.state, version.reason = ModelState.LOADING, ""
            await self._announce()
        generation = self._generation(plan)
        version.loading = generation
        async with self._threads:
            started_s = time.monotonic()
            reason = await self._bring_up(generation, plan, cpu_instances)
        version.loading = None
        if reason:
            self._tell(f"model '{plan.found.name}' version {plan.number}: {reason}")
            await asyncio.to_thread(applications.delete, generation.application)
            if version.current is None:
                version.state, version.reason = ModelState.UNAVAILABLE, reason
            await self._announce()
            raise Internal(f"version {plan.number} is at UNAVAILABLE state: {reason};")
        old, version.current = version.current, generation
        version.state, version.reason = ModelState.READY, ""
        version.load_duration_s = time.monotonic() - started_s
        self._tell_loaded(plan, generation, version.load_duration_s)
        await self._announce()
        if old is not None:
            self._retire(old, None)

    def _tell_loaded(self, plan: Plan, generation: Generation, duration_s: float) -> None:
        """Once per version, however many replicas said the same."""
        place = f"model '{plan.found.name}' version {plan.number}"
        lines = dict.fromkeys(line for r in generation.reports.values() for line in r.log)
        for line in lines:
            self._tell(f"{place}: {line}")
        groups = ", ".join(f"{t.deployment} x {t.slots}" for t in generation.targets())
        self._tell(f"{place} is READY after {duration_s:.1f} s ({groups})")

    def _adopt(self, version: Version, plan: Plan) -> bool:
        """Take over a running application that serves exactly what is on disk."""
        for application, reports in self._strays.items():
            parsed = applications.parse_application(application)
            fresh = all(r.content_hash == plan.content_hash for r in reports.values())
            if parsed != (plan.found.name, plan.number) or not reports or not fresh:
                continue
            generation = self._generation(plan, application)
            for report in reports.values():
                generation.note(report, time.monotonic())
            if generation.error():
                continue
            version.current, version.state, version.reason = generation, ModelState.READY, ""
            self._tell(f"model '{plan.found.name}' version {plan.number} is adopted")
            return True
        return False

    def _generation(self, plan: Plan, application: str = "") -> Generation:
        name = application or applications.application_name(
            plan.found.name, plan.number, applications.generation_number()
        )
        replicas = {p.deployment: p.replicas for p in plan.placements}
        return Generation(name, plan.config, plan.content_hash, replicas)

    async def _bring_up(self, generation: Generation, plan: Plan, cpu_instances: int) -> str:
        """Deploy and wait for every replica's word; the reason when it does not come about."""
        specs = self._specs(generation, plan, cpu_instances)
        app = self._bind_model(specs, plan.placements, self._settings)
        try:
            await asyncio.to_thread(applications.deploy, generation.application, app)
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
        return ""

    def _specs(self, generation: Generation, plan: Plan, cpu_instances: int) -> list[ReplicaSpec]:
        threads = max(1, available_cpus() // max(1, cpu_instances))
        return [
            ReplicaSpec(
                controller_application=self._application,
                application=generation.application,
                deployment=placement.deployment,
                repository=str(Path(plan.found.path).parent),
                model_name=plan.found.name,
                version=plan.number,
                config=plan.config,
                content_hash=plan.content_hash,
                kind=placement.kind,
                gpu=placement.gpu,
                instances=placement.instances,
                threads=threads,
                max_execution_s=self._settings.max_execution_s,
                logical_gpus=self._settings.logical_gpus,
                environment=self._settings.environment,
            )
            for placement in plan.placements
        ]

    # --- what may go -----------------------------------------------------------------------------

    def seen(self, router_id: str, epoch: int, sequence: int, in_use: tuple[str, ...]) -> None:
        self._routers[router_id] = _Seen(time.monotonic(), epoch, sequence, in_use)

    def _retire(self, generation: Generation, version: Version | None) -> None:
        task = asyncio.get_running_loop().create_task(
            self._drain(generation, version, self._catalogue.sequence)
        )
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def _drain(self, generation: Generation, version: Version | None, sequence: int) -> None:
        """Delete once every Router has let go, or the grace is over."""
        deadline_s = time.monotonic() + self._settings.exit_timeout_s
        while time.monotonic() < deadline_s and self._used(generation.application, sequence):
            await asyncio.sleep(POLL_S)
        await asyncio.to_thread(applications.delete, generation.application)
        if version is not None and version.current is None and version.loading is None:
            version.state, version.reason = ModelState.UNAVAILABLE, "unloaded"
            await self._announce()

    def _used(self, application: str, sequence: int) -> bool:
        now_s = time.monotonic()
        return any(
            seen.epoch != self._catalogue.epoch
            or seen.sequence < sequence
            or application in seen.in_use
            for seen in self._routers.values()
            if now_s - seen.at_s < ROUTER_SILENT_S
        )


def available_cpus() -> int:
    """CPUs that this process may use: affinity, and the cgroup's quota where there is one."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpus = affinity or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cpus
    return cpus if quota == "max" else max(1, min(cpus, int(quota) // int(period)))
