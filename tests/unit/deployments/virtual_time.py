"""An event loop whose clock moves only when there is nothing to do, so that timers take no time."""

from __future__ import annotations

import asyncio
import math
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _Selector(selectors.DefaultSelector):
    """Instead of waiting for `timeout` seconds it lets them pass."""

    now_ns = 0

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if not ready and timeout is None:
            raise RuntimeError("nothing left to do: the test waits for something that never comes")
        if not ready and timeout:
            self.now_ns += max(1, math.ceil(timeout * 1e9))
        return ready


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.virtual = _Selector()
        super().__init__(self.virtual)

    def time(self) -> float:
        return self.virtual.now_ns / 1e9


def run(main: Callable[[Callable[[], int]], Coroutine[Any, Any, T]]) -> T:
    """Runs `main(clock)`; the clock gives virtual nanoseconds."""
    loop = _Loop()
    try:
        return loop.run_until_complete(main(lambda: loop.virtual.now_ns))
    finally:
        while left := asyncio.all_tasks(loop):
            for task in left:
                task.cancel()
            loop.run_until_complete(asyncio.wait(left))
        loop.close()


async def settle() -> None:
    """Lets everything happen that needs no time."""
    for _ in range(20):
        await asyncio.sleep(0)
