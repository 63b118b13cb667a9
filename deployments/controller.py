"""Controller: what is loaded, and what Routers follow. One replica, in the Router's application.

Owns the lifecycle (load-new, flip, drain-old) of model applications and the counters' aggregate.
Serves no inference: when it dies, serving goes on; when it returns it adopts what runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ray import get_runtime_context, serve
from ray._private.authentication.authentication_utils import is_token_auth_enabled

from configs import metrics, tracing
from configs.errors import ConfigError
from configs.server import ServerSettings
from configs.stores import is_remote

from . import applications, trace_settings
from .aggregate import Aggregator, LoadedVersion
from .applications import BindModel
from .catalogue import Catalogue
from .census import Census, census
from .errors import ControlDisabled, ShuttingDown, Unavailable
from .followers import Followers
from .lifecycle import Lifecycle
from .log_settings import changed, initial, shown
from .logbook import Lines, Logbook
from .logs import Tap, aloud, announcement, clean
from .metrics import render
from .mirror import mirrors
from .names import check_model_name
from .polling import Poller
from .repository import Repository
from .scaling import Scaling
from .statistics import Delta, Legacy, Peers, VersionKey
from .types import LogSettings, ReplicaReport, Snapshot, TraceChanges

logger = logging.getLogger("ray.serve")

LONG_POLL_S = 2.0
TICK_S = 0.5
RETRY_S = 1.0


class Controller:
    """Verbs for Routers (`watch`, `push`, `control`), replicas (`report`) and the command line."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, settings: ServerSettings, bind_model: BindModel
    ) -> None:
        self._settings = settings
        self._logbook = Logbook(settings.log_file)
        self._log = Tap(initial(settings), loud=False)  # the logbook is
        self._log.attach()
        self._application = serve.get_replica_context().app_name
        await asyncio.to_thread(_check_cluster, settings)
        repository = await asyncio.to_thread(_open, settings, self._application)
        self._repository = repository
        self._catalogue = Catalogue(epoch=time.time_ns(), log=self._log.settings)
        self._changed = asyncio.Condition()
        self._told = Lines()
        self._followers = Followers(self._catalogue)
        self._lifecycle = Lifecycle(
            settings,
            repository,
            self._catalogue,
            self._followers,
            bind_model,
            self._application,
            self._announce,
            self._tell,
        )
        self._poller = Poller(repository, self._lifecycle, settings.repository_poll_s)
        self._first_pass_over = False
        self._aggregator = Aggregator()
        self._counted: set[VersionKey] = set()
        self._scaling = Scaling(
            self._catalogue,
            self._lifecycle.lock,
            self._aggregator.load,
            self._announce,
            self._tell,
            settings.model_load_timeout_s,
        )
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._start()), loop.create_task(self._tick())]

    async def _start(self) -> None:
        polls = self._settings.model_control_mode == "poll"
        while True:
            try:
                if polls:
                    await self._poller.begin()
                await self._lifecycle.start()
                break
            except Exception:  # of Serve's controller, say; an empty server must not seem ready
                logger.exception("the first load pass failed, and is tried again")
                await asyncio.sleep(RETRY_S)
        self._first_pass_over = self._catalogue.started = True
        await self._announce()
        if polls:
            loop = asyncio.get_running_loop()
            self._tasks.append(loop.create_task(self._poller.run()))

    def _tell(self, text: str) -> None:
        """For whoever runs the server: on this process's output, and for `manta serve` to show."""
        text = clean(text)  # it may quote a client, or a model
        form = self._catalogue.log.format
        if form != "json":
            aloud(text, sys.__stdout__)
        if form == "json" or self._settings.log_file:
            self._logbook.write(announcement(text, form))
        if form != "json":
            self._told.add(text)

    async def _announce(self) -> None:
        """Something that Routers or a waiting load should know has changed."""
        self._count()
        async with self._changed:
            self._catalogue.sequence += 1
            self._changed.notify_all()

    def _count(self) -> None:
        """Statistics live as long as the generation that they count."""
        current = {
            VersionKey(v.model_name, str(v.number), v.current.application): (
                v.load_duration_s,
                v.current.config.metric_tags,
            )
            for v in self._catalogue.versions()
            if v.current is not None
        }
        for key in self._counted - set(current):
            self._aggregator.drop(key)
        for key in set(current) - self._counted:
            self._aggregator.open(key, *current[key])
        self._counted = set(current)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._collect()
            now_s = time.monotonic()
            stale = [g.drop_stale(now_s) for _, g in self._catalogue.generations()]
            if any(stale):
                await self._announce()
            for router_id in self._followers.silent():
                self._aggregator.retire(router_id)
            self._scale()

    def _scale(self) -> None:
        try:
            self._scaling.look(time.monotonic())
        except Exception:  # the clock goes on
            logger.exception("scaling failed")

    def _collect(self) -> None:
        """This process's own lines, to where the others' are."""
        for line in self._log.take():
            self._logbook.write(line)

    # --- replicas --------------------------------------------------------------------------------

    async def report(self, report: ReplicaReport) -> LogSettings:
        """The answer is how the replica is to log from now on."""
        for line in report.fresh:
            self._logbook.write(line)
        report = replace(report, fresh=()) if report.fresh else report  # it is kept
        generation = self._catalogue.find(report.application)
        if generation is None:
            self._lifecycle.stray(report)
        elif generation.note(report, time.monotonic()):
            await self._announce()
        return self._catalogue.log

    # --- Routers ---------------------------------------------------------------------------------

    async def watch(
        self, router_id: str, epoch: int, sequence: int, in_use: tuple[str, ...]
    ) -> Snapshot | None:
        """The snapshot once it differs from what the Router has; None after LONG_POLL_S, and when
        the Router should tell what it has counted.

        `in_use` are the applications that the Router may still call: they are not deleted.
        """
        self._followers.seen(router_id, epoch, sequence, in_use)
        catalogue = self._catalogue

        def news() -> bool:
            return epoch != catalogue.epoch or sequence != catalogue.sequence

        def wanted() -> bool:
            return news() or self._followers.owes(router_id)

        try:
            await asyncio.wait_for(self._wait(wanted), LONG_POLL_S)
        except asyncio.TimeoutError:
            return None
        return catalogue.snapshot(self._settings.strict_readiness) if news() else None

    async def _wait(self, news: Callable[[], bool]) -> None:
        async with self._changed:
            await self._changed.wait_for(news)

    async def push(
        self,
        router_id: str,
        delta: Delta,
        lost: tuple[str, ...],
        lines: tuple[str, ...],
        log: LogSettings,
        asked: bool,
        trace: TraceChanges,
    ) -> tuple[int, Legacy | None, Peers]:
        """A Router's counters and lines since its last flush, applications where it lost a call,
        and how it logs and traces: that outlives a Controller. Answers which life of the Controller
        has them, and what the Router should keep for the next.
        """
        legacy = self._aggregator.apply(router_id, delta, time.monotonic())
        if delta.pending:  # perhaps for a version that has no replica
            self._scale()
        if asked:  # and not begun before
            self._followers.counted(router_id)
        for line in lines:
            self._logbook.write(line)
        await self._log_as(log)
        await self._trace_as(trace)
        for application in lost:
            generation = self._catalogue.find(application)
            if generation is not None:
                generation.suspect(time.monotonic())
        return self._catalogue.epoch, legacy, self._aggregator.peers(router_id, delta.heard)

    async def statistics(self, name: str, version: str) -> list[dict[str, Any]]:
        """Triton's JSON form of the versions that serve, all of them or those asked for."""
        self._check_started()
        await self._gather_counts()
        return [
            self._aggregator.report(one.key.model, one.key.version)
            for one in self._aggregator.loaded()
            if name in ("", one.key.model) and version in ("", one.key.version)
        ]

    async def metrics(self) -> str:
        self._check_started()
        await self._gather_counts()
        config = metrics.parse(self._settings.metrics_config)
        return render(map(self._with_replicas, self._aggregator.loaded()), config)

    def _with_replicas(self, loaded: LoadedVersion) -> LoadedVersion:
        generation = self._catalogue.find(loaded.key.generation)
        if generation is None:
            return loaded
        wanted = sum(generation.replicas.values())
        return replace(loaded, replicas_wanted=wanted, replicas_running=generation.running)

    async def _gather_counts(self) -> None:
        """Of all Routers, up to this moment: each says what it has counted only now and then."""
        if self._followers.ask():
            async with self._changed:
                self._changed.notify_all()
            await self._followers.all_counted()

    async def log_settings(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Changed, known to all Routers, as they are now. Replicas hear of it within a second."""
        await self._gather_settings()
        if changes:
            await self._log_as(changed(self._catalogue.log, changes))
            await self._followers.reach(self._catalogue.sequence)
        return shown(self._catalogue.log, self._settings.log_file)

    async def _log_as(self, settings: LogSettings) -> None:
        if settings.changed_ns > self._catalogue.log.changed_ns:
            self._catalogue.log = settings
            self._log.follow(settings)
            await self._announce()

    async def trace_settings(self, model: str, changes: Mapping[str, Any]) -> dict[str, Any]:
        """The same for traces, of one model or, for "", of all."""
        config = tracing.parse(self._settings.trace_config)
        await self._gather_settings()
        if changes:
            before = self._catalogue.trace
            await self._trace_as(trace_settings.changed(config, before, model, changes))
            await self._followers.reach(self._catalogue.sequence)
        return trace_settings.shown(config, self._catalogue.trace, model)

    async def _trace_as(self, changes: TraceChanges) -> None:
        if changes.changed_ns > self._catalogue.trace.changed_ns:
            self._catalogue.trace = changes
            await self._announce()

    async def _gather_settings(self) -> None:
        """Each push brings along those that a Router has heard of. A Controller that has just
        begun has none, and a change of one setting would bring all others back to the start's."""
        self._check_started()
        await self._gather_counts()

    def _check_started(self) -> None:
        """Counters that begin at zero would seem to go backwards until adoption is over."""
        if not self._catalogue.started:
            raise Unavailable("the server's controller is starting; try again")

    async def control(self, verb: str, name: str, parameters: Mapping[str, Any]) -> None:
        """`load` and `unload`; raises an error of ours."""
        if self._settings.model_control_mode != "explicit":
            raise ControlDisabled()
        if self._catalogue.closing:
            raise ShuttingDown()
        self._check_started()
        check_model_name(name)
        if verb == "load":
            await self._lifecycle.load(name, parameters)
        else:
            await self._lifecycle.unload(name)

    async def on_disk(self) -> dict[str, str]:
        """Every model directory, whatever was loaded, and why it can be none, if so."""
        return await asyncio.to_thread(self._repository.names)

    async def replicas(self) -> list[ReplicaReport]:
        """What every live replica last said of itself; for tests and for `manta` commands."""
        return [
            report
            for _, generation in self._catalogue.generations()
            for report in generation.reports.values()
        ]

    async def census(self) -> Census:
        return census()

    # --- the command line ------------------------------------------------------------------------

    async def started(self) -> tuple[bool, bool]:
        """Whether the first pass is over, and whether some model failed in it."""
        return self._first_pass_over, bool(self._catalogue.failed())

    async def messages(self, seen: int) -> tuple[int, tuple[str, ...]]:
        """How many lines were told so far, and those after the first `seen`, as far as kept."""
        return self._told.since(seen)

    async def log_lines(self, seen: int) -> tuple[int, tuple[str, ...]]:
        """The same of the log, unless it goes to a file."""
        self._collect()
        return self._logbook.since(seen)

    async def close(self) -> None:
        """Not ready from now on; Routers hear of it."""
        self._catalogue.closing = True
        await self._announce()

    async def check_health(self) -> None:
        for task in self._tasks[1:]:
            if task.done():
                raise RuntimeError("the Controller's clock has stopped")

    async def __del__(self) -> None:
        """Models go with the application, and stay when only this process is replaced."""
        for task in getattr(self, "_tasks", ()):
            task.cancel()
        if not hasattr(self, "_tasks"):
            return  # the constructor failed
        if await asyncio.to_thread(applications.is_deleting, self._application):
            # Routers first: what they have accepted still needs the models.
            while await asyncio.to_thread(applications.has_replicas, self._application, "Router"):
                await asyncio.sleep(0.1)
            for name in await asyncio.to_thread(applications.live):
                with contextlib.suppress(Exception):  # the others must go all the same
                    await asyncio.to_thread(applications.delete, name)
            await self._lifecycle.close()
            await asyncio.to_thread(self._repository.close)
        self._log.detach()
        self._collect()
        self._logbook.close()


def _check_cluster(settings: ServerSettings) -> None:
    """What must hold before anything is served; the text names the way out."""
    if not is_token_auth_enabled() and not settings.allow_insecure_cluster:
        raise RuntimeError(
            "this Ray cluster has no token authentication: whoever reaches its ports can run code "
            "in the replicas. Start it with RAY_AUTH_MODE=token, or set allow_insecure_cluster"
        )
    if (settings.listener == "serve") != applications.has_proxy():
        expected = "EveryNode or HeadOnly" if settings.listener == "serve" else "Disabled"
        raise RuntimeError(
            f"listener '{settings.listener}' needs proxy_location {expected} in the Serve config"
        )


def _open(settings: ServerSettings, application: str) -> Repository:
    """Raises ConfigError for a repository that cannot be read."""
    owner = f"{get_runtime_context().gcs_address} {application}"
    mirrored = mirrors(settings, owner)
    if mirrored and not settings.remote_directory and applications.node_count() > 1:
        raise ConfigError(
            "repositories in stores need --remote-directory on a cluster of several nodes, a "
            "folder that all of them share"
        )
    local = [path for path in settings.model_repository if not is_remote(path)]
    repository = Repository(local, settings.model_config_name, mirrored)
    repository.check()
    return repository
