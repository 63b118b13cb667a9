"""What an instance does about Routers that break the rules: they go, and nobody else notices."""

from __future__ import annotations

import asyncio
import os
import socket
from unittest import mock

import numpy as np
import pytest

from deployments import channel
from deployments.arena import Arenas
from deployments.channel import Layout
from deployments.codec import Codec
from deployments.desk import Desk
from deployments.errors import ReplicaLost
from tests import models

from .channels import batch_of, drive, place, rows, until, whole

BATCH = batch_of(*rows(2))


def words(kind: int = channel.BATCH, flags: int = 0, header: bytes | None = None) -> bytes:
    layout = Codec().batch(BATCH)
    data = b"".join(p if isinstance(p, bytes) else p.tobytes() for p in layout.pieces)
    made = Layout(layout.header if header is None else header, [], layout.size)
    return channel.head(kind, made, flags) + data


async def answer(sock: socket.socket) -> bytes:
    """What comes until the instance hangs up; and what it says once it has read everything."""
    loop = asyncio.get_running_loop()
    data = b""
    while True:
        try:
            more = await asyncio.wait_for(loop.sock_recv(sock, 1 << 20), 0.3)
        except asyncio.TimeoutError:
            return data + b"(open)"
        except ConnectionResetError:
            return data
        if not more:
            return data
        data += more


def attached(at) -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    ours.setblocking(False)
    at.instance.attach(theirs, "router-2")
    return ours


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\n" * 8,
        b"\0" * 640,
        words(header=b"{}"),
        words(header=b"[" * 3000),
        words(channel.REPLY),
        words(channel.HELLO),
        words(channel.LIMIT),
        words(flags=channel.NEW_ARENA),
        channel.head(channel.BATCH, Layout(b"{}", [], 64), channel.IN_ARENA, 1, 0, 9, 64),
        channel.PREFIX.pack(channel.MAGIC, channel.VERSION, channel.BATCH, 0, 0, 2 << 30, *[0] * 4),
    ],
)
def test_a_router_that_breaks_the_rules_loses_its_connection_only(said):
    @drive
    async def bad() -> None:
        async with place(models.identity()) as at:
            good = await at.connect()
            sock = attached(at)
            await asyncio.get_running_loop().sock_sendall(sock, said)
            assert not (await answer(sock)).endswith(b"(open)")
            sock.close()
            (part,) = (await good.execute(BATCH)).parts
            np.testing.assert_array_equal(part.outputs["y"].data, whole(BATCH))
            assert at.instance.slots.held == 0
            await good.aclose()

    bad()


@drive
async def test_control_the_same_by_the_rules_is_answered():
    async with place(models.identity()) as at:
        sock = attached(at)
        await asyncio.get_running_loop().sock_sendall(sock, words() + words(channel.WANT, 0, b""))
        said = await answer(sock)
        assert said.endswith(b"(open)")
        kinds = []
        data = np.frombuffer(said.removesuffix(b"(open)"), np.uint8)
        while data.nbytes:
            kinds.append(channel.parse(data).kind)
            data = data[channel.frame_bytes(data.tobytes()) :]
        assert kinds == [channel.LIMIT, channel.REPLY]
        sock.close()


@drive
async def test_memory_that_could_shrink_under_a_run_is_not_read():
    async with place(models.identity()) as at:
        for sealed in (True, False):
            sock = attached(at)
            layout = Codec().batch(BATCH)
            arena = Arenas().take(layout.size)
            assert arena is not None
            arena.write(layout.pieces)
            fd = os.dup(arena.fd) if sealed else os.memfd_create("t", os.MFD_ALLOW_SEALING)
            os.ftruncate(fd, arena.size)
            flags = channel.IN_ARENA | channel.NEW_ARENA
            head = channel.head(channel.BATCH, layout, flags, 1, 0, 1, arena.size)
            socket.send_fds(sock, [head], [fd])
            os.close(fd)
            assert (await answer(sock)).endswith(b"(open)") is sealed
            sock.close()
            arena.close()


@drive
async def test_a_router_that_does_not_read_holds_up_nobody():
    async with place(models.identity()) as at:
        good = await at.connect()
        slow = attached(at)
        large = batch_of(*rows(2, 20_000))
        layout = Codec().batch(large)
        data = b"".join(p if isinstance(p, bytes) else p.tobytes() for p in layout.pieces)
        frame = channel.head(channel.BATCH, layout) + data
        for _ in range(10):  # its answers pile up
            await asyncio.get_running_loop().sock_sendall(slow, frame)
        answered = 0
        while answered < 20:
            if good.idle:
                reply = await good.execute(BATCH)
                answered += not reply.refused
            else:
                good.want()
                await asyncio.sleep(0.001)
        slow.close()
        await until(lambda: at.instance.slots.held == 0)
        await good.aclose()


def connections(at) -> int:
    return len(at.instance._poller._connections)


def desk_of(at) -> Desk:
    (desk,) = at.instance._poller._connections
    assert isinstance(desk, Desk)
    return desk


@drive
async def test_connections_leave_no_descriptors_behind():
    async with place(models.identity()) as at:
        client = await at.connect()
        await client.execute(batch_of(*rows(2, 200_000)))
        await client.aclose()
        await until(lambda: not connections(at))
        await asyncio.wrap_future(at.instance._post(lambda: None))  # closed, and not only removed
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(5):
            client = await at.connect()
            for _ in range(3):
                await client.execute(batch_of(*rows(2, 200_000)))
            await client.aclose()
            await until(lambda: not connections(at))
        await asyncio.wrap_future(at.instance._post(lambda: None))  # closed, and not only removed
        assert len(os.listdir("/proc/self/fd")) <= before


@drive
async def test_an_instance_that_is_closed_closes_what_comes():
    async with place(models.identity()) as at:
        await asyncio.to_thread(at.instance.close)
        assert await answer(attached(at)) == b""


@pytest.mark.parametrize("method", ["send", "flush"])
def test_an_error_of_the_system_ends_one_connection_and_not_the_thread(method):
    @drive
    async def one() -> None:
        async with place(models.identity()) as at:
            doomed = await at.connect()
            desk = desk_of(at)
            with mock.patch.object(desk._stream, method, side_effect=OSError(24, "too many")):
                if method == "send":
                    with pytest.raises(ReplicaLost):
                        await doomed.execute(BATCH)
                else:
                    at.instance._post(lambda: desk.finish(0.1))
                await until(lambda: not doomed.open)
            good = await at.connect()
            assert (await good.execute(BATCH)).parts[0].error is None
            assert connections(at) == at.instance.slots.parties == 1
            await good.aclose()

    one()


@drive
async def test_memory_that_cannot_be_trimmed_ends_one_connection():
    async with place(models.identity()) as at:
        client = await at.connect()
        desk = desk_of(at)
        with mock.patch.object(desk._arenas, "trim", side_effect=MemoryError):
            await asyncio.wrap_future(at.instance._post(desk.trim))
        await until(lambda: not client.open)
        assert at.instance.slots.parties == 0
