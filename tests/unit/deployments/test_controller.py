"""Settings at a Controller that has just begun: those that only Routers know are not lost."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from configs.server import ServerSettings
from deployments.aggregate import Aggregator
from deployments.catalogue import Catalogue
from deployments.controller import Controller
from deployments.errors import Unavailable
from deployments.followers import Followers
from deployments.ledger import Ledger
from deployments.log_settings import initial
from deployments.logs import Tap
from deployments.statistics import Recorder
from deployments.types import TraceChanges, TraceScope

SETTINGS = ServerSettings(model_repository=("/r",), trace_config=("triton,file=/t.json",))
KNOWN = TraceChanges({"": TraceScope({"count": 7}, 5), "m": TraceScope({"rate": 3}, 4)}, 5)


class Begun(Controller):
    """A Controller without what needs Ray Serve: it has no application, and loads nothing."""

    def __init__(self, started: bool = True) -> None:
        self._settings = SETTINGS
        self._log = Tap(initial(SETTINGS), loud=False)
        self._catalogue = Catalogue(epoch=9, log=initial(SETTINGS))
        self._catalogue.started = started
        self._changed = asyncio.Condition()
        self._followers = Followers(self._catalogue)
        self._aggregator = Aggregator()
        self._counted = set()

    def __del__(self) -> None:  # type: ignore[override]  # Serve would await it
        pass


class Verb:
    """One of the Controller's, as a handle has it."""

    def __init__(self, verb: Any) -> None:
        self.remote = verb


class Router:
    """Follows, and tells when it is asked, as the real one does."""

    def __init__(self, name: str, controller: Any, trace: TraceChanges) -> None:
        self.name, self.controller = name, controller
        self.push = Verb(controller.push)
        self.ledger = Ledger(name, self, Tap(initial(SETTINGS)), dict, Recorder())
        self.ledger.trace = trace

    async def follow(self) -> None:
        epoch = sequence = 0
        while True:
            snapshot = await self.controller.watch(self.name, epoch, sequence, ())
            if snapshot is None:
                await self.ledger.flush(asked=True)
            else:
                epoch, sequence = snapshot.epoch, snapshot.sequence


def test_a_change_keeps_what_another_router_alone_has_heard_of() -> None:
    async def main() -> None:
        controller = Begun()
        routers = [Router("old", controller, KNOWN), Router("new", controller, TraceChanges())]
        tasks = [asyncio.create_task(router.follow()) for router in routers]
        await asyncio.sleep(0.05)  # both wait for news
        shown = await controller.trace_settings("", {"rate": 5})
        assert (shown["trace_rate"], shown["trace_count"]) == ("5", "7")
        assert (await controller.trace_settings("m", {}))["trace_rate"] == "3"
        assert (await controller.log_settings({"verbose": 1}))["log_verbose_level"] == 1
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(asyncio.wait_for(main(), 30))


def test_settings_are_neither_shown_nor_changed_before_it_has_started() -> None:
    async def main() -> None:
        controller = Begun(started=False)
        for verb in (controller.log_settings({}), controller.trace_settings("", {"rate": 5})):
            with pytest.raises(Unavailable):
                await verb
        assert controller._catalogue.trace == TraceChanges()

    asyncio.run(main())
