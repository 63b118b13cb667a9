"""A peer that takes nothing is let go; one that takes a little is not."""

from __future__ import annotations

import asyncio
import socket

import pytest

from deployments.unread import Unread

BIG = b"x" * (8 << 20)


class Writer(asyncio.Protocol):
    def __init__(self, silent_s):
        self.silent_s, self.lost = silent_s, asyncio.Event()
        self.paused = 0

    def connection_made(self, transport):
        self.transport = transport
        self.unread = Unread(transport, self.silent_s)

    def pause_writing(self):
        self.paused += 1
        self.unread.watch()

    def resume_writing(self):
        self.unread.rest()

    def connection_lost(self, exc):
        self.unread.rest()
        self.lost.set()


def run(use, silent_s):
    async def main():
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        loop = asyncio.get_running_loop()
        _, writer = await loop.create_connection(lambda: Writer(silent_s), sock=ours)
        writer.transport.write(BIG)
        assert writer.paused == 1
        try:
            await asyncio.wait_for(use(writer, theirs), 30)
        finally:
            writer.transport.abort()
            theirs.close()

    asyncio.run(main())


def test_who_takes_nothing_is_let_go():
    async def use(writer, theirs):
        await writer.lost.wait()

    run(use, silent_s=0.05)


def test_who_takes_a_little_each_time_is_not():
    async def use(writer, theirs):
        taken, loop = 0, asyncio.get_running_loop()
        while taken < len(BIG):
            taken += len(await loop.sock_recv(theirs, 1 << 19))
            await asyncio.sleep(0.02)
            assert not writer.lost.is_set()

    run(use, silent_s=0.5)


def test_control_nobody_is_let_go_before_its_time():
    async def use(writer, theirs):
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(writer.lost.wait(), 0.2)

    run(use, silent_s=600)
