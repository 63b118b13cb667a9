"""What may go, and what every Router has heard of."""

from __future__ import annotations

import asyncio

import pytest

from deployments import followers
from deployments.catalogue import Catalogue
from deployments.followers import Followers


@pytest.fixture
def catalogue() -> Catalogue:
    return Catalogue(epoch=7)


@pytest.fixture
def routers(catalogue: Catalogue) -> Followers:
    return Followers(catalogue)


def test_an_application_is_used_until_every_router_has_let_go(catalogue, routers) -> None:
    epoch = catalogue.epoch
    assert not routers.use("a", 5)  # there is nobody to call it
    routers.seen("one", epoch, 5, ("a",))
    routers.seen("two", epoch, 5, ())
    assert routers.use("a", 5) and not routers.use("b", 5)
    routers.seen("one", epoch, 5, ())
    assert not routers.use("a", 5)


def test_who_has_not_heard_of_it_may_call_it_yet(catalogue, routers) -> None:
    routers.seen("one", catalogue.epoch, 4, ())
    assert routers.use("a", 5)
    routers.seen("one", catalogue.epoch - 1, 9, ())  # of an earlier Controller
    assert routers.use("a", 5)
    routers.seen("one", catalogue.epoch, 5, ())
    assert not routers.use("a", 5)


def test_waiting_ends_when_the_last_one_has_heard(catalogue, routers) -> None:
    async def main() -> list[str]:
        told: list[str] = []
        waiting = asyncio.ensure_future(routers.reach(5))
        waiting.add_done_callback(lambda _: told.append("reached"))
        for name, sequence in (("one", 5), ("two", 4), ("two", 5)):
            routers.seen(name, catalogue.epoch, sequence, ())
            told.append(name)
            await asyncio.sleep(3 * followers._POLL_S)
        await waiting
        return told

    routers.seen("two", catalogue.epoch, 3, ())
    assert asyncio.run(main()) == ["one", "two", "two", "reached"]


def test_control_nobody_waits_for_ever(catalogue, routers, monkeypatch) -> None:
    monkeypatch.setattr(followers, "CATCH_UP_S", 0.02)
    routers.seen("one", catalogue.epoch, 4, ())
    asyncio.run(routers.reach(5))
    assert routers.use("a", 5)


def test_who_is_silent_is_told_once_and_waited_for_no_more(catalogue, routers, monkeypatch) -> None:
    routers.seen("one", catalogue.epoch, 4, ("a",))
    assert routers.silent() == []
    monkeypatch.setattr(followers, "ROUTER_SILENT_S", -1.0)
    assert routers.silent() == ["one"]
    assert routers.silent() == [] and not routers.use("a", 5)


def test_one_router_alone_has_told_what_it_counted_when_it_asks(catalogue, routers) -> None:
    routers.seen("one", catalogue.epoch, 1, ())
    assert not routers.ask() and not routers.owes("one")


def test_all_are_asked_for_what_they_counted_and_waited_for(catalogue, routers) -> None:
    async def main() -> list[str]:
        told: list[str] = []
        waiting = asyncio.ensure_future(routers.all_counted())
        waiting.add_done_callback(lambda _: told.append("all"))
        for name in ("one", "two"):
            assert routers.owes(name)
            routers.counted(name)
            assert not routers.owes(name)
            told.append(name)
            await asyncio.sleep(3 * followers._POLL_S)
        await waiting
        return told

    for name in ("one", "two"):
        routers.seen(name, catalogue.epoch, 1, ())
        routers.counted(name)
    assert routers.ask()
    assert asyncio.run(main()) == ["one", "two", "all"]


def test_control_counts_are_not_waited_for_for_ever(catalogue, routers, monkeypatch) -> None:
    monkeypatch.setattr(followers, "COUNTS_S", 0.02)
    for name in ("one", "two"):
        routers.seen(name, catalogue.epoch, 1, ())
    assert routers.ask()
    routers.counted("one")
    asyncio.run(routers.all_counted())
    assert routers.owes("two") and not routers.owes("one")
