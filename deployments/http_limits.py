"""uvicorn's own HTTP protocol with a cap and a deadline on what comes before a body.

Owns the limits on headers, which uvicorn does not have. Called by the listener, for every port.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\n"
    b'content-length: 39\r\nconnection: close\r\n\r\n{"error":"request headers are too big"}'
)


class LimitedProtocol(HttpToolsProtocol):  # type: ignore[misc]
    """Counts from the first byte of a request to the end of its headers."""

    max_header_bytes: int
    read_timeout_s: float

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._header_bytes = 0
        self._in_headers = True
        self._header_timer: asyncio.TimerHandle | None = None
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._headers_over()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._in_headers:
            self._header_bytes += len(data)
        super().data_received(data)
        if self._in_headers and self._header_bytes > self.max_header_bytes:
            self._headers_over()
            if not self.transport.is_closing():
                self.transport.write(_TOO_LARGE)
                self.transport.close()

    def on_message_begin(self) -> None:
        if not self._in_headers:
            self._expect_headers()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._headers_over()
        super().on_headers_complete()

    def _expect_headers(self) -> None:
        self._in_headers, self._header_bytes = True, 0
        self._header_timer = self.loop.call_later(self.read_timeout_s, self.transport.close)

    def _headers_over(self) -> None:
        self._in_headers = False
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None


def limited_protocol(max_header_bytes: int, read_timeout_s: float) -> type[LimitedProtocol]:
    """uvicorn makes one of these per connection and gives it nothing of ours."""

    class Limited(LimitedProtocol):
        pass

    Limited.max_header_bytes, Limited.read_timeout_s = max_header_bytes, read_timeout_s
    return Limited
