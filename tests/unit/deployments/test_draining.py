"""How long what an instance has is waited for, on a clock of the test's own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from configs.server import ServerSettings
from deployments.draining import END_S, LINGER_S, answered, grace_s, limit_s

from .virtual_time import run

LIMIT_S = 60.0


class Instance:
    def __init__(self, held: int = 0) -> None:
        self.slots: Any = SimpleNamespace(held=held)
        self.connected = True


def waited_s(*instances: Instance, later: Callable[[], None] | None = None) -> float:
    """`later` is called after 20 s."""

    async def main(clock: Callable[[], int]) -> float:
        if later is not None:
            asyncio.get_running_loop().call_later(20, later)
        await answered(instances, LIMIT_S)
        return clock() / 1e9

    return run(main)


def about(value_s: float, expected_s: float) -> bool:
    return abs(value_s - expected_s) < 0.2


def test_what_is_held_is_waited_for_and_a_moment_more() -> None:
    one = Instance(held=1)
    assert about(waited_s(one, later=lambda: setattr(one.slots, "held", 0)), 20 + LINGER_S)


def test_a_router_that_leaves_is_not_waited_for() -> None:
    one = Instance(held=1)
    assert about(waited_s(one, later=lambda: setattr(one, "connected", False)), 20)
    assert waited_s(one) == 0


def test_what_hangs_is_waited_for_as_long_as_two_batches_may_take() -> None:
    assert about(waited_s(Instance(held=2), Instance()), limit_s(LIMIT_S))


def test_without_instances_there_is_nothing_to_wait_for() -> None:
    assert waited_s() == 0


def test_serve_waits_longer_than_that() -> None:
    assert grace_s(ServerSettings(max_execution_s=40, exit_timeout_s=30)) == 80 + END_S
    assert grace_s(ServerSettings(max_execution_s=1, exit_timeout_s=30)) == 30 + END_S
