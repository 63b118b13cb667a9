"""What a server has started with: replicas that are forks, and models that could not be loaded."""

from __future__ import annotations

import psutil

from tests.serve.server import Server


def test_cpu_replicas_are_forks_and_share_most_of_their_memory(server: Server) -> None:
    pids = [one for name in ("mlp", "eager_mlp", "strings") for one in server.replica_pids(name)]
    assert pids
    for pid in pids:
        process = psutil.Process(pid)
        parent = process.parent()
        assert parent is not None and "deployments.forkserver" in " ".join(parent.cmdline())
        memory = process.memory_full_info()
        assert memory.uss < memory.rss / 2, memory


def test_router_and_controller_are_not(server: Server) -> None:
    """The control of the test above: they import no torch, and have an interpreter of their own."""
    for name in ("Router", "Controller"):
        for pid in server.replica_pids(f"manta:{name}"):
            parent = psutil.Process(pid).parent()
            assert parent is None or "forkserver" not in " ".join(parent.cmdline())
