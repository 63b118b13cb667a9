"""Reading an HTTP request's body within limits, and noticing that its client has left.

uvicorn has no limits and no read deadline of its own, so they are here: size (announced, streamed
and inflated), chunks, encoding, time. Knows nothing of the protocol; the roads over HTTP call it.
"""

from __future__ import annotations

import asyncio
import contextlib
from asyncio import Future
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from typing import Any

from configs.server import ServerSettings

from . import http_coding
from .errors import InvalidArgument, MantaError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Headers = Mapping[bytes, bytes]

MAX_CHUNKS = 65536
MAX_PIECES = 1024
# Most answers come sooner; only for the others is it worth a task to learn that nobody waits.
WATCH_AFTER_S = 0.05
# Fields that are lists, which may come in several pieces.
_LISTS = (b"accept-encoding", b"content-encoding")


class ClientGone(Exception):
    """Nobody is left to answer. Never leaves the HTTP edge."""


class BodyRefused(Exception):
    """Fact: the error. The rest of the body is unread, so the connection cannot be used again."""

    def __init__(self, error: MantaError) -> None:
        super().__init__(error)
        self.error = error


def fold(fields: Sequence[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """Fields by their lower-case names; of those that come twice the last, but lists are joined."""
    folded = dict(fields)
    if len(folded) != len(fields):
        for name in _LISTS:
            if name in folded:
                folded[name] = b", ".join(value for key, value in fields if key == name)
    return folded


async def read_within(
    headers: Headers, receive: Receive, limit: int, settings: ServerSettings
) -> bytes:
    """The whole body, inflated. Raises BodyRefused over a limit, ClientGone when the client leaves,
    and InvalidArgument for a body that is there and cannot be inflated."""
    try:
        coding = http_coding.of_request(headers.get(b"content-encoding"))
        if coding:
            limit = min(limit, settings.http_max_input_size_bytes)
        check_length(headers, limit)
        body = await read_body(
            receive, limit, settings.http_read_timeout_s, b"content-length" not in headers
        )
    except MantaError as error:
        raise BodyRefused(error) from None
    return await http_coding.inflate(body, coding, limit) if coding else body


def check_length(headers: Headers, limit: int) -> None:
    """What can be refused before a byte of the body is read."""
    announced = headers.get(b"content-length", b"0")
    if not announced.isdigit() or len(announced) > 19 or int(announced) >= 2**31:
        shown = announced[:64].decode("latin-1")
        raise InvalidArgument(f"Unable to parse Content-Length, got: {shown}")
    if int(announced) > limit:
        raise too_large(int(announced), limit)


def body_limit(announced: bytes | None, settings: ServerSettings) -> int:
    """The largest body; `announced` is the field that says that binary tensors are in it."""
    if announced in (None, b"0"):
        return min(settings.max_body_bytes, settings.http_max_input_size_bytes)
    return settings.max_body_bytes


def too_many_chunks() -> InvalidArgument:
    return InvalidArgument(f"request body has more than {MAX_CHUNKS} chunks")


def too_slow(limit_s: float) -> InvalidArgument:
    return InvalidArgument(f"no byte of the request's body came for {limit_s:g} s")


def too_large(size: int, limit: int) -> InvalidArgument:
    return InvalidArgument(
        f"request body of {size} bytes exceeds the maximum allowed value of {limit} bytes. Use "
        "--http-max-input-size to increase the limit, or --max-body-bytes for binary tensors."
    )


class Pieces:
    """A body as it comes. Small pieces are joined as they become many, and once more in the end:
    each would be an object with a size of its own."""

    __slots__ = ("_joined", "_last")

    def __init__(self, first: bytes) -> None:
        self._joined: list[bytes] = []
        self._last = [first]

    def add(self, piece: bytes) -> None:
        self._last.append(piece)
        if len(self._last) >= MAX_PIECES:
            self._joined.append(b"".join(self._last))
            self._last = []

    def whole(self) -> bytes:
        return b"".join([*self._joined, *self._last])


async def read_body(receive: Receive, limit: int, timeout_s: float, in_chunks: bool) -> bytes:
    """`in_chunks`: the client has cut it so. Otherwise what comes at a time is the network's."""
    message = await _in_time(receive, timeout_s)
    body: bytes = message.get("body", b"")
    if message["type"] == "http.request" and not message.get("more_body"):
        if len(body) > limit:
            raise too_large(len(body), limit)
        return body
    pieces, count, total = Pieces(body), int(bool(body)), len(body)
    while True:
        if message["type"] == "http.disconnect":
            raise ClientGone
        if total > limit:
            raise too_large(total, limit)
        if in_chunks and count > MAX_CHUNKS:
            raise too_many_chunks()
        if not message.get("more_body"):
            return pieces.whole()
        message = await _in_time(receive, timeout_s)
        body = message.get("body", b"")
        pieces.add(body)
        count, total = count + bool(body), total + len(body)  # the end has no bytes


async def _in_time(receive: Receive, limit_s: float) -> Message:
    """One message. wait_for costs a task per message, asyncio.timeout is not in Python 3.10."""
    task = asyncio.current_task()
    assert task is not None
    expired = False

    def expire() -> None:
        nonlocal expired
        expired = True
        task.cancel()

    timer = asyncio.get_running_loop().call_later(limit_s, expire)
    try:
        return await receive()
    except asyncio.CancelledError:
        if not expired or getattr(task, "uncancel", int)():
            raise
        raise too_slow(limit_s) from None
    finally:
        timer.cancel()


async def until_done(future: Future[Any], receive: Receive) -> None:
    """Wait for `future`, whatever its outcome; if the client leaves first, cancel it."""
    loop = asyncio.get_running_loop()
    watch: asyncio.Task[None] | None = None
    left = False

    async def notice() -> None:
        nonlocal left
        with contextlib.suppress(Exception):
            left = (await receive())["type"] == "http.disconnect"
        if left:
            future.cancel()

    def start() -> None:
        nonlocal watch
        watch = loop.create_task(notice())

    timer = loop.call_later(WATCH_AFTER_S, start)
    try:
        await future
    except asyncio.CancelledError:
        if left:
            raise ClientGone from None
        raise
    except Exception:
        pass  # the caller asks the future, and tells its error with the request's id
    finally:
        timer.cancel()
        if watch is not None:
            watch.cancel()
