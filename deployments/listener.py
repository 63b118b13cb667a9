"""The Router's own listeners: HTTP and metrics by uvicorn, gRPC by grpc.aio, on shared ports.

Owns sockets, start, drain and stop, and the limits on headers that uvicorn does not have. Decides
nothing about requests. Called by the Router.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any

import grpc
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from configs.server import ServerSettings

from .ports import PortClaim

logger = logging.getLogger("ray.serve")

KEEP_ALIVE_S = 75
BACKLOG = 2048
# Clients that keep a connection get this long to be told `Connection: close` and leave.
DRAIN_WINDOW_S = 1.0

_TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\n"
    b'content-length: 39\r\nconnection: close\r\n\r\n{"error":"request headers are too big"}'
)


def limited_protocol(max_header_bytes: int, read_timeout_s: float) -> type[asyncio.Protocol]:
    """uvicorn's own protocol with a cap and a deadline on what comes before a body."""

    class LimitedProtocol(HttpToolsProtocol):  # type: ignore[misc]
        """Counts from the first byte of a request to the end of its headers."""

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
            if self._in_headers and self._header_bytes > max_header_bytes:
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
            self._header_timer = self.loop.call_later(read_timeout_s, self.transport.close)

        def _headers_over(self) -> None:
            self._in_headers = False
            if self._header_timer is not None:
                self._header_timer.cancel()
                self._header_timer = None

    return LimitedProtocol


class HttpListener:
    """One ASGI app on one claimed port."""

    def __init__(self, claim: PortClaim, app: Any, settings: ServerSettings) -> None:
        self._claim = claim
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                http=limited_protocol(settings.http_max_header_bytes, settings.http_read_timeout_s),
                ws="none",
                lifespan="off",
                loop="none",
                log_level="warning",
                access_log=False,
                proxy_headers=False,
                backlog=BACKLOG,
                server_header=False,
                date_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=max(1, int(settings.exit_timeout_s)),
            )
        )
        # Signals belong to the process that starts the server, not to a replica.
        self._server.capture_signals = contextlib.nullcontext
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(
            self._server.serve(sockets=[self._claim.socket])
        )

    def alive(self) -> bool:
        return self._task is None or not self._task.done()

    async def drain(self) -> None:
        """Stop accepting, let clients of kept connections leave, answer what is in flight."""
        if self._task is None:
            self._claim.close()
            return
        for server in getattr(self._server, "servers", ()):
            server.close()
        loop = asyncio.get_running_loop()
        end_s = loop.time() + DRAIN_WINDOW_S
        while self._server.server_state.connections and loop.time() < end_s:
            await asyncio.sleep(0.02)
        self._server.should_exit = True
        with contextlib.suppress(Exception):
            await self._task
        self._claim.close()


class GrpcListener:
    """grpc.aio on one claimed port; the claim's own socket only holds the place."""

    def __init__(
        self, claim: PortClaim, add_servicer: Callable[[Any], None], settings: ServerSettings
    ) -> None:
        limit = min(settings.max_body_bytes, 2**31 - 1)
        self._claim = claim
        self._grace_s = settings.exit_timeout_s
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", limit),
                ("grpc.max_send_message_length", 2**31 - 1),
                ("grpc.so_reuseport", 1),
            ]
        )
        add_servicer(self._server)
        self._started = False

    async def start(self) -> None:
        claim = self._claim
        host = f"[{claim.address}]" if ":" in claim.address else claim.address
        self._server.add_insecure_port(f"{host}:{claim.port}")
        await self._server.start()
        self._started = True

    async def drain(self) -> None:
        if self._started:
            await self._server.stop(self._grace_s)
        self._claim.close()


class Listener:
    """All open edges of one Router: claimed in the constructor, opened and drained together."""

    def __init__(
        self,
        settings: ServerSettings,
        owner: str,
        http_app: Any,
        metrics_app: Any,
        add_servicer: Callable[[Any], None],
    ) -> None:
        self._http: list[HttpListener] = []
        self._grpc: list[GrpcListener] = []
        self.ports: dict[str, int] = {}
        by_router = settings.listener == "router"
        claims: list[PortClaim] = []
        try:
            # With Serve's own proxy in front only the metrics are ours.
            for edge in ("http", "grpc", "metrics") if by_router else ("metrics",):
                if getattr(settings, f"allow_{edge}"):
                    address = getattr(settings, f"{edge}_address")
                    claims.append(PortClaim(address, getattr(settings, f"{edge}_port"), owner))
                    self.ports[edge] = claims[-1].port
        except BaseException:
            for claim in claims:
                claim.close()
            raise
        for edge, claim in zip(self.ports, claims, strict=True):
            if edge == "grpc":
                self._grpc.append(GrpcListener(claim, add_servicer, settings))
            else:
                app = http_app if edge == "http" else metrics_app
                self._http.append(HttpListener(claim, app, settings))

    async def open(self) -> None:
        for grpc_listener in self._grpc:
            await grpc_listener.start()
        for http_listener in self._http:
            http_listener.start()
        logger.info("listening on %s", self.ports)

    def alive(self) -> bool:
        return all(listener.alive() for listener in self._http)

    async def drain(self) -> None:
        await asyncio.gather(
            *(listener.drain() for listener in self._http),
            *(listener.drain() for listener in self._grpc),
        )
