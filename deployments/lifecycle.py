"""Load-new, flip, drain-old: how model versions come to serve, change, and leave.

Owns the order of steps. The Controller calls it; bookkeeping is the Catalogue's, what Routers have
heard of it the Followers', Serve's side is `applications`, the disk is the Repository's, what was
given instead the Overrides'. How one generation comes up is `arrivals`', how it goes `departures`'.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from configs.errors import ConfigError
from configs.server import ServerSettings

from . import applications, overrides
from .adoption import Adoption, lasting_facts
from .applications import BindModel
from .arrivals import Arrivals, counts, scalings
from .catalogue import Catalogue, Generation, Version
from .departures import Departures
from .errors import Internal, LoadFailed, MantaError, Unsupported
from .followers import Followers
from .overrides import Overrides
from .planner import UNEXPECTED, Plan, Planner, kept_at, started_with
from .repository import Repository
from .types import ModelState, Override, ReplicaReport

logger = logging.getLogger("ray.serve")


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
        self._announce = announce
        self._tell = tell
        self._overrides = Overrides(settings.file_override_directory)
        self._adoption = Adoption(catalogue, self._overrides, tell)
        self._departures = Departures(settings, followers, self._overrides, announce)
        self._arrivals = Arrivals(settings, self._planner, bind_model, tell)
        self._locks: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._threads = asyncio.Semaphore(settings.model_load_thread_count)

    # --- the first pass --------------------------------------------------------------------------

    async def start(self) -> None:
        """Adopt what an earlier Controller left running, then load what the settings ask for."""
        running, left_over = await self._adoption.adopt()
        if running:  # Routers know what is adopted; the rest of the pass is like any other load
            self._catalogue.started = True
            await self._announce()
        found = await asyncio.to_thread(self._repository.names)
        names = self._wanted(list(found), running)
        for one in found:
            if one not in names:
                self._catalogue.version(one, 0)
        for one in self._settings.autoscaling:
            if one not in found:
                self._tell(f"the settings have autoscaling of '{one}', and there is no such model")
        plans = await asyncio.gather(*(self._prepare_noting(name) for name in names))
        cpu_instances = sum(plan.cpu_instances for model in plans for plan in model)
        await asyncio.gather(
            *(self._begin(name, p, cpu_instances) for name, p in zip(names, plans, strict=True))
        )
        for name, folder in left_over.items():
            self._departures.leave(name, folder, sequence=self._catalogue.sequence)
        if self._settings.model_control_mode == "poll":  # what went while nobody looked
            adopted = {name for name, _ in map(applications.parse_application, running)}
            for name in adopted.difference(names):
                await self.unload(name)

    def _wanted(self, found: list[str], running: list[str]) -> list[str]:
        if self._settings.model_control_mode != "explicit":
            return sorted(found)
        if running:  # a restart: what clients have loaded and unloaded since counts
            return sorted({name for name, _ in map(applications.parse_application, running)})
        if self._settings.load_model == ("*",):
            return sorted(found)
        return sorted(set(self._settings.load_model))

    def lock(self, name: str) -> asyncio.Lock:
        """Held while a model is loaded, resized or unloaded, and by whoever else changes it."""
        return self._locks[name]

    def stray(self, report: ReplicaReport) -> None:
        self._adoption.stray(report)

    async def _prepare_noting(self, name: str) -> list[Plan]:
        try:
            return await self._prepare(name, self._overrides.of(name))
        except (ConfigError, MantaError) as error:
            self._note_failure(name, str(error))
        except Exception:
            logger.exception("model %s could not be read", name)
            self._note_failure(name, UNEXPECTED)
        return []

    async def _begin(self, name: str, plans: list[Plan], cpu_instances: int) -> None:
        async with self._locks[name]:
            # After an adoption a client may have loaded it in another way since it was planned.
            if all(plan.override == self._overrides.of(name) for plan in plans):
                await self._load_all(name, plans, cpu_instances)

    async def _prepare(self, name: str, override: Override | None) -> list[Plan]:
        """The versions to load; those that cannot be are noted. Raises ConfigError or ours."""
        plans, failed = await asyncio.to_thread(self._planner.plan, name, override)
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
        overrides.check(name, parameters, self._settings)
        if not any(key.startswith(overrides.FILE) for key in parameters):
            await self._check_on_disk(name)
        elif not self._settings.file_override_directory:
            if await asyncio.to_thread(applications.node_count) > 1:
                raise Unsupported(
                    "file overrides on a cluster of several nodes need --file-override-directory, "
                    "a folder that all nodes share"
                )
        await asyncio.shield(self._departures.own(self._load(name, parameters)))

    def reload(self, name: str) -> None:
        """Begin to take over what is on disk; what has not changed stays as it is."""
        if not self._catalogue.closing:
            self._departures.own(self._load(name, {}))

    def withdraw(self, name: str, reason: str = "") -> None:
        """Begin to unload what is not on disk any more, or may not be served for a reason."""
        if not self._catalogue.closing:
            self._departures.own(self.unload(name, reason))

    async def _check_on_disk(self, name: str) -> None:
        if not await asyncio.to_thread(self._repository.contains, name):
            raise Internal(f"failed to load '{name}', failed to poll from model repository")

    async def _load(self, name: str, parameters: Mapping[str, Any]) -> None:
        """All Routers know how it ended, well or not: one has the index that is asked for next."""
        try:
            failed = await self._load_in_turn(name, parameters)
        except Exception:
            await self._followers.reach(self._catalogue.sequence)
            raise
        await self._followers.reach(self._catalogue.sequence)
        if failed:
            raise LoadFailed(name, " ".join(failed))

    async def _load_in_turn(self, name: str, parameters: Mapping[str, Any]) -> list[str]:
        """With others of the same model, and planned only then. What failed, in words; raises
        LoadFailed and others where nothing was begun."""
        async with self._locks[name]:
            override = await self._asked(name, parameters)
            try:
                failed, took = await self._load_from(name, override)
                if took:
                    await self._overrides.put(name, override)
            finally:
                await self._overrides.release(override.folder if override else "")
        return failed

    async def _asked(self, name: str, parameters: Mapping[str, Any]) -> Override | None:
        """What a request wants to be in force; its folder is held. A configuration stays until the
        model is unloaded, files only until the next load without."""
        if parameters:
            return await self._overrides.make(name, parameters)
        override = self._overrides.of(name)
        if override is None or not override.folder:
            return override
        await self._check_on_disk(name)
        return None

    async def _load_from(self, name: str, override: Override | None) -> tuple[list[str], bool]:
        """What failed, in words, and whether some version is now as it was asked for."""
        try:
            plans = await self._prepare(name, override)
        except ConfigError as error:
            self._note_failure(name, str(error))
            await self._announce()
            raise LoadFailed(name, str(error)) from error
        others = sum(sum(g.replicas.values()) for _, g in self._catalogue.generations())
        cpu_instances = others + sum(plan.cpu_instances for plan in plans)
        failed = await self._load_all(name, plans, cpu_instances)
        versions = self._catalogue.versions(name)
        serving = {one.number: one.current.fingerprint for one in versions if one.current}
        return failed, any(serving.get(plan.number) == plan.fingerprint for plan in plans)

    async def _load_all(self, name: str, plans: Sequence[Plan], cpu_instances: int) -> list[str]:
        """Loads the plans of one model, retires what is not among them; what failed, in words."""
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

    async def unload(self, name: str, reason: str = "") -> None:
        """Begin to unload all versions; returns at once, the model drains behind. With a `reason`
        the model itself is UNAVAILABLE for it."""
        if not (self._catalogue.versions(name) or reason):
            return
        async with self._locks[name]:
            for version in self._catalogue.versions(name):
                if version.current is not None:
                    await self._retire_version(version)
                elif version.state is not ModelState.UNLOADING and version.number:
                    version.state, version.reason = ModelState.UNAVAILABLE, "unloaded"
            self._catalogue.forget(name, 0)
            await self._overrides.put(name, None)
            if reason:
                self._note_failure(name, reason)
            await self._announce()
        await self._followers.reach(self._catalogue.sequence)

    async def _retire_version(self, version: Version) -> None:
        generation, version.current = version.current, None
        version.state, version.reason = ModelState.UNLOADING, ""
        await self._announce()
        if generation is not None:
            sequence = self._catalogue.sequence
            self._departures.leave(generation.application, generation.folder, version, sequence)

    async def close(self) -> None:
        """The server ends: no file of ours stays behind."""
        await self._overrides.close()

    # --- one version -----------------------------------------------------------------------------

    async def _load_version(self, plan: Plan, cpu_instances: int) -> str:
        """One version to READY, beside whatever serves; "" or why it did not come about."""
        version = self._catalogue.version(plan.found.name, plan.number)
        current = version.current
        if current is not None and current.fingerprint == plan.fingerprint:
            kept = await self._keep(current, plan)
            if kept is not None:
                version.labels = plan.labels
                return kept
        if current is None:
            version.state, version.reason = ModelState.LOADING, ""
        reason = UNEXPECTED
        for tries_left in reversed(range(self._settings.model_load_retry_count + 1)):
            reason = await self._try(version, plan, cpu_instances)
            if not reason or self._catalogue.closing:
                break
            if tries_left:
                place = f"model '{plan.found.name}' version {plan.number}"
                self._tell(f"{place}: {reason}; it is tried again")
        if reason and version.current is None:
            version.state, version.reason = ModelState.UNAVAILABLE, reason
        return reason

    async def _remember(self, generation: Generation) -> None:
        try:
            kept = lasting_facts(generation)
            await asyncio.to_thread(applications.remember, generation.application, kept)
        except Exception as error:  # it serves all the same
            logger.warning("%s is not remembered: %s", generation.application, error)

    async def _keep(self, current: Generation, plan: Plan) -> str | None:
        """What serves is what is wanted, but for how many there are of it and for what concerns
        other versions: "", why not, or None where that takes a new generation."""
        plan = kept_at(plan, current.replicas)
        if dict(current.replicas) != counts(plan):
            current.waking = current.resting
            async with self._threads:
                reason = await self._arrivals.resize(current, plan)
            if reason != "":
                return reason
        current.autoscaling = scalings(plan)
        if current.adjust(plan.config):
            await self._announce()
        return ""

    async def _try(self, version: Version, plan: Plan, cpu_instances: int) -> str:
        """A new generation, and the flip to it if it comes up; "" or why it did not."""
        if version.current is not None:
            plan = started_with(plan, version.current.replicas)
        generation = version.loading = self._arrivals.generation(plan)
        self._overrides.hold(generation.folder)
        await self._announce()
        reason = UNEXPECTED
        try:
            async with self._threads:
                started_s = time.monotonic()
                reason = await self._arrivals.bring_up(generation, plan, cpu_instances)
        except Exception:
            logger.exception("loading %s failed", generation.application)
        finally:
            version.loading = None
            if reason:
                self._departures.leave(generation.application, generation.folder)
        if reason:
            return reason
        old, version.current = version.current, generation
        version.state, version.reason, version.labels = ModelState.READY, "", plan.labels
        version.load_duration_s = time.monotonic() - started_s
        self._arrivals.tell_loaded(plan, generation, version.load_duration_s)
        await self._announce()
        await self._remember(generation)
        if old is not None:
            sequence = self._catalogue.sequence
            self._departures.leave(old.application, old.folder, sequence=sequence)
        return ""
