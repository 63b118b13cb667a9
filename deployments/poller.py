"""What an instance's thread waits on: the Routers' connections, and a wake-up for everything else.

Owns the selector and the order in which work comes up. Runs nothing itself: the instance's thread
asks for the `next` piece of work and does it. Knows no frames (`desk`) and no models.
"""

from __future__ import annotations

import contextlib
import select
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol, TypeAlias

from .slots import Slots

Work: TypeAlias = Callable[[], None]

# How often it looks when only time can change something.
_TICK_S = 0.25
_TRIM_S = 10.0


class Connection(Protocol):
    """One connection, on this thread only."""

    @property
    def has_memory(self) -> bool:
        """Whether it keeps memory that time may free."""
        ...

    def fileno(self) -> int: ...

    def serve(self, readable: bool, writable: bool) -> None: ...

    def trim(self) -> None: ...

    def finish(self, limit_s: float) -> None:
        """Sends what is owed, for so long at most, and closes."""
        ...


class Poller:
    """`post` and `connected` may be called on any thread, everything else on the instance's."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._lock = threading.Lock()
        self._posted: deque[Work | None] = deque()
        self._ready: deque[Work | None] = deque()
        self._connections: list[Connection] = []
        self._selector = selectors.DefaultSelector()
        self._bell, self._ringer = socket.socketpair()
        self._bell.setblocking(False)
        self._ringer.setblocking(False)
        self._selector.register(self._bell, selectors.EVENT_READ, None)
        self._rung = False
        self._closed = False
        self._trim_s = 0.0

    def post(self, work: Work | None) -> None:
        """None: nothing comes after this."""
        with self._lock:
            if self._closed:
                return
            self._posted.append(work)
            if not self._rung:
                self._rung = True
                with contextlib.suppress(BlockingIOError):
                    self._ringer.send(b"\0")

    @property
    def connected(self) -> bool:
        """Whether any peer is still there; also while the instance's thread is busy, and has not
        read that they are gone."""
        wait, known = select.poll(), 0
        for connection in list(self._connections):
            with contextlib.suppress(ValueError):  # closed just now
                wait.register(connection.fileno(), 0)  # tells of the end alone
                known += 1
        return known > len(wait.poll(0))

    def next(self) -> Work | None:
        """Blocks until there is something to do. None: it is over."""
        while True:
            self._slots.settle()  # after the last piece of work
            self._wait()
            self._slots.settle()  # and before the next: its successor may come while it runs
            if self._ready:
                return self._ready.popleft()

    def ready(self, work: Work) -> None:
        """In its turn."""
        self._ready.append(work)

    def add(self, connection: Connection) -> None:
        self._selector.register(connection.fileno(), selectors.EVENT_READ, connection)
        self._connections.append(connection)

    def watch(self, connection: Connection, writing: bool) -> None:
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if writing else 0)
        self._selector.modify(connection.fileno(), events, connection)

    def remove(self, connection: Connection) -> None:
        """Before its socket is closed."""
        if connection in self._connections:
            self._connections.remove(connection)
            with contextlib.suppress(KeyError):  # a `watch` that failed has done so already
                self._selector.unregister(connection.fileno())

    def last(self) -> list[Work]:
        """After the end was posted: what has come all the same."""
        self._wait(0.0)
        left = [work for work in self._ready if work is not None]
        self._ready.clear()
        return left

    def finish(self, limit_s: float) -> None:
        """After the last piece of work."""
        until_s = time.monotonic() + limit_s
        for connection in list(self._connections):
            connection.finish(max(0.0, until_s - time.monotonic()))
        with self._lock:
            self._closed = True
        self._selector.close()
        self._bell.close()
        self._ringer.close()

    def _wait(self, timeout_s: float | None = None) -> None:
        if timeout_s is None:
            timeout_s = self._timeout_s()
        for key, events in self._selector.select(timeout_s):
            if key.data is None:
                self._answer_bell()
            elif key.data in self._connections:  # another's turn may have closed it
                reading = bool(events & selectors.EVENT_READ)
                key.data.serve(reading, bool(events & selectors.EVENT_WRITE))
        if self._trim_s and time.monotonic() >= self._trim_s:
            self._trim_s = 0.0
            for connection in list(self._connections):  # one that is lost meanwhile is removed
                connection.trim()

    def _timeout_s(self) -> float | None:
        # Also where there is always something to do: memory is most of all kept there.
        if not self._trim_s and any(one.has_memory for one in self._connections):
            self._trim_s = time.monotonic() + _TRIM_S
        if self._ready:
            return 0.0
        if self._slots.unsettled:
            return _TICK_S
        return max(0.0, self._trim_s - time.monotonic()) if self._trim_s else None

    def _answer_bell(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._bell.recv(64)
        with self._lock:
            self._rung = False
            self._ready.extend(self._posted)
            self._posted.clear()
