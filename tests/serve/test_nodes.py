"""Several nodes: a head without CPUs and two workers, a Router on each worker, on one machine.

The Routers share the ports here, and the kernel spreads connections over them; a test finds out
which one it has. One worker dies, a new one comes, then the one with the Controller dies: these
tests build on each other, in the order of the file.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tritonclient.grpc as grpcclient

from tests import models
from tests.serve import repository
from tests.serve.clients import inputs, rows
from tests.serve.nodes import Node, Nodes, cluster
from tests.serve.server import wait_equal, wait_for

# Each waits for several processes to start, one after the other.
pytestmark = pytest.mark.timeout(600)

# Each is a place where a request can be held; two workers share them.
HELD = 4
# Clients of each Router that ask all the time.
STEADY = 3
LIMIT_S = 180.0
HOLD = f'''{repository.HOLD}
class Hold(torch.nn.Module):
    """Tells its process; below 0 it is held before."""

    def forward(self, x):
        if x.min() < 0:
            hold()
        return torch.full(x.shape, os.getpid(), dtype=torch.int64)
'''
SPARES = ("spare_a", "spare_b", "spare_c")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("nodes")
    models.save_eager(HOLD, root, "hold")
    tensors = [repository.tensor("x", "1")], [repository.tensor("pid", "1", "TYPE_INT64")]
    eager = 'backend: "pytorch"\nruntime: "model.py"'
    more = f"instance_group [ {{ kind: KIND_CPU count: {HELD} }} ]\n" + repository.EAGER
    text = repository.config(*tensors, engine=eager, max_batch_size=1, more=more)
    repository.write_config(root, "hold", text)
    two = "instance_group [ { kind: KIND_CPU count: 2 } ]\n"
    models.save_torchscript(repository.mlp(), root, "mlp")
    repository.write_config(root, "mlp", repository.MLP + two)
    for name in (*SPARES, "wide"):
        models.save_torchscript(models.identity(), root, name)
        text = repository.config(
            [repository.tensor("x", "2")], [repository.tensor("OUTPUT__0", "2")]
        )
        if name == "wide":  # one a worker, and no more
            text += two + repository.parameter("CPU_FRACTION", "1.5")
        repository.write_config(root, name, text)
    return root


@pytest.fixture(scope="module")
def nodes(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """The Routers as in cluster/overlays/ha: one a node, and none where there are no CPUs."""
    some = {"num_cpus": 0.1}
    deployments: list[dict[str, Any]] = [
        {"name": "Router", "max_replicas_per_node": 1, "ray_actor_options": some},
        {"name": "Controller", "ray_actor_options": some},
    ]
    args: dict[str, Any] = {"model_control_mode": "explicit", "load_model": ["hold", "mlp"]}
    args |= {"max_queue_s": LIMIT_S, "max_execution_s": LIMIT_S}  # what is held does not hang
    folder = tmp_path_factory.mktemp("config")
    with cluster(root, folder, deployments, router_replicas=2, **args) as one:
        one.wait_ready()
        wait_for(lambda: len(one.routers()) == 2, LIMIT_S, "two Routers")
        yield one
        family = one.descendants()
        assert one.stop() == 0, one.output()[-3000:]
        assert not [process for process in family if process.is_running()]


# --- connections ---------------------------------------------------------------------------------


class Line:
    """One HTTP connection that stays; `router` is the process that has its other end."""

    def __init__(self, nodes: Nodes) -> None:
        self._connection = http.client.HTTPConnection(nodes.http, timeout=LIMIT_S)
        self._connection.connect()
        self.ask("GET", "/v2/health/live")  # accepted, then
        port = self._connection.sock.getsockname()[1]
        self.router = next(pid for pid in nodes.routers().values() if port in _peers(pid))

    def ask(self, verb: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and body. Raises OSError or HTTPException when the connection is lost."""
        text = None if body is None else json.dumps(body)
        self._connection.request(verb, path, text)
        reply = self._connection.getresponse()
        content = reply.read()
        return reply.status, json.loads(content) if content else None

    def infer(self, model: str, value: Any) -> tuple[int, Any]:
        """Of the model's only input; the data of its only output, or the text of the error."""
        array = np.asarray(value, np.float32)
        name = {"mlp": "INPUT__0"}.get(model, "x")
        data = array.ravel().tolist()
        tensor = {"name": name, "shape": array.shape, "datatype": "FP32", "data": data}
        status, answer = self.ask("POST", f"/v2/models/{model}/infer", {"inputs": [tensor]})
        return status, answer["outputs"][0]["data"] if status == 200 else answer["error"]

    def control(self, verb: str, model: str) -> int:
        return self.ask("POST", f"/v2/repository/models/{model}/{verb}", {})[0]

    def ready(self, model: str) -> bool:
        return self.ask("GET", f"/v2/models/{model}/ready")[0] == 200

    def index(self) -> dict[str, str]:
        _, found = self.ask("POST", "/v2/repository/index", {})
        return {one["name"]: one.get("state", "") for one in found}

    def counts(self, model: str) -> tuple[int, int]:
        """How many requests succeeded and failed."""

        def told() -> Any:  # a Controller may have begun just now
            status, answer = self.ask("GET", f"/v2/models/{model}/stats")
            return answer if status == 200 else None

        answer = wait_for(told, 60, "statistics")
        stats = answer["model_stats"][0]["inference_stats"]
        return stats["success"]["count"], stats["fail"]["count"]

    def close(self) -> None:
        self._connection.close()


def _peers(pid: int) -> set[int]:
    """The other ends' ports of a process' connections."""
    with contextlib.suppress(psutil.NoSuchProcess):
        found = psutil.Process(pid).net_connections("tcp")
        return {one.raddr.port for one in found if one.raddr}
    return set()


@contextlib.contextmanager
def lines_to(nodes: Nodes, counts: dict[int, int]) -> Iterator[dict[int, list[Line]]]:
    """So many connections to each of these Routers, once it has opened its ports."""
    found: dict[int, list[Line]] = {pid: [] for pid in counts}

    end_s = time.monotonic() + LIMIT_S
    try:
        while any(len(found[pid]) < count for pid, count in counts.items()):
            assert time.monotonic() < end_s, (counts, found)
            line = Line(nodes)
            if len(found.get(line.router, ())) < counts.get(line.router, 0):
                found[line.router].append(line)
            else:
                line.close()
                time.sleep(0.02)
        yield found
    finally:
        for line in (line for lines in found.values() for line in lines):
            line.close()


def replicas(nodes: Nodes, model: str) -> list[dict[str, Any]]:
    peeked = nodes.peek()["replicas"]
    return [one for one in peeked if one["application"].split(".")[1] == model and one["loaded"]]


def spread(nodes: Nodes, model: str) -> Counter[str]:
    """How many replicas each node has."""
    return Counter(one["node_id"] for one in replicas(nodes, model))


def all_loaded(nodes: Nodes) -> None:
    """The Controller counts on all replicas, since it has heard of each within seconds."""
    wanted = {"hold": HELD, "mlp": 2}
    wait_equal(lambda: {model: spread(nodes, model).total() for model in wanted}, wanted, LIMIT_S)


# --- what all nodes have in common ---------------------------------------------------------------


def test_replicas_and_routers_are_spread_over_the_workers(nodes: Nodes) -> None:
    workers = {node.node_id for node in nodes.workers}
    assert {node.node_id for node in nodes.routers()} == workers
    all_loaded(nodes)
    assert set(spread(nodes, "hold")) == workers
    assert spread(nodes, "mlp") == dict.fromkeys(workers, 1)


def test_two_routers_give_the_same_answers_and_exact_statistics(nodes: Nodes) -> None:
    """Each by both ways to replicas: the channel on its node, Serve to the other."""
    questions = [rows(count, 8, count) for count in (1, 2, 5)]
    before = {r["replica_id"]: traffic(r) for r in replicas(nodes, "mlp")}
    routers = list(nodes.routers().values())
    with lines_to(nodes, dict.fromkeys(routers, 4)) as found, grpc_clients(nodes, 12) as clients:
        one, other = (found[pid][0] for pid in routers)
        start = one.counts("mlp")
        answers: list[list[Any]] = [[] for _ in questions]

        def over_http(line: Line) -> None:
            for _ in range(5):
                for question, given in zip(questions, answers, strict=True):
                    status, data = line.infer("mlp", question)
                    assert status == 200, data
                    given.append(np.array(data, np.float32))

        def over_grpc(client: Any) -> None:
            for question, given in zip(questions, answers, strict=True):
                reply = client.infer("mlp", inputs(grpcclient, {"INPUT__0": question}))
                given.append(reply.as_numpy("OUTPUT__0").ravel())

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            list(pool.map(over_http, [line for lines in found.values() for line in lines]))
            list(pool.map(over_grpc, clients))
        assert grpc_routers(nodes) == set(routers)  # the kernel gave clients to both
        sent = len(questions) * (8 * 5 + len(clients))
        total = start[0] + sent, start[1]
        # Each Router tells the Controller now and then.
        wait_equal(lambda: (one.counts("mlp"), other.counts("mlp")), (total, total), 60)
    for given in answers:
        for answer in given:  # rows of other requests in its batch may change the last bits
            np.testing.assert_allclose(answer, given[0], rtol=1e-5, atol=1e-6)
    wait_for(lambda: both_grew(nodes, before), 60, "both ways to both replicas were used")


def traffic(report: dict[str, Any]) -> tuple[int, int]:
    """Batches that came by a channel, and through Serve."""
    return int(report["details"]["by_channel"]), int(report["details"]["by_serve"])


def both_grew(nodes: Nodes, before: dict[str, tuple[int, int]]) -> bool:
    """At each replica. A channel is for the Router of the same node; the other one's batches come
    through Serve."""
    now = {one["replica_id"]: traffic(one) for one in replicas(nodes, "mlp")}
    return now.keys() == before.keys() and all(
        now[r][0] > channel and now[r][1] > serve for r, (channel, serve) in before.items()
    )


@contextlib.contextmanager
def grpc_clients(nodes: Nodes, count: int) -> Iterator[list[Any]]:
    """Each with a connection of its own."""
    own = [("grpc.use_local_subchannel_pool", 1)]
    clients = [grpcclient.InferenceServerClient(nodes.grpc, channel_args=own) for _ in range(count)]
    try:
        yield clients
    finally:
        for client in clients:
            client.close()


def grpc_routers(nodes: Nodes) -> set[int]:
    """Those that have connections at the gRPC port, themselves or by their HAProxy."""
    found = set()
    for pid in nodes.routers().values():
        for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
            for one in process.net_connections("tcp"):
                if one.raddr and one.laddr.port == nodes.grpc_port:
                    found.add(pid)
    return found


def test_no_load_or_unload_is_lost_among_two_routers(nodes: Nodes) -> None:
    """What one Router has done is there for a client of the other, as soon as it has said so."""
    routers = list(nodes.routers().values())
    with lines_to(nodes, dict.fromkeys(routers, len(SPARES))) as found:

        def work(turn: int) -> None:
            model = SPARES[turn]
            here, there = (found[pid][turn] for pid in routers[:: 1 if turn % 2 else -1])
            assert here.control("load", model) == 200
            assert there.ready(model) and there.infer(model, [[1, 2]]) == (200, [1.0, 2.0])
            assert there.control("unload", model) == 200
            assert not here.ready(model) and here.infer(model, [[1, 2]])[0] == 404
            assert here.control("load", model) == 200
            assert there.ready(model) and here.infer(model, [[3, 4]]) == (200, [3.0, 4.0])
            if turn:
                assert there.control("unload", model) == 200

        with concurrent.futures.ThreadPoolExecutor(len(SPARES)) as pool:
            list(pool.map(work, range(len(SPARES))))
        one, other = (found[pid][0] for pid in routers)
        wait_for(lambda: "UNLOADING" not in one.index().values(), 60, "all is unloaded")
        wait_for(lambda: one.index() == other.index(), 60, "both have the same index")
        for line in (one, other):
            assert [line.ready(model) for model in SPARES] == [True, False, False]


# --- a node dies ---------------------------------------------------------------------------------


@dataclass
class Load:
    """What became of requests: `held` ones by Router, and those of clients that never rest."""

    held: dict[int, Counter[str]] = field(default_factory=dict)
    steady: dict[int, Counter[str]] = field(default_factory=dict)


def outcome(ask: Callable[[], tuple[int, Any]]) -> str:
    """`ok`, `lost` where the connection is, `ended` for the 503 of a replica that has, or else."""
    try:
        status, answer = ask()
    except (OSError, http.client.HTTPException):
        return "lost"
    if status == 503 and "has ended; send the request again" in answer:
        return "ended"
    return "ok" if status == 200 else f"{status} {answer}"


def under_load(nodes: Nodes, root: Path, stays: int, goes: int, strike: Callable[[], None]) -> Load:
    """All of `hold` runs requests of the Router `stays`, and as many of `goes` wait behind them;
    clients of both ask `mlp` all the time. Then `strike` is called; what is held comes to its end
    when all models are whole again."""
    load, stop = Load(), threading.Event()
    folder = root / "hold"
    for file in folder.glob("held.*"):
        file.unlink()

    def steady(line: Line) -> Counter[str]:
        """Until it is told to stop, or has lost its connection."""
        told: Counter[str] = Counter()
        while not stop.is_set() and not told["lost"]:
            told[outcome(lambda: line.infer("mlp", rows(1, 8)))] += 1
        return told

    def held(line: Line) -> str:
        return outcome(lambda: line.infer("hold", [[-1]]))

    with (
        lines_to(nodes, {stays: HELD + STEADY, goes: HELD + STEADY}) as found,
        concurrent.futures.ThreadPoolExecutor(32) as pool,
        repository.holding(folder) as go,
    ):
        try:
            holding = {stays: [pool.submit(held, line) for line in found[stays][:HELD]]}

            def all_held() -> bool:
                early = [one.result() for one in holding[stays] if one.done()]
                assert not early, early
                return len(list(folder.glob("held.*"))) == HELD

            wait_for(all_held, LIMIT_S, "all are held")
            holding[goes] = [pool.submit(held, line) for line in found[goes][:HELD]]
            asking = {
                pid: [pool.submit(steady, line) for line in lines[HELD:]]
                for pid, lines in found.items()
            }
            time.sleep(1.0)  # they wait by now, and clients ask
            strike()
            go()
            for pid, waiting in holding.items():
                load.held[pid] = Counter(one.result(LIMIT_S) for one in waiting)
        finally:
            stop.set()
        for pid, clients in asking.items():
            load.steady[pid] = sum((one.result(LIMIT_S) for one in clients), Counter())
    return load


def routers_of(nodes: Nodes, node: Node) -> tuple[int, int]:
    """The Router of another node, and that of this one."""
    found = nodes.routers()
    return next(pid for one, pid in found.items() if one != node), found[node]


def home_of_the_controller(nodes: Nodes, wanted: bool) -> Node:
    """Its worker, or the other one."""
    (pid,) = nodes.replica_pids("manta:Controller")
    home = nodes.node_of(pid)
    return home if wanted else next(node for node in nodes.workers if node != home)


def applications(nodes: Nodes) -> Counter[str]:
    """How many replicas of each have loaded."""
    return Counter(one["application"] for one in nodes.peek()["replicas"] if one["loaded"])


def nobody_on(nodes: Nodes, node: Node) -> bool:
    return all(one["node_id"] != node.node_id for one in nodes.peek()["replicas"])


def test_control_nothing_is_lost_when_no_node_dies(nodes: Nodes, root: Path) -> None:
    stays, goes = routers_of(nodes, nodes.workers[0])
    load = under_load(nodes, root, stays, goes, lambda: None)
    assert load.held == {stays: Counter(ok=HELD), goes: Counter(ok=HELD)}
    assert set(load.steady[stays]) == set(load.steady[goes]) == {"ok"}


def lose(nodes: Nodes, root: Path, node: Node) -> None:
    """Kills the node under load, and looks at what became of it."""
    stays, goes = routers_of(nodes, node)
    all_loaded(nodes)
    dead = {model: spread(nodes, model)[node.node_id] for model in ("hold", "mlp")}
    whole = applications(nodes)
    with lines_to(nodes, {stays: 1}) as found:
        line = found[stays][0]
        before = {model: line.counts(model) for model in dead}

        def strike() -> None:
            began_s = time.monotonic()
            nodes.kill(node)
            wait_for(lambda: nobody_on(nodes, node), LIMIT_S, "its replicas are not counted on")
            # The same applications: nothing was loaded anew by way of another one.
            wait_for(lambda: applications(nodes) == whole, LIMIT_S, "all replicas came back")
            print(f"\nafter {time.monotonic() - began_s:.1f} s all were back")

        load = under_load(nodes, root, stays, goes, strike)
        print(load)
        # What ran on the dead node is known; all else that its Router had, was in flight there.
        alive = HELD - dead["hold"]
        assert load.held[stays] == +Counter(ok=alive, ended=dead["hold"])
        assert load.held[goes] == Counter(lost=HELD)
        # Each instance there had at most one request of each client, in whatever batches.
        assert set(load.steady[stays]) <= {"ok", "ended"} and load.steady[stays]["ok"]
        assert load.steady[stays]["ended"] <= STEADY * dead["mlp"]
        assert set(load.steady[goes]) <= {"ok", "lost"} and load.steady[goes]["lost"] == STEADY
        for model, mine in (("hold", load.held[stays]), ("mlp", load.steady[stays])):
            now = line.counts(model)
            grown = [one - other for one, other in zip(now, before[model], strict=True)]
            assert grown[0] >= mine["ok"] and grown[1] >= mine["ended"]  # they never went back
        with lines_to(nodes, {stays: 2}) as new:  # all connections reach the one that is left
            assert all(one.infer("mlp", rows(1, 8))[0] == 200 for one in new[stays])


def test_a_dead_worker_fails_only_what_was_in_flight_there(nodes: Nodes, root: Path) -> None:
    lose(nodes, root, home_of_the_controller(nodes, False))


def test_a_new_node_takes_what_waited_for_one(nodes: Nodes) -> None:
    """A Router, and a model that has no room otherwise."""
    (router,) = nodes.routers().values()
    with (
        lines_to(nodes, {router: 2}) as found,
        concurrent.futures.ThreadPoolExecutor(1) as pool,
    ):
        line, other = found[router]
        loading = pool.submit(line.control, "load", "wide")
        wait_for(lambda: other.index()["wide"] == "LOADING", 60, "it is being loaded")
        wait_for(lambda: len(spread(nodes, "wide")) == 1, LIMIT_S, "the one that has room is there")
        assert not loading.done()
        node = nodes.add()
        assert loading.result(LIMIT_S) == 200
        wait_equal(lambda: spread(nodes, "wide"), {one.node_id: 1 for one in nodes.workers}, 60)
        wait_for(lambda: node in nodes.routers(), LIMIT_S, "a Router on the new node")
        with lines_to(nodes, dict.fromkeys(nodes.routers().values(), 1)) as both:
            for (one,) in both.values():
                assert one.infer("wide", [[5, 6]]) == (200, [5.0, 6.0])
                assert one.infer("mlp", rows(1, 8))[0] == 200
        assert line.control("unload", "wide") == 200
        wait_for(lambda: not replicas(nodes, "wide"), 60, "it is gone")


def test_the_node_with_the_controller_is_no_exception(nodes: Nodes, root: Path) -> None:
    """Its models are adopted, and what its Router had counted is not forgotten."""
    time.sleep(5.0)  # until each Router knows what the other one has counted
    lose(nodes, root, home_of_the_controller(nodes, True))
