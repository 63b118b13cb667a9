"""How a generation comes up, and how one that serves gets more or fewer instances.

Owns what is asked of Serve and how long it may take; who flips to it, and what is told to clients
when it does not come up, is the lifecycle's, which calls this.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from functools import partial

from configs.autoscaling import Autoscaling
from configs.server import ServerSettings

from . import applications
from .applications import BindModel
from .catalogue import Generation
from .planner import Plan, Planner

logger = logging.getLogger("ray.serve")

POLL_S = 0.1


class Arrivals:
    def __init__(
        self,
        settings: ServerSettings,
        planner: Planner,
        bind_model: BindModel,
        tell: Callable[[str], None],
    ) -> None:
        self._settings = settings
        self._planner = planner
        self._bind_model = bind_model
        self._tell = tell

    def generation(self, plan: Plan) -> Generation:
        name = applications.application_name(
            plan.found.name, plan.number, applications.generation_number()
        )
        return Generation(
            name,
            plan.config,
            plan.fingerprint,
            counts(plan),
            override=plan.override,
            autoscaling=scalings(plan),
        )

    async def bring_up(self, generation: Generation, plan: Plan, cpu_instances: int) -> str:
        """Deploy and wait for every replica's word; the reason when it does not come about."""
        specs = self._planner.specs(plan, generation.application, cpu_instances)
        bind = partial(self._bind_model, specs, plan.placements, self._settings)
        try:
            await asyncio.to_thread(applications.deploy, generation.application, bind)
        except Exception:
            logger.exception("application %s was not accepted", generation.application)
            return "Ray Serve did not accept the model's application"
        return await self._until_complete(generation, plan) or generation.settle()

    async def resize(self, generation: Generation, plan: Plan) -> str | None:
        """As many replicas as are planned, of a generation that serves on meanwhile; the reason
        when they do not come up, and None where Serve does not do it."""
        before, generation.replicas = dict(generation.replicas), counts(plan)
        try:
            await self._scale(generation, before)
        except Exception:
            logger.exception("application %s cannot be scaled", generation.application)
            generation.restore(before)
            return None
        reason = await self._until_complete(generation, plan)
        if reason:
            generation.restore(before)
            with contextlib.suppress(Exception):  # the old ones serve, however many there are
                await self._scale(generation, counts(plan))
            return reason
        groups = ", ".join(f"{name} x {count}" for name, count in generation.replicas.items())
        self._tell(f"model '{plan.found.name}' version {plan.number} is resized ({groups})")
        return ""

    async def _scale(self, generation: Generation, before: dict[str, int]) -> None:
        for deployment, count in generation.replicas.items():
            if before.get(deployment) != count:
                await asyncio.to_thread(
                    applications.scale, generation.application, deployment, count
                )

    async def _until_complete(self, generation: Generation, plan: Plan) -> str:
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

    def tell_loaded(self, plan: Plan, generation: Generation, duration_s: float) -> None:
        """Once per version, however many replicas said the same."""
        place = f"model '{plan.found.name}' version {plan.number}"
        lines = dict.fromkeys(line for r in generation.reports.values() for line in r.log)
        for line in lines:
            self._tell(f"{place}: {line}")
        passive = {r.deployment for r in generation.reports.values() if r.passive}
        groups = ", ".join(
            f"{t.deployment} passive"
            if t.deployment in passive
            else f"{t.deployment} x {t.slots}{_bounds(generation, t.deployment)}"
            for t in generation.targets()
        )
        self._tell(f"{place} is READY after {duration_s:.1f} s ({groups})")


def _bounds(generation: Generation, deployment: str) -> str:
    scaling = generation.autoscaling.get(deployment)
    return f", scaled {scaling.min_count} to {scaling.max_count}" if scaling else ""


def scalings(plan: Plan) -> dict[str, Autoscaling]:
    """The deployments that are scaled by what waits for them."""
    return {one.deployment: one.autoscaling for one in plan.placements if one.autoscaling}


def counts(plan: Plan) -> dict[str, int]:
    """How many replicas each deployment is to have."""
    return {placement.deployment: placement.replicas for placement in plan.placements}
