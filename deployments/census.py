"""What a process holds at this moment: its unfinished tasks, and living objects of ours, by kind.

For whoever looks for a leak, the tests first. Called by Router and Controller.
"""

from __future__ import annotations

import asyncio
import gc
from collections import Counter
from typing import TypeAlias

Census: TypeAlias = dict[str, dict[str, int]]


def census() -> Census:
    """`tasks` of the running loop by their coroutine, `objects` by their class. What lived when the
    collector's generations were frozen is not counted."""
    gc.collect()
    tasks = Counter(_name(task) for task in asyncio.all_tasks())
    kinds = (type(one) for one in gc.get_objects())
    ours = (kind for kind in kinds if kind.__module__.startswith("deployments."))
    objects = Counter(f"{kind.__module__}.{kind.__qualname__}" for kind in ours)
    return {"tasks": dict(sorted(tasks.items())), "objects": dict(sorted(objects.items()))}


def _name(task: asyncio.Task[object]) -> str:
    coroutine = task.get_coro()
    return str(getattr(coroutine, "__qualname__", type(coroutine).__qualname__))
