"""Where the batches of one model version may run now, and the choice among these places.

A place is one instance of one replica, reached by a local channel or through Serve. Owns how many
batches each has, and the rest of a place that refused one. Follows the replicas that the Controller
tells of; knows neither Ray nor sockets, which its `Reach` does. Asked by the Gate.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol

from .batcher import ModelClient
from .errors import ReplicaLost
from .types import Batch, BatchReply, Endpoint, Target

logger = logging.getLogger("manta.places")

# How long a place rests that refused a batch: it was promised to another Router.
BACKOFF_S = 0.005
BACKOFF_MAX_S = 0.080
# Where a call through Serve was lost, the replica is asked after this long whether it is there, and
# again each time. By then the Controller has told that it is gone (`catalogue.SUSPECT_S`), unless
# it is not, or the Controller is gone as well.
LOST_S = 5.0
_NOTHING = Batch(rows=(), inputs=(), outputs=())
# A channel that broke is tried again this often; an instance that is still reported after the first
# few failures is then reached through Serve.
RECONNECT_S = 0.5
PATIENCE = 5


class Channel(Protocol):
    """One connection to one instance on this node, with its own idea of what it may be sent."""

    @property
    def outstanding(self) -> int: ...

    @property
    def open(self) -> bool: ...

    @property
    def idle(self) -> bool: ...

    @property
    def ahead(self) -> bool: ...

    def want(self) -> None: ...

    def spare(self) -> None: ...

    def execute(self, batch: Batch) -> asyncio.Future[BatchReply]: ...

    async def aclose(self) -> None: ...


class Reach(Protocol):
    """How an instance is reached."""

    def is_local(self, endpoint: Endpoint) -> bool: ...

    async def channel(
        self, endpoint: Endpoint, instance: int, changed: Callable[[], None]
    ) -> Channel:
        """Raises whatever keeps it from coming about."""
        ...

    def through_serve(self, deployment: str, replica_id: str) -> ModelClient: ...

    async def aclose(self) -> None: ...


class Place:
    """Takes one batch at a time, and one ahead. `running` counts those that it has."""

    def __init__(self, client: ModelClient | Channel, changed: Callable[[], None]) -> None:
        self._client = client
        self._changed = changed
        self._rests = 0
        self._backoff_s = BACKOFF_S
        self.running = 0

    @property
    def idle(self) -> bool:
        """Whether a batch that comes now starts at once."""
        return self.running == 0 and not self._rests

    @property
    def ahead(self) -> bool:
        """Whether one may be sent to wait beside the one that runs."""
        return self.running == 1 and not self._rests

    def execute(self, batch: Batch) -> Awaitable[BatchReply]:
        return self._client.execute(batch)

    def want(self) -> None:
        """Something waits that could run here, if this place is shared with other Routers."""

    def spare(self) -> None:
        """Nothing waits any more."""

    def accepted(self) -> None:
        self._backoff_s = BACKOFF_S

    def refused(self) -> None:
        """Nothing comes here for a while, for longer each time in a row."""
        self._rests += 1
        loop = asyncio.get_running_loop()
        loop.call_later(self._backoff_s, self._thaw, context=contextvars.Context())
        self._backoff_s = min(2 * self._backoff_s, BACKOFF_MAX_S)

    def _thaw(self) -> None:
        self._rests -= 1
        self._changed()


class ServePlace(Place):
    """One instance that is reached through Serve. `lost` is called when its replica seems to have
    ended."""

    def __init__(
        self, client: ModelClient, changed: Callable[[], None], lost: Callable[[], None]
    ) -> None:
        super().__init__(client, changed)
        self._lost = lost
        self._asking: asyncio.Task[None] | None = None

    async def execute(self, batch: Batch) -> BatchReply:
        try:
            return await self._client.execute(batch)
        except ReplicaLost:
            # Before the next batch is sent: it would be lost at once, and so would all that wait.
            self._lost()
            raise

    def doubt(self) -> None:
        """Nothing comes here until the replica says that it lives."""
        if self._asking is None:
            self._rests += 1
            loop = asyncio.get_running_loop()
            self._asking = contextvars.Context().run(loop.create_task, self._until_it_answers())

    async def _until_it_answers(self) -> None:
        while True:
            await asyncio.sleep(LOST_S)
            try:
                if not (await self._client.execute(_NOTHING)).refused:
                    break
            except Exception as error:
                logger.debug("a replica does not answer: %s", error)
        self._asking = None
        self._thaw()

    def leave(self) -> None:
        """Nobody waits for it any more."""
        if self._asking is not None:
            self._asking.cancel()


class LocalPlace(Place):
    """One instance on this node. `running` may be one more than the channel has yet been sent."""

    def __init__(self, channel: Channel, changed: Callable[[], None]) -> None:
        super().__init__(channel, changed)
        self._channel = channel

    @property
    def idle(self) -> bool:
        return self.running == 0 and not self._rests and self._channel.idle

    @property
    def ahead(self) -> bool:
        return self.running == 1 and not self._rests and self._channel.ahead

    def want(self) -> None:
        self._channel.want()

    def spare(self) -> None:
        if self.running <= self._channel.outstanding:  # else the grant's batch is on its way
            self._channel.spare()


class _Seat:
    """One live instance, whichever way it is reached now; without a place while it is not."""

    def __init__(self, deployment: str, endpoint: Endpoint, instance: int) -> None:
        self.deployment = deployment
        self.endpoint = endpoint
        self.instance = instance
        self.place: Place | None = None
        self.channel: Channel | None = None
        self.task: asyncio.Task[None] | None = None
        self.left = False


class Places:
    """All places of one running application. `changed` is called when one may have become free,
    `starved` when something waits and there is none at all."""

    def __init__(
        self,
        reach: Reach,
        changed: Callable[[], None],
        starved: Callable[[], None] = lambda: None,
    ) -> None:
        self._reach = reach
        self._changed = changed
        self._starved = starved
        self._starving = False
        self._seats: dict[tuple[str, str, int], _Seat] = {}
        self._places: list[Place] = []
        self._leaving: set[asyncio.Task[None]] = set()
        self._closing = False

    @property
    def vacant(self) -> bool:
        """Whether there is no live instance, reached or not."""
        return not self._seats

    # --- asked by the Gate -----------------------------------------------------------------------

    def idle(self) -> Place | None:
        """A place where a batch would start at once."""
        return next((place for place in self._places if place.idle), None)

    def ahead(self) -> Place | None:
        """A place that takes one more beside the one that runs. On another node, not while one here
        has none: it may be free, and only has to be asked, where Routers share it."""
        here = [place for place in self._places if isinstance(place, LocalPlace)]
        ahead = next((place for place in here if place.ahead), None)
        if ahead is not None or not all(place.running for place in here):
            return ahead
        return next((place for place in self._places if place.ahead), None)

    def want(self) -> None:
        for place in self._places:
            place.want()
        if not self._seats and not self._starving:  # once, until there is news
            self._starving = True
            self._starved()

    def spare(self) -> None:
        self._starving = False
        for place in self._places:
            place.spare()

    # --- told by the Router ----------------------------------------------------------------------

    def follow(self, targets: Iterable[Target]) -> None:
        """The replicas that live now; batches elsewhere are answered, or fail, by themselves."""
        self._starving = False
        wanted = {
            (target.deployment, endpoint.replica_id, instance): endpoint
            for target in targets
            for endpoint in target.endpoints
            for instance in range(endpoint.instances)
        }
        for key, seat in list(self._seats.items()):
            if wanted.get(key) != seat.endpoint:
                self._forget(self._seats.pop(key))
        for key, endpoint in wanted.items():
            if key not in self._seats:
                self._seats[key] = seat = _Seat(key[0], endpoint, key[2])
                if self._reach.is_local(endpoint):
                    self._connect(seat, fresh=True)
                else:
                    self._through_serve(seat)
        self._rebuild()

    async def aclose(self) -> None:
        """The Gate has been drained, or has given up on what still runs."""
        self._closing = True
        for seat in self._seats.values():
            self._forget(seat)
        self._seats.clear()
        self._places = []
        if self._leaving:
            await asyncio.gather(*self._leaving, return_exceptions=True)
        await self._reach.aclose()

    # --- how each is reached ---------------------------------------------------------------------

    def _connect(self, seat: _Seat, fresh: bool) -> None:
        # An empty context: connections outlive the request that may have noticed the loss.
        work, loop = self._try_to_connect(seat, fresh), asyncio.get_running_loop()
        seat.task = contextvars.Context().run(loop.create_task, work)

    async def _try_to_connect(self, seat: _Seat, fresh: bool) -> None:
        """Until it is reached by its channel. One that never was, or that is reported on although
        its channel stays broken, is reached through Serve meanwhile."""
        failures = 0
        while True:
            try:
                channel = await self._reach.channel(
                    seat.endpoint, seat.instance, lambda: self._heard(seat)
                )
                break
            except Exception as error:
                failures += 1
                where = seat.endpoint.replica_id
                logger.debug("no channel to %s, instance %d: %s", where, seat.instance, error)
            if (fresh or failures > PATIENCE) and seat.place is None:
                self._through_serve(seat)
                self._rebuild()
                self._changed()
            await asyncio.sleep(RECONNECT_S)
        if seat.left:
            await channel.aclose()
            return
        if isinstance(seat.place, ServePlace):
            seat.place.leave()
        seat.task, seat.channel = None, channel
        seat.place = LocalPlace(channel, self._changed)
        self._rebuild()
        self._heard(seat)

    def _through_serve(self, seat: _Seat) -> None:
        client = self._reach.through_serve(seat.deployment, seat.endpoint.replica_id)
        seat.place = ServePlace(client, self._changed, lambda: self._lost(seat.endpoint.replica_id))

    def _lost(self, replica_id: str) -> None:
        """All its instances have gone with it, if it has."""
        for seat in self._seats.values():
            if seat.endpoint.replica_id == replica_id and isinstance(seat.place, ServePlace):
                seat.place.doubt()

    def _heard(self, seat: _Seat) -> None:
        """Its channel has news: a grant, another limit, or its end."""
        if seat.channel is not None and not seat.channel.open:
            self._close(seat)
            if not seat.left:
                self._connect(seat, fresh=False)
                self._rebuild()
        self._changed()

    def _forget(self, seat: _Seat) -> None:
        seat.left = True
        if seat.task is not None:
            seat.task.cancel()
        self._close(seat)

    def _close(self, seat: _Seat) -> None:
        """What it has is still answered, unless the channel is lost."""
        channel, place, seat.channel, seat.place = seat.channel, seat.place, None, None
        if isinstance(place, ServePlace):
            place.leave()
        if channel is not None and place is not None:
            task = asyncio.get_running_loop().create_task(self._close_when_done(channel, place))
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)

    def _rebuild(self) -> None:
        seats = self._seats.values()
        self._places = [seat.place for seat in seats if seat.place is not None]

    async def _close_when_done(self, channel: Channel, place: Place) -> None:
        while place.running and channel.open and not self._closing:
            await asyncio.sleep(0.05)
        await channel.aclose()
