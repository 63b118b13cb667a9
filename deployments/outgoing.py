"""How a batch gets to an instance: in its frame, or in shared memory that the frame names.

Owns the arenas of one connection, their copying, sharing and end. What is under way, and what
becomes of it, is `local`'s, which alone calls this, on the Router's event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from . import channel
from .arena import ARENA_BYTES, Arena, Arenas
from .channel import Layout
from .codec import Codec
from .errors import Internal
from .stream import Stream
from .types import Batch, BatchReply

logger = logging.getLogger("manta.local")

# Copies from this size on are made on a thread: the event loop has others to serve.
THREAD_BYTES = 1 << 20
_TRIM_S = 10.0


class Call:
    """One batch under way. It is kept until it is answered, also when nobody waits any more."""

    __slots__ = ("arena", "batch", "deadline_s", "future")

    def __init__(self, batch: Batch, future: asyncio.Future[BatchReply], deadline_s: float) -> None:
        self.batch = batch
        self.future = future
        self.deadline_s = deadline_s
        self.arena = 0


class Outgoing:
    """The callables must not raise. `watch`: something was sent. `tell` sends a frame that has but
    its kind and an arena. `failed`: a batch was not sent; called while the error is handled."""

    def __init__(
        self,
        stream: Stream,
        codec: Codec,
        watch: Callable[[], None],
        tell: Callable[[int, int], None],
        failed: Callable[[int, Exception], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._stream = stream
        self._codec = codec
        self._watch = watch
        self._tell = tell
        self._failed = failed
        self._arenas = Arenas()
        self._open = True
        self._trimmer: asyncio.TimerHandle | None = None

    def send(self, number: int, call: Call, flags: int) -> None:
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
            copied = self._loop.run_in_executor(None, arena.write, layout.pieces)
        except Exception as error:  # also: no thread, or the loop ends
            self._failed(number, error)
            return
        copied.add_done_callback(lambda done: self._copied(done, number, layout, flags, arena))

    def _copied(
        self, done: asyncio.Future[None], number: int, layout: Layout, flags: int, arena: Arena
    ) -> None:
        if not self._open:
            return
        error = None if done.cancelled() else done.exception()
        if done.cancelled() or error is not None:  # the executor ends with the process
            logger.error("a batch was not copied", exc_info=error)
            self._arenas.forget(arena.number)
            failure = Internal("the server failed to send this request")
            self._failed(number, failure)
            return
        try:
            self._pass(number, layout, flags, arena)
        except Exception as lost:
            self._failed(number, lost)

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

    # --- what the arenas become ------------------------------------------------------------------

    def settle(self, call: Call, flags: int) -> None:
        """The replica is done with what `call` has sent, or keeps it for good."""
        if call.arena and flags & channel.KEPT:
            self._arenas.forget(call.arena)
            self._tell_dropped()
        elif call.arena:
            self._arenas.free(call.arena)
        call.arena = 0

    def free(self, arena: int) -> None:
        """By its number, as the replica says it."""
        self._arenas.free(arena)

    def _trim(self) -> None:
        self._trimmer = None
        self._arenas.trim()
        self._tell_dropped()
        if self._open and len(self._arenas):
            self._trimmer = self._loop.call_later(_TRIM_S, self._trim)

    def _tell_dropped(self) -> None:
        for number in self._arenas.dropped():
            if self._open:
                self._tell(channel.DROP, number)

    def close(self) -> None:
        self._open = False
        self._arenas.close()
        if self._trimmer is not None:
            self._trimmer.cancel()
