"""Shared memory for large payloads: sealed memory files, passed over the channel's own socket.

`Arenas` are the sender's: made, written, reused and dropped. `Mappings` are the receiver's: checked
before they are looked at, so that no peer can make this process fault. Neither knows frames.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .channel import MAX_ARENA_BYTES, ChannelError, Piece
from .types import Array

if sys.platform == "linux":
    import fcntl

# From this size on, a payload travels in shared memory: below, the socket is as fast.
ARENA_BYTES = 256 << 10
IDLE_S = 30.0

_GRAIN_BYTES = 1 << 20
_MAX_ARENAS = 16
_MAX_BYTES = 2 << 30


class Arena:
    """One memory file of this process's own. `passed`: the peer has its descriptor."""

    def __init__(self, number: int, size: int) -> None:
        self.number = number
        self.size = size
        self.passed = False
        self.free_since_s: float | None = None
        self.fd = os.memfd_create("manta", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, size)
            # Nobody can make it smaller: a reader's memory stays where it is.
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
            self._memory: Array = np.frombuffer(mmap.mmap(self.fd, size), np.uint8)
        except BaseException:
            os.close(self.fd)
            raise

    def write(self, pieces: Sequence[Piece]) -> None:
        """One after another from the start. Lets other threads run meanwhile."""
        at = 0
        for piece in pieces:
            source = np.frombuffer(piece, np.uint8) if isinstance(piece, bytes) else _flat(piece)
            self._memory[at : at + source.nbytes] = source
            at += source.nbytes

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _flat(array: Array) -> Array:
    flat: Array = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return flat


class Arenas:
    """The arenas of one direction of one connection; capped in number and bytes."""

    def __init__(self, max_bytes: int = _MAX_BYTES, max_count: int = _MAX_ARENAS) -> None:
        self._max_bytes = max_bytes
        self._max_count = max_count
        self._arenas: dict[int, Arena] = {}
        self._dropped: list[int] = []
        self._last = 0

    def __len__(self) -> int:
        return len(self._arenas)

    @property
    def size_bytes(self) -> int:
        return sum(one.size for one in self._arenas.values())

    def take(self, size: int) -> Arena | None:
        """One that nobody reads; None when there can be no more: then the socket must do."""
        if not hasattr(os, "memfd_create") or size > MAX_ARENA_BYTES:
            return None
        free = [one for one in self._arenas.values() if one.free_since_s is not None]
        fitting = [one for one in free if one.size >= size]
        if fitting:
            found = min(fitting, key=lambda one: one.size)
            found.free_since_s = None
            return found
        wanted = -(-size // _GRAIN_BYTES) * _GRAIN_BYTES
        for one in free:  # too small, and in the way
            if self._has_room(wanted):
                break
            self.forget(one.number)
        if not self._has_room(wanted):
            return None
        try:
            made = Arena(self._last + 1, wanted)
        except (OSError, ValueError):  # no memory, or no descriptors
            return None
        self._last += 1
        self._arenas[made.number] = made
        return made

    def _has_room(self, size: int) -> bool:
        return len(self._arenas) < self._max_count and self.size_bytes + size <= self._max_bytes

    def free(self, number: int) -> None:
        """Its reader is done with it. A number that is none is the peer's mistake, and no harm."""
        arena = self._arenas.get(number)
        if arena is not None and arena.free_since_s is None:
            arena.free_since_s = time.monotonic()

    def forget(self, number: int) -> None:
        """Not to be written again: the reader's memory lives on for as long as it is looked at."""
        arena = self._arenas.pop(number, None)
        if arena is not None:
            arena.close()
            if arena.passed:
                self._dropped.append(number)

    def trim(self, idle_s: float = IDLE_S) -> None:
        """Lets go what nobody has needed for so long."""
        limit_s = time.monotonic() - idle_s
        for one in list(self._arenas.values()):
            if one.free_since_s is not None and one.free_since_s <= limit_s:
                self.forget(one.number)

    def dropped(self) -> list[int]:
        """Those that the peer must be told of, once each."""
        dropped, self._dropped = self._dropped, []
        return dropped

    def close(self) -> None:
        for one in self._arenas.values():
            one.close()
        self._arenas.clear()
        self._dropped.clear()


class _View:
    """What arrays out of a mapping hold on to: when the last is gone, so is this."""

    __slots__ = ("__array_interface__", "__weakref__", "_memory")

    def __init__(self, memory: Array) -> None:
        self._memory = memory
        self.__array_interface__ = memory.__array_interface__


class _Mapping:
    def __init__(self, fd: int, size: int, writable: bool) -> None:
        access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
        self.memory: Array = np.frombuffer(mmap.mmap(fd, size, access=access), np.uint8)
        self.alone = sys.getrefcount(self.memory)


class Mappings:
    """The peer's arenas, as far as this side has been given them.

    `writable`: a model may change its input in place; a Router has no reason to.
    """

    def __init__(
        self, writable: bool, max_bytes: int = _MAX_BYTES, max_count: int = _MAX_ARENAS
    ) -> None:
        self._writable = writable
        self._max_bytes = max_bytes
        self._max_count = max_count
        self._mappings: dict[int, _Mapping] = {}

    def __len__(self) -> int:
        return len(self._mappings)

    def add(self, number: int, fd: int, size: int) -> None:
        """Takes over the descriptor. Raises ChannelError."""
        try:
            if number in self._mappings:
                raise ChannelError("an arena that comes twice")
            total = sum(one.memory.nbytes for one in self._mappings.values())
            if len(self._mappings) >= self._max_count or total + size > self._max_bytes:
                raise ChannelError("too many arenas")
            _check(fd, size)
            self._mappings[number] = _Mapping(fd, size, self._writable)
        except (OSError, ValueError) as error:
            raise ChannelError(f"an arena that cannot be mapped: {error}") from None
        finally:
            os.close(fd)

    def payload(self, number: int, size: int) -> Array:
        """The first `size` bytes. Raises ChannelError."""
        return self._find(number, size).memory[:size]

    def lend(self, number: int, size: int, released: Callable[[int], None]) -> Array:
        """The same; `released` is called, on any thread, when nobody looks at them any more."""
        view = _View(self._find(number, size).memory[:size])
        weakref.finalize(view, released, number).atexit = False
        lent: Array = np.asarray(view)
        return lent

    def is_held(self, number: int) -> bool:
        """Whether somebody still looks at it."""
        mapping = self._mappings.get(number)
        return mapping is not None and sys.getrefcount(mapping.memory) > mapping.alone

    def drop(self, number: int) -> None:
        self._mappings.pop(number, None)

    def close(self) -> None:
        self._mappings.clear()

    def _find(self, number: int, size: int) -> _Mapping:
        mapping = self._mappings.get(number)
        if mapping is None or mapping.memory.nbytes < size:
            raise ChannelError("an arena that is not known here")
        return mapping


def _check(fd: int, size: int) -> None:
    """Sealed against shrinking, and as large as it is said to be: else reading could be fatal."""
    seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    if not seals & fcntl.F_SEAL_SHRINK:
        raise ChannelError("an arena that can shrink")
    if size <= 0 or os.fstat(fd).st_size < size:
        raise ChannelError("an arena that is smaller than it says")


def close_all(descriptors: Sequence[Any]) -> None:
    for fd in descriptors:
        with contextlib.suppress(OSError):
            os.close(fd)
