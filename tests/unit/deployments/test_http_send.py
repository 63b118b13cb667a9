"""ASGI answers on their way out."""

from __future__ import annotations

import asyncio

import pytest

from deployments import http_send
from deployments.http_replies import CLOSE, JSON

KEEP = (b"connection", b"keep-alive")


async def sent(wrap):
    """What leaves of one whole reply."""
    messages: list = []

    async def send(message):
        messages.append(message)

    await http_send.reply(wrap(send), 200, [JSON, KEEP], b"{}")
    return messages


@pytest.mark.parametrize(
    ("wrap", "fields", "body"),
    [
        (lambda send: send, [JSON, KEEP, (b"content-length", b"2")], b"{}"),
        (http_send.without_body, [JSON, KEEP, (b"content-length", b"2")], b""),
        (http_send.closing, [JSON, (b"content-length", b"2"), CLOSE], b"{}"),
    ],
)
def test_a_reply(wrap, fields, body):
    start, end = asyncio.run(sent(wrap))
    assert (start["status"], start["headers"]) == (200, fields)
    assert end == {"type": "http.response.body", "body": body}
