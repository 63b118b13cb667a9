"""The metrics port: one page over plain ASGI, GET and nothing else, as tritonserver has it.

What stands on the page is not its business: `render` makes it. Called by the listener.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from .errors import MethodNotAllowed
from .http_body import Message, Receive
from .http_replies import JSON, Field, error_body, error_reply

TEXT: Field = (b"content-type", b"text/plain; charset=utf-8")

Send = Callable[[Message], Awaitable[None]]


class MetricsApp:
    def __init__(self, render: Callable[[], Awaitable[str]]) -> None:
        self._render = render

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        status, fields, body = await self._answer(scope)
        fields = [*fields, (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": status, "headers": fields})
        hidden = scope["method"] == "HEAD"
        await send({"type": "http.response.body", "body": b"" if hidden else body})

    async def _answer(self, scope: Message) -> tuple[int, list[Field], bytes]:
        if scope["path"] not in ("/metrics", "/metrics/"):
            return 404, [JSON], error_body("Not Found")
        try:
            if scope["method"] != "GET":
                raise MethodNotAllowed()
            return 200, [TEXT], (await self._render()).encode()
        except Exception as error:
            return error_reply(error, dict(scope["headers"]))
