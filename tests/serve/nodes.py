"""Manta on a Ray cluster of several nodes, all of them on this machine.

`Nodes` is a test's end of it. The other end, this file run as a program, owns the Cluster and the
`serve run` that deploys to it; it takes commands and answers them, a line of JSON each.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import secrets
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.serve.server import BIN, ROOT, Server, free_ports, profile

MIB = 1 << 20
ANSWER_S = 90.0
END_S = 60.0
# The head has no CPUs, as in cluster/base/rayservice.yaml: no model's replica goes there.
HEAD = {"num_cpus": 0, "object_store_memory": 80 * MIB, "include_dashboard": False}
WORKER = {"num_cpus": 2, "object_store_memory": 80 * MIB}
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


@dataclass(frozen=True)
class Node:
    """`raylet` is a process id."""

    node_id: str
    raylet: int


class Nodes(Server):
    """A head, two workers, and the application deployed to them by `serve run`."""

    def __init__(
        self, config: Path, ports: list[int], environment: Mapping[str, str], root: Path
    ) -> None:
        command = [sys.executable, "-m", "tests.serve.nodes", str(config)]
        super().__init__(command, ports, environment, root, talks=True)
        self.head = self._ask_for("add")
        self.workers = [self._ask_for("add"), self._ask_for("add")]

    def deploy(self) -> None:
        self._command("deploy")

    def add(self) -> Node:
        node = self._ask_for("add")
        self.workers.append(node)
        return node

    def kill(self, node: Node) -> None:
        """All processes of a node at once, as if it had lost its power."""
        self._command("kill", node.raylet)
        self.workers.remove(node)

    def node_of(self, pid: int) -> Node:
        """Of a process that was not forked from another replica."""
        above = {one.pid for one in psutil.Process(pid).parents()}
        return next(node for node in (self.head, *self.workers) if node.raylet in above)

    def routers(self) -> dict[Node, int]:
        """Process ids, by the nodes that they are on."""
        return {self.node_of(pid): pid for pid in self.replica_pids("manta:Router")}

    def _ask_for(self, verb: str) -> Node:
        return Node(**self._command(verb))

    def _command(self, *words: Any) -> dict[str, Any]:
        asked, answers = self.process.stdin, self.process.stdout
        assert asked is not None and answers is not None
        asked.write(json.dumps(words).encode() + b"\n")
        ready, _, _ = select.select([answers], [], [], ANSWER_S)
        line = answers.readline() if ready else b""
        assert line, self.output()[-4000:]
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        super().close()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


@contextlib.contextmanager
def cluster(
    root: Path, folder: Path, deployments: list[dict[str, Any]], **args: Any
) -> Iterator[Nodes]:
    """serve_config.yaml with these `args`, and Serve's options for our deployments; not waited
    for. `folder` is for the file."""
    ports = free_ports(3)
    config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    config["http_options"]["port"], config["grpc_options"]["port"] = ports[:2]
    edges = {"http_port": ports[0], "grpc_port": ports[1], "metrics_port": ports[2]}
    config["applications"][0]["args"] |= {**edges, **args}
    config["applications"][0]["deployments"] = deployments
    path = folder / "serve_config.yaml"
    path.write_text(yaml.safe_dump(config))
    environment = {
        **profile(),
        "MANTA_MODEL_REPOSITORY": str(root),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    nodes = Nodes(path, ports, environment, root)
    try:
        nodes.deploy()
        yield nodes
    finally:
        nodes.close()


# --- the program ---------------------------------------------------------------------------------


class _Runner:
    def __init__(self, config: str) -> None:
        from ray.cluster_utils import Cluster

        self._config = config
        self._cluster = Cluster(shutdown_at_exit=False)
        self._nodes: dict[int, Any] = {}
        self._deployed: subprocess.Popen[bytes] | None = None

    def add(self) -> dict[str, Any]:
        kind = WORKER if self._nodes else HEAD
        node = self._cluster.add_node(**kind)
        pid = node.all_processes["raylet"][0].process.pid
        self._nodes[pid] = node
        return asdict(Node(node.node_id, pid))

    def deploy(self) -> dict[str, Any]:
        command = [str(BIN / "serve"), "run", "--address", self._cluster.address, self._config]
        self._deployed = subprocess.Popen(command, stdin=subprocess.DEVNULL, cwd=ROOT)
        return {}

    def kill(self, raylet: int) -> dict[str, Any]:
        family = self._family(raylet)
        for one in family:  # first, so that none can tell of another's death
            with contextlib.suppress(psutil.NoSuchProcess):
                one.suspend()
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        self._cluster.remove_node(self._nodes.pop(raylet), allow_graceful=False)
        return {"killed": len(family)}

    def stop(self, raylet: int) -> dict[str, Any]:
        family = self._family(raylet)
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.suspend()
        return {"stopped": len(family)}

    def _family(self, raylet: int) -> list[psutil.Process]:
        """The raylet first, then its workers, its fork servers and their forks."""
        own = psutil.Process(raylet)
        found = [own, *own.children(recursive=True)]
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                words = process.cmdline()
                if str(raylet) in words and any("deployments.forkserver" in w for w in words):
                    found += [process, *process.children(recursive=True)]
        return found

    def end(self) -> None:
        if self._deployed is not None:
            self._deployed.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._deployed.wait(END_S)
        self._cluster.shutdown()

    def reap(self) -> None:
        """What has outlived its parent is a child of this process; the rest has others to wait."""
        ours = {*self._nodes, self._deployed.pid if self._deployed else 0}
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error, ChildProcessError):
                name = child.name()
                if child.pid not in ours and name not in ("raylet", "gcs_server"):
                    if child.status() == psutil.STATUS_ZOMBIE:
                        os.waitpid(child.pid, os.WNOHANG)


def main() -> None:
    commands, answers = os.fdopen(0, "rb", buffering=0), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what Ray prints is for the log
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    ended: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: ended.append(number))
    runner = _Runner(sys.argv[1])
    while not ended:
        ready, _, _ = select.select([0], [], [], 1.0)
        runner.reap()
        line = commands.readline() if ready else b""
        if ready and not line:
            break
        if line:
            verb, *arguments = json.loads(line)
            answers.write(json.dumps(getattr(runner, verb)(*arguments)) + "\n")
            answers.flush()
    runner.end()


if __name__ == "__main__":
    main()
