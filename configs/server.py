"""The server's own settings: the `args` of serve_config.yaml and the flags of `manta serve`.

Host addresses and the repository's path default to the environment, so that one
serve_config.yaml fits every host. Read by all of deployments/; changes nothing.
"""

from __future__ import annotations

import os
import sys
from itertools import combinations
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from . import grpc_options, grpc_tls, metrics, restricted, stores, tracing
from .autoscaling import Autoscaling
from .patterns import header_pattern
from .restricted import RestrictedGroup

MIB = 1 << 20
INT32_MAX = 2**31 - 1

# Variables that change how torch, CUDA and their thread pools behave; replicas get them, because
# a Ray worker inherits the environment of its node and not that of the command that was typed.
REPLICA_VARIABLES = (
    "CUDA_",
    "CUBLAS_",
    "CUDNN_",
    "NCCL_",
    "NVIDIA_TF32",
    "TORCH_",
    "TORCHINDUCTOR_",
    "PYTORCH_",
    "AOTI_",
    "MKL_",
    "KMP_",
    "OMP_",
    "ATEN_",
)


def _repositories() -> tuple[str, ...]:
    return tuple(stores.split(os.environ.get("MANTA_MODEL_REPOSITORY", ""))) or (
        "examples/model_repository",
    )


def _address(protocol: str) -> str:
    return os.environ.get(f"MANTA_{protocol}_ADDRESS") or "127.0.0.1"


def _by_fork() -> bool | str:
    """Text is for pydantic to read, or to refuse."""
    return os.environ.get("MANTA_FORK_SERVER") or False


def _replica_environment() -> dict[str, str]:
    """CUDA_VISIBLE_DEVICES stays out: Ray sets it per replica."""
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith(REPLICA_VARIABLES) and name != "CUDA_VISIBLE_DEVICES"
    }


class ServerSettings(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        protected_namespaces=(),
        allow_inf_nan=False,
        hide_input_in_errors=True,  # there are secrets among the settings
    )

    id: str = Field("triton", min_length=1, description="The server's name in its metadata.")

    model_repository: tuple[str, ...] = Field(
        default_factory=_repositories,
        min_length=1,
        description="Model repositories, folders or URLs (s3://, gs://, as://); by default those "
        "of MANTA_MODEL_REPOSITORY.",
    )
    model_control_mode: Literal["none", "poll", "explicit"] = Field(
        "none",
        description="`none` loads all models at start, `poll` also what changes later, `explicit` "
        "only those asked for.",
    )
    load_model: tuple[str, ...] = Field(
        (), description="Models to load at start in explicit mode; `*` alone loads all."
    )
    repository_poll_s: float = Field(
        15, gt=0, description="How often mode `poll` looks; it acts on what two looks agree on."
    )
    model_config_name: str = Field(
        "",
        pattern=r"^[\w.+@~=:,-]*$",
        description="configs/<name>.pbtxt stands for config.pbtxt in models that have it.",
    )
    model_load_retry_count: int = Field(
        0, ge=0, le=100, description="How often the load of a version is tried again."
    )
    allow_file_override: bool = Field(
        False, description="Load requests may bring files of a model along."
    )
    remote_directory: str = Field(
        "",
        description="Folder for what is fetched from repositories in stores; with several nodes "
        "one that they share. By default the Controller's temporary one.",
    )
    file_override_directory: str = Field(
        "",
        description="Folder for such files; with several nodes one that they share. By default the "
        "Controller's temporary one.",
    )
    max_file_override_bytes: int = Field(
        256 * MIB, ge=1, description="Most that the files of one load request may weigh."
    )
    exit_on_error: bool = Field(
        True, description="Stop the server when a model fails to load at start."
    )
    strict_readiness: bool = Field(
        True, description="Not ready while a model that should be loaded is not."
    )
    model_load_thread_count: int = Field(
        4, ge=1, le=64, description="How many models load at the same time."
    )
    disable_auto_complete_config: bool = Field(
        False, description="config.pbtxt must be complete; nothing is read from the model."
    )
    model_load_timeout_s: float = Field(
        300, gt=0, description="How long one model version may take to load."
    )

    listener: Literal["router", "serve"] = Field(
        "router", description="Who holds the ports: the Router itself or Serve's proxy."
    )
    batching: Literal["serve", "direct"] = Field(
        "serve", description="Released batches go through @serve.batch, or straight on."
    )
    local_channel: bool = Field(
        True, description="Reach replicas on the Router's own node by sockets, not through Serve."
    )
    http_lane: bool = Field(
        True, description="Take infer calls from uvicorn's parser straight to the queue."
    )
    grpc_lane: bool = Field(
        True, description="Take ModelInfer calls past grpc.aio, with HAProxy in front."
    )
    fork_server: bool = Field(
        default_factory=_by_fork,
        validate_default=True,
        description="CPU replicas are forks of one process per node that has imported torch; by "
        "default as MANTA_FORK_SERVER says, which cluster/serve.env sets.",
    )
    router_replicas: int = Field(1, ge=1, description="Replicas of the Router.")
    allow_http: bool = Field(True, description="Serve HTTP.")
    allow_grpc: bool = Field(True, description="Serve gRPC.")
    allow_metrics: bool = Field(True, description="Serve metrics.")
    allow_client_shm: bool = Field(
        False, description="Clients may register shared memory, and keep tensors in it."
    )
    allow_gpu_metrics: bool = Field(
        True, description="Metrics of GPUs, where NVML and its Python bindings are there."
    )
    allow_cpu_metrics: bool = Field(True, description="Metrics of CPU and memory.")
    metrics_interval_ms: int = Field(
        2000, ge=1, description="How often the metrics of CPU and GPUs are read."
    )
    metrics_config: tuple[str, ...] = Field(
        (), description="What tritonserver takes as --metrics-config: `key=value` entries."
    )
    http_port: int = Field(8000, ge=1, le=65535, description="HTTP port.")
    grpc_port: int = Field(8001, ge=1, le=65535, description="gRPC port.")
    metrics_port: int = Field(8002, ge=1, le=65535, description="Metrics port.")
    http_address: str = Field(
        default_factory=lambda: _address("HTTP"),
        description="Address that HTTP binds; by default MANTA_HTTP_ADDRESS or loopback.",
    )
    grpc_address: str = Field(
        default_factory=lambda: _address("GRPC"),
        description="Address that gRPC binds; by default MANTA_GRPC_ADDRESS or loopback.",
    )
    metrics_address: str = Field(
        default_factory=lambda: _address("METRICS"),
        description="Address that metrics bind; by default MANTA_METRICS_ADDRESS or loopback.",
    )

    http_restricted_api: tuple[RestrictedGroup, ...] = Field(
        (), description="Groups of APIs that HTTP clients reach with a header: API,API:KEY=VALUE."
    )
    grpc_restricted_protocol: tuple[RestrictedGroup, ...] = Field(
        (),
        description="The same for gRPC, whose metadata has the name triton-grpc-protocol-KEY.",
    )
    grpc_infer_response_compression_level: Literal["none", "low", "medium", "high"] = Field(
        "none", description="How much answers over gRPC are compressed, for clients that take it."
    )
    grpc_max_response_pool_size: int = Field(
        64,
        ge=1,
        description="Most requests of one gRPC stream in work, and so most answers that wait.",
    )
    grpc_keepalive_time_ms: int | None = Field(
        None, ge=1, le=INT32_MAX, description="Silence after which grpc.aio pings a client."
    )
    grpc_keepalive_timeout_ms: int | None = Field(
        None, ge=1, le=INT32_MAX, description="How long grpc.aio waits for the answer to a ping."
    )
    grpc_keepalive_permit_without_calls: bool | None = Field(
        None, description="Whether grpc.aio also pings clients that have no call."
    )
    grpc_http2_max_pings_without_data: int | None = Field(
        None, ge=0, le=INT32_MAX, description="Most pings of grpc.aio with no data between them."
    )
    grpc_http2_min_recv_ping_interval_without_data_ms: int | None = Field(
        None,
        ge=0,
        le=INT32_MAX,
        description="Least time between a client's pings that grpc.aio takes for no abuse.",
    )
    grpc_http2_max_ping_strikes: int | None = Field(
        None, ge=0, le=INT32_MAX, description="Abusive pings before grpc.aio ends a connection."
    )
    grpc_max_connection_age_ms: int | None = Field(
        None, ge=1, le=INT32_MAX, description="Age at which grpc.aio tells a client to reconnect."
    )
    grpc_max_connection_age_grace_ms: int | None = Field(
        None, ge=1, le=INT32_MAX, description="How long calls may go on after that."
    )

    grpc_use_ssl: bool = Field(False, description="gRPC over TLS alone.")
    grpc_use_ssl_mutual: bool = Field(
        False, description="gRPC over TLS alone, for clients that have a certificate themselves."
    )
    grpc_server_cert: str = Field(
        "", description="Absolute path of the server's certificate (PEM), on each Router's node."
    )
    grpc_server_key: str = Field("", description="Absolute path of its private key (PEM).")
    grpc_root_cert: str = Field(
        "", description="Absolute path of the root of clients' certificates, for mutual TLS."
    )

    gpu_fraction: float = Field(
        0.01, gt=0, le=1, description="Share of a GPU per replica without GPU_FRACTION."
    )
    cpu_fraction: float = Field(
        0.01, gt=0, description="CPUs asked of Ray per CPU replica without CPU_FRACTION."
    )
    logical_gpus: bool = Field(
        False,
        description="Instances of KIND_GPU run on the CPU: proves placement without hardware.",
    )
    autoscaling: dict[str, Autoscaling | None] = Field(
        {},
        description="By model, what stands for its AUTOSCALING whatever config.pbtxt says; null is "
        "none.",
    )
    environment: dict[str, str] = Field(
        default_factory=_replica_environment,
        description="Environment of the replicas; by default ours for torch, CUDA and threads.",
    )

    compile_cache: str = Field(
        default_factory=lambda: os.environ.get("MANTA_COMPILE_CACHE", ""),
        description="Folder for what COMPILE_ON_LOAD compiles, on each node; by default "
        "MANTA_COMPILE_CACHE, or manta/compiled in the user's cache.",
    )

    max_queue_requests: int = Field(
        4096, ge=1, description="Requests that may wait per model version in one Router."
    )
    max_queue_s: float = Field(60, gt=0, description="How long a request may wait for a batch.")
    max_execution_s: float = Field(
        60, gt=0, description="How long one batch may run before its instance counts as hung."
    )
    exit_timeout_s: float = Field(
        30, ge=0, description="How long shutting down waits for accepted requests."
    )
    by_reference_min_bytes: int = Field(
        1 * MIB, ge=0, description="Batches from this size on travel through the object store."
    )

    http_max_input_size_bytes: int = Field(
        64 * MIB,
        ge=1,
        description="Largest JSON part of a request, and largest inflated body.",
    )
    max_body_bytes: int = Field(
        1024 * MIB, ge=1, description="Largest request in all, with its binary tensors."
    )
    http_max_header_bytes: int = Field(
        64 * 1024, ge=1024, description="Largest request line and headers together."
    )
    http_read_timeout_s: float = Field(
        30, gt=0, description="How long a client may take between bytes of a request."
    )
    http_header_forward_pattern: str = Field(
        "", description="HTTP headers whose names match become request parameters; empty: none."
    )
    grpc_header_forward_pattern: str = Field(
        "", description="gRPC metadata whose names match becomes request parameters; empty: none."
    )
    http_control_host: tuple[str, ...] = Field(
        (),
        description="Names under which web pages of this server may load models and change "
        "settings, beside addresses and localhost.",
    )
    max_json_depth: int = Field(100, ge=1, description="Deepest nesting of request JSON.")
    max_tensor_rank: int = Field(64, ge=1, description="Most dimensions of a tensor.")
    max_tensors_per_request: int = Field(
        1024, ge=1, description="Most inputs, and most outputs, of one request."
    )

    allow_insecure_cluster: bool = Field(
        False, description="Run on a Ray cluster that has no token authentication."
    )
    log_verbose: int = Field(
        0, ge=0, lt=2**31, description="Verbosity of the log; 0 is off, 2 shows Ray's output too."
    )
    log_info: bool = Field(True, description="Whether information is logged.")
    log_warning: bool = Field(True, description="Whether warnings are logged.")
    log_error: bool = Field(True, description="Whether errors are logged.")
    log_format: Literal["default", "ISO8601", "json"] = Field(
        "default", description="The form of a line of the log."
    )
    log_file: str = Field(
        "", description="Where the log goes, on the Controller's node, instead of standard error."
    )

    trace_config: tuple[str, ...] = Field(
        (), description="What tritonserver takes as --trace-config: `key=value` entries."
    )

    @field_validator("trace_config")
    @classmethod
    def _traceable(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        tracing.check(tracing.parse(value))
        return value

    @field_validator("http_header_forward_pattern", "grpc_header_forward_pattern")
    @classmethod
    def _compiles(cls, value: str, info: ValidationInfo) -> str:
        try:
            header_pattern(value)
        except ValueError as error:
            flag = str(info.field_name).replace("_", "-")
            raise ValueError(f"--{flag}: {error}") from None
        return value

    @field_validator("metrics_config")
    @classmethod
    def _known_metrics(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        metrics.parse(value)
        return value

    @field_validator("http_restricted_api", "grpc_restricted_protocol", mode="before")
    @classmethod
    def _restricted(cls, value: Any, info: ValidationInfo) -> Any:
        return restricted.read_groups(value, info.field_name == "grpc_restricted_protocol")

    @model_validator(mode="after")
    def _consistent(self) -> ServerSettings:
        if self.load_model and self.model_control_mode != "explicit":
            raise ValueError("load_model needs model_control_mode 'explicit'")
        if self.fork_server and "fork_server" in self.model_fields_set:
            if sys.platform != "linux":
                raise ValueError("fork_server needs Linux")
        if self.allow_client_shm:
            if sys.platform != "linux":
                raise ValueError("allow_client_shm needs Linux")
            if self.router_replicas > 1:
                raise ValueError(
                    "allow_client_shm needs router_replicas 1: a region is known to the Router "
                    "that it was registered with"
                )
        if self.listener == "serve":
            if not self.allow_http:
                raise ValueError("allow_http false needs listener 'router': Serve's proxy is HTTP")
            for lane in ("http_lane", "grpc_lane"):
                if lane in self.model_fields_set and getattr(self, lane):
                    raise ValueError(f"{lane} needs listener 'router': Serve's proxy has none")
            if "grpc_address" in self.model_fields_set:
                raise ValueError(
                    "grpc_address needs listener 'router': Serve's gRPC binds all interfaces"
                )
            for name in grpc_options.beyond_serve(self):
                raise ValueError(f"{name} needs listener 'router': Serve's gRPC does not take it")
        grpc_tls.check(self)
        if self.http_max_input_size_bytes > self.max_body_bytes:
            raise ValueError("http_max_input_size_bytes must not be above max_body_bytes")
        edges = ("http", "grpc", "metrics")
        ports = [(f"{e}_port", getattr(self, f"{e}_port")) for e in edges if self._open(e)]
        for (one, port), (other, same) in combinations(ports, 2):
            if port == same:
                raise ValueError(f"{one} and {other} are both {port}; they must differ")
        return self

    def _open(self, edge: str) -> bool:
        return bool(getattr(self, f"allow_{edge}"))
