"""What a server has started with: replicas that are forks, and models that could not be loaded."""

from __future__ import annotations

from typing import Any

import psutil

from tests.serve.conftest import BROKEN
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


def test_good_models_serve_beside_three_broken_ones(server: Server, http: Any) -> None:
    index = {entry["name"]: entry for entry in http.get_model_repository_index()}
    assert index["mlp"]["state"] == "READY"
    assert {index[name]["state"] for name in BROKEN} == {"UNAVAILABLE"}
    assert "bad_field/config.pbtxt:1" in index["bad_field"]["reason"]
    assert "torch.save" in index["pickled"]["reason"]
    assert "INPUT__7" in index["bad_name"]["reason"]
    assert not any(str(server.repository) in index[name]["reason"] for name in BROKEN)
