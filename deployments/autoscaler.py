"""How many instances a model version should have, by what waits for them: policy as plain data.

No ray, no asyncio and no clock: times are seconds given by the caller. Remembers only since when
more, or fewer, would do. Called by `scaling`, which acts on the answer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from configs.autoscaling import Autoscaling


@dataclass(frozen=True, slots=True)
class Load:
    """Over all Routers: requests that wait, batches that run or are sent ahead, and a number that
    changes whenever a request has ended."""

    queued: int = 0
    running: int = 0
    finished: int = 0


@dataclass(slots=True)
class _Trend:
    """Since when more (or fewer) are wanted without a break, and the most careful such wish."""

    since_s: float
    count: int


class Autoscaler:
    """Of one generation, whose `deployments` (one per listed GPU) all have the same count.

    More instances come once what waits has asked for more for `upscale_delay_s` on end: as many as
    it asked for at least in that time. Fewer remain once fewer would have done for
    `downscale_delay_s` on end: as many as were needed at most. So a count that was just left is
    not the next one, and one quiet or busy moment changes nothing. From zero, and into changed
    bounds, it goes at once.
    """

    def __init__(self, limits: Autoscaling, target: float, deployments: int = 1) -> None:
        self._limits = limits
        self._target = target
        self._deployments = deployments
        self._finished: int | None = None
        self._up: _Trend | None = None
        self._down: _Trend | None = None

    def wanted(self, load: Load, count: int, now_s: float) -> int:
        """What each deployment should have, which has `count`; within the bounds."""
        desired = self._desired(load, count)
        bounded = self._limits.bounded(count)
        if bounded != count or count == 0:
            self.forget()
            return desired if load.queued and count == 0 else bounded
        if desired > count:
            self._down = None
            self._up = trend = self._up or _Trend(now_s, desired)
            trend.count = min(trend.count, desired)
            if now_s - trend.since_s < self._limits.upscale_delay_s:
                return count
        elif desired < count:
            self._up = None
            self._down = trend = self._down or _Trend(now_s, desired)
            trend.count = max(trend.count, desired)
            if now_s - trend.since_s < self._limits.downscale_delay_s:
                return count
        else:
            self.forget()
            return count
        self.forget()
        return trend.count

    def forget(self) -> None:
        """Nobody looks for a while: what holds on end begins anew."""
        self._up = self._down = None

    def _desired(self, load: Load, count: int) -> int:
        """What would do now. Nothing that works is taken away, and batches that are sent ahead are
        not asked for more: those count once they wait in a Router."""
        queued = math.ceil(load.queued / self._target)
        busy = min(load.running, count * self._deployments)
        # Short requests are over before anybody looks; only a version that had none may sleep.
        alive = int(load.finished != self._finished and self._finished is not None)
        self._finished = load.finished
        instances = max(queued, busy, alive, 1 if load.queued else 0)
        return self._limits.bounded(math.ceil(instances / self._deployments))
