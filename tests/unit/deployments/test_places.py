"""Which places there are, which are free, and what becomes of one whose channel breaks."""

from __future__ import annotations

import asyncio

import pytest

from deployments.errors import ReplicaLost
from deployments.places import LOST_S, PATIENCE, RECONNECT_S, LocalPlace, Place, Places
from deployments.types import Batch, BatchReply, ChannelAddress, Endpoint, Target

from .virtual_time import run, settle

BATCH = Batch(rows=(1,), inputs=(), outputs=())


class Channel:
    """An instance's end that does what the test says."""

    def __init__(self, changed):
        self._changed = changed
        self.open = self.idle = self.ahead = True
        self.wanted = self.spared = self.outstanding = 0
        self.closed = False
        self.replies = []

    def execute(self, batch):
        reply = asyncio.get_running_loop().create_future()
        self.replies.append(reply)
        return reply

    def want(self):
        self.wanted += 1

    def spare(self):
        self.spared += 1

    def say(self, **facts):
        for name, value in facts.items():
            setattr(self, name, value)
        self._changed()

    async def aclose(self):
        self.closed = True
        self.open = False


class Handle:
    """A replica that is reached through Serve."""

    def __init__(self, name, reach):
        self.name = name
        self._reach = reach

    async def execute(self, batch):
        self._reach.asked += 1
        if self.name in self._reach.ended:
            raise ReplicaLost("m")
        return BatchReply((), refused=self.name in self._reach.others)

    async def aclose(self):
        pass


class Reach:
    """`broken` replicas have no channel that could be opened; calls to `ended` ones are lost,
    and those to `others` reach another one than they name."""

    def __init__(self):
        self.opened = []
        self.broken = set()
        self.ended = set()
        self.others = set()
        self.attempts = 0
        self.asked = 0
        self.closed = False

    def is_local(self, endpoint):
        return endpoint.channel is not None

    async def channel(self, endpoint, instance, changed):
        self.attempts += 1
        if endpoint.replica_id in self.broken:
            raise OSError("connection refused")
        channel = Channel(changed)
        self.opened.append((endpoint.replica_id, instance, channel))
        return channel

    def through_serve(self, deployment, replica_id):
        return Handle(f"{deployment}/{replica_id}", self)

    async def aclose(self):
        self.closed = True


def target(*endpoints, name="group"):
    return Target(name, sum(one.instances for one in endpoints), endpoints)


def here(name, instances=1):
    return Endpoint(name, "this", instances, ChannelAddress("/run/x", "t"))


def elsewhere(name, instances=1):
    return Endpoint(name, "that", instances)


def drive(test):
    def wrapper():
        async def main(clock):
            reach, calls = Reach(), []
            places = Places(reach, lambda: calls.append(clock()))
            await test(places, reach, calls)
            await places.aclose()
            assert reach.closed and places.idle() is None

        run(main)

    wrapper.__name__ = test.__name__
    return wrapper


def names(places):
    """The places as they would be given out, one batch each."""
    taken = []
    while (place := places.idle()) is not None:
        place.running += 1
        taken.append(place)
    for place in taken:
        place.running -= 1
    return [type(place).__name__ for place in taken]


@drive
async def test_a_place_per_instance_here_and_elsewhere(places, reach, calls):
    places.follow([target(here("a", 2)), target(elsewhere("b", 3), name="other")])
    assert names(places) == ["ServePlace"] * 3  # the channels are not open yet
    await settle()
    assert sorted(names(places)) == ["LocalPlace"] * 2 + ["ServePlace"] * 3
    assert [(name, instance) for name, instance, _ in reach.opened] == [("a", 0), ("a", 1)]
    assert calls  # somebody may wait for them


@drive
async def test_one_batch_runs_and_one_waits_at_each(places, reach, calls):
    places.follow([target(elsewhere("a", 2))])
    first, second = places.idle(), None
    assert first is not None
    first.running += 1
    second = places.idle()
    assert second is not None and second is not first
    second.running += 1
    assert places.idle() is None
    ahead = places.ahead()
    ahead.running += 1
    assert places.ahead() is not ahead
    places.ahead().running += 1
    assert places.ahead() is None


@drive
async def test_a_channel_says_itself_whether_it_takes_a_batch(places, reach, calls):
    places.follow([target(here("a"))])
    await settle()
    ((_, _, channel),) = reach.opened
    place = places.idle()
    assert isinstance(place, LocalPlace) and places.ahead() is None
    channel.idle = False  # shared with another Router: it must ask
    assert places.idle() is None
    places.want()
    places.spare()
    assert (channel.wanted, channel.spared) == (1, 1)
    place.running += 1  # on its way, by the grant that would be given back
    places.spare()
    assert channel.spared == 1
    place.running -= 1
    before = len(calls)
    channel.say(idle=True)
    assert len(calls) == before + 1 and places.idle() is place
    place.running += 1
    assert places.idle() is None and places.ahead() is place
    channel.ahead = False
    assert places.ahead() is None


@drive
async def test_nothing_waits_on_another_node_while_an_instance_here_may_be_free(
    places, reach, calls
):
    places.follow([target(here("a")), target(elsewhere("b"), name="other")])
    await settle()
    channel = reach.opened[0][2]
    channel.say(idle=False, ahead=False)  # another Router has been there: it is to be asked
    there = places.idle()
    there.running += 1
    assert there.ahead and places.ahead() is None
    channel.say(idle=True)
    local = places.idle()
    assert isinstance(local, LocalPlace)
    local.running += 1
    assert places.ahead() is there
    channel.say(ahead=True)
    assert places.ahead() is local


@drive
async def test_a_refusal_rests_longer_each_time_until_one_is_accepted(places, reach, calls):
    places.follow([target(elsewhere("a"))])
    loop = asyncio.get_running_loop()
    place, rests = places.idle(), []
    for _ in range(6):
        began = loop.time()
        place.refused()
        assert places.idle() is None
        while places.idle() is None:
            await asyncio.sleep(0.001)
        rests.append(round(1e3 * (loop.time() - began)))
    assert rests == [5, 10, 20, 40, 80, 80]
    place.accepted()
    place.refused()
    await asyncio.sleep(0.0055)
    assert places.idle() is place


@drive
async def test_one_broken_channel_is_opened_again_and_leaves_the_others_alone(places, reach, calls):
    places.follow([target(here("a", 2))])
    await settle()
    kept = [p for p in (places.idle(),) if p][0]
    (_, _, first), (_, _, second) = reach.opened
    second.say(open=False, idle=False)
    assert names(places) == ["LocalPlace"]
    await settle()
    assert names(places) == ["LocalPlace"] * 2
    assert places.idle() is kept and not first.closed
    assert [instance for _, instance, _ in reach.opened] == [0, 1, 1]


@drive
async def test_a_replica_that_died_has_no_place_until_it_is_reported_for_long(places, reach, calls):
    places.follow([target(here("a"))])
    await settle()
    reach.broken.add("a")
    reach.opened[0][2].say(open=False)
    await asyncio.sleep(RECONNECT_S * (PATIENCE - 1))
    assert names(places) == []  # nothing is sent to where probably nobody lives
    await asyncio.sleep(RECONNECT_S * 3)
    assert names(places) == ["ServePlace"]  # it lives, it says: then through Serve
    reach.broken.clear()
    await asyncio.sleep(RECONNECT_S * 1.5)
    assert names(places) == ["LocalPlace"]


@drive
async def test_one_that_never_had_a_channel_is_reached_through_serve_at_once(places, reach, calls):
    reach.broken.add("a")
    places.follow([target(here("a"))])
    await settle()
    assert names(places) == ["ServePlace"]
    assert isinstance(await places.idle().execute(BATCH), BatchReply)


@drive
async def test_where_a_call_was_lost_nothing_is_sent_until_it_says_that_it_lives(
    places, reach, calls
):
    """Its calls come back at once, and it would seem free for all that waits."""
    places.follow([target(elsewhere("a", 2)), target(elsewhere("b"), name="other")])
    reach.ended.add("group/a")
    place = places.idle()
    place.running += 1
    with pytest.raises(ReplicaLost):
        await place.execute(BATCH)
    place.running -= 1
    assert names(places) == ["ServePlace"]  # b's: both of a's are in doubt
    other = places.idle()
    other.running += 1
    assert isinstance(await other.execute(BATCH), BatchReply)
    other.running -= 1
    await asyncio.sleep(LOST_S * 4.5)
    assert names(places) == ["ServePlace"]
    reach.ended.clear()
    before = len(calls)
    await asyncio.sleep(LOST_S)
    assert names(places) == ["ServePlace"] * 3
    assert len(calls) > before  # somebody may wait for them


@drive
async def test_another_replica_that_answers_instead_does_not_count(places, reach, calls):
    places.follow([target(elsewhere("a"))])
    reach.ended.add("group/a")
    place = places.idle()
    with pytest.raises(ReplicaLost):
        await place.execute(BATCH)
    place.refused()  # nor does the end of a shorter rest
    reach.ended.clear()
    reach.others.add("group/a")
    await asyncio.sleep(LOST_S * 2.5)
    assert places.idle() is None
    reach.others.clear()
    await asyncio.sleep(LOST_S)
    assert places.idle() is place


@drive
async def test_one_in_doubt_that_leaves_is_asked_no_more(places, reach, calls):
    places.follow([target(elsewhere("a"))])
    reach.ended.add("group/a")
    with pytest.raises(ReplicaLost):
        await places.idle().execute(BATCH)
    places.follow([])
    await settle()
    assert asyncio.all_tasks() == {asyncio.current_task()}


@drive
async def test_one_in_doubt_whose_channel_comes_about_is_asked_no_more(places, reach, calls):
    reach.broken.add("a")
    places.follow([target(here("a"))])
    await settle()
    reach.ended.add("group/a")
    with pytest.raises(ReplicaLost):
        await places.idle().execute(BATCH)
    asked = reach.asked
    await asyncio.sleep(LOST_S * 2.5)
    assert reach.asked == asked + 2 and names(places) == []
    reach.broken.clear()
    await asyncio.sleep(RECONNECT_S * 1.5)
    assert names(places) == ["LocalPlace"]
    asked = reach.asked
    await asyncio.sleep(LOST_S * 3)
    assert reach.asked == asked


@drive
async def test_a_replica_that_leaves_still_answers_what_it_has(places, reach, calls):
    places.follow([target(here("a"), here("b"))])
    await settle()
    place = places.idle()
    place.running += 1
    reply = place.execute(BATCH)
    channel = next(c for name, _, c in reach.opened if c.replies)
    left = next(name for name, _, c in reach.opened if c.replies)
    stays = "b" if left == "a" else "a"
    places.follow([target(here(stays))])
    assert names(places) == ["LocalPlace"]
    await asyncio.sleep(1)
    assert not channel.closed
    channel.replies[0].set_result(BatchReply(()))
    assert await reply == BatchReply(())
    place.running -= 1
    await asyncio.sleep(0.1)
    assert channel.closed


@drive
async def test_a_lost_channel_of_a_replica_that_left_is_not_opened_again(places, reach, calls):
    places.follow([target(here("a"))])
    await settle()
    place = places.idle()
    place.running += 1
    places.follow([])
    reach.opened[0][2].say(open=False)
    attempts = reach.attempts
    await asyncio.sleep(RECONNECT_S * 3)
    assert reach.attempts == attempts and places.idle() is None


@drive
async def test_a_replaced_address_is_another_channel(places, reach, calls):
    places.follow([target(here("a"))])
    await settle()
    places.follow([target(Endpoint("a", "this", 1, ChannelAddress("/run/y", "t")))])
    await asyncio.sleep(0.1)
    assert [channel.closed for _, _, channel in reach.opened] == [True, False]
    places.follow([target(Endpoint("a", "this", 1, ChannelAddress("/run/y", "t")))])
    await asyncio.sleep(0.1)
    assert len(reach.opened) == 2  # nothing changed


def test_what_a_place_raises_is_the_clients():
    class Lost:
        async def execute(self, batch):
            raise ReplicaLost("m")

        async def aclose(self):
            pass

    with pytest.raises(ReplicaLost):
        asyncio.run(_awaited(Place(Lost(), lambda: None)))


async def _awaited(place):
    return await place.execute(BATCH)


def test_who_waits_where_no_replica_is_says_so_once_until_there_is_news():
    async def main(clock):
        told = []
        places = Places(Reach(), lambda: None, lambda: told.append(1))
        places.want()
        places.want()
        assert len(told) == 1
        places.spare()  # answered, or gone
        places.want()
        assert len(told) == 2
        places.follow([target()])  # a change, and still nobody
        places.want()
        assert len(told) == 3
        places.follow([target(elsewhere("a"))])
        places.want()
        assert len(told) == 3
        places.follow([])
        places.want()
        assert len(told) == 4
        await places.aclose()

    run(main)
