"""Which Router has heard of what, what each still uses, and whether its counts are all here.

Owns what Routers say when they ask the Controller for news, and when they last told their counts.
Called by the Controller, which takes these calls, and by the lifecycle, which waits.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from .catalogue import Catalogue

ROUTER_SILENT_S = 10.0
CATCH_UP_S = 5.0
# Longer than a Router takes to tell what it has counted; one that is gone is not waited for.
COUNTS_S = 0.5
_POLL_S = 0.01


@dataclass(frozen=True)
class _Seen:
    at_s: float
    epoch: int
    sequence: int
    in_use: tuple[str, ...]


class Followers:
    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._routers: dict[str, _Seen] = {}
        self._counted_s: dict[str, float] = {}
        self._asked_s = 0.0

    def seen(self, router_id: str, epoch: int, sequence: int, in_use: tuple[str, ...]) -> None:
        self._routers[router_id] = _Seen(time.monotonic(), epoch, sequence, in_use)

    def silent(self) -> list[str]:
        """Routers that are gone; each is told once."""
        now_s = time.monotonic()
        silent = [r for r, seen in self._routers.items() if now_s - seen.at_s > ROUTER_SILENT_S]
        for router_id in silent:
            del self._routers[router_id]
            self._counted_s.pop(router_id, None)
        return silent

    async def reach(self, sequence: int) -> None:
        """What a client has loaded must be there whichever Router its next request meets."""
        deadline_s = time.monotonic() + CATCH_UP_S
        while time.monotonic() < deadline_s and self._behind(sequence):
            await asyncio.sleep(_POLL_S)

    def counted(self, router_id: str) -> None:
        """It has told all that it had counted until now."""
        self._counted_s[router_id] = time.monotonic()

    def owes(self, router_id: str) -> bool:
        """Whether its counts were asked for since it told them."""
        return self._counted_s.get(router_id, 0.0) < self._asked_s

    def ask(self) -> bool:
        """For what all have counted; false where it is here, since the one that asks told it."""
        if len(self._routers) < 2:
            return False
        self._asked_s = time.monotonic()
        return True

    async def all_counted(self) -> None:
        deadline_s = time.monotonic() + COUNTS_S
        while time.monotonic() < deadline_s and any(map(self.owes, self._routers)):
            await asyncio.sleep(_POLL_S)

    def use(self, application: str, sequence: int) -> bool:
        """Whether some Router calls it, or may as it has not heard of `sequence`."""
        epoch = self._catalogue.epoch
        return any(
            s.epoch != epoch or s.sequence < sequence or application in s.in_use
            for s in self._routers.values()
        )

    def _behind(self, sequence: int) -> bool:
        epoch = self._catalogue.epoch
        return any(s.epoch != epoch or s.sequence < sequence for s in self._routers.values())
