"""How a generation leaves: once every Router has let go, Serve deletes it; then its files go.

Owns the tasks that nobody's leaving cancels. Called by the lifecycle, which decides who leaves.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from configs.server import ServerSettings

from . import applications, draining
from .catalogue import Version
from .errors import MantaError
from .followers import Followers
from .overrides import Overrides
from .types import ModelState

logger = logging.getLogger("ray.serve")

POLL_S = 0.1
# Beyond the limits of queue and execution, which a Router keeps itself.
DRAIN_MARGIN_S = 10.0


class Departures:
    def __init__(
        self,
        settings: ServerSettings,
        followers: Followers,
        overrides: Overrides,
        announce: Callable[[], Awaitable[None]],
    ) -> None:
        self._settings = settings
        self._followers = followers
        self._overrides = overrides
        self._announce = announce
        self._tasks: set[asyncio.Task[None]] = set()

    def own(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task that nobody's leaving cancels."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            if not isinstance(error, MantaError):
                logger.error("a task of the lifecycle failed", exc_info=error)

    def leave(
        self, application: str, folder: str = "", version: Version | None = None, sequence: int = 0
    ) -> None:
        """Begin to take an application away. Nobody calls it who has heard of change `sequence`;
        `folder` held its files, and `version` is told when it is gone."""
        self.own(self._leave(application, folder, version, sequence))

    async def _leave(
        self, application: str, folder: str, version: Version | None, sequence: int
    ) -> None:
        settings = self._settings
        limit_s = settings.max_queue_s + settings.max_execution_s + DRAIN_MARGIN_S
        deadline_s = time.monotonic() + limit_s
        while time.monotonic() < deadline_s and self._followers.use(application, sequence):
            await asyncio.sleep(POLL_S)
        await self._delete(application, draining.grace_s(settings) + DRAIN_MARGIN_S)
        if version is not None and version.current is None and version.loading is None:
            if version.state is ModelState.UNLOADING:
                version.state, version.reason = ModelState.UNAVAILABLE, "unloaded"
            await self._announce()
        await self._overrides.release(folder)

    async def _delete(self, application: str, limit_s: float) -> None:
        deadline_s = time.monotonic() + limit_s
        while time.monotonic() < deadline_s:
            try:
                await asyncio.to_thread(applications.delete, application)
                if not await asyncio.to_thread(applications.exists, application):
                    return
            except Exception as error:  # Serve's controller may be restarting
                logger.warning("application %s is not deleted yet: %s", application, error)
            await asyncio.sleep(POLL_S * 5)
