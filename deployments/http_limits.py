"""uvicorn's own HTTP protocol with a cap and a deadline on what comes before a body.

Owns the limits on headers and on chunks, the answer to what is no HTTP, and the end of clients that
neither send nor read: uvicorn has no limits, and a connection without a timer is a file descriptor
for ever. Called by the listener, for every port.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from . import http_body, http_replies
from .forwarding import AS_SENT

_BAD, _TOO_LARGE = b"400 Bad Request", b"431 Request Header Fields Too Large"
_REFUSAL = (
    b"HTTP/1.1 %b\r\ncontent-type: application/json\r\n"
    b"connection: close\r\ncontent-length: %d\r\n\r\n%b"
)


class LimitedProtocol(HttpToolsProtocol):  # type: ignore[misc]
    """Counts from the first byte of a request to the end of its headers."""

    max_header_bytes: int
    read_timeout_s: float

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._header_bytes = 0
        self._chunks = 0
        self._in_headers = True
        self._header_timer: asyncio.TimerHandle | None = None
        self._between = True  # the parser is at the end of a message, or before the first
        self._fresh_bytes = 0  # of this read, if the message that begins next begins with it
        self._flush_timer: asyncio.TimerHandle | None = None
        self._unsent = 0
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._headers_over()
        self._flush_over()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._in_headers:
            self._header_bytes += len(data)
        self._fresh_bytes = len(data) if self._between else 0
        super().data_received(data)
        if self._headers_too_large() and not self.transport.is_closing():
            self._end_with(_TOO_LARGE, "request headers are too big")
        if self.transport.is_closing():
            self._watch_flush()
        elif self.timeout_keep_alive_task is None and self._header_timer is None:
            self._watch_idle()

    def _watch_idle(self) -> None:
        """uvicorn has stopped its timer for what is no request: line feeds between two, or the
        body of one that is answered."""
        if self.cycle is None or self.cycle.response_complete:
            wait_s = self.timeout_keep_alive if self._between else self.read_timeout_s
            self.timeout_keep_alive_task = self.loop.call_later(
                wait_s, self.timeout_keep_alive_handler
            )

    def on_message_begin(self) -> None:
        if not self._in_headers:
            self._expect_headers()
            self._header_bytes = self._fresh_bytes
        self._between, self._fresh_bytes, self._chunks = False, 0, 0
        super().on_message_begin()

    def on_message_complete(self) -> None:
        self._between = True
        super().on_message_complete()

    def on_headers_complete(self) -> None:
        super().on_headers_complete()  # which raises for a path that is none
        self._headers_over()

    def on_chunk_header(self) -> None:
        """Who reads the body gets many small chunks as one: only here can they be counted."""
        self._chunks += 1
        # The last one is empty, and none of them.
        if self._chunks > http_body.MAX_CHUNKS + 1 and not self.transport.is_closing():
            self._end_with(_BAD, str(http_body.too_many_chunks()))

    def send_400_response(self, msg: str) -> None:
        """uvicorn's answer to what is no HTTP, in the form of all other errors."""
        if self._headers_too_large():
            self._end_with(_TOO_LARGE, "request headers are too big")
        else:
            self._end_with(_BAD, msg)

    def _headers_too_large(self) -> bool:
        return self._in_headers and self._header_bytes > self.max_header_bytes

    def _end_with(self, status: bytes, text: str) -> None:
        """Ends the connection; says why, unless it would be taken for the answer to a request
        before this one or stand in the middle of an answer."""
        cycle = self.cycle
        if cycle is None:
            alone = True
        elif self._in_headers or self._between:
            alone = cycle.response_complete  # that of the request before
        else:
            alone = not cycle.response_started
        if alone and not self.pipeline:
            body = http_replies.error_body(text)
            self.transport.write(_REFUSAL % (status, len(body), body))
        self._headers_over()
        self._end()
        if cycle is not None:
            # Who reads this body reads no more of it, and has nobody to answer.
            cycle.disconnected = cycle.response_complete = True
            cycle.message_event.set()

    def _expect_headers(self) -> None:
        self._in_headers, self._header_bytes = True, 0
        self._header_timer = self.loop.call_later(self.read_timeout_s, self._end)

    def _headers_over(self) -> None:
        self._in_headers = False
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    # --- clients that do not read ----------------------------------------------------------------

    def _end(self) -> None:
        self.transport.close()
        self._watch_flush()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._watch_flush()

    def shutdown(self) -> None:
        super().shutdown()
        self._watch_flush()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_flush()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_flush()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            self._flush_over()

    def _watch_flush(self) -> None:
        """From when nothing more is written until what was written has left."""
        stopped = self.flow.write_paused or self.transport.is_closing()
        if stopped and self._flush_timer is None:
            self._unsent = self.transport.get_write_buffer_size()
            if self._unsent:
                self._flush_timer = self.loop.call_later(self.timeout_keep_alive, self._look)

    def _look(self) -> None:
        self._flush_timer = None
        if self.transport.get_write_buffer_size() >= self._unsent:
            self.transport.abort()  # to close would wait for the client
        else:
            self._watch_flush()

    def _flush_over(self) -> None:
        if self._flush_timer is not None:
            self._flush_timer.cancel()
            self._flush_timer = None


def keep_names(connection: LimitedProtocol, name: bytes, value: bytes) -> None:
    """A field as uvicorn takes it, and beside it with its name as it was sent."""
    HttpToolsProtocol.on_header(connection, name, value)
    extensions = connection.scope.setdefault("extensions", {})
    extensions.setdefault(AS_SENT, []).append((name, value))


def limited_protocol(
    max_header_bytes: int, read_timeout_s: float, keeps_names: bool = False
) -> type[LimitedProtocol]:
    """uvicorn makes one of these per connection and gives it nothing of ours."""

    class Limited(LimitedProtocol):
        pass

    Limited.max_header_bytes, Limited.read_timeout_s = max_header_bytes, read_timeout_s
    if keeps_names:
        Limited.on_header = keep_names
    return Limited
