"""HAProxy as our child: it lives no longer than we do, and no shorter."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from configs.grpc_tls import Certificates
from deployments import haproxy
from deployments.haproxy import Haproxy, HaproxyFailed, find_binary
from deployments.haproxy_config import Front

from .grpc_lanes import needs_haproxy

ROOT = Path(__file__).parents[3]


def front(folder, port=0, **more):
    facts: dict[str, Any] = {"address": "127.0.0.1", "path": "/a.B/C", "stream_path": "/a.B/D"}
    facts |= {"read_s": 5, "answer_s": 60, "grace_s": 5}
    return Front(port=port or free_port(), folder=Path(folder), **{**facts, **more})


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_for(condition, limit_s=20.0):
    end_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.01)


async def until(condition):
    while not condition():
        await asyncio.sleep(0.01)


def kill(child):
    with suppress(ProcessLookupError):
        assert child.pid
        os.kill(child.pid, 9)


@pytest.fixture
def folder():
    """Not pytest's own: the path of a socket must be short."""
    with tempfile.TemporaryDirectory() as path:
        yield path


# --- what it is told ----------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"folder": "/tmp/a b"},
        {"folder": "/tmp/a\n    stats socket /tmp/s"},
        {"folder": "/tmp/$HOME"},
        {"folder": "relative"},
        {"folder": "/tmp/" + "x" * 100},
        {"path": "/a b"},
        {"path": "/a }\n"},
        {"stream_path": "/a } or TRUE"},
        {"address": "localhost"},
        {"address": "0.0.0.0:1 user root"},
        {"port": "1 accept-proxy"},
    ],
)
def test_nothing_that_means_more_gets_into_its_configuration(wrong):
    with pytest.raises(ValueError):
        front(**{"folder": "/tmp/x", "port": 1, **wrong}).text()


def test_its_configuration():
    text = front("/tmp/x", 8001).text()
    assert "bind ipv4@127.0.0.1:8001 tcp-ut 600s proto h2" in text
    assert "unix@/tmp/x/lane.sock" in text
    assert "use_backend streams if { path /a.B/D }" in text
    assert "bind ipv6@[::1]:8001" in front("/tmp/x", 8001, address="::1").text()
    for closed in ("stats", "log ", "lua", "ssl"):
        assert closed not in text


@pytest.mark.parametrize("root", [None, Path("/etc/tls/ca stats socket.pem")])
def test_its_certificates_have_names_of_ours(folder, root):
    files = Certificates(Path("/etc/tls/a b.pem"), Path("/etc/tls/k\n.pem"), root)
    told = front(folder, certificates=files)
    for _ in range(2):  # it is started again
        told.link()
    (bind,) = (line for line in told.text().splitlines() if " ssl crt " in line)
    assert f" crt {folder}/server.pem alpn h2 ssl-min-ver TLSv1.2" in bind
    assert f"bind unix@{folder}/clear.sock proto h2" in told.text()
    assert (f"verify required ca-file {folder}/root.pem" in bind) == (root is not None)
    assert "/etc/tls" not in told.text() and "stats" not in told.text()
    found = {one.name: one.readlink() for one in Path(folder).iterdir()}
    wanted = {"server.pem": files.cert, "server.pem.key": files.key, "root.pem": root}
    assert found == {name: file for name, file in wanted.items() if file}


def test_a_program_that_is_not_there(monkeypatch):
    monkeypatch.setenv("RAY_SERVE_HAPROXY_BINARY_PATH", "/nowhere/haproxy")
    with pytest.raises(HaproxyFailed):
        find_binary()


# --- its life ----------------------------------------


@needs_haproxy
@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "::1"])
def test_it_starts_and_leaves(folder, address):
    async def use():
        lost = []
        told = front(folder, address=address)
        child = Haproxy(told, find_binary(), lambda: lost.append(1))
        await child.start()
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family) as probe:
            probe.connect(("::1" if ":" in address else "127.0.0.1", told.port))
        await child.leave(5)
        await child.stop(1)
        assert not listens(told.port) and not lost

    asyncio.run(use())


@needs_haproxy
def test_dead_it_is_started_again_but_not_for_ever(folder):
    async def use():
        lost = asyncio.Event()
        told = front(folder)
        child = Haproxy(told, find_binary(), lost.set)
        await child.start()
        pids = {child.pid}
        kill(child)
        await until(lambda: child.pid not in pids and listens(told.port))
        assert not lost.is_set()
        while not lost.is_set():
            pids.add(child.pid)
            kill(child)
            await asyncio.sleep(0.05)
        assert 2 < len(pids) <= 1 + haproxy.RESTARTS
        assert not listens(told.port)
        await child.stop(1)

    asyncio.run(use())


@needs_haproxy
def test_a_taken_port_and_a_wrong_program_are_told(folder, caplog):
    async def use():
        with socket.socket() as holder:
            holder.bind(("127.0.0.1", 0))
            holder.listen()
            told = front(folder, holder.getsockname()[1])
            with pytest.raises(HaproxyFailed):
                await Haproxy(told, find_binary(), lambda: None).start()
        for wrong in ("/bin/false", "/etc/hostname", "/nowhere"):
            with pytest.raises(HaproxyFailed):
                await Haproxy(front(folder), wrong, lambda: None).start()

    asyncio.run(use())
    assert "Address already in use" in caplog.text or "cannot bind" in caplog.text
    assert "/nowhere: No such file" in caplog.text


# --- its end with us ----------------------------------------

OWNER = """
import asyncio, subprocess, sys
from pathlib import Path
from deployments.haproxy import Haproxy, find_binary
from deployments.haproxy_config import Front

async def main():
    front = Front("127.0.0.1", {port}, Path({folder!r}), "/a.B/C", "/a.B/D", 5, 60, 5)
    if {ours}:
        child = Haproxy(front, find_binary(), lambda: None)
        await child.start()
        pid = child.pid
    else:
        config = Path({folder!r}) / "haproxy.cfg"
        config.write_text(front.text())
        pid = subprocess.Popen([find_binary(), "-db", "-f", str(config)]).pid
    print(pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


def owner(folder, port, ours):
    """A process that has HAProxy as its child, and the child's number."""
    code = OWNER.format(port=port, folder=folder, ours=ours)
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    wait_for(lambda: listens(port))
    return process, pid


def end(process):
    process.kill()
    process.wait()
    process.stdout.close()


@needs_haproxy
def test_killing_its_owner_frees_the_port(folder):
    port = free_port()
    process, _ = owner(folder, port, ours=True)
    end(process)
    wait_for(lambda: not listens(port))


@needs_haproxy
def test_control_an_ordinary_child_keeps_the_port(folder):
    port = free_port()
    process, pid = owner(folder, port, ours=False)
    try:
        end(process)
        time.sleep(0.5)
        assert listens(port)
    finally:
        os.kill(pid, 9)


@needs_haproxy
def test_it_ends_with_the_thread_that_started_it(folder):
    """Why it is started from a thread that lives as long as the process."""
    told = front(folder)
    done = threading.Event()

    def begin():
        async def use():
            await Haproxy(told, find_binary(), lambda: None).start()
            assert listens(told.port)
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

        asyncio.run(use())
        done.set()

    thread = threading.Thread(target=begin)
    thread.start()
    thread.join()
    assert done.is_set()
    wait_for(lambda: not listens(told.port))
