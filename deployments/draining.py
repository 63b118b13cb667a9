"""How long the replicas of a model that are to go may take to answer what they have.

Serve waits for what came through Serve, and knows nothing of the Routers' own connections: what
came by these is waited for here. Called by the replica; the limits are also `app`'s and
`departures`'.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from configs.server import ServerSettings

from .slots import SIZE, Slots

POLL_S = 0.05
# Routers that hear of it close their connections once they have their answers. Where nobody tells
# them, no promise is left after this long (`slots.QUIET_NS`), and nothing is on its way.
LINGER_S = 2.0
# For the rest: `finalize` of the Python backend's models, a last word to the Controller.
END_S = 30.0


class Held(Protocol):
    """An instance that takes no more than it was promised."""

    slots: Slots

    @property
    def connected(self) -> bool:
        """Whether any Router is there to hear its answers."""
        ...


def limit_s(max_execution_s: float) -> float:
    """An instance has one batch that runs, and one that waits beside it."""
    return SIZE * max_execution_s


def grace_s(settings: ServerSettings) -> float:
    """After this long Serve kills a replica that has not ended."""
    return max(settings.exit_timeout_s, limit_s(settings.max_execution_s)) + END_S


async def answered(instances: Sequence[Held], max_execution_s: float) -> None:
    """Returns once the instances have answered all that Routers wait for. Not longer than what they
    may have can take, and not for Routers that have ended themselves."""
    until_s = asyncio.get_running_loop().time() + limit_s(max_execution_s)
    await asyncio.gather(*(_answered(one, until_s) for one in instances))


async def _answered(instance: Held, until_s: float) -> None:
    loop = asyncio.get_running_loop()
    free_s = loop.time()
    while instance.connected and (now_s := loop.time()) < until_s:
        if instance.slots.held:
            free_s = now_s
        elif now_s - free_s >= LINGER_S:
            return
        await asyncio.sleep(POLL_S)
