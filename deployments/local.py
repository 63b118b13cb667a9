"""LocalClient: a Router's connection to one instance of a replica on the same node.

Owns what is under way there, its time limit, and what this side may send (`slots` decides at the
other end). One future per batch, no task. Lives on the Router's event loop. Called by `places`.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import socket
import time
from collections.abc import Callable

from . import channel
from .arena import ARENA_BYTES, Arena, Arenas, Mappings
from .channel import ChannelError, Frame, Hello, Layout
from .codec import Codec
from .errors import Internal, MantaError, QueueTimeout, ReplicaLost
from .stream import Stream, check_peer
from .types import Batch, BatchReply, ChannelAddress

logger = logging.getLogger("manta.local")

CONNECT_S = 5.0
# Copies from this size on are made on a thread: the event loop has others to serve.
THREAD_BYTES = 1 << 20
_TRIM_S = 10.0


class _Call:
    """One batch under way. It is kept until it is answered, also when nobody waits any more."""

    __slots__ = ("arena", "batch", "deadline_s", "future")

    def __init__(self, batch: Batch, future: asyncio.Future[BatchReply], deadline_s: float) -> None:
        self.batch = batch
        self.future = future
        self.deadline_s = deadline_s
        self.arena = 0


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
        self._arenas = Arenas()
        self._mappings = Mappings(writable=False)
        self._calls: dict[int, _Call] = {}
        self._last = 0
        self._limit = 0
        self._granted = False
        self._asked = False
        self._open = True
        self._writing = False
        self._welcome: asyncio.Future[None] | None = self._loop.create_future()
        self._timer: asyncio.TimerHandle | None = None
        self._trimmer: asyncio.TimerHandle | None = None

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
        client = cls(_dial(address.path), model_name, changed, limit_s)
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
        call = _Call(batch, future, self._loop.time() + self._limit_s)
        self._calls[number] = call
        if self._timer is None:
            self._arm(call.deadline_s)
        self._send(number, call, 0)
        return future

    def _send(self, number: int, call: _Call, flags: int) -> None:
        """`flags`: how the members are to be run; none the first time."""
        try:
            layout = self._codec.batch(call.batch, apart=bool(flags))
            arena = None
            if layout.size >= ARENA_BYTES:
                arena = self._arenas.take(layout.size)
                self._tell_dropped()  # before a new one: the replica has its own limits
            if arena is None:
                stamp_ns = time.monotonic_ns()
                head = channel.head(channel.BATCH, layout, flags, number, stamp_ns)
                self._stream.send(head, layout.pieces, layout.size)
                self._watch()
                return
            call.arena = arena.number
            if layout.size < THREAD_BYTES:
                arena.write(layout.pieces)
                self._pass(number, layout, flags, arena)
                return
        except ChannelError as error:
            self._lose(str(error))
            return
        except MantaError as error:
            self._give_up(number, error)
            return
        except Exception:
            self._break()
            return
        try:
            copied = self._loop.run_in_executor(None, arena.write, layout.pieces)
        except Exception:  # no thread, or the loop ends
            self._break()
            return
        copied.add_done_callback(lambda done: self._copied(done, number, layout, flags, arena))

    def _give_up(self, number: int, error: MantaError) -> None:
        call = self._calls.pop(number, None)
        if call is None:  # the connection was lost just now, and all its calls with it
            return
        if call.future.done():
            self._changed()  # whoever sent it has given up: this is news to them
        else:
            call.future.set_exception(error)

    def _copied(
        self, done: asyncio.Future[None], number: int, layout: Layout, flags: int, arena: Arena
    ) -> None:
        if not self._open:
            return
        error = None if done.cancelled() else done.exception()
        if done.cancelled() or error is not None:  # the executor ends with the process
            logger.error("a batch was not copied", exc_info=error)
            self._arenas.forget(arena.number)
            self._give_up(number, Internal("the server failed to send this request"))
            return
        try:
            self._pass(number, layout, flags, arena)
        except ChannelError as lost:
            self._lose(str(lost))
        except Exception:
            self._break()

    def _pass(self, number: int, layout: Layout, flags: int, arena: Arena) -> None:
        flags |= channel.IN_ARENA | (0 if arena.passed else channel.NEW_ARENA)
        fd = -1 if arena.passed else arena.fd
        arena.passed = True
        stamp_ns = time.monotonic_ns()
        self._stream.send(
            channel.head(channel.BATCH, layout, flags, number, stamp_ns, arena.number, arena.size),
            fd=fd,
        )
        self._watch()
        if self._trimmer is None:
            self._trimmer = self._loop.call_later(_TRIM_S, self._trim)

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
            self._arenas.free(frame.arena)
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
        self._settle_arena(call, frame.flags)
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
        self._settle_arena(call, frame.flags)
        self._send(frame.number, call, how)

    def _settle_arena(self, call: _Call, flags: int) -> None:
        if call.arena and flags & channel.KEPT:
            self._arenas.forget(call.arena)
            self._tell_dropped()
        elif call.arena:
            self._arenas.free(call.arena)
        call.arena = 0

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

    def _trim(self) -> None:
        self._trimmer = None
        self._arenas.trim()
        self._tell_dropped()
        if self._open and len(self._arenas):
            self._trimmer = self._loop.call_later(_TRIM_S, self._trim)

    def _tell_dropped(self) -> None:
        for number in self._arenas.dropped():
            if self._open:
                self._tell(channel.DROP, arena=number)

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
        self._arenas.close()
        self._mappings.close()
        for timer in (self._timer, self._trimmer):
            if timer is not None:
                timer.cancel()
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


def _fail(call: _Call, error: MantaError) -> None:
    if not call.future.done():
        call.future.set_exception(error)


def _dial(path: str) -> socket.socket:
    """A connection to a process of our own user. Raises ChannelError."""
    if not hasattr(socket, "AF_UNIX"):
        raise ChannelError("this system has no unix sockets")
    try:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    except OSError as error:  # out of descriptors
        raise ChannelError(f"no connection to the replica: {error.strerror}") from None
    try:
        sock.setblocking(False)
        sock.connect(path)  # at once, or not at all
        check_peer(sock)
    except OSError as error:
        sock.close()
        raise ChannelError(f"no connection to the replica: {error.strerror}") from None
    except ChannelError:
        sock.close()
        raise
    return sock
