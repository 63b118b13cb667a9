"""Instance groups as processes, shared weights, parameters and environment, on the real server."""

from __future__ import annotations

from pathlib import Path

from tests.serve.server import Server, wait_for


def test_count_two_is_two_replicas(server: Server) -> None:
    peeked = server.peek()
    (application,) = [name for name in peeked["running"] if name.startswith("manta.slow.")]
    assert peeked["running"][application] == {"slow_0": 2}
    pids = {r["pid"] for r in peeked["replicas"] if r["application"] == application}
    assert len(pids) == 2 and pids == set(server.replica_pids(application))


def test_weight_sharing_is_one_actor_with_two_instances_over_one_module(server: Server) -> None:
    peeked = server.peek()
    (replica,) = [r for r in peeked["replicas"] if r["application"].startswith("manta.shared.")]
    assert replica["instances"] == 2
    first, second = replica["weight_pointers"]
    assert first == second != 0
    assert len(server.replica_pids(replica["application"])) == 1


def test_without_weight_sharing_weights_are_their_own(server: Server) -> None:
    """The control: an ordinary replica has one instance and one pointer."""
    peeked = server.peek()
    (replica,) = [r for r in peeked["replicas"] if r["application"].startswith("manta.mlp.")]
    assert replica["instances"] == 1 and len(replica["weight_pointers"]) == 1


def test_the_environment_reaches_the_replicas(server: Server) -> None:
    peeked = server.peek()
    assert peeked["replicas"]
    assert all(r["details"]["cuda_launch_blocking"] == "1" for r in peeked["replicas"])


def test_parameters_are_told_in_the_log_when_a_version_loads(server: Server) -> None:
    lines = (
        "Inference Mode is enabled",
        "Optimized execution is enabled",
        "cuDNN is enabled",
        "Cache Cleaning is disabled",
        "Torch parallelism settings for 'eager_mlp': NUM_THREADS = 1; NUM_INTEROP_THREADS = 1;",
        "'torch.compile' optional parameter(s) for 'eager_mlp': {'disable': True}",
    )
    reusing = "Reusing TorchScript model for instance 'shared_1_"

    def missing() -> list[str]:
        return [line for line in (*lines, reusing) if line not in server.output()]

    # A moment after they are logged.
    wait_for(lambda: not missing(), 30, "the lines are shown")
    assert server.output().count(reusing) == 1


def _maps_torch(pid: int) -> bool:
    return "libtorch" in Path(f"/proc/{pid}/maps").read_text()


def test_the_router_has_no_torch(server: Server) -> None:
    (router,) = server.replica_pids("manta:Router")
    assert not _maps_torch(router)
    # The control: a replica, looked at in the same way, has it.
    assert all(_maps_torch(pid) for pid in server.replica_pids("manta.mlp."))
