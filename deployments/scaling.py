"""Gives the versions that are scaled more or fewer replicas, as the `autoscaler` says.

Owns what is remembered of each between two looks, and the calls to Serve's external scaler. Acts
only on generations that serve, and in turn with loads of the same model. Called by the Controller,
on its clock and when a Router tells that something waits.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any, Protocol

from configs.autoscaling import Autoscaling
from configs.model import ModelConfig

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
# How soon Serve begins to stop what it is told to stop: at once, unless its controller is busy.
STOP_S = 30.0
POLL_S = 0.1


class Serve(Protocol):
    """What is asked of Ray Serve: `applications`."""

    def scale(self, name: str, deployment: str, count: int) -> None: ...

    def staying(self, name: str, deployments: Iterable[str]) -> int: ...

    def remember(self, name: str, facts: bytes) -> None: ...


class _Scaled:
    """What is remembered of one generation. `asked` is what Serve was asked for and has not
    answered: whether it has taken that is not known."""

    def __init__(self) -> None:
        self.limits: Mapping[str, Autoscaling] = {}
        self.task: asyncio.Task[None] | None = None
        self.retry_s = 0.0
        self.asked: int | None = None
        self.waking_s: float | None = None

    def follow(self, limits: Mapping[str, Autoscaling], config: ModelConfig) -> None:
        """The limits that are in force now, of each deployment the same."""
        if limits == self.limits:
            return
        self.limits, one = limits, next(iter(limits.values()))
        self.autoscaler = Autoscaler(one, one.target(config), len(limits))
        self.asked = self.asked if self.asked is None else one.bounded(self.asked)

    def wanted(self, load: Load, count: int, now_s: float) -> int:
        """As the policy says. Where that would leave `count` and Serve may have `asked`:
        the more of the two while anything waits or runs, else the fewer."""
        wanted = self.autoscaler.wanted(load, count, now_s)
        if self.asked is None or wanted != count:
            return wanted
        return (max if load.queued or load.running else min)(wanted, self.asked)


class Scaling:
    """`lock` is that of a model's loads, `load` what Routers have told of a version since a time.
    `wake_limit_s`: when a version that wakes counts as one that does not; `stop_limit_s`: when
    Serve should have begun to stop what it was told to."""

    def __init__(
        self,
        catalogue: Catalogue,
        lock: Callable[[str], asyncio.Lock],
        load: Callable[[VersionKey, float], Load],
        announce: Callable[[], Coroutine[Any, Any, None]],
        tell: Callable[[str], None],
        wake_limit_s: float,
        serve: Serve = applications,
        stop_limit_s: float = STOP_S,
    ) -> None:
        self._catalogue = catalogue
        self._lock = lock
        self._load = load
        self._announce = announce
        self._tell = tell
        self._wake_limit_s = wake_limit_s
        self._serve = serve
        self._stop_limit_s = stop_limit_s
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
            one = self._scaled.get(generation.application) or _Scaled()
            one.follow(generation.autoscaling, generation.config)
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
        wanted = one.wanted(load, generation.count, now_s)
        if one.asked is not None or _moves(generation, wanted):
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
            before, moves = generation.count, _moves(generation, wanted)
            # After an answer that was lost Serve may have none of those that count.
            lacks = one.asked is not None and not any(t.slots for t in generation.targets())
            one.asked = wanted
            try:
                await self._ask(generation, wanted)
            except Exception as error:  # Serve's controller may be restarting
                one.retry_s = now_s + RETRY_S
                logger.warning("%s is not scaled yet: %s", generation.application, error)
                return
            finally:  # some of it may have been done; and more may come while the first is awaited
                awaited = before == 0 or generation.waking or lacks
                generation.waking = generation.count > 0 and awaited
            one.asked = None
            if moves:
                self._tell(
                    f"model '{version.model_name}' version {version.number} is scaled from "
                    f"{before} to {wanted} ({load.queued} requests wait, {load.running} batches "
                    "run)"
                )
            await self._announce()

    async def _ask(self, generation: Generation, wanted: int) -> None:
        """A deployment counts as scaled once Serve has taken it, whatever comes of the others."""
        if wanted == 0:
            await asyncio.to_thread(self._serve.remember, generation.application, facts(generation))
        for name in generation.autoscaling:
            await asyncio.to_thread(self._serve.scale, generation.application, name, wanted)
            generation.replicas = {**generation.replicas, name: wanted}
        if wanted == 0:
            generation.rest()
            await self._announce()
            await self._until_none_stays(generation)

    async def _until_none_stays(self, generation: Generation) -> None:
        """Serve only notes what it is to have. Asked for more before it acts on that, it keeps the
        replicas that it has; and they are not heard any more. The model's lock is held meanwhile.
        """
        try:
            await asyncio.wait_for(self._poll_staying(generation), self._stop_limit_s)
        except BaseException as error:
            generation.leaving = frozenset()  # whoever stays serves
            if isinstance(error, asyncio.TimeoutError):
                raise RuntimeError("Serve has not stopped its replicas") from None
            raise

    async def _poll_staying(self, generation: Generation) -> None:
        names = tuple(generation.autoscaling)
        while await asyncio.to_thread(self._serve.staying, generation.application, names):
            await asyncio.sleep(POLL_S)


def _moves(generation: Generation, wanted: int) -> bool:
    return any(generation.replicas.get(name) != wanted for name in generation.autoscaling)
