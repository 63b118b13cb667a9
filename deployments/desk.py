"""Desk: one Router's connection at one instance, on the instance's own thread.

Owns what frames mean there: batches in, replies out, whose turn it is (`slots`) and shared memory.
A peer that breaks the rules loses its connection, and nobody else notices. Called by the `poller`.
"""

from __future__ import annotations

import logging
import select
import socket
import time
from typing import Literal, Protocol, TypeAlias

from . import channel
from .arena import ARENA_BYTES, Arenas, Mappings
from .channel import ChannelError, Frame, Layout
from .codec import Codec
from .errors import Internal, MantaError
from .poller import Poller
from .slots import Slots
from .stream import Stream
from .types import Batch, BatchReply

logger = logging.getLogger("ray.serve")  # Serve writes this one to the replica's log file

How: TypeAlias = Literal["", "singly", "halves", "whole"]


class SendAgain(Exception):
    """A joined batch failed, and its run may have changed the only copy of its inputs."""

    def __init__(self, how: How) -> None:
        super().__init__(how)
        self.how = how


class Runner(Protocol):
    """The instance. `finished_ns` is when its last run ended."""

    finished_ns: int

    def execute(self, batch: Batch, how: How) -> BatchReply:
        """Raises SendAgain for a joined batch; `how` then says how its members are run."""
        ...


class Desk:
    """See the module's docstring."""

    def __init__(
        self, sock: socket.socket, router_id: str, slots: Slots, poller: Poller, runner: Runner
    ) -> None:
        self._router_id = router_id
        self._slots = slots
        self._poller = poller
        self._runner = runner
        self._stream = Stream(sock)
        self._codec = Codec()
        self._arenas = Arenas()
        self._mappings = Mappings(writable=True)
        self._writing = False
        poller.add(self)  # first: who has a seat is told to send, and must be read
        self._seat = slots.join(self)

    # --- as the poller sees it -------------------------------------------------------------------

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def has_memory(self) -> bool:
        return len(self._arenas) > 0

    def serve(self, readable: bool, writable: bool) -> None:
        try:
            if writable:
                self._stream.flush()
                self._watch()
            if readable:
                for frame in self._stream.receive():
                    self._take(frame)
                self._stream.check_fds()
        except ChannelError as error:
            self._close(error)
        except Exception:  # ours to mend; the instance has others to serve
            logger.exception("connection of router %s", self._router_id)
            self._close(None)

    def trim(self) -> None:
        try:
            self._arenas.trim()
            self._tell_dropped()
        except ChannelError as error:
            self._close(error)
        except Exception:
            logger.exception("connection of router %s", self._router_id)
            self._close(None)

    def finish(self, limit_s: float) -> None:
        until_s = time.monotonic() + limit_s
        try:
            while not self._stream.flush():
                left_s = until_s - time.monotonic()
                if left_s <= 0:
                    break
                wait = select.poll()
                wait.register(self._stream.fileno(), select.POLLOUT)
                wait.poll(left_s * 1000)
        except ChannelError as error:
            logger.debug("router %s: %s", self._router_id, error)
        except Exception:  # others are to be finished, too
            logger.exception("connection of router %s", self._router_id)
        self._close(None)

    # --- as the slots see it ---------------------------------------------------------------------

    def limited(self, limit: int) -> None:
        self._send(channel.LIMIT, number=limit)

    def granted(self) -> None:
        self._send(channel.GRANT)

    # --- frames in -------------------------------------------------------------------------------

    def _take(self, frame: Frame) -> None:
        if frame.flags & channel.NEW_ARENA:
            self._mappings.add(frame.arena, self._stream.take_fd(), frame.arena_bytes)
        kind = frame.kind
        if kind == channel.BATCH:
            self._take_batch(frame)
        elif kind == channel.WANT:
            self._slots.want(self._seat)
        elif kind == channel.SPARE:
            self._slots.spare(self._seat)
        elif kind == channel.RELEASE:
            self._arenas.free(frame.arena)
        elif kind == channel.DROP:
            self._mappings.drop(frame.arena)
        else:
            raise ChannelError(f"a frame of kind {kind} from a Router")

    def _take_batch(self, frame: Frame) -> None:
        payload = frame.payload
        if frame.flags & channel.IN_ARENA:
            payload = self._mappings.payload(frame.arena, frame.payload_bytes)
        batch = self._codec.read_batch(frame.header, payload)
        if self._slots.take(self._seat):
            self._poller.ready(_Run(self, frame, batch))
        else:
            self._send(channel.REPLY, flags=channel.REFUSED, number=frame.number)

    # --- a batch ---------------------------------------------------------------------------------

    def run(self, frame: Frame, batches: list[Batch]) -> None:
        """`batches` holds one, and is emptied: nothing else may keep it."""
        if self._stream.closed:  # nobody waits for it any more
            batches.clear()
            self._slots.done()
            return
        # How long it lay beside a run; not what the way here took.
        waited_ns = max(0, self._runner.finished_ns - frame.stamp_ns) if frame.stamp_ns else 0
        kind, layout, flags = channel.REPLY, None, 0
        promised = False
        try:
            reply = self._runner.execute(batches.pop(), _how(frame.flags))
            layout = self._codec.reply(BatchReply(reply.parts, waited_ns=waited_ns))
        except SendAgain as error:
            kind, promised = channel.AGAIN, True
            flags = channel.HALVES if error.how == "halves" else channel.SINGLY
        except MantaError as error:
            kind, layout = channel.FAILED, channel.error_layout(error)
        except Exception:
            logger.exception("a batch of router %s failed", self._router_id)
            kind = channel.FAILED
            layout = channel.error_layout(Internal("the model instance failed to run this request"))
        finally:
            if promised:
                self._slots.give_back(self._seat)
            else:
                self._slots.done()
        if (
            frame.flags & channel.IN_ARENA
            and not self._stream.closed
            and self._mappings.is_held(frame.arena)
        ):
            flags |= channel.KEPT
        self._send(kind, layout, flags, frame.number)

    # --- frames out ------------------------------------------------------------------------------

    def _send(
        self, kind: int, layout: Layout | None = None, flags: int = 0, number: int = 0
    ) -> None:
        if self._stream.closed:
            return
        try:
            arena = None
            if layout is not None and layout.size >= ARENA_BYTES:
                arena = self._arenas.take(layout.size)
                self._tell_dropped()  # before a new one: the peer has its own limits
            if layout is None or arena is None:
                head = channel.head(kind, layout, flags, number)
                pieces, size = ([], 0) if layout is None else (layout.pieces, layout.size)
                self._stream.send(head, pieces, size)
            else:
                arena.write(layout.pieces)
                flags |= channel.IN_ARENA | (0 if arena.passed else channel.NEW_ARENA)
                fd = -1 if arena.passed else arena.fd
                arena.passed = True
                head = channel.head(kind, layout, flags, number, 0, arena.number, arena.size)
                self._stream.send(head, fd=fd)
            self._watch()
        except ChannelError as error:
            self._close(error)
        except MantaError as error:  # an answer too large
            self._send(channel.FAILED, channel.error_layout(error), flags & channel.KEPT, number)
        except Exception:  # out of descriptors, or memory: this one pays, and not the instance
            logger.exception("connection of router %s", self._router_id)
            self._close(None)

    def _tell_dropped(self) -> None:
        for number in self._arenas.dropped():
            self._stream.send(channel.head(channel.DROP, arena=number))

    def _watch(self) -> None:
        if self._stream.pending != self._writing:
            self._writing = self._stream.pending
            self._poller.watch(self, self._writing)

    def _close(self, error: ChannelError | None) -> None:
        if self._stream.closed:
            return
        if error is not None:
            logger.info("connection of router %s ended: %s", self._router_id, error)
        self._poller.remove(self)
        self._slots.leave(self._seat)
        self._stream.close()
        self._arenas.close()
        self._mappings.close()


class _Run:
    """One accepted batch. It lets go of the inputs when it is called."""

    def __init__(self, desk: Desk, frame: Frame, batch: Batch) -> None:
        self._desk = desk
        self._frame = frame
        self._batches = [batch]

    def __call__(self) -> None:
        self._desk.run(self._frame, self._batches)


def _how(flags: int) -> How:
    if flags & channel.SINGLY:
        return "singly"
    return "halves" if flags & channel.HALVES else ""
