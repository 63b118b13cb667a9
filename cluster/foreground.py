"""What `manta serve` shows while it runs: what the Controller tells, the log, where it is ready.

Owns when to ask for them; starts and ends nothing. Called by `cli`.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Callable
from typing import Any

from configs.server import ServerSettings

START_POLL_S = 0.25
MESSAGES_S = 1.0
ANSWER_S, CLOSE_S = 3.0, 5.0


async def show(controller: Any, settings: ServerSettings, asked: Callable[[], bool]) -> int:
    """Until it is asked to end, then 0; 1 at once where the first load pass does not do."""
    started, seen, logged = False, 0, 0
    while not asked():
        with contextlib.suppress(Exception):  # it may be restarting
            seen, lines = await _answer(controller.messages.remote(seen))
            for line in lines:
                print(f"manta: {line}", flush=True)
            logged, lines = await _answer(controller.log_lines.remote(logged))
            for line in lines:
                print(line, file=sys.stderr, flush=True)
            if not started:
                started, failed = await _answer(controller.started.remote())
                if failed and started and settings.exit_on_error:
                    print("manta serve: failed to load all models", file=sys.stderr)
                    return 1
                if started:
                    say(settings, where(settings))
        await asyncio.sleep(START_POLL_S if not started else MESSAGES_S)
    with contextlib.suppress(Exception):
        await _answer(controller.close.remote(), CLOSE_S)
    return 0


async def _answer(response: Any, limit_s: float = ANSWER_S) -> Any:
    """A Serve response is awaitable, but no coroutine that could be waited for with a limit."""

    async def answer() -> Any:
        return await response

    return await asyncio.wait_for(answer(), limit_s)


def where(settings: ServerSettings) -> str:
    edges = [
        f"{edge} {getattr(settings, f'{edge}_address')}:{getattr(settings, f'{edge}_port')}"
        for edge in ("http", "grpc", "metrics")
        if getattr(settings, f"allow_{edge}")
    ]
    return "ready on " + ", ".join(edges)


def say(settings: ServerSettings, text: str) -> None:
    """In the form of the log where that is for machines."""
    if settings.log_format == "json":
        from deployments.logs import announcement

        print(announcement(text, "json"), flush=True)
    else:
        print(f"manta: {text}", flush=True)
