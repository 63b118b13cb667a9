"""Updates of a running application through `serve deploy`, under load, with counts; its control.

One cluster, as an operator has it, for all of them; the last test ends it by its head's death.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import tritonclient.http as httpclient
from tritonclient.utils import InferenceServerException

from tests.serve import repository
from tests.serve.clients import statistics
from tests.serve.cluster import Cluster, ray_cluster
from tests.serve.load import Load, Target, pair_of, running
from tests.serve.server import GONE_S, port_is_free, runs, wait_equal, wait_for

# Each waits for several processes to start, one after the other.
pytestmark = pytest.mark.timeout(600)

# The one is loaded at start, the other by a client.
TARGETS = [Target(name, "x", "y", pair_of) for name in ("given", "asked")]
ARGS: dict[str, Any] = {"model_control_mode": "explicit", "load_model": ["given"]}
LIMIT_S = 120.0
RAYS_AGENTS = {"ray::DashboardAgent", "ray::RuntimeEnvAgent"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    root = tmp_path_factory.mktemp("updated")
    for target in TARGETS:
        repository.write_nap(root, target.model)
    with ray_cluster(root, tmp_path_factory.mktemp("config")) as one:
        one.deploy(**ARGS)
        one.wait_ready()
        client(one).load_model("asked")
        yield one


def client(cluster: Cluster) -> Any:
    return httpclient.InferenceServerClient(cluster.http, network_timeout=LIMIT_S)


def replicas(cluster: Cluster) -> set[int]:
    """Of both models, once there is one of each: a Controller that has just begun adopts first."""

    def both() -> set[int]:
        found = {replica["pid"] for replica in cluster.peek()["replicas"]}
        return found if len(found) == len(TARGETS) else set()

    pids: set[int] = wait_for(both, LIMIT_S, "both models have their replica, and no other")
    return pids


def routers(cluster: Cluster, count: int, besides: set[int] | None = None) -> set[int]:
    """Waits until there are so many, none of them one of those before, and Serve has settled."""

    def there() -> set[int]:
        found = set(cluster.replica_pids("manta:Router"))
        return found if len(found) == count and not found & (besides or set()) else set()

    found: set[int] = wait_for(there, LIMIT_S, f"{count} Routers")
    cluster.wait_status("RUNNING")
    return found


def routers_that_run(cluster: Cluster) -> set[int]:
    return set(cluster.replica_pids("manta:Router"))


def counted(cluster: Cluster) -> dict[str, int]:
    """How many succeeded; asked again while the Controller is replaced."""
    with_all = client(cluster)

    def told() -> dict[str, int] | None:
        try:
            return {t.model: statistics(with_all, t.model)["success"] for t in TARGETS}
        except InferenceServerException as error:
            assert error.status() == "503", error
            return None

    found: dict[str, int] = wait_for(told, LIMIT_S, "statistics")
    return found


def named(family: list[psutil.Process], *names: str) -> list[psutil.Process]:
    found = []
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.name() in names:
                found.append(process)
    return found


def show(record: Any, name: str, load: Load, strike_s: float) -> None:
    record(name, {"codes": load.codes(), "recovered_s": load.recovered_s(strike_s)})
    print(f"{name}: {load.codes()}, recovered after {load.recovered_s(strike_s)}")


def test_a_changed_configuration_loses_nothing_and_keeps_the_models(
    cluster: Cluster, record_property: Any
) -> None:
    """Router and Controller are replaced, with one Router too; models, and what was loaded by a
    client, stay; every answer is counted, once."""
    old, kept, before = routers(cluster, 1), replicas(cluster), counted(cluster)
    with running(cluster, TARGETS, clients=2, passing=2) as load:
        begun_s = time.monotonic()
        cluster.deploy(**ARGS, max_queue_s=61)
        routers(cluster, 1, besides=old)
        print(f"update: replaced after {time.monotonic() - begun_s:.1f} s")
        load.wait_ok()
    show(record_property, "update", load, begun_s)
    assert not load.lost()
    assert replicas(cluster) == kept
    expected = {model: n + load.codes(model=model)["ok"] for model, n in before.items()}
    wait_equal(lambda: counted(cluster), expected, 60)  # the old Router's have come, too


@pytest.mark.long
def test_a_configuration_that_is_refused_changes_nothing(cluster: Cluster) -> None:
    old = routers(cluster, 1)
    with running(cluster, TARGETS) as load:
        cluster.deploy(**ARGS, max_queue_s=-1)
        status = cluster.wait_status("DEPLOY_FAILED")
        load.wait_ok()
    assert "max_queue_s" in status["message"]
    assert not load.lost()
    assert set(cluster.replica_pids("manta:Router")) == old


@pytest.mark.long
@pytest.mark.parametrize(("lacks", "then_s"), [("a repository", 62), ("a port", 63)])
def test_a_configuration_that_cannot_be_served_leaves_the_old_router_serving(
    cluster: Cluster, record_property: Any, lacks: str, then_s: int
) -> None:
    """Its Controller does not start, or its Router does not, so the new Router never counts as
    running; and the next configuration puts that right."""
    old, kept = routers_that_run(cluster), replicas(cluster)
    with socket.socket() as holder, running(cluster, TARGETS) as load:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        wrong: dict[str, Any] = {"a repository": {"model_repository": ["/nowhere"]}}
        wrong["a port"] = {"http_port": holder.getsockname()[1]}
        begun_s = time.monotonic()
        cluster.deploy(**ARGS, **wrong[lacks])
        cluster.wait_status("DEPLOY_FAILED")
        load.wait_ok()
        assert old <= routers_that_run(cluster)
        cluster.deploy(**ARGS, max_queue_s=then_s)
        routers(cluster, 1, besides=old)
        load.wait_ok()
    show(record_property, f"without {lacks}", load, begun_s)
    assert not load.lost()
    assert replicas(cluster) == kept


@pytest.mark.long
def test_a_router_more_and_a_router_less_lose_nothing(
    cluster: Cluster, record_property: Any
) -> None:
    """A changed number of replicas replaces none."""
    args, before = {**ARGS, "max_queue_s": 64}, routers_that_run(cluster)
    cluster.deploy(**args)
    (old,) = routers(cluster, 1, besides=before)
    with running(cluster, TARGETS, clients=2, passing=2) as load:
        begun_s = time.monotonic()
        cluster.deploy([{"name": "Router", "num_replicas": 2}], **args)
        assert old in routers(cluster, 2)
        load.wait_ok()
        cluster.deploy([{"name": "Router", "num_replicas": 1}], **args)
        routers(cluster, 1)
        load.wait_ok()
    show(record_property, "Routers", load, begun_s)
    assert not load.lost()


def test_control_a_router_that_is_killed_instead_does_lose_requests(
    cluster: Cluster, record_property: Any
) -> None:
    old, kept = routers_that_run(cluster), replicas(cluster)
    with running(cluster, TARGETS, clients=2, passing=2) as load:
        struck_s = time.monotonic()
        for pid in old:
            os.kill(pid, signal.SIGKILL)
        routers(cluster, 1, besides=old)
        wait_for(cluster.ready, LIMIT_S, "it is ready again")
        load.wait_back(struck_s)
        load.wait_ok()
    show(record_property, "the only Router", load, struck_s)
    # HAProxy outlives its Router by a moment, in which it answers for it.
    assert load.lost()["cut"] and set(load.lost()) <= {"cut", "503"}
    assert replicas(cluster) == kept


def test_when_the_head_dies_the_node_ends_and_leaves_its_ports(
    cluster: Cluster, record_property: Any
) -> None:
    """Without Redis nothing outlives the head: `ray start --block` says so by its exit code."""
    with running(cluster, TARGETS) as load:
        cluster.stop_peeking()
        family = cluster.descendants()
        (head,) = named(family, "gcs_server")
        begun_s = time.monotonic()
        head.kill()
        assert cluster.process.wait(LIMIT_S) == 1
        ended_s = time.monotonic()
        wait_for(lambda: load.codes().get("cut", 0) > load.loops, LIMIT_S, "nobody can connect")
    show(record_property, "head", load, begun_s)
    print(f"head: the node ended after {ended_s - begun_s:.1f} s")
    # What is answered is answered rightly, for as long as that is.
    assert set(load.lost()) <= {"cut", "503"}
    agents = named(family, *RAYS_AGENTS)  # they end by themselves within a minute
    _, alive = psutil.wait_procs([p for p in family if p not in agents], timeout=GONE_S)
    assert not list(filter(runs, alive))
    for process in agents:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    assert "gcs_server" in cluster.output()
    for port in (cluster.http_port, cluster.grpc_port, cluster.metrics_port):
        assert port_is_free(port)
