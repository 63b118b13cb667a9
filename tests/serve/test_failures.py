"""What happens when something dies, under load, with counts. Each case has its control.

The servers here are their own: a killed Router must not disturb other tests.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tritonclient.http as httpclient
from tritonclient.utils import InferenceServerException

from tests.serve import repository
from tests.serve.clients import aio_client, infer, infer_aio, statistics
from tests.serve.server import BIN, ROOT, Server, free_ports, manta_serve, port_is_free, wait_for

HELD = np.full((1, 1), -1.0, np.float32)
SHORT = np.full((1, 1), 0.01, np.float32)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return repository.build(tmp_path_factory.mktemp("own"), None)


@pytest.fixture(scope="module")
def own(root: Path) -> Iterator[Server]:
    flags = ["--model-control-mode=explicit", "--load-model=slow", "--max-execution-secs=5"]
    with manta_serve(root, *flags) as server:
        server.wait_ready()
        yield server


def sleepers(server: Server) -> list[int]:
    return server.replica_pids("manta.slow.")


def whole(server: Server) -> set[int]:
    """Waits until both replicas of `slow` are loaded and the Controller counts on them."""

    def both() -> set[int]:
        found = {r["pid"] for r in server.peek()["replicas"] if ".slow." in r["application"]}
        return found if len(found) == 2 and found == set(sleepers(server)) else set()

    pids: set[int] = wait_for(both, 90, "both replicas of slow are there")
    return pids


def codes(replies: list[Any]) -> dict[str, int]:
    """How many answers of each kind: `ok`, or the status of the error."""
    counted: dict[str, int] = {}
    for reply in replies:
        name = str(reply.status()) if isinstance(reply, InferenceServerException) else "ok"
        counted[name] = counted.get(name, 0) + 1
    return counted


def under_load(server: Server, waiting: int, strike: Any) -> list[Any]:
    """Two requests that run, `waiting` short ones behind them; then `strike` is called. What runs
    comes to its end after it."""

    async def run(go: Callable[[], None]) -> list[Any]:
        async with aio_client(server, "http") as client:
            calls = [asyncio.create_task(infer_aio(client, "slow", {"s": HELD})) for _ in range(2)]
            await asyncio.sleep(0.7)  # both run now, one on each replica
            calls += [
                asyncio.create_task(infer_aio(client, "slow", {"s": SHORT})) for _ in range(waiting)
            ]
            await asyncio.sleep(0.4)
            strike()
            await asyncio.sleep(0.4)
            go()
            return await asyncio.gather(*calls, return_exceptions=True)

    with repository.holding(server.repository / "slow") as go:
        return asyncio.run(run(go))


def test_control_nothing_is_lost_when_nothing_dies(own: Server) -> None:
    assert codes(under_load(own, 20, lambda: None)) == {"ok": 22}


def test_a_killed_replica_fails_only_what_ran_there(own: Server) -> None:
    """One of two replicas: one request in flight fails with 503, the rest go to the other one."""
    victim = min(whole(own))
    replies = under_load(own, 20, lambda: os.kill(victim, signal.SIGKILL))
    assert codes(replies) == {"ok": 21, "503": 1}
    assert victim not in whole(own)  # replaced


def test_when_all_replicas_die_what_is_queued_waits_for_the_replacement(own: Server) -> None:
    victims = whole(own)

    def strike() -> None:
        for pid in victims:
            os.kill(pid, signal.SIGKILL)

    replies = under_load(own, 20, strike)
    assert codes(replies) == {"ok": 20, "503": 2}


def test_a_hung_instance_is_replaced_and_its_request_answered(own: Server) -> None:
    before = whole(own)
    client = httpclient.InferenceServerClient(own.http, network_timeout=120)
    hanging = np.full((1, 1), 3600.0, np.float32)
    with pytest.raises(InferenceServerException) as caught:
        infer(client, "slow", {"s": hanging})
    assert str(caught.value.status()) == "503"
    assert infer(client, "slow", {"s": SHORT}).as_numpy("t")[0, 0] == SHORT[0, 0] * 2
    after = whole(own)
    assert len(before & after) == 1  # the other one, which did not hang, was left alone
    client.close()


def test_a_killed_controller_stops_nobody_and_comes_back(own: Server) -> None:
    client = httpclient.InferenceServerClient(own.http)
    (controller,) = own.replica_pids("manta:Controller")
    replicas = whole(own)
    before = statistics(client, "slow")
    replies = under_load(own, 20, lambda: os.kill(controller, signal.SIGKILL))
    assert codes(replies) == {"ok": 22}
    wait_for(lambda: own.replica_pids("manta:Controller"), 60, "the Controller is back")

    def answers() -> bool:
        try:
            client.get_inference_statistics("slow")
            return bool(client.is_server_ready())
        except InferenceServerException:
            return False

    wait_for(answers, 60, "the new Controller answers")
    assert set(sleepers(own)) == replicas  # adopted, not loaded again
    after = statistics(client, "slow")
    assert after["success"] - before["success"] == 22  # the new one knows all that was counted
    client.close()


def test_a_killed_router_leaves_no_port_behind_and_comes_back(own: Server) -> None:
    (router,) = own.replica_pids("manta:Router")
    replicas = whole(own)
    os.kill(router, signal.SIGKILL)
    wait_for(lambda: own.replica_pids("manta:Router") not in ([], [router]), 60, "a new Router")
    wait_for(own.ready, 60, "the server is ready again")
    client = httpclient.InferenceServerClient(own.http)
    assert infer(client, "slow", {"s": SHORT}).as_numpy("t")[0, 0] == SHORT[0, 0] * 2
    assert set(sleepers(own)) == replicas
    client.close()


def test_a_restarted_controller_loads_what_has_changed_and_loses_nothing(
    own: Server, root: Path
) -> None:
    """Adopted as it is, then loaded anew, since the file is another one by now."""
    whole(own)
    source = root / "slow" / "1" / "model.py"
    old = source.read_text()
    (controller,) = own.replica_pids("manta:Controller")
    client = httpclient.InferenceServerClient(own.http)

    def factor() -> float:
        """Any error ends the test: nothing may be lost in between."""
        return round(float(infer(client, "slow", {"s": SHORT}).as_numpy("t")[0, 0] / SHORT[0, 0]))

    try:
        assert factor() == 2
        source.write_text(old.replace("seconds * 2", "seconds * 3"))
        os.kill(controller, signal.SIGKILL)
        wait_for(lambda: factor() == 3, 120, "the new file serves")
    finally:
        source.write_text(old)
    client.close()


def test_sigterm_answers_every_accepted_request(own: Server) -> None:
    family = own.descendants()
    whole(own)
    replies = under_load(own, 20, lambda: own.send(signal.SIGTERM))
    assert codes(replies) == {"ok": 22}
    assert own.process.wait(90) == 0
    _, alive = psutil.wait_procs(family, timeout=15)
    assert not alive
    for port in (own.http_port, own.grpc_port, own.metrics_port):
        assert port_is_free(port)


def test_a_second_server_on_a_busy_port_fails_at_once_naming_it(root: Path) -> None:
    import socket

    busy, other, third = free_ports(3)
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", busy))
        holder.listen()
        done = subprocess.run(
            [
                str(BIN / "manta"),
                "serve",
                f"--model-repository={root}",
                f"--http-port={busy}",
                f"--grpc-port={other}",
                f"--metrics-port={third}",
            ],
            capture_output=True,
            text=True,
            timeout=20,
            cwd=ROOT,
        )
    assert done.returncode == 1
    assert f"port {busy}" in done.stderr
