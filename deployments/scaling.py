"""Gives the versions that are scaled more or fewer replicas, as the `autoscaler` says.

Owns what is remembered of each between two looks, and the calls to Serve's external scaler. Acts
only on generations that serve, and in turn with loads of the same model. Called by the Controller,
on its clock and when a Router tells that something waits.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Protocol

from configs.autoscaling import Autoscaling

from . import applications
from .adoption import facts
from .autoscaler import Autoscaler, Load
from .catalogue import Catalogue, Generation, Version
from .statistics import VersionKey
from .types import ModelState

logger = logging.getLogger("ray.serve")

# What a Router said longer ago is not what waits now: it may be gone.
FRESH_S = 3.0
RETRY_S = 5.0


class Serve(Protocol):
    """What is asked of Ray Serve: `applications`."""

    def scale(self, name: str, deployment: str, count: int) -> None: ...

    def remember(self, name: str, facts: bytes) -> None: ...


class _Scaled:
    """What is remembered of one generation."""

    def __init__(self, limits: Mapping[str, Autoscaling], target: float) -> None:
        self.limits = limits
        self.autoscaler = Autoscaler(next(iter(limits.values())), target, len(limits))
        self.task: asyncio.Task[None] | None = None
        self.retry_s = 0.0
        self.waking_s: float | None = None


class Scaling:
    """`lock` is that of a model's loads, `load` what Routers have told of a version since a time.
    `wake_limit_s`: when a version that wakes counts as one that does not."""

    def __init__(
        self,
        catalogue: Catalogue,
        lock: Callable[[str], asyncio.Lock],
        load: Callable[[VersionKey, float], Load],
        announce: Callable[[], Coroutine[Any, Any, None]],
        tell: Callable[[str], None],
        wake_limit_s: float,
        serve: Serve = applications,
    ) -> None:
        self._catalogue = catalogue
        self._lock = lock
        self._load = load
        self._announce = announce
        self._tell = tell
        self._wake_limit_s = wake_limit_s
        self._serve = serve
        self._scaled: dict[str, _Scaled] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def look(self, now_s: float) -> None:
        """Begins what is to be done; waits for nothing."""
        seen: dict[str, _Scaled] = {}
        for version in self._catalogue.versions():
            generation = version.current
            if generation is None or not generation.autoscaling:
                continue
            if version.state is not ModelState.READY or self._catalogue.closing:
                continue
            one = self._scaled.get(generation.application)
            if one is None or one.limits != generation.autoscaling:
                target = next(iter(generation.autoscaling.values())).target(generation.config)
                one = _Scaled(generation.autoscaling, target)
            seen[generation.application] = one
            self._look_at(version, generation, one, now_s)
        self._scaled = seen

    def _look_at(
        self, version: Version, generation: Generation, one: _Scaled, now_s: float
    ) -> None:
        self._watch_waking(version, generation, one, now_s)
        if one.task is not None and not one.task.done():
            return
        # A version whose replicas do not load is Serve's to mend: that is no question of how many.
        if self._lock(version.model_name).locked() or version.loading or generation.broken():
            one.autoscaler.forget()
            return
        if now_s < one.retry_s:
            return
        key = VersionKey(version.model_name, str(version.number), generation.application)
        load = self._load(key, now_s - FRESH_S)
        wanted = one.autoscaler.wanted(load, generation.count, now_s)
        if any(generation.replicas.get(name) != wanted for name in generation.autoscaling):
            one.task = self._own(self._scale(version, generation, one, wanted, load, now_s))

    def _watch_waking(
        self, version: Version, generation: Generation, one: _Scaled, now_s: float
    ) -> None:
        """Ready never lies: what does not come in time is not awaited any more."""
        if not generation.waking:
            one.waking_s = None
            return
        one.waking_s = now_s if one.waking_s is None else one.waking_s
        if now_s - one.waking_s > self._wake_limit_s:
            generation.waking = False
            self._tell(
                f"model '{version.model_name}' version {version.number} has no replica "
                f"{self._wake_limit_s:g} s after the first request"
            )
            one.task = self._own(self._announce())

    def _own(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """The loop itself holds tasks only weakly."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _scale(
        self,
        version: Version,
        generation: Generation,
        one: _Scaled,
        wanted: int,
        load: Load,
        now_s: float,
    ) -> None:
        async with self._lock(version.model_name):
            if version.current is not generation or self._catalogue.closing:
                return
            before = generation.count
            try:
                await self._ask(generation, wanted)
            except Exception as error:  # Serve's controller may be restarting
                one.retry_s = now_s + RETRY_S
                logger.warning("%s is not scaled yet: %s", generation.application, error)
                return
            finally:  # some of it may have been done; and more may come while the first is awaited
                awaited = before == 0 or generation.waking
                generation.waking = generation.count > 0 and awaited
            if wanted == 0:
                generation.rest()
            self._tell(
                f"model '{version.model_name}' version {version.number} is scaled from {before} "
                f"to {wanted} ({load.queued} requests wait, {load.running} batches run)"
            )
            await self._announce()

    async def _ask(self, generation: Generation, wanted: int) -> None:
        """A deployment counts as scaled once Serve has taken it, whatever comes of the others."""
        if wanted == 0:
            await asyncio.to_thread(self._serve.remember, generation.application, facts(generation))
        for name in generation.autoscaling:
            await asyncio.to_thread(self._serve.scale, generation.application, name, wanted)
            generation.replicas = {**generation.replicas, name: wanted}
