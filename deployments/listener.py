"""The Router's own listeners on shared ports: HTTP and metrics by uvicorn, gRPC beside them.

Owns sockets, start, drain and stop of HTTP, and of all edges together (gRPC's is `grpc_listener`).
Decides nothing about requests. Called by the Router.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import select
import socket
from collections.abc import Callable
from typing import Any

import uvicorn

from configs import grpc_tls
from configs.server import ServerSettings

from .grpc_listener import GrpcListener
from .http import HttpApp
from .http_lane import lane_protocol
from .http_limits import limited_protocol
from .ports import PortClaim

logger = logging.getLogger("ray.serve")

KEEP_ALIVE_S = 75
BACKLOG = 2048
# Turns of the loop in which what it has accepted becomes a connection.
SETTLE_TURNS = 3
# Clients that keep a connection get this long to be told `Connection: close` and leave.
DRAIN_WINDOW_S = 1.0


class HttpListener:
    """One ASGI app on one claimed port; infer calls of ours take the lane."""

    def __init__(self, claim: PortClaim, app: Any, settings: ServerSettings) -> None:
        self._claim = claim
        # Of a claimed socket asyncio does not see that it is TCP, and would leave answers in two
        # pieces to Nagle: 40 ms each. Connections inherit it.
        claim.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                http=_protocol(app, settings),
                ws="none",
                lifespan="off",
                loop="none",
                # Its own would close all handlers of this process, and Serve asks a Router for the
                # place of its log: one that fails to answer is stopped.
                log_config=None,
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
        await self._accept_all()
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

    async def _accept_all(self) -> None:
        """What waits to be accepted when the socket is closed would be reset. The loop accepts one
        or all in a turn, whichever it is; those that go on coming are not waited for."""
        if self._claim.socket.fileno() < 0:
            return
        look = select.poll()
        look.register(self._claim.socket, select.POLLIN)
        for _ in range(BACKLOG):
            if not look.poll(0):
                break
            await asyncio.sleep(0)
        for _ in range(SETTLE_TURNS):
            await asyncio.sleep(0)


def _protocol(app: Any, settings: ServerSettings) -> type[asyncio.Protocol]:
    if settings.http_lane and isinstance(app, HttpApp):
        lane: type[asyncio.Protocol] = lane_protocol(app, settings)
        return lane
    limited: type[asyncio.Protocol] = limited_protocol(
        settings.http_max_header_bytes,
        settings.http_read_timeout_s,
        bool(settings.http_header_forward_pattern),
    )
    return limited


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
        if by_router:
            grpc_tls.certificates(settings)  # who starts us hears what is wrong with them
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
                inference = http_app.inference if isinstance(http_app, HttpApp) else None
                self._grpc.append(GrpcListener(claim, add_servicer, settings, inference))
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
        http = all(listener.alive() for listener in self._http)
        return http and all(listener.alive() for listener in self._grpc)

    async def drain(self) -> None:
        await asyncio.gather(
            *(listener.drain() for listener in self._http),
            *(listener.drain() for listener in self._grpc),
        )
