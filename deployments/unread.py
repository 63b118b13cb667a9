"""The end of connections whose peer takes nothing of what was written to it.

Owns a timer that runs only while a transport's buffer is full, so that others pay nothing for it.
Called by the gRPC lane; HTTP has its own in `http_limits`, where uvicorn has timers, too.
"""

from __future__ import annotations

import asyncio

SILENT_S = 600.0


class Unread:
    """Between `watch` and `rest`, aborts the connection when no byte has left it for `silent_s`."""

    __slots__ = ("_bytes", "_silent_s", "_timer", "_transport")

    def __init__(self, transport: asyncio.Transport, silent_s: float = SILENT_S) -> None:
        self._transport = transport
        self._silent_s = silent_s
        self._timer: asyncio.TimerHandle | None = None
        self._bytes = 0

    def watch(self) -> None:
        self._bytes = self._transport.get_write_buffer_size()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._silent_s, self._look)

    def rest(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        if self._transport.get_write_buffer_size() >= self._bytes:
            self._transport.abort()  # to close would wait for the peer
        else:
            self.watch()
