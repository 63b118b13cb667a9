"""Poll mode: what two looks in a row agree on is acted on, once."""

from __future__ import annotations

import asyncio
import shutil

import pytest

from deployments.errors import Internal
from deployments.polling import Changes, Poller, Watch
from deployments.repository import DUPLICATE, Repository


def look(**models):
    """Signatures by model; any two words differ."""
    return {name: tuple((word,) for word in words.split()) for name, words in models.items()}


def test_what_was_there_at_the_start_is_no_change():
    watch = Watch(look(a="1"))
    assert watch.look(look(a="1")) == Changes() == watch.look(look(a="1"))


def test_a_change_is_acted_on_once_it_rests():
    watch = Watch(look(a="1", b="1"))
    for half in "234":  # somebody is writing
        assert watch.look(look(a=half, b="1")) == Changes()
    assert watch.look(look(a="4", b="1")) == Changes(changed=("a",))
    assert watch.look(look(a="4", b="1")) == Changes()  # also if it has failed


def test_what_was_written_back_meanwhile_is_no_change():
    watch = Watch(look(a="1"))
    watch.look(look(a="2"))
    assert watch.look(look(a="1")) == Changes() == watch.look(look(a="1"))


def test_models_come_and_go():
    watch = Watch(look(a="1"))
    assert watch.look(look(a="1", b="1")) == Changes()
    assert watch.look(look(a="1", b="1")) == Changes(changed=("b",))
    assert watch.look(look(b="1")) == Changes()  # perhaps it is only being replaced
    assert watch.look(look(b="1")) == Changes(gone=("a",))
    assert watch.look(look(b="1")) == Changes()
    watch.look(look(a="1", b="1"))
    assert watch.look(look(a="1", b="1")) == Changes(changed=("a",))


def test_a_model_in_two_repositories():
    watch = Watch(look(a="1"))
    watch.look(look(a="1 2"))
    assert watch.look(look(a="1 2")) == Changes(duplicate=("a",))
    watch.look(look(a="2"))
    assert watch.look(look(a="2")) == Changes(changed=("a",))


class Loading:
    def __init__(self):
        self.asked = []

    def reload(self, name):
        self.asked.append(("reload", name))

    def withdraw(self, name, reason=""):
        self.asked.append(("withdraw", name, reason))


@pytest.fixture
def roots(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    (tmp_path / "one" / "m" / "1").mkdir(parents=True)
    return tmp_path / "one", tmp_path / "two"


def test_the_poller_tells_what_is_to_be_done(roots):
    loading = Loading()
    poller = Poller(Repository(roots), loading, 1)
    one, two = roots

    async def twice():
        loading.asked.clear()
        for _ in range(2):
            await poller.look()
        return list(loading.asked)

    async def main():
        await poller.begin()
        assert await twice() == []
        (one / "m" / "1" / "model.pt").write_text("weights")
        assert await twice() == [("reload", "m")]
        shutil.copytree(one / "m", two / "m")
        assert await twice() == [("withdraw", "m", DUPLICATE)]
        shutil.rmtree(one / "m")
        assert await twice() == [("reload", "m")]
        shutil.rmtree(two / "m")
        assert await twice() == [("withdraw", "m", "")]

    asyncio.run(main())


def test_a_repository_that_is_away_takes_no_model_along(roots):
    loading = Loading()
    poller = Poller(Repository(roots), loading, 1)
    one, _ = roots

    async def main():
        await poller.begin()
        one.rename(one.parent / "away")
        for _ in range(3):
            with pytest.raises(Internal):
                await poller.look()
        (one.parent / "away").rename(one)
        for _ in range(2):
            await poller.look()

    asyncio.run(main())
    assert loading.asked == []


def test_polling_goes_on_after_a_failure(roots):
    loading = Loading()
    poller = Poller(Repository(roots), loading, 0.001)
    one, _ = roots

    async def main():
        await poller.begin()
        one.rename(one.parent / "away")
        running = asyncio.ensure_future(poller.run())
        await asyncio.sleep(0.02)
        (one.parent / "away" / "n" / "1").mkdir(parents=True)
        (one.parent / "away").rename(one)
        while not loading.asked:
            await asyncio.sleep(0.001)
        running.cancel()

    asyncio.run(asyncio.wait_for(main(), 30))
    assert loading.asked[0] == ("reload", "n")
