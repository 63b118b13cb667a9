"""Nothing is lost but what was on the path that broke: two Routers over two replicas."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import os
import signal
import socket
import threading
import time
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import tritonclient.http as httpclient
from tritonclient.utils import InferenceServerException

from tests.serve.clients import aio_client, infer_aio, statistics
from tests.serve.load import ROUTER_GONE, Target, pair_of, running
from tests.serve.server import Server, kill, port_is_free, runs, wait_for

_PIDFD_GETFD = 438  # its number is the same on every architecture


def nap_replicas(server: Server) -> list[dict[str, Any]]:
    return [r for r in server.peek()["replicas"] if ".nap." in r["application"]]


def whole(server: Server) -> list[dict[str, Any]]:
    """Both replicas, once both Routers have a channel to each."""

    def both() -> list[dict[str, Any]]:
        replicas = [r for r in nap_replicas(server) if r["details"].get("routers") == "2"]
        pids = {r["pid"] for r in replicas}
        return replicas if len(pids) == 2 and pids <= set(server.replica_pids("nap")) else []

    found: list[dict[str, Any]] = wait_for(both, 90, "both replicas of nap are there")
    return found


def load(server: Server, protocol: str, count: int, strike: Any = lambda: None) -> list[Any]:
    """`count` requests over 24 clients of a connection each; `strike` is called in the middle."""

    async def run() -> list[Any]:
        numbers = iter(range(count))
        replies: list[Any] = [None] * count

        async def worker() -> None:
            async with aio_client(server, protocol) as client:
                for i in numbers:
                    if i == count // 2:
                        await asyncio.to_thread(strike)
                    x = np.array([[i, -i]], np.float32)
                    try:
                        reply = await infer_aio(client, "nap", {"x": x})
                        assert np.array_equal(reply.as_numpy("y"), x * 2)
                        replies[i] = "ok"
                    except InferenceServerException as error:
                        replies[i] = str(error.status())
                    except Exception as error:  # a connection that broke
                        replies[i] = type(error).__name__

        await asyncio.gather(*(worker() for _ in range(24)))
        return replies

    return asyncio.run(run())


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_two_routers_never_overfill_a_replica(pair: Server, protocol: str) -> None:
    """One batch that runs and one ahead is what an instance holds, whoever sends them; a client
    that leaves in between fails nobody else."""
    stop = threading.Event()
    by_serve = {replica["pid"]: replica["details"]["by_serve"] for replica in whole(pair)}

    def leave() -> None:
        body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]}
        while not stop.is_set():
            with contextlib.suppress(httpx.TimeoutException):
                httpx.post(f"http://{pair.http}/v2/models/nap/infer", json=body, timeout=0.03)

    leaver = threading.Thread(target=leave)
    leaver.start()
    try:
        assert set(load(pair, protocol, 600)) == {"ok"}
    finally:
        stop.set()
        leaver.join()
    for replica in whole(pair):
        details = replica["details"]
        assert 1 <= int(details["peak_held"]) <= 2
        assert int(details["by_channel"]) > 10
        assert details["by_serve"] == by_serve[replica["pid"]]


def test_a_killed_replica_loses_only_what_it_held(pair: Server) -> None:
    victim = whole(pair)[0]["pid"]
    replies = load(pair, "http", 400, lambda: os.kill(victim, signal.SIGKILL))
    # At most two batches of at most four rows.
    assert replies.count("ok") >= 400 - 8 and set(replies) <= {"ok", "503"}
    assert victim not in {replica["pid"] for replica in whole(pair)}


def test_a_broken_channel_loses_only_what_was_on_it(pair: Server) -> None:
    """All connections between Routers and replicas break at once; no process ends."""
    routers = pair.replica_pids("manta:Router")
    before = {replica["pid"] for replica in whole(pair)}
    for _ in range(5):  # all may be answered in the moment in which they break
        whole(pair)
        broken: list[int] = []
        replies = load(pair, "http", 400, lambda b=broken: b.extend(map(break_channels, routers)))
        assert broken == [2, 2]  # to both replicas, from each Router
        # Each had at most one batch that ran and one ahead, of at most four rows; the second
        # Router's break a moment later, when its replicas may have given it what the first one had.
        assert replies.count("ok") >= 400 - 32 and set(replies) <= {"ok", "503"}
        if "503" in replies:
            break
    assert "503" in replies
    assert set(load(pair, "http", 100)) == {"ok"}
    assert {replica["pid"] for replica in whole(pair)} == before  # nobody died of it


def break_channels(pid: int) -> int:
    """Shuts a process's channels down, with a debugger's means; how many there were."""
    libc = ctypes.CDLL(None, use_errno=True)
    pidfd, found = os.pidfd_open(pid), 0
    try:
        for entry in os.listdir(f"/proc/{pid}/fd"):
            copy = libc.syscall(_PIDFD_GETFD, pidfd, int(entry), 0)
            if copy < 0:
                if ctypes.get_errno() == errno.EPERM:
                    pytest.skip("this system lets nobody look into another process")
                continue  # closed in the meantime
            try:
                one = socket.socket(fileno=copy)
            except OSError:  # no socket
                os.close(copy)
                continue
            with one, contextlib.suppress(OSError):  # of the listening ones
                if one.family == socket.AF_UNIX and "manta-channel-" in str(one.getpeername()):
                    one.shutdown(socket.SHUT_RDWR)
                    found += 1
    finally:
        os.close(pidfd)
    return found


def test_a_killed_router_takes_its_haproxy_along_and_the_other_goes_on(pair: Server) -> None:
    victim = pair.replica_pids("manta:Router")[0]
    before = [process.pid for process in pair.haproxies()]
    own = [process for process in pair.haproxies() if process.ppid() == victim]
    assert len(before) == 2 and len(own) == 1
    with running(pair, [Target("nap", "x", "y", pair_of)], clients=6) as going:
        struck_s = time.monotonic()
        kill(victim)
        wait_for(lambda: not runs(own[0]), 30, "its HAProxy is gone")
        gone_s = time.monotonic()
        going.wait_back(struck_s)
        print(f"\none of two Routers: {going.codes()}, {going.recovered_s(struck_s)}")
        wait_for(
            lambda: sum(map(runs, pair.haproxies())) == 2, 120, "the new Router has one of its own"
        )
        print(f"replaced after {time.monotonic() - struck_s:.1f} s")
        going.wait_ok()
    for protocol, gone in ROUTER_GONE.items():
        assert set(going.lost(protocol=protocol)) <= gone
    # What it had in work; whoever asks after that is answered by the other one. gRPC's channels
    # may wait a second before they connect again, and fail what is asked meanwhile.
    failed = [one for one in going.sent if one.outcome not in ("ok", "")]
    assert all(one.begun_s < gone_s for one in failed if one.protocol == "http")
    assert not going.relapses(gone_s)


def settled(client: httpclient.InferenceServerClient) -> int:
    """How many requests have succeeded, once what earlier tests left is told."""
    seen = [-1]

    def same() -> bool:
        seen.append(statistics(client, "nap")["success"])
        time.sleep(3)
        return statistics(client, "nap")["success"] == seen[-1]

    wait_for(same, 60, "the counts rest")
    return seen[-1]


def test_statistics_of_two_routers_are_exact(pair: Server) -> None:
    with contextlib.closing(httpclient.InferenceServerClient(pair.http)) as client:
        before = settled(client)
        assert set(load(pair, "http", 120)) == {"ok"}

        def counted() -> int:
            return statistics(client, "nap")["success"] - before

        # The Router that is not asked tells once a second what it has counted.
        wait_for(lambda: counted() >= 120, 60, "both Routers have told")
        assert counted() == 120


def test_a_killed_command_leaves_no_process_and_no_port(pair: Server) -> None:
    """The last test of this server."""
    family = pair.descendants()
    assert len(family) > 5
    pair.send(signal.SIGKILL)
    _, alive = psutil.wait_procs(family, timeout=120)
    assert not alive and port_is_free(pair.http_port)
