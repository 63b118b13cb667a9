"""Model applications on Serve: their names, how they are deployed, deleted and found again.

Knows nothing of versions' states; blocking calls, made by the Controller in threads.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any
from urllib.parse import quote, unquote

import ray
from ray import serve
from ray.serve._private.common import DeploymentID
from ray.serve._private.storage.kv_store import RayInternalKVStore
from ray.serve.api import RunTarget
from ray.serve.context import _get_global_client

from configs.placement import GroupPlacement
from configs.server import ServerSettings

from .types import ReplicaSpec

logger = logging.getLogger("ray.serve")

PREFIX = "manta"
GPU_RESOURCE = "manta_gpu_"
SCALE_S = 30.0
_NOT_LOADED = frozenset({"STARTING", "STOPPING", "STOPPED"})
# Serve registers modules with cloudpickle for the time of a call, in a table of the whole process:
# two of its calls at once trip over each other (2.60: "not registered for pickle by value").
_SERVE_CALLS = threading.Lock()
BindModel = Callable[[Sequence[ReplicaSpec], Sequence[GroupPlacement], ServerSettings], Any]


def application_name(model_name: str, version: int, generation: int) -> str:
    """`manta.<escaped model>.<version>.<generation>`; the escape leaves no dot in the model."""
    escaped = quote(model_name, safe="").replace(".", "%2E").replace("%", "=")
    return f"{PREFIX}.{escaped}.{version}.{generation}"


def is_model(name: str) -> bool:
    """Whether an application of this name is one of ours."""
    parts = name.split(".")
    return len(parts) == 4 and parts[0] == PREFIX and parts[2].isdigit() and parts[3].isdigit()


def parse_application(name: str) -> tuple[str, int]:
    """Model and version of an application of ours."""
    _, model, version, _ = name.split(".")
    return unquote(model.replace("=", "%")), int(version)


def gpu_count() -> int:
    """GPUs by listed index that some node offers; without index resources, GPUs in the cluster."""
    resources = ray.cluster_resources()
    indices = [
        int(name.removeprefix(GPU_RESOURCE)) for name in resources if name.startswith(GPU_RESOURCE)
    ]
    return max(indices) + 1 if indices else int(resources.get("GPU", 0))


def resources() -> Collection[str]:
    """The names of all that some node offers."""
    return frozenset(ray.cluster_resources())


def deploy(name: str, bind: Callable[[], Any]) -> None:
    """Hand the application that `bind` makes to Serve; returns before its replicas are there."""
    with _SERVE_CALLS:
        target = RunTarget(
            target=bind(),
            name=name,
            route_prefix=None,
            external_scaler_enabled=True,  # so that `scale` may change it
        )
        serve.run_many([target], wait_for_applications_running=False)


def _applications() -> dict[str, Any]:
    with _SERVE_CALLS:
        found: dict[str, Any] = serve.status().applications
    return found


def failure(name: str) -> str:
    """Why Serve gave the application up, "" while it has not."""
    status = _applications().get(name)
    if status is None or status.status not in ("DEPLOY_FAILED", "UNHEALTHY"):
        return ""
    reasons = [deployment.message for deployment in status.deployments.values()]
    logger.error("application %s: %s %s", name, status.message, reasons)
    return "the model instance's process ended while it loaded"


def waiting_for(placements: Sequence[GroupPlacement]) -> str:
    """What a load that never started asks Ray for, in words."""
    wants = []
    for placement in placements:
        parts = [f"{placement.replicas} x"]
        parts += [f"{placement.num_cpus:g} CPU"] if placement.num_cpus else []
        parts += [f"{placement.num_gpus:g} GPU"] if placement.num_gpus else []
        parts += [f"{amount:g} {name}" for name, amount in placement.resources.items()]
        wants.append(f"{placement.deployment}: " + " ".join(parts))
    return "; ".join(wants)


def delete(name: str) -> None:
    """Have Serve drain and delete it, within its grace; a missing application is fine."""
    with _SERVE_CALLS:
        serve.delete(name, _blocking=False)
    _memory().delete(name)


def exists(name: str) -> bool:
    return name in _applications()


def live() -> dict[str, dict[str, int]]:
    """Our model applications that Serve runs or starts, newest first, with their deployments and
    how many replicas each has, but for those that leave."""
    found = {
        name: {
            deployment: sum(
                count for state, count in one.replica_states.items() if state != "STOPPING"
            )
            for deployment, one in status.deployments.items()
        }
        for name, status in _applications().items()
        if is_model(name) and status.status != "DELETING"
    }
    return {name: found[name] for name in sorted(found, key=_generation_of, reverse=True)}


def started() -> set[str]:
    """Those of our model applications that have a replica which has been loaded."""
    return {
        name
        for name, status in _applications().items()
        if is_model(name)
        for one in status.deployments.values()
        if any(count for state, count in one.replica_states.items() if state not in _NOT_LOADED)
    }


def staying(name: str, deployments: Iterable[str]) -> int:
    """How many replicas of these deployments Serve has that it does not stop."""
    counts = live().get(name, {})
    return sum(counts.get(deployment, 0) for deployment in deployments)


def _generation_of(name: str) -> int:
    return int(name.rpartition(".")[2])


def is_deleting(name: str) -> bool:
    status = _applications().get(name)
    return status is None or status.status == "DELETING"


def has_replicas(name: str, deployment: str) -> bool:
    """Whether any replica's actor still lives; Serve's status forgets those that are stopping."""
    prefix = f"SERVE_REPLICA::{name}#{deployment}#"
    actors = ray.util.list_named_actors(all_namespaces=True)
    return any(actor["name"].startswith(prefix) for actor in actors)


def running(name: str, deployment: str) -> int:
    """How many replicas of a deployment Serve counts on."""
    application = _applications().get(name)
    found = application.deployments.get(deployment) if application else None
    return int(found.replica_states.get("RUNNING", 0)) if found else 0


def has_proxy() -> bool:
    """Whether Serve's own HTTP proxy runs, which would take half the traffic of our ports."""
    with _SERVE_CALLS:
        return bool(serve.status().proxies)


def generation_number() -> int:
    return time.time_ns() // 1_000_000


def scale(name: str, deployment: str, count: int) -> None:
    """Have Serve run so many replicas of a deployment. Those that stay are not touched, as all of
    them would be if the application were handed in again; those that go are drained."""
    controller = _get_global_client()._controller
    wanted = DeploymentID(name=deployment, app_name=name)
    ray.get(controller.update_deployment_replicas.remote(wanted, count), timeout=SCALE_S)


def node_count() -> int:
    return sum(1 for node in ray.nodes() if node["Alive"])


# --- what is known of an application, for a Controller that finds none of its replicas ------------


def remember(name: str, facts: bytes) -> None:
    """Kept where Serve keeps its own, as long as the application."""
    _memory().put(name, facts)


def recall(name: str) -> bytes | None:
    facts: bytes | None = _memory().get(name)
    return facts


def _memory() -> RayInternalKVStore:
    return RayInternalKVStore(namespace=PREFIX)
