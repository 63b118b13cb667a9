"""The HTTP listener's own limits, over real sockets: headers too big, too slow, and the drain."""

from __future__ import annotations

import asyncio
import logging
import logging.handlers
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import uvicorn

from configs.server import ServerSettings
from deployments.listener import HttpListener
from deployments.ports import PortClaim

REQUEST = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def app(scope: Any, receive: Any, send: Any) -> None:
    await send(
        {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]}
    )
    await send({"type": "http.response.body", "body": b"ok"})


def drive(use: Callable[[HttpListener, int], Awaitable[None]], read_timeout_s: float = 30) -> None:
    async def run() -> None:
        settings = ServerSettings(http_max_header_bytes=1024, http_read_timeout_s=read_timeout_s)
        claim = PortClaim("127.0.0.1", 0, "test")
        listener = HttpListener(claim, app, settings)
        listener.start()
        await asyncio.sleep(0.05)
        try:
            await use(listener, claim.port)
        finally:
            await asyncio.wait_for(listener.drain(), 10)

    asyncio.run(run())


async def connect(port: int) -> Connection:
    return await asyncio.open_connection("127.0.0.1", port)


async def ask(connection: Connection, data: bytes) -> bytes:
    """What comes back, up to the end of the body or of the connection."""
    reader, writer = connection
    writer.write(data)
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
    size = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
    return head + await asyncio.wait_for(reader.readexactly(size), 10)


def test_headers_that_do_not_end_are_cut_off() -> None:
    async def use(listener: HttpListener, port: int) -> None:
        endless = await connect(port)
        reply = await ask(endless, b"GET / HTTP/1.1\r\nx: " + b"a" * 2048)
        assert reply.startswith(b"HTTP/1.1 431") and b'{"error"' in reply
        assert await asyncio.wait_for(endless[0].read(), 10) == b""  # and it is closed
        assert (await ask(await connect(port), REQUEST)).endswith(b"ok")

    drive(use)


def test_a_client_that_sends_no_headers_is_let_go() -> None:
    async def use(listener: HttpListener, port: int) -> None:
        silent, slow = await connect(port), await connect(port)
        slow[1].write(b"GET / HTTP/1.1\r\nx:")
        for reader, _ in (silent, slow):
            assert await asyncio.wait_for(reader.read(), 10) == b""

    drive(use, read_timeout_s=0.2)


def test_control_a_kept_connection_is_not_let_go_by_that_deadline() -> None:
    async def use(listener: HttpListener, port: int) -> None:
        connection = await connect(port)
        for _ in range(3):
            assert (await ask(connection, REQUEST)).endswith(b"ok")
            await asyncio.sleep(0.4)

    drive(use, read_timeout_s=0.2)


def test_a_drained_listener_is_gone() -> None:
    async def use(listener: HttpListener, port: int) -> None:
        assert (await ask(await connect(port), REQUEST)).endswith(b"ok")
        assert listener.alive()
        await asyncio.wait_for(listener.drain(), 10)
        assert not listener.alive()
        try:
            await connect(port)
        except ConnectionRefusedError:
            return
        raise AssertionError("the port still accepts connections")

    drive(use)


def test_what_waits_to_be_accepted_when_it_leaves_is_answered() -> None:
    """Closing the socket would reset it, though another Router has the same port."""

    async def use(listener: HttpListener, port: int) -> None:
        waiting = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
        for one in waiting:
            one.sendall(REQUEST)
        await asyncio.wait_for(listener.drain(), 10)
        for one in waiting:
            with one:
                one.settimeout(10)
                assert one.recv(4096).startswith(b"HTTP/1.1 200")

    drive(use)


def test_the_logs_of_others_stay_as_they_are() -> None:
    """Serve's controller, when it comes back, asks a Router where its handler writes, and stops one
    that cannot say."""
    handler = logging.handlers.MemoryHandler(1, target=logging.NullHandler())

    async def use(listener: HttpListener, port: int) -> None:
        assert handler.target is not None

    drive(use)


def test_control_uvicorns_own_configuration_closes_them() -> None:
    handler = logging.handlers.MemoryHandler(1, target=logging.NullHandler())
    uvicorn.Config(app)
    assert handler.target is None
