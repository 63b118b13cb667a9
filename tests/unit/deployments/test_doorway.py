"""Who is let in at a replica's door, and what is left behind when it closes."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import stat
import tempfile
from pathlib import Path

import pytest

from deployments import channel, doorway
from deployments.channel import Hello, Layout
from deployments.doorway import Doorway
from deployments.types import ChannelAddress

from .channels import drive, until


@pytest.fixture(autouse=True)
def short_tmp(monkeypatch):
    """pytest's own folders have long names, and sockets need short ones."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


class Admitted(list):
    def __call__(self, instance: int, sock: socket.socket, router_id: str) -> None:
        self.append((instance, router_id))
        sock.close()


def hello(token: str, instance: int = 0) -> bytes:
    return channel.head(channel.HELLO, Hello(token, "router-1", instance).layout())


async def say(address: ChannelAddress, *parts: bytes) -> bytes:
    """What the door answers, until it closes."""
    reader, writer = await asyncio.open_unix_connection(address.path)
    for part in parts:
        writer.write(part)
        await asyncio.sleep(0.01)
    try:
        answer = await asyncio.wait_for(reader.read(), 10)
    except ConnectionResetError:
        answer = b""
    writer.close()
    return answer


@drive
async def test_who_knows_the_token_is_admitted():
    admitted = Admitted()
    door = Doorway(2, admitted)
    address = door.open()
    assert address is not None
    words = hello(address.token, 1)
    for parts in ([words], [words[:10], words[10:70], words[70:]]):
        assert await say(address, *parts) == channel.head(channel.WELCOME)
    assert admitted == [(1, "router-1")] * 2
    door.close()


@drive
async def test_everybody_else_is_not():
    admitted = Admitted()
    door = Doorway(2, admitted)
    address = door.open()
    assert address is not None
    good = hello(address.token)
    for words in (
        hello("0" * 64),
        hello(""),
        hello("ä"),
        hello(address.token, 2),
        b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n" + b" " * 64,
        b"X" + good[1:],
        channel.head(channel.BATCH, Hello(address.token, "r", 0).layout()),
        channel.head(channel.HELLO, Layout(b"{}", [], 0)),
        channel.head(channel.HELLO, Layout(b"{" * 8000, [], 0)),
    ):
        assert await say(address, words) == b""
    assert admitted == []
    assert await say(address, good) == channel.head(channel.WELCOME)
    door.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
@drive
async def test_another_user_is_not_admitted_even_with_the_token():
    admitted = Admitted()
    door = Doorway(1, admitted)
    address = door.open()
    assert address is not None
    path = Path(address.path)
    with socket.socket(socket.AF_UNIX) as other:
        os.seteuid(65534)
        try:
            with pytest.raises(PermissionError):  # the directory is in the way
                other.connect(address.path)
        finally:
            os.seteuid(0)
        for place in (path, path.parent, path.parent.parent):
            place.chmod(0o777)
        os.seteuid(65534)
        try:
            other.connect(address.path)
        finally:
            os.seteuid(0)
        other.sendall(hello(address.token))
        other.setblocking(False)
        try:
            assert await asyncio.get_running_loop().sock_recv(other, 100) == b""
        except ConnectionResetError:
            pass
    assert admitted == []
    door.close()


@drive
async def test_who_says_nothing_has_to_leave():
    door = Doorway(1, Admitted())
    doorway.HELLO_S, before = 0.05, doorway.HELLO_S
    try:
        address = door.open()
        assert address is not None
        assert await say(address) == b""
        assert await say(address, hello(address.token)[:40]) == b""
    finally:
        doorway.HELLO_S = before
        door.close()


@drive
async def test_the_directory_is_ours_alone_and_goes_with_the_door():
    door = Doorway(1, Admitted())
    address = door.open()
    assert address is not None
    directory = Path(address.path).parent
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert len(address.path) < 100
    idle = asyncio.create_task(say(address))
    await asyncio.sleep(0.05)
    door.close()
    assert not directory.exists()
    assert await idle == b""
    door.close()


def test_what_dead_processes_left_is_swept(short_tmp):
    @drive
    async def sweep() -> None:
        door = Doorway(1, Admitted())
        address = door.open()
        assert address is not None
        dead = short_tmp / "manta-channel-dead"
        dead.mkdir(mode=0o700)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(dead / "socket"))  # closed without a trace, as by SIGKILL
        for folder in (dead, Path(address.path).parent):
            os.utime(folder, (1, 1))
        young, old, other = (
            short_tmp / f"manta-channel-{name}" for name in ("young", "old", "other")
        )
        for folder in (young, old, other):
            folder.mkdir()
        (other / "file").write_text("not ours")
        os.utime(old, (1, 1))
        os.utime(other, (1, 1))
        doorway.sweep(str(short_tmp))
        await until(lambda: not dead.exists())
        assert not old.exists() and young.exists() and other.exists()
        assert await say(address, hello(address.token)) == channel.head(channel.WELCOME)
        door.close()

    sweep()


def test_where_no_socket_can_be_there_is_no_door(monkeypatch, short_tmp):
    @drive
    async def closed() -> None:
        monkeypatch.setattr(tempfile, "tempdir", str(short_tmp / "missing"))
        door = Doorway(1, Admitted())
        assert door.open() is None
        door.close()

    closed()


def test_long_places_are_left_for_short_ones(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/tmp/" + "x" * 90)
    assert doorway._base() == "/tmp"


def test_a_replica_that_is_just_starting_is_not_swept(short_tmp):
    folder = short_tmp / "manta-channel-new"
    folder.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket"))  # and does not listen yet
        doorway.sweep(str(short_tmp))
        listener.listen(1)
        assert folder.exists()
        os.utime(folder, (1, 1))
        doorway.sweep(str(short_tmp))
        assert folder.exists()  # somebody listens
    doorway.sweep(str(short_tmp))
    assert not folder.exists()


def test_a_peer_that_only_looks_is_no_warning(caplog):
    @drive
    async def look() -> None:
        door = Doorway(1, Admitted())
        address = door.open()
        assert address is not None
        for words in (b"", b"MNTA"):
            with caplog.at_level(logging.DEBUG, "ray.serve"):
                caplog.clear()
                _, writer = await asyncio.open_unix_connection(address.path)
                writer.write(words)
                writer.close()
                await until(lambda: bool(caplog.records))
            (record,) = caplog.records
            assert record.levelno == (logging.WARNING if words else logging.DEBUG)
        door.close()

    look()
