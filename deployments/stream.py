"""Frames in and out of one non-blocking unix socket, with the descriptors that come along.

Owns receive buffers, the queue of what the peer has not taken yet, and its limit. Knows neither
what frames mean nor who waits for the socket. Used on one thread at a time.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
import sys
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from .arena import close_all
from .channel import ALIGNMENT, ChannelError, Frame, Piece, frame_bytes, parse
from .types import Array

BUFFER_BYTES = 128 << 10
# A peer that does not read may leave this much behind one frame; then it is cut off.
MAX_QUEUED_BYTES = 64 << 20

_SPARE_BUFFERS = 3
_FD_BYTES = array.array("i").itemsize
_MAX_FDS = 4
_ANCILLARY_BYTES = socket.CMSG_SPACE(_MAX_FDS * _FD_BYTES)
# Smaller messages are copied into one piece: cheaper than a list for the kernel.
_JOIN_BYTES = 32 << 10
_MAX_PIECES = 512
_CREDENTIALS = struct.Struct("3i")


class _Buffer:
    """Aligned memory that frames are received into. Arrays cut from it keep it alive."""

    __slots__ = ("alone", "memory", "origin", "size", "view")

    def __init__(self, size: int) -> None:
        self.memory: Array = np.empty(size + ALIGNMENT, np.uint8)
        self.origin = -self.memory.ctypes.data % ALIGNMENT
        self.size = size
        self.view = memoryview(self.memory)[self.origin : self.origin + size]  # type: ignore[arg-type]
        self.alone = sys.getrefcount(self.memory)

    @property
    def unused(self) -> bool:
        return sys.getrefcount(self.memory) == self.alone

    def cut(self, start: int, end: int) -> Array:
        return self.memory[self.origin + start : self.origin + end]


class Stream:
    """One end of a connection."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        with contextlib.suppress(OSError):  # what the kernel allows; it makes one wake-up of many
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self._sock = sock
        self._buffer = _Buffer(BUFFER_BYTES)
        self._spares: list[_Buffer] = []
        self._start = 0
        self._end = 0
        self._fds: deque[int] = deque()
        self._queue: deque[tuple[memoryview, Sequence[int]]] = deque()
        self._queued_bytes = 0
        self.closed = False

    def fileno(self) -> int:
        return self._sock.fileno()

    @property
    def pending(self) -> bool:
        """Whether something waits for the peer to read."""
        return bool(self._queue)

    # --- in --------------------------------------------------------------------------------------

    def receive(self) -> list[Frame]:
        """What is there. Raises ChannelError for a bad frame, and when the peer is gone."""
        self._make_room()
        try:
            count, ancillary, flags, _ = self._sock.recvmsg_into(
                [self._buffer.view[self._end :]], _ANCILLARY_BYTES, _CLOEXEC
            )
        except BlockingIOError:
            return []
        except OSError as error:
            raise ChannelError(f"the connection is lost: {error.strerror}") from None
        if ancillary:
            self._keep_fds(ancillary)
        if not count or flags & socket.MSG_CTRUNC:
            raise ChannelError("the connection is closed" if not count else "too many descriptors")
        self._end += count
        return self._cut()

    def _cut(self) -> list[Frame]:
        frames = []
        while self._end - self._start >= ALIGNMENT:
            size = frame_bytes(self._buffer.view[self._start :])
            if self._end - self._start < size:
                break
            frames.append(parse(self._buffer.cut(self._start, self._start + size)))
            self._start += size
        if len(self._fds) > _MAX_FDS:
            raise ChannelError("too many descriptors")
        return frames

    def take_fd(self) -> int:
        """The descriptor of a frame that says it brings one; in the order of those frames."""
        if not self._fds:
            raise ChannelError("a descriptor that did not come")
        return self._fds.popleft()

    def check_fds(self) -> None:
        """After all frames are looked at: what nobody asked for is no frame of ours."""
        if self._fds and self._start == self._end:
            raise ChannelError("a descriptor that nothing was said of")

    def _keep_fds(self, ancillary: Sequence[tuple[int, int, bytes]]) -> None:
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(data[: len(data) - len(data) % _FD_BYTES])
                self._fds.extend(fds)

    def _make_room(self) -> None:
        """The next frame starts aligned, in memory that nobody looks at."""
        rest = self._end - self._start
        needed = ALIGNMENT
        if rest >= ALIGNMENT:
            needed = frame_bytes(self._buffer.view[self._start :])
        if not rest and self._buffer.unused:
            self._start = self._end = 0
        elif self._start + needed > self._buffer.size or (not rest and self._end):
            self._swap(max(needed, BUFFER_BYTES), rest)

    def _swap(self, size: int, rest: int) -> None:
        old = self._buffer
        new = next((one for one in self._spares if one.size >= size and one.unused), None)
        if new is not None:
            self._spares.remove(new)
        else:
            new = _Buffer(size)
        if rest:
            new.view[:rest] = old.view[self._start : self._end]
        if old.size == BUFFER_BYTES and len(self._spares) < _SPARE_BUFFERS:
            self._spares.append(old)
        self._buffer, self._start, self._end = new, 0, rest

    # --- out -------------------------------------------------------------------------------------

    def send(self, head: bytes, pieces: Sequence[Piece] = (), size: int = 0, fd: int = -1) -> None:
        """At once as far as the peer takes it; the rest is queued. Raises ChannelError.

        `pieces` must not change afterwards.
        """
        if self.closed:
            raise ChannelError("the connection is closed")
        fds = (fd,) if fd >= 0 else ()
        parts: list[Piece] = [head, *pieces] if pieces else [head]
        if len(parts) > 1 and (size <= _JOIN_BYTES or len(parts) > _MAX_PIECES):
            parts = [_join(parts)]
        total = len(head) + size
        if self._queue:
            if self._queued_bytes > MAX_QUEUED_BYTES:
                raise ChannelError("the peer does not read")
            self._enqueue(parts, 0, fds)
            return
        sent = self._push(parts, fds)
        if sent < total:
            self._enqueue(parts, sent, fds if not sent else ())

    def _push(self, parts: Sequence[Any], fds: Sequence[int]) -> int:
        try:
            if fds:
                rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
                return self._sock.sendmsg(parts, [rights], _NOSIGNAL)
            if len(parts) == 1:
                return self._sock.send(parts[0], _NOSIGNAL)
            return self._sock.sendmsg(parts, (), _NOSIGNAL)
        except BlockingIOError:
            return 0
        except (BufferError, TypeError, ValueError):  # an array that is not laid out in C order
            return self._push([_contiguous(one) for one in parts], fds)
        except OSError as error:
            raise ChannelError(f"the connection is lost: {error.strerror}") from None

    def _enqueue(self, parts: Sequence[Any], skip: int, fds: Sequence[int]) -> None:
        # Of its own: the sender may close its descriptor before the peer reads.
        try:
            kept: Sequence[int] = [os.dup(fd) for fd in fds]
        except OSError as error:
            raise ChannelError(f"a descriptor cannot be kept: {error.strerror}") from None
        for part in parts:
            view = _bytes_of(part)
            if skip >= view.nbytes:
                skip -= view.nbytes
                continue
            self._queue.append((view[skip:], kept))
            self._queued_bytes += view.nbytes - skip
            skip, kept = 0, ()

    def flush(self) -> bool:
        """Sends on what is queued; whether all is gone. Raises ChannelError."""
        while self._queue:
            view, fds = self._queue[0]
            sent = self._push([view], fds)
            if not sent:
                return False
            if fds:
                close_all(fds)
            self._queued_bytes -= sent
            if sent < view.nbytes:
                self._queue[0] = (view[sent:], ())
            else:
                self._queue.popleft()
        return True

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        close_all(self._fds)
        self._fds.clear()
        for _, fds in self._queue:
            close_all(fds)
        self._queue.clear()
        self._sock.close()


_CLOEXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
_NOSIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)


def _contiguous(part: Piece | memoryview) -> Any:
    return np.ascontiguousarray(part) if isinstance(part, np.ndarray) else part


def _join(parts: Sequence[Any]) -> bytes:
    try:
        return b"".join(parts)
    except (BufferError, TypeError, ValueError):
        return b"".join([_contiguous(one) for one in parts])


def _bytes_of(part: Any) -> memoryview:
    if isinstance(part, np.ndarray):
        return memoryview(np.ascontiguousarray(part).reshape(-1).view(np.uint8))  # type: ignore[arg-type]
    return memoryview(part)


def dial(path: str) -> socket.socket:
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


def check_peer(sock: socket.socket) -> None:
    """Raises ChannelError when the other end belongs to another user."""
    if sys.platform != "linux":  # the directory's mode must do
        return
    data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(data)
    if uid != os.geteuid():
        raise ChannelError(f"the peer belongs to user {uid}")
