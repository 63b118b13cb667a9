"""LocalClient: a Router's connection to one instance of a replica on the same node.

Owns what is under way there, its time limit, and what this side may send (`slots` decides at the
other end); how a batch is sent is `outgoing`'s. One future per batch, no task. Lives on the
Router's event loop. Called by `places`.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import socket
from collections.abc import Callable

from . import channel
from .arena import Mappings
from .channel import ChannelError, Frame, Hello
from .codec import Codec
from .errors import MantaError, QueueTimeout, ReplicaLost
from .outgoing import Call, Outgoing
from .stream import Stream, dial
from .types import Batch, BatchReply, ChannelAddress

logger = logging.getLogger("manta.local")

CONNECT_S = 5.0


class LocalClient:
    """See the module's docstring. `connect` makes one."""

    def __init__(
        self,
        sock: socket.socket,
        model_name: str,
        changed: Callable[[], None],
        limit_s: float,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._model_name = model_name
        self._changed = changed
        self._limit_s = limit_s
        self._stream = Stream(sock)
        self._fd = sock.fileno()
        self._codec = Codec()
        self._outgoing = Outgoing(self._stream, self._codec, self._watch, self._tell, self._failed)
        self._send = self._outgoing.send
        self._mappings = Mappings(writable=False)
        self._calls: dict[int, Call] = {}
        self._last = 0
        self._limit = 0
        self._granted = False
        self._asked = False
        self._open = True
        self._writing = False
        self._welcome: asyncio.Future[None] | None = self._loop.create_future()
        self._timer: asyncio.TimerHandle | None = None

    @classmethod
    async def connect(
        cls,
        address: ChannelAddress,
        instance: int,
        router_id: str,
        model_name: str,
        changed: Callable[[], None],
        limit_s: float,
    ) -> LocalClient:
        """Raises ChannelError."""
        client = cls(dial(address.path), model_name, changed, limit_s)
        welcome = client._welcome
        assert welcome is not None
        try:
            # An empty context: the connection outlives the request that may have asked for it.
            context = contextvars.Context()
            context.run(client._loop.add_reader, client._fd, client._readable)
            layout = Hello(address.token, router_id, instance).layout()
            client._stream.send(channel.head(channel.HELLO, layout))
            await asyncio.wait_for(welcome, CONNECT_S)
        except asyncio.TimeoutError:
            client._lose("it does not answer")
            raise ChannelError("the replica does not answer") from None
        except BaseException:
            welcome.cancel()  # nobody waits for it, should it have come to nothing before
            client._lose("it was not made")
            raise
        return client

    # --- asked by the places ---------------------------------------------------------------------

    @property
    def outstanding(self) -> int:
        """Batches that were sent and are not answered."""
        return len(self._calls)

    @property
    def open(self) -> bool:
        """False for good once the connection is lost or closed."""
        return self._open

    @property
    def idle(self) -> bool:
        """Whether a batch sent now would start at once, as far as this side can know."""
        return self._open and not self._calls and (self._limit > 0 or self._granted)

    @property
    def ahead(self) -> bool:
        """Whether one more may be sent beside the one that runs."""
        return self._open and len(self._calls) == 1 and (self._limit > 1 or self._granted)

    def want(self) -> None:
        """Asks for a turn, where the instance is shared; once is enough."""
        if self._open and not self._limit and not self._asked and not self._granted:
            self._asked = True
            self._tell(channel.WANT)

    def spare(self) -> None:
        """Nothing waits here any more: a turn that was given, or asked for, is another's."""
        if self._open and (self._granted or self._asked):
            self._granted = self._asked = False
            self._tell(channel.SPARE)

    # --- batches ---------------------------------------------------------------------------------

    def execute(self, batch: Batch) -> asyncio.Future[BatchReply]:
        """Sends at once. Fails with ReplicaLost, QueueTimeout or Internal."""
        future: asyncio.Future[BatchReply] = self._loop.create_future()
        if not self._open:
            future.set_exception(ReplicaLost(self._model_name))
            return future
        self._last = number = self._last + 1
        self._granted = False
        call = Call(batch, future, self._loop.time() + self._limit_s)
        self._calls[number] = call
        if self._timer is None:
            self._arm(call.deadline_s)
        self._send(number, call, 0)
        return future

    def _failed(self, number: int, error: Exception) -> None:
        """A batch was not sent; `error` is being handled now."""
        if isinstance(error, ChannelError):
            self._lose(str(error))
        elif isinstance(error, MantaError):
            self._give_up(number, error)
        else:
            self._break()

    def _give_up(self, number: int, error: MantaError) -> None:
        call = self._calls.pop(number, None)
        if call is None:  # the connection was lost just now, and all its calls with it
            return
        if call.future.done():
            self._changed()  # whoever sent it has given up: this is news to them
        else:
            call.future.set_exception(error)

    # --- the socket ------------------------------------------------------------------------------

    def _readable(self) -> None:
        try:
            for frame in self._stream.receive():
                self._take(frame)
                if not self._open:
                    return
            self._stream.check_fds()
        except ChannelError as error:
            self._lose(str(error))
        except Exception:
            self._break()

    def _writable(self) -> None:
        try:
            self._stream.flush()
            self._watch()
        except ChannelError as error:
            self._lose(str(error))
        except Exception:
            self._break()

    def _watch(self) -> None:
        if self._stream.pending == self._writing:
            return
        self._writing = self._stream.pending
        if self._writing:
            contextvars.Context().run(self._loop.add_writer, self._fd, self._writable)
        else:
            self._loop.remove_writer(self._fd)

    def _tell(self, kind: int, arena: int = 0) -> None:
        try:
            self._stream.send(channel.head(kind, arena=arena))
            self._watch()
        except ChannelError as error:
            self._lose(str(error))
        except Exception:
            self._break()

    # --- frames in -------------------------------------------------------------------------------

    def _take(self, frame: Frame) -> None:
        if frame.flags & channel.NEW_ARENA:
            self._mappings.add(frame.arena, self._stream.take_fd(), frame.arena_bytes)
        kind = frame.kind
        if kind in (channel.REPLY, channel.FAILED):
            self._answer(frame)
        elif kind == channel.LIMIT:
            self._limit = frame.number
            self._granted = self._asked = False
            self._changed()
        elif kind == channel.GRANT:
            self._asked, self._granted = False, True
            self._changed()
        elif kind == channel.AGAIN:
            self._send_again(frame)
        elif kind == channel.RELEASE:
            self._outgoing.free(frame.arena)
        elif kind == channel.DROP:
            self._mappings.drop(frame.arena)
        elif kind == channel.WELCOME and self._welcome is not None:
            if not self._welcome.done():
                self._welcome.set_result(None)
            self._welcome = None
        else:
            raise ChannelError(f"a frame of kind {kind} from a replica")

    def _answer(self, frame: Frame) -> None:
        call = self._calls.get(frame.number)
        if call is None:
            raise ChannelError("a reply to nothing")
        reply: BatchReply | MantaError
        if frame.kind == channel.FAILED:
            reply = channel.read_error(frame.header)
        elif frame.flags & channel.REFUSED:
            reply = BatchReply(parts=(), refused=True)
        elif frame.flags & channel.IN_ARENA:
            payload = self._mappings.lend(frame.arena, frame.payload_bytes, self._released)
            reply = self._codec.read_reply(frame.header, payload, len(call.batch.rows))
        else:
            reply = self._codec.read_reply(frame.header, frame.payload, len(call.batch.rows))
        del self._calls[frame.number]
        if call.arena:
            self._outgoing.settle(call, frame.flags)
        if call.future.done():
            self._changed()  # whoever sent it has given up: this is news to them
        elif isinstance(reply, MantaError):
            call.future.set_exception(reply)
        else:
            call.future.set_result(reply)

    def _send_again(self, frame: Frame) -> None:
        call = self._calls.get(frame.number)
        how = frame.flags & (channel.SINGLY | channel.HALVES)
        if call is None or not how:
            raise ChannelError("asked for what was not sent")
        if call.arena:
            self._outgoing.settle(call, frame.flags)
        self._send(frame.number, call, how)

    def _released(self, number: int) -> None:
        """Nobody looks at a reply any more; on whichever thread that shows."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: so is this
            self._loop.call_soon_threadsafe(self._release, number)

    def _release(self, number: int) -> None:
        if self._open:
            self._tell(channel.RELEASE, arena=number)

    # --- time ------------------------------------------------------------------------------------

    def _arm(self, deadline_s: float) -> None:
        """One timer for all: it rings for the oldest, and each has the same limit."""
        context = contextvars.Context()
        self._timer = self._loop.call_at(deadline_s, self._ring, context=context)

    def _ring(self) -> None:
        self._timer = None
        now_s = self._loop.time()
        for call in self._calls.values():
            if call.deadline_s > now_s:
                self._arm(call.deadline_s)
                return
            _fail(call, QueueTimeout(self._model_name))

    # --- the end ---------------------------------------------------------------------------------

    async def aclose(self) -> None:
        """What is under way fails. Doing it twice is doing it once."""
        self._lose("closed by this side", quiet=True)

    def _break(self) -> None:
        """An error that nobody foresaw, now being handled: what the peer has been told, or has
        told, is uncertain. A connection that is lost is made again; one left so would be dead."""
        logger.exception("the channel to model '%s'", self._model_name)
        self._lose("an error of this side")

    def _lose(self, reason: str, quiet: bool = False) -> None:
        if not self._open:
            return
        self._open = False
        self._loop.remove_reader(self._fd)
        if self._writing:
            self._loop.remove_writer(self._fd)
        self._stream.close()
        self._outgoing.close()
        self._mappings.close()
        if self._timer is not None:
            self._timer.cancel()
        welcome, self._welcome = self._welcome, None
        if welcome is not None:
            if not welcome.done():
                welcome.set_exception(ChannelError(reason))
            return  # it never was
        if not quiet:
            logger.info("the channel to model '%s' ended: %s", self._model_name, reason)
        calls, self._calls = self._calls, {}
        for call in calls.values():
            _fail(call, ReplicaLost(self._model_name))
        if not quiet:
            self._changed()


def _fail(call: Call, error: MantaError) -> None:
    if not call.future.done():
        call.future.set_exception(error)
