"""Composition root: what runs, how many, where. The only place with deployment options and bind.

`build_app` is the import path of `serve_config.yaml`; `model_app` is what the Controller deploys
for one model version. Annotations are evaluated here: Serve reads `build_app`'s own.
"""

from collections.abc import Sequence
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from configs.placement import GroupPlacement
from configs.server import ServerSettings

from . import draining, forkclient
from .client import LeastLoaded
from .controller import Controller
from .replica import ModelReplica
from .router import Router
from .types import ReplicaSpec

APPLICATION = "manta"

# Control calls (long polls, reports, pushes) of many replicas and Routers at a time.
CONTROL_CALLS = 10_000
# Requests through Serve's own proxy (`listener: serve`); the Scheduler's limits are the real ones.
PROXY_REQUESTS = 100_000
# A line per call costs more than the call, and long polls would fill the log.
LOGGING = {"enable_access_log": False}
HEALTH_PERIOD_S = 2.0
HEALTH_TIMEOUT_S = 10.0
CONTROLLER_MARGIN_S = 15.0


def build_app(args: ServerSettings) -> Application:
    """The Router with its Controller. Both ask for no CPU, so that they start on a full laptop."""
    controller = serve.deployment(
        Controller,
        name="Controller",
        num_replicas=1,
        max_ongoing_requests=CONTROL_CALLS,
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        logging_config=LOGGING,
        graceful_shutdown_wait_loop_s=0.1,
        # It outlives the Routers, which need it to the end of their own grace.
        graceful_shutdown_timeout_s=args.exit_timeout_s + CONTROLLER_MARGIN_S,
    )
    router = serve.deployment(
        serve.ingress()(Router),
        name="Router",
        num_replicas=args.router_replicas,
        max_ongoing_requests=PROXY_REQUESTS,
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        logging_config=LOGGING,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=args.exit_timeout_s,
        # A new Router shares the ports with the old one until that one has drained.
        max_surge_percent=100,
    )
    return router.bind(args, controller.bind(args, model_app))


def model_app(
    specs: Sequence[ReplicaSpec], placements: Sequence[GroupPlacement], settings: ServerSettings
) -> Application:
    """One deployment per instance group (and per listed GPU), replicas as the group counts them.

    Serve wants one ingress deployment per application: the first group is bound last and holds
    handles to the others, which it does not use; Routers address each deployment by name.
    """
    bound: list[Any] = [
        _model_deployment(spec, placement, settings).bind(spec)
        for spec, placement in list(zip(specs, placements, strict=True))[1:]
    ]
    first = _model_deployment(specs[0], placements[0], settings)
    app: Application = first.bind(specs[0], *bound)
    return app


def _model_deployment(
    spec: ReplicaSpec, placement: GroupPlacement, settings: ServerSettings
) -> Any:
    return serve.deployment(
        ModelReplica,
        name=spec.deployment,
        num_replicas=placement.replicas,
        # Each instance: one batch that runs, one that waits, and as much again for other Routers,
        # which the replica refuses itself and at once.
        max_ongoing_requests=4 * placement.instances + 16,
        ray_actor_options={
            "num_cpus": placement.num_cpus,
            "num_gpus": placement.num_gpus,
            "resources": dict(placement.resources),
            **_by_fork(placement.kind, settings),
        },
        request_router_config=RequestRouterConfig(request_router_class=LeastLoaded),
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        logging_config=LOGGING,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=draining.grace_s(settings),
    )


def _by_fork(kind: str, settings: ServerSettings) -> dict[str, Any]:
    """Replicas as forks of one process per node that has imported torch (`forkserver`).

    Those with a GPU are not: CUDA after a fork has yet to be proven here. Logical GPUs have none.
    """
    on_host = kind == "KIND_CPU" or settings.logical_gpus
    if not on_host or not settings.fork_server or not forkclient.supported():
        return {}
    # For the server's first import and not only the replica: torch reads some of it right there.
    variables = dict(settings.environment)
    return {"runtime_env": {"py_executable": forkclient.executable(), "env_vars": variables}}
