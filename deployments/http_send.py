"""What is done to an ASGI answer on its way out, whoever made it.

Owns whole replies, answers to HEAD, and the last answer of a connection. Called by `http`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from .http_body import Message
from .http_replies import CLOSE, Field

Send = Callable[[Message], Awaitable[None]]


async def reply(send: Send, status: int, fields: list[Field], body: bytes) -> None:
    fields = [*fields, (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": fields})
    await send({"type": "http.response.body", "body": body})


def without_body(send: Send) -> Send:
    async def send_head(message: Message) -> None:
        await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

    return send_head


def closing(send: Send) -> Send:
    """Tells the client to close its connection."""

    async def send_last(message: Message) -> None:
        if message["type"] == "http.response.start":
            fields = [field for field in message["headers"] if field[0] != CLOSE[0]]
            message = {**message, "headers": [*fields, CLOSE]}
        await send(message)

    return send_last
