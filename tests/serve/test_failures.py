"""What happens when something dies: the table of docs/operations.md, row by row, under load.

Stock clients ask over HTTP and gRPC before, while and after it dies, and every request is counted:
what is lost is known by construction, and after the recovery nothing is. The server here is their
own: a killed Router must not disturb other tests. Two Routers are in `test_paths`, updates and the
head of a cluster in `test_update`. How long a recovery took is told (`-s`), never judged.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tritonclient.http as httpclient
from tritonclient.utils import InferenceServerException

from tests.serve import repository
from tests.serve.clients import infer, statistics
from tests.serve.load import PROTOCOLS, ROUTER_GONE, Load, Target, pair_of, running
from tests.serve.server import (
    BIN,
    GONE_S,
    ROOT,
    Server,
    free_ports,
    kill,
    manta_serve,
    port_is_free,
    runs,
    wait_for,
)

HELD = {"s": np.full((1, 1), -1.0, np.float32)}
HANGS = {"s": np.full((1, 1), 3600.0, np.float32)}
SHORT = np.full((1, 1), 0.01, np.float32)
LIMIT_S = 120.0
# tritonserver's words.
EXITING = {
    "[503] Server exiting",
    "[StatusCode.UNAVAILABLE] GRPC server is shutting down and has stopped accepting new requests.",
}


def moments(number: int) -> Any:
    """A few milliseconds, and no two requests' the same."""
    return np.full((1, 1), 0.004 + number % 1000 * 1e-6, np.float32)


# What dies is `slow`, of two replicas that do one request at a time; `nap` is there beside it.
TARGETS = [Target("slow", "s", "t", moments), Target("nap", "x", "y", pair_of)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = repository.build(tmp_path_factory.mktemp("own"), None)
    repository.write_nap(root, "nap")
    return root


@pytest.fixture(scope="module")
def own(root: Path) -> Iterator[Server]:
    flags = ["--model-control-mode=explicit", "--load-model=slow", "--load-model=nap"]
    flags.append("--max-queue-secs=240")  # until replicas are replaced, however long that takes
    with manta_serve(root, *flags, "--max-execution-secs=8") as server:
        server.wait_ready()
        yield server


@pytest.fixture
def tell(record_property: Any) -> Callable[..., None]:
    def told(name: str, load: Load, **more: Any) -> None:
        facts = {"load": load.codes(), **more}
        record_property(name, facts)
        print(f"\n{name}: {facts}\n{load.texts.most_common(5)}")

    return told


def titled(server: Server, words: str) -> list[int]:
    """Processes whose command line has these words."""
    found = []
    for process in filter(runs, server.descendants()):
        with contextlib.suppress(psutil.Error):  # it ends just now
            if words in " ".join(process.cmdline()):
                found.append(process.pid)
    return found


def sleepers(server: Server) -> list[int]:
    return server.replica_pids("manta.slow.")


def whole(server: Server, without: frozenset[int] = frozenset()) -> set[int]:
    """Waits until both replicas of `slow` are loaded and the Controller counts on them."""

    def both() -> set[int]:
        found = {r["pid"] for r in server.peek()["replicas"] if ".slow." in r["application"]}
        there = len(found) == 2 and found == set(sleepers(server)) and not found & without
        return found if there else set()

    pids: set[int] = wait_for(both, LIMIT_S, "both replicas of slow are there")
    return pids


def strike_while_held(server: Server, load: Load, strike: Callable[[], Any]) -> dict[str, str]:
    """Both replicas of `slow` run a request, one over each protocol, and those of the load wait
    behind them; then `strike` is called. What those two came to, when they may end."""
    folder = server.repository / "slow"
    with repository.holding(folder) as go:
        held = {protocol: load.submit(protocol, "slow", HELD) for protocol in PROTOCOLS}
        wait_for(lambda: len(repository.held(folder)) == 2, 30, "both replicas run a request")
        strike()
        go()
        return {protocol: one.result(60) for protocol, one in held.items()}


def since(begun_s: float) -> float:
    return round(time.monotonic() - begun_s, 1)


# --- replicas ------------------------------------------------------------------------------------


def test_control_nothing_is_lost_when_nothing_dies(own: Server) -> None:
    whole(own)
    with running(own, TARGETS) as load:
        assert strike_while_held(own, load, lambda: None) == {"http": "ok", "grpc": "ok"}
        load.wait_ok()
    assert not load.lost()


def test_a_killed_replica_fails_only_what_ran_there(own: Server, tell: Any) -> None:
    """One of two replicas: the request that it ran fails with 503, the rest go to the other one."""
    victim = min(whole(own))
    with running(own, TARGETS) as load:
        outcomes = strike_while_held(own, load, lambda: kill(victim))
        begun_s = time.monotonic()
        whole(own, without=frozenset({victim}))  # replaced
        tell("replica", load, held=outcomes, replaced_s=since(begun_s))
        load.wait_ok()
    assert sorted(outcomes.values()) == ["503", "ok"]
    assert not load.lost()


def test_when_all_replicas_die_what_is_queued_waits_for_the_replacement(
    own: Server, tell: Any
) -> None:
    victims = whole(own)
    with running(own, TARGETS) as load:
        outcomes = strike_while_held(own, load, lambda: kill(*victims))
        begun_s = time.monotonic()
        load.wait_ok()
        answered_s = since(begun_s)
        whole(own, without=frozenset(victims))
        tell("all replicas", load, held=outcomes, answers_s=answered_s, replaced_s=since(begun_s))
    assert outcomes == {"http": "503", "grpc": "503"}
    assert not load.lost()


@pytest.mark.parametrize("protocol", ["http", pytest.param("grpc", marks=pytest.mark.long)])
def test_a_hung_instance_is_replaced_and_its_request_answered(
    own: Server, tell: Any, protocol: str
) -> None:
    before = whole(own)
    with running(own, TARGETS) as load:
        begun_s = time.monotonic()
        hung = load.submit(protocol, "slow", HANGS).result(LIMIT_S)
        answered_s = since(begun_s)
        after = wait_for(lambda: whole(own) - before and whole(own), LIMIT_S, "it is replaced")
        tell("hang", load, held=hung, answered_s=answered_s, replaced_s=since(begun_s))
        load.wait_ok()
    assert hung == "503"
    assert not load.lost()
    assert len(before & after) == 1  # the other one, which did not hang, was left alone


# --- what is beside the path of requests ---------------------------------------------------------


def test_a_killed_controller_stops_nobody_and_comes_back(own: Server, tell: Any) -> None:
    client = httpclient.InferenceServerClient(own.http)
    (controller,) = own.replica_pids("manta:Controller")
    replicas = whole(own)
    before = statistics(client, "slow")

    def answers() -> bool:
        try:
            client.get_inference_statistics("slow")
            return bool(client.is_server_ready())
        except InferenceServerException as error:
            assert error.status() == "503"
            return False

    with running(own, TARGETS) as load:
        outcomes = strike_while_held(own, load, lambda: kill(controller))
        begun_s = time.monotonic()
        wait_for(lambda: own.replica_pids("manta:Controller"), LIMIT_S, "the Controller is back")
        wait_for(answers, LIMIT_S, "the new Controller answers")
        tell("Controller", load, held=outcomes, answers_s=since(begun_s))
        load.wait_ok()
    assert outcomes == {"http": "ok", "grpc": "ok"}
    assert not load.lost()
    assert set(sleepers(own)) == replicas  # adopted, not loaded again
    # The new one knows all that was counted.
    good = load.codes(model="slow")["ok"] + 2
    assert statistics(client, "slow")["success"] - before["success"] == good
    client.close()


@pytest.mark.long
def test_a_killed_fork_server_stops_nobody_and_the_next_replica_starts(
    own: Server, tell: Any
) -> None:
    victim = min(whole(own))
    with running(own, TARGETS) as load:
        kill(*fork_servers(own))
        load.wait_ok()
        begun_s = time.monotonic()
        kill(victim)
        whole(own, without=frozenset({victim}))
        tell("fork server", load, replaced_s=since(begun_s))
        load.wait_ok()
    assert load.lost() in ({}, {"503": 1})  # what the replica ran, if it ran anything
    assert not load.lost(model="nap")
    assert fork_servers(own)  # the replica has started another


def fork_servers(server: Server) -> list[int]:
    return titled(server, "deployments.forkserver")


def test_serves_own_controller_is_killed_and_replicas_are_still_replaced(
    own: Server, tell: Any
) -> None:
    victim = min(whole(own))
    (controller,) = titled(own, "ray::ServeController")
    with running(own, TARGETS) as load:
        outcomes = strike_while_held(own, load, lambda: kill(controller))
        load.wait_ok()
        assert not load.lost()
        begun_s = time.monotonic()
        kill(victim)
        whole(own, without=frozenset({victim}))
        tell("Serve's controller", load, held=outcomes, replaced_s=since(begun_s))
        load.wait_ok()
    assert outcomes == {"http": "ok", "grpc": "ok"}
    assert load.lost() in ({}, {"503": 1})  # what the replica ran, if it ran anything


# --- the path of requests ------------------------------------------------------------------------


def test_a_killed_haproxy_cuts_grpc_alone_and_comes_back(own: Server, tell: Any) -> None:
    whole(own)
    (haproxy,) = own.haproxies()
    with running(own, TARGETS) as load:
        struck: list[float] = []

        def strike() -> None:
            struck.append(time.monotonic())
            kill(haproxy.pid)
            struck.append(time.monotonic())

        outcomes = strike_while_held(own, load, strike)
        wait_for(lambda: any(map(runs, own.haproxies())), LIMIT_S, "HAProxy is back")
        load.wait_back(struck[0])
        load.wait_ok()
    tell("HAProxy", load, held=outcomes, recovered_s=load.recovered_s(struck[0]))
    assert outcomes == {"http": "ok", "grpc": "cut"}
    assert not load.lost(protocol="http")
    assert set(load.lost()) <= {"cut"}
    assert not load.relapses(struck[1])


def test_a_killed_router_leaves_no_port_behind_and_comes_back(own: Server, tell: Any) -> None:
    """The only one: what it had in work is cut, then nobody can connect until there is a new one;
    none is answered wrongly, and models stay."""
    (router,) = own.replica_pids("manta:Router")
    replicas = whole(own)
    with running(own, TARGETS) as load:
        struck: list[float] = []

        def strike() -> None:
            struck.append(time.monotonic())
            kill(router)
            struck.append(time.monotonic())

        outcomes = strike_while_held(own, load, strike)
        wait_for(
            lambda: own.replica_pids("manta:Router") not in ([], [router]), LIMIT_S, "a new Router"
        )
        wait_for(own.ready, LIMIT_S, "the server is ready again")
        load.wait_back(struck[0])
        load.wait_ok()
    in_work = load.in_work(struck[0])
    tell(
        "Router",
        load,
        held=outcomes,
        in_work=in_work,
        recovered_s=load.recovered_s(struck[0]),
    )
    for protocol, gone in ROUTER_GONE.items():
        assert outcomes[protocol] in gone
        assert set(load.lost(protocol=protocol)) <= gone
    assert not load.relapses(struck[1])
    assert set(sleepers(own)) == replicas


def test_a_restarted_controller_loads_what_has_changed_and_loses_nothing(
    own: Server, root: Path
) -> None:
    """Adopted as it is, then loaded anew, since the file is another one by now."""
    whole(own)
    source = root / "slow" / "1" / "model.py"
    old = source.read_text()
    (controller,) = own.replica_pids("manta:Controller")
    client = httpclient.InferenceServerClient(own.http, network_timeout=LIMIT_S)

    def factor() -> float:
        """Any error ends the test: nothing may be lost in between."""
        return round(float(infer(client, "slow", {"s": SHORT}).as_numpy("t")[0, 0] / SHORT[0, 0]))

    try:
        assert factor() == 2
        source.write_text(old.replace("seconds * 2", "seconds * 3"))
        os.kill(controller, signal.SIGKILL)
        wait_for(lambda: factor() == 3, LIMIT_S, "the new file serves")
        source.write_text(old)
        client.load_model("slow")
    finally:
        source.write_text(old)
    client.close()


def test_sigterm_answers_every_accepted_request(own: Server, tell: Any) -> None:
    """What it had in work when the signal came is answered. Who asks after that is told so, or
    cannot connect."""
    family = own.descendants()
    whole(own)
    struck: list[float] = []

    def strike() -> None:
        struck.append(time.monotonic())
        own.send(signal.SIGTERM)
        time.sleep(1.0)  # it leaves its ports while both are held, and answers them all the same

    with running(own, TARGETS) as load:
        outcomes = strike_while_held(own, load, strike)
        assert own.process.wait(LIMIT_S) == 0
    in_work = load.in_work(struck[0])
    tell("SIGTERM", load, held=outcomes, in_work=in_work, ended_s=since(struck[0]))
    assert outcomes == {"http": "ok", "grpc": "ok"}
    assert set(in_work) == {"ok"}
    refused = {text for outcome, text in load.texts if outcome == "503"}
    assert set(load.lost()) <= {"503", "cut"} and refused <= EXITING, load.texts
    _, alive = psutil.wait_procs(family, timeout=GONE_S)
    assert not alive
    for port in (own.http_port, own.grpc_port, own.metrics_port):
        assert port_is_free(port)


def test_a_second_server_on_a_busy_port_fails_at_once_naming_it(root: Path) -> None:
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
            timeout=60,
            cwd=ROOT,
        )
    assert done.returncode == 1
    assert f"port {busy}" in done.stderr
