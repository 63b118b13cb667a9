"""The metrics port: one page of text (spec/server.md §5.2). Called by the listener."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from .errors import HTTP_STATUS, MantaError

logger = logging.getLogger("manta.http")


class MetricsApp:
    """ASGI: GET /metrics, 405 for other methods, 404 elsewhere."""

    def __init__(self, render: Callable[[], Awaitable[str]]) -> None:
        self._render = render

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        status, text = await self._answer(scope["path"], scope["method"])
        body = text.encode()
        headers = [
            (b"content-type", b"text/plain; charset=utf-8"),
            (b"content-length", b"%d" % len(body)),
        ]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        body = b"" if scope["method"] == "HEAD" else body
        await send({"type": "http.response.body", "body": body})

    async def _answer(self, path: str, method: str) -> tuple[int, str]:
        if path != "/metrics":
            return 404, "Not Found\n"
        if method not in ("GET", "HEAD"):
            return 405, "Method Not Allowed\n"
        try:
            return 200, await self._render()
        except MantaError as error:
            return HTTP_STATUS[error.code], f"{error}\n"
        except Exception:
            logger.exception("metrics could not be rendered")
            return 500, "internal error\n"
