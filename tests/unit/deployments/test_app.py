"""The composition root: what a model's deployment asks of Ray. No Ray is started."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from configs.placement import GroupPlacement
from configs.server import ServerSettings
from deployments import app

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks as Linux has them")


def options(kind: str, fork_server: bool, logical_gpus: bool = False) -> dict[str, Any]:
    settings = ServerSettings(
        environment={"OMP_NUM_THREADS": "3"}, fork_server=fork_server, logical_gpus=logical_gpus
    )
    found: dict[str, Any] = deployment(settings, kind).ray_actor_options
    return found


def deployment(settings: ServerSettings, kind: str = "KIND_CPU") -> Any:
    placement = GroupPlacement(
        deployment="m_0",
        kind=kind,
        gpu=None,
        replicas=2,
        instances=1,
        num_cpus=0.01,
        num_gpus=0,
        resources={},
    )
    spec: Any = type("Spec", (), {"deployment": "m_0"})()
    return app._model_deployment(spec, placement, settings)


def test_serve_gives_a_replica_the_time_for_all_that_its_instances_may_have() -> None:
    made = deployment(ServerSettings(max_execution_s=70, exit_timeout_s=5))
    assert made._deployment_config.graceful_shutdown_timeout_s > 2 * 70
    made = deployment(ServerSettings(max_execution_s=1, exit_timeout_s=50))
    assert made._deployment_config.graceful_shutdown_timeout_s > 50


def test_cpu_replicas_are_forks_with_the_environment_of_the_server() -> None:
    environment = options("KIND_CPU", True)["runtime_env"]
    assert environment["py_executable"].endswith("forkclient.py")
    assert environment["env_vars"] == {"OMP_NUM_THREADS": "3"}


@pytest.mark.parametrize("kind", ["KIND_GPU", "KIND_MODEL"])
def test_replicas_with_devices_are_not(kind: str) -> None:
    assert not options(kind, True).get("runtime_env")


@pytest.mark.parametrize("kind", ["KIND_GPU", "KIND_MODEL"])
def test_logical_devices_are_the_host(kind: str) -> None:
    assert options(kind, True, logical_gpus=True)["runtime_env"]


def test_the_setting_turns_it_off() -> None:
    assert not options("KIND_CPU", False).get("runtime_env")
