from __future__ import annotations

import asyncio

from deployments.census import census
from deployments.weights import WeightCache

KIND = "deployments.weights.WeightCache"


async def wait_for_ever() -> None:
    await asyncio.Event().wait()


def test_tasks_and_objects_are_counted_while_they_live():
    async def run() -> None:
        before = census()
        task = asyncio.create_task(wait_for_ever())
        cache = WeightCache()
        held = census()
        assert held["tasks"]["wait_for_ever"] == 1 and "wait_for_ever" not in before["tasks"]
        assert held["objects"][KIND] == before["objects"].get(KIND, 0) + 1
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        del task, cache
        assert census() == before

    asyncio.run(run())
