"""Who has the gRPC port: HAProxy with the lane, or grpc.aio where it cannot run; and its end."""

from __future__ import annotations

import asyncio
import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

import grpc
import pytest

from configs.grpc_tls import CertificateError
from deployments.grpc_lane import PATH
from deployments.grpc_listener import Folder, GrpcListener
from deployments.grpc_services import STREAM_PATH
from deployments.ports import PortClaim
from tests.certificates import Authority

from .grpc_lanes import Twins, needs_haproxy, run
from .test_grpc import good
from .test_haproxy import listens

MESSAGE = good().SerializeToString()


async def until(condition):
    while not condition():
        await asyncio.sleep(0.01)


async def answers(server, road="lane"):
    async with server.channel(road) as channel:
        return await channel.unary_unary(PATH)(MESSAGE, wait_for_ready=True, timeout=20)


@needs_haproxy
def test_a_dead_haproxy_comes_back():
    async def use(server):
        listener = server.edges["lane"]
        pid = listener._haproxy.pid
        assert await answers(server)
        os.kill(pid, 9)
        await until(lambda: listener._haproxy.pid != pid)
        assert await answers(server)
        assert listener.alive() and listener.has_lane

    run(use)


@needs_haproxy
def test_grpc_aio_takes_the_port_when_haproxy_does_not_stay(caplog):
    async def use(server):
        listener = server.edges["lane"]
        while listener.has_lane:
            with suppress(ProcessLookupError):
                os.kill(listener._haproxy.pid, 9)
            await asyncio.sleep(0.05)
        assert await answers(server)
        assert listener.alive()

    run(use)
    assert "grpc.aio takes the gRPC port" in caplog.text


def test_grpc_aio_has_the_port_where_there_is_no_haproxy(monkeypatch, caplog):
    monkeypatch.setenv("RAY_SERVE_HAPROXY_BINARY_PATH", "/nowhere/haproxy")

    async def use():
        server = Twins(exit_timeout_s=5)
        with pytest.raises(AssertionError):  # it looks for the lane
            await server.__aenter__()
        assert await answers(server)
        listener = server.edges["lane"]
        assert listener.alive() and not listener.has_lane
        await listener.drain()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", server.ports["lane"])

    asyncio.run(use())
    assert "so grpc.aio has the gRPC port" in caplog.text


@needs_haproxy
def test_drained_it_answers_what_it_has_and_frees_the_port():
    """Clients are told to go: the next call of one that stays connected finds no listener."""

    async def use(server):
        listener, channel = server.edges["lane"], server.channels["lane"]
        folder = listener._folder.path
        call = channel.unary_unary(PATH)
        assert await call(MESSAGE)
        model = server.models["linear"]
        model.held = asyncio.Event()
        running = call(MESSAGE)
        await until(lambda: model.groups[1:])
        draining = asyncio.ensure_future(listener.drain())
        await until(lambda: not listens(server.ports["lane"]))
        await asyncio.sleep(1.5)  # beyond the window in which clients are told
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call(MESSAGE)
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        assert not draining.done()
        model.held.set()
        assert await running
        await draining
        assert not folder.exists()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", server.ports["lane"])

    run(use, exit_timeout_s=20)


@needs_haproxy
def test_two_share_a_port():
    """As two Routers of one node do; one may leave."""

    async def use(server):
        first = server.edges["lane"]
        claim = PortClaim("127.0.0.1", server.ports["lane"], "test")
        second = GrpcListener(claim, first._add_servicer, first._settings, server.inference)
        await second.start()
        assert second.has_lane
        for _ in range(8):
            assert await answers(server)
        await second.drain()
        for _ in range(4):
            assert await answers(server)

    run(use, port=_shared_port())


def _shared_port():
    claim = PortClaim("127.0.0.1", 0, "test")
    port = claim.port
    claim.close()
    return port


@needs_haproxy
def test_what_only_grpc_aio_can_do_it_does_where_it_has_the_port(caplog):
    """The age of a connection ends a call that outlives it; behind HAProxy it must not, since
    other clients share that connection."""

    async def use(server):
        model = server.models["linear"]
        model.held = asyncio.Event()
        calls = {
            road: asyncio.ensure_future(server.call(road, MESSAGE)) for road in ("ordinary", "lane")
        }
        assert (await calls["ordinary"])[0] == "UNAVAILABLE"
        stream = server.channels["lane"].stream_stream(STREAM_PATH)()
        await stream.write(MESSAGE)
        await asyncio.sleep(0.5)
        assert not calls["lane"].done()
        model.held.set()
        assert (await calls["lane"])[0] == "OK"
        assert await stream.read()

    run(use, grpc_max_connection_age_ms=100, grpc_max_connection_age_grace_ms=100)
    assert "grpc_max_connection_age_grace_ms: HAProxy has the gRPC port" in caplog.text


def test_an_unopened_listener_can_be_drained():
    async def use():
        server = Twins()
        claim = PortClaim("127.0.0.1", 0, "test")
        await GrpcListener(claim, lambda _: None, server.settings, server.inference).drain()

    asyncio.run(use())


# --- the folder ----------------------------------------


def test_the_folder_is_ours_alone_and_goes(monkeypatch):
    with tempfile.TemporaryDirectory() as root:
        monkeypatch.setattr(tempfile, "tempdir", root)
        folder, other = Folder(), Folder()
        assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
        assert folder.path != other.path
        folder.close()
        folder.close()
        assert not folder.path.exists() and other.path.exists()
        other.close()


def test_what_a_killed_one_left_goes_with_the_next_start(monkeypatch):
    with tempfile.TemporaryDirectory() as root:
        monkeypatch.setattr(tempfile, "tempdir", root)
        killed, living = Folder(), Folder()
        os.close(killed._lock)  # as the system does with a killed process
        begun = Path(root) / f"manta-{os.getuid()}" / "grpc-begun"
        begun.mkdir()  # of one that has not come to its lock yet
        again = Folder()
        assert not killed.path.exists()
        assert living.path.exists() and again.path.exists() and begun.exists()
        living.close()
        again.close()


def test_a_folder_that_others_may_enter_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    root = tmp_path / f"manta-{os.getuid()}"
    root.mkdir(mode=0o755)
    with pytest.raises(PermissionError):
        Folder()
    root.chmod(0o700)  # the control
    Folder().close()


# --- TLS -----------------------------------------------------------------------------------------


def read(authority, name):
    return (authority.folder / name).read_bytes()


def secure(server, road, root, chain=None, key=None):
    """A new connection each time: gRPC shares those of equal channels, but by credentials too."""
    credentials = grpc.ssl_channel_credentials(root, key, chain)
    return grpc.aio.secure_channel(server.address(road), credentials)


async def refused(channel):
    async with channel:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await channel.unary_unary(PATH)(MESSAGE, timeout=10)
    return error.value.code() is grpc.StatusCode.UNAVAILABLE


@needs_haproxy
@pytest.mark.parametrize("road", ["lane", "ordinary"])
@pytest.mark.parametrize("mutual", [False, True])
def test_over_tls_it_answers_those_who_trust_it_and_whom_it_trusts(tmp_path, road, mutual):
    ours, strangers = Authority(tmp_path / "ours"), Authority(tmp_path / "strangers")
    root = read(ours, "root.pem")
    known = [read(ours, "client.pem"), read(ours, "client.key")]
    stranger = [read(strangers, "client.pem"), read(strangers, "client.key")]

    async def use(server):
        async with secure(server, road, root, *known) as channel:
            assert await channel.unary_unary(PATH)(MESSAGE, timeout=20)
        assert await refused(server.channel(road))  # in the clear
        assert await refused(secure(server, road, read(strangers, "root.pem"), *known))
        for pair in ([], stranger):
            channel = secure(server, road, root, *pair)
            if mutual:
                assert await refused(channel)
            else:
                async with channel:
                    assert await channel.unary_unary(PATH)(MESSAGE, timeout=20)

    run(use, **ours.settings(mutual))


@needs_haproxy
@pytest.mark.parametrize("mutual", [False, True])
def test_grpc_aio_has_tls_too_when_it_takes_the_port(tmp_path, mutual):
    ours = Authority(tmp_path / "ours")
    root, known = read(ours, "root.pem"), [read(ours, "client.pem"), read(ours, "client.key")]

    async def use(server):
        while server.edges["lane"].has_lane:
            with suppress(ProcessLookupError):
                os.kill(server.edges["lane"]._haproxy.pid, 9)
            await asyncio.sleep(0.05)
        async with secure(server, "lane", root, *known) as channel:
            assert await channel.unary_unary(PATH)(MESSAGE, wait_for_ready=True, timeout=20)
        assert await refused(server.channel("lane"))
        if mutual:
            assert await refused(secure(server, "lane", root))

    run(use, **ours.settings(mutual))


@needs_haproxy
@pytest.mark.parametrize("said", [b"", b"\x16\x03\x01\x02\x00"])
def test_who_does_not_finish_a_handshake_is_let_go(tmp_path, said):
    ours = Authority(tmp_path / "ours")

    async def use(server):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.ports["lane"])
        writer.write(said)
        async with secure(server, "lane", read(ours, "root.pem")) as channel:
            call = channel.unary_unary(PATH)
            assert await call(MESSAGE, timeout=20)
            await asyncio.wait_for(reader.read(), 20)
            assert await call(MESSAGE, timeout=20)  # on a connection that is as old
        writer.close()

    run(use, http_read_timeout_s=1, **ours.settings(mutual=False))


def test_with_certificates_that_are_not_there_nothing_has_the_port(tmp_path):
    ours = Authority(tmp_path / "ours")
    server = Twins(**ours.settings(mutual=False))
    (ours.folder / "server.key").unlink()

    async def use():
        claim = PortClaim("127.0.0.1", 0, "test")
        listener = GrpcListener(claim, lambda _: None, server.settings, server.inference)
        with pytest.raises(CertificateError, match="grpc_server_key"):
            await listener.start()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", claim.port)
        await listener.drain()

    asyncio.run(use())
