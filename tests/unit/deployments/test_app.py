"""The composition root: what a model's deployment asks of Ray. No Ray is started."""

from __future__ import annotations

from typing import Any

import pytest

from configs.placement import GroupPlacement
from configs.server import ServerSettings
from deployments import app, forkclient

SETTINGS = ServerSettings(environment={"OMP_NUM_THREADS": "3"})


def options(kind: str, monkeypatch: pytest.MonkeyPatch, switch: str) -> dict[str, Any]:
    monkeypatch.setenv(forkclient.SWITCH, switch)
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
    found: dict[str, Any] = app._model_deployment(spec, placement, SETTINGS).ray_actor_options
    return found


def test_cpu_replicas_are_forks_with_the_environment_of_the_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    environment = options("KIND_CPU", monkeypatch, "1")["runtime_env"]
    assert environment["py_executable"].endswith("forkclient.py")
    assert environment["env_vars"] == {"OMP_NUM_THREADS": "3"}


@pytest.mark.parametrize("kind", ["KIND_GPU", "KIND_MODEL"])
def test_replicas_with_devices_are_not(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not options(kind, monkeypatch, "1").get("runtime_env")


def test_the_switch_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not options("KIND_CPU", monkeypatch, "0").get("runtime_env")
