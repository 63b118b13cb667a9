"""tritonserver's command line, as data: which option sets which of our settings, which have no
meaning here, and which are refused by name. Called by `cli`; the words of --help are in `usage`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal


class FlagError(Exception):
    """A command line that cannot be served; the text names the flag."""


Kind = Literal["text", "number", "bool", "list", "switch", "level"]


@dataclass(frozen=True)
class Flag:
    """`setting` is a field of ServerSettings; `help` is shown by --help. A `switch` may stand
    without a value; a `level` is a number, or a boolean for 1 and 0. `key` is what the setting has
    before each value of a list."""

    setting: str
    kind: Kind
    help: str
    key: str = ""


@dataclass(frozen=True)
class Refused:
    """An option that asks for what is not there; with a value of `nothing` it asks for nothing."""

    reason: str
    nothing: tuple[str, ...] = ()


_OFF = ("false", "0", "off", "no")
# What these govern: HAProxy, which has the port otherwise, knows none of them.
_GRPC_AIO = "(only without HAProxy: --grpc-lane=false)"

FLAGS: dict[str, Flag] = {
    "model-repository": Flag(
        "model_repository", "list", "path or URL of a model repository; repeatable"
    ),
    "model-store": Flag("model_repository", "list", "the same as --model-repository"),
    "model-control-mode": Flag("model_control_mode", "text", "none, poll or explicit"),
    "repository-poll-secs": Flag("repository_poll_s", "number", "how often mode poll looks"),
    "load-model": Flag("load_model", "list", "model to load at start in explicit mode; repeatable"),
    "model-load-thread-count": Flag("model_load_thread_count", "number", "models loaded at a time"),
    "model-load-retry-count": Flag(
        "model_load_retry_count", "number", "how often a load is tried again"
    ),
    "model-config-name": Flag(
        "model_config_name", "text", "configs/NAME.pbtxt stands for config.pbtxt where it is there"
    ),
    "disable-auto-complete-config": Flag(
        "disable_auto_complete_config", "switch", "config.pbtxt must be complete"
    ),
    "strict-model-config": Flag(
        "disable_auto_complete_config", "bool", "the older name of the same"
    ),
    "exit-on-error": Flag("exit_on_error", "bool", "end when a model fails to load at start"),
    "strict-readiness": Flag("strict_readiness", "bool", "not ready while a model is unavailable"),
    "exit-timeout-secs": Flag("exit_timeout_s", "number", "how long accepted requests may take"),
    "id": Flag("id", "text", "the server's name in its metadata"),
    "allow-http": Flag("allow_http", "bool", "serve HTTP"),
    "http-address": Flag("http_address", "text", "address that HTTP binds"),
    "http-port": Flag("http_port", "number", "port of HTTP"),
    "http-max-input-size": Flag(
        "http_max_input_size_bytes", "number", "largest JSON part of a request, in bytes"
    ),
    "max-body-bytes": Flag(
        "max_body_bytes", "number", "largest request with its binary tensors, in bytes"
    ),
    "http-header-forward-pattern": Flag(
        "http_header_forward_pattern", "text", "headers that become request parameters: a regex"
    ),
    "http-control-host": Flag(
        "http_control_host", "list", "name whose web pages may load models; repeatable"
    ),
    "allow-grpc": Flag("allow_grpc", "bool", "serve gRPC"),
    "grpc-address": Flag("grpc_address", "text", "address that gRPC binds"),
    "http-restricted-api": Flag(
        "http_restricted_api",
        "list",
        "API[,API...]:HEADER=VALUE, groups of APIs that want a header; repeatable",
    ),
    "grpc-port": Flag("grpc_port", "number", "port of gRPC"),
    "grpc-header-forward-pattern": Flag(
        "grpc_header_forward_pattern", "text", "metadata that becomes request parameters: a regex"
    ),
    "grpc-restricted-protocol": Flag(
        "grpc_restricted_protocol",
        "list",
        "API[,API...]:KEY=VALUE, the same by metadata triton-grpc-protocol-KEY; repeatable",
    ),
    "grpc-infer-response-compression-level": Flag(
        "grpc_infer_response_compression_level",
        "text",
        "none, low, medium or high: compress answers to clients that take it",
    ),
    "grpc-max-response-pool-size": Flag(
        "grpc_max_response_pool_size", "number", "most requests of one stream in work at a time"
    ),
    "grpc-keepalive-time": Flag(
        "grpc_keepalive_time_ms", "number", f"ms of silence before a ping {_GRPC_AIO}"
    ),
    "grpc-keepalive-timeout": Flag(
        "grpc_keepalive_timeout_ms", "number", f"ms until a ping counts as lost {_GRPC_AIO}"
    ),
    "grpc-keepalive-permit-without-calls": Flag(
        "grpc_keepalive_permit_without_calls", "bool", f"pings also without calls {_GRPC_AIO}"
    ),
    "grpc-http2-max-pings-without-data": Flag(
        "grpc_http2_max_pings_without_data", "number", f"pings with no data between {_GRPC_AIO}"
    ),
    "grpc-http2-min-recv-ping-interval-without-data": Flag(
        "grpc_http2_min_recv_ping_interval_without_data_ms",
        "number",
        f"ms that must lie between a client's pings {_GRPC_AIO}",
    ),
    "grpc-http2-max-ping-strikes": Flag(
        "grpc_http2_max_ping_strikes", "number", f"pings too soon that are let pass {_GRPC_AIO}"
    ),
    "grpc-max-connection-age": Flag(
        "grpc_max_connection_age_ms", "number", f"ms until clients must connect anew {_GRPC_AIO}"
    ),
    "grpc-max-connection-age-grace": Flag(
        "grpc_max_connection_age_grace_ms", "number", f"ms that calls have beyond that {_GRPC_AIO}"
    ),
    "grpc-use-ssl": Flag("grpc_use_ssl", "bool", "serve gRPC over TLS alone"),
    "grpc-use-ssl-mutual": Flag(
        "grpc_use_ssl_mutual", "bool", "the same, and clients need a certificate"
    ),
    "grpc-server-cert": Flag("grpc_server_cert", "text", "the server's certificate, a PEM file"),
    "grpc-server-key": Flag("grpc_server_key", "text", "its private key, a PEM file"),
    "grpc-root-cert": Flag(
        "grpc_root_cert",
        "text",
        "root of clients' certificates, a PEM file; read with --grpc-use-ssl-mutual",
    ),
    "allow-metrics": Flag("allow_metrics", "bool", "serve metrics"),
    "allow-gpu-metrics": Flag("allow_gpu_metrics", "bool", "metrics of GPUs, through NVML"),
    "allow-cpu-metrics": Flag("allow_cpu_metrics", "bool", "metrics of CPU and memory"),
    "metrics-address": Flag("metrics_address", "text", "address that metrics bind"),
    "metrics-port": Flag("metrics_port", "number", "port of metrics"),
    "allow-client-shm": Flag("allow_client_shm", "bool", "clients may use shared memory"),
    "metrics-interval-ms": Flag(
        "metrics_interval_ms", "number", "how often metrics of CPU and GPUs are read"
    ),
    "metrics-config": Flag(
        "metrics_config",
        "list",
        "counter_latencies=BOOL, summary_latencies=BOOL, summary_quantiles=Q:ERROR,... or "
        "histogram_latencies=BOOL; repeatable",
    ),
    "log-verbose": Flag("log_verbose", "level", "0 is quiet, 1 logs details, 2 also Ray's"),
    "log-info": Flag("log_info", "bool", "log information"),
    "log-warning": Flag("log_warning", "bool", "log warnings"),
    "log-error": Flag("log_error", "bool", "log errors"),
    "log-format": Flag("log_format", "text", "default, ISO8601 or json"),
    "log-file": Flag("log_file", "text", "file for the log instead of standard error"),
    "trace-config": Flag(
        "trace_config",
        "list",
        "level=, rate=, count=, mode=triton or opentelemetry, triton,file=, triton,log-frequency=, "
        "opentelemetry,url=, opentelemetry,resource=KEY=VALUE, opentelemetry,bsp_...=; repeatable",
    ),
    "trace-file": Flag(
        "trace_config", "list", "the older name of --trace-config=triton,file=", "triton,file="
    ),
    "trace-level": Flag(
        "trace_config", "list", "the older name of --trace-config=level=", "level="
    ),
    "trace-rate": Flag("trace_config", "list", "the older name of --trace-config=rate=", "rate="),
    "trace-count": Flag(
        "trace_config", "list", "the older name of --trace-config=count=", "count="
    ),
    "trace-log-frequency": Flag(
        "trace_config",
        "list",
        "the older name of --trace-config=triton,log-frequency=",
        "triton,log-frequency=",
    ),
    # Manta's own
    "listener": Flag("listener", "text", "router or serve: who holds the ports"),
    "batching": Flag("batching", "text", "serve or direct: through @serve.batch or straight on"),
    "router-replicas": Flag("router_replicas", "number", "replicas of the Router"),
    "local-channel": Flag("local_channel", "bool", "reach replicas on the same node by sockets"),
    "http-lane": Flag("http_lane", "bool", "take infer calls past the ASGI application"),
    "grpc-lane": Flag("grpc_lane", "bool", "take ModelInfer past grpc.aio, with HAProxy in front"),
    "fork-server": Flag("fork_server", "bool", "CPU replicas are forks of one process per node"),
    "gpu-fraction": Flag("gpu_fraction", "number", "share of a GPU per replica"),
    "cpu-fraction": Flag("cpu_fraction", "number", "CPUs asked of Ray per CPU replica"),
    "max-queue-requests": Flag("max_queue_requests", "number", "requests that may wait per model"),
    "max-queue-secs": Flag("max_queue_s", "number", "how long a request may wait for a batch"),
    "max-execution-secs": Flag("max_execution_s", "number", "when a running batch counts as hung"),
    "model-load-timeout-secs": Flag("model_load_timeout_s", "number", "limit of one load"),
    "allow-file-override": Flag(
        "allow_file_override", "bool", "load requests may bring files of a model along"
    ),
    "file-override-directory": Flag(
        "file_override_directory", "text", "folder for such files; one that all nodes share"
    ),
    "remote-directory": Flag(
        "remote_directory", "text", "folder for what is fetched from stores; shared by all nodes"
    ),
    "max-file-override-bytes": Flag(
        "max_file_override_bytes", "number", "most that the files of one load may weigh"
    ),
    "compile-cache": Flag("compile_cache", "text", "folder for what COMPILE_ON_LOAD compiles"),
    "logical-gpus": Flag("logical_gpus", "bool", "run GPU instances on the CPU, to test placement"),
    "allow-insecure-cluster": Flag(
        "allow_insecure_cluster", "bool", "run on a Ray cluster without token authentication"
    ),
}

_EVENT_LOOPS = "Routers are event loops; --router-replicas says how many"
_NO_BACKENDS = "the runtimes are part of Manta, no libraries to be found"
_TORCHS_MEMORY = "torch has its own allocator of device memory"

# Of tritonserver, for machinery that is not here: accepted, and warned of once. Name: reason.
MEANINGLESS: dict[str, str] = {
    "http-thread-count": _EVENT_LOOPS,
    "grpc-infer-thread-count": _EVENT_LOOPS,
    "grpc-infer-allocation-pool-size": "requests are not kept for reuse",
    "buffer-manager-thread-count": "inputs are joined on the thread of the instance",
    "pinned-memory-pool-byte-size": "there is no pool of pinned memory",
    "cuda-memory-pool-byte-size": _TORCHS_MEMORY,
    "cuda-virtual-address-size": _TORCHS_MEMORY,
    "enable-peer-access": "no batch moves from GPU to GPU",
    "min-supported-compute-capability": "the build of torch decides",
    "model-load-gpu-limit": "Ray places replicas by GPU_FRACTION and --gpu-fraction",
    "host-policy": "Ray decides where replicas run",
    "backend-config": "what a model is told stands in its config.pbtxt",
    "backend-directory": _NO_BACKENDS,
    "repoagent-directory": "there are no repository agents",
    "cache-directory": "there is no response cache",
}

# Within an option without meaning, what would mean something: (key, the value that is in force).
MEANINGFUL: dict[str, tuple[str, str]] = {"backend-config": ("default-max-batch-size", "4")}

_SAGEMAKER = "SageMaker's endpoints are not supported"
_VERTEX = "Vertex AI's endpoints are not supported"
_SHARED_PORT = "no other server may listen on the port; Routers share it by themselves"

# Of tritonserver, and asking for what is not there: refused by name.
REFUSED: dict[str, Refused] = {
    "allow-sagemaker": Refused(_SAGEMAKER, _OFF),
    "sagemaker-port": Refused(_SAGEMAKER),
    "sagemaker-safe-port-range": Refused(_SAGEMAKER),
    "sagemaker-thread-count": Refused(_SAGEMAKER),
    "allow-vertex-ai": Refused(_VERTEX, _OFF),
    "vertex-ai-port": Refused(_VERTEX),
    "vertex-ai-thread-count": Refused(_VERTEX),
    "vertex-ai-default-model": Refused(_VERTEX),
    "cache-config": Refused("there is no response cache"),
    "response-cache-byte-size": Refused("there is no response cache", ("0",)),
    "model-namespacing": Refused("a model's name is its own over all repositories", _OFF),
    "rate-limit": Refused("there is no rate limiter", ("off",)),
    "rate-limit-resource": Refused("there is no rate limiter"),
    "reuse-grpc-port": Refused(_SHARED_PORT, _OFF),
    "reuse-http-port": Refused(_SHARED_PORT, _OFF),
}

_TRUE = ("true", "1", "on", "yes")


def parse(arguments: Sequence[str]) -> dict[str, Any]:
    """Settings from `--a=b` and `--a b`. Raises FlagError for what is unknown or refused."""
    settings: dict[str, Any] = {}
    for name, value in _pairs(arguments):
        flag = FLAGS.get(name)
        if flag is None:
            continue  # it asks for nothing
        if flag.kind == "list":
            settings[flag.setting] = (*settings.get(flag.setting, ()), flag.key + value)
        elif flag.kind in ("bool", "switch"):
            settings[flag.setting] = _bool(name, value)
        elif flag.kind == "level" and not value.isdigit():
            settings[flag.setting] = int(_bool(name, value))
        else:
            settings[flag.setting] = value
    return settings


def warnings(arguments: Sequence[str]) -> list[str]:
    """A line for each option that has no meaning here, once, however often it is given."""
    names = dict.fromkeys(name for name, _ in _pairs(arguments) if name in MEANINGLESS)
    return [f"--{name} has no effect: {MEANINGLESS[name]}" for name in names]


def trace_entry(entry: str) -> str:
    """One of --trace-config's, its path absolute if it has one. Raises FlagError for a path where
    nothing can be written."""
    key, _, path = entry.partition("=")
    if key != "triton,file" or not path:
        return entry
    path = os.path.abspath(path)
    if not os.access(os.path.dirname(path), os.W_OK):
        raise FlagError(f"trace file '{path}' cannot be written there")
    return f"{key}={path}"


def _pairs(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            raise FlagError(f"unexpected argument '{argument}'")
        name, equals, value = argument[2:].partition("=")
        if name not in FLAGS and name not in MEANINGLESS and name not in REFUSED:
            raise FlagError(f"unknown option '--{name}'")
        if not equals:
            if name in FLAGS and FLAGS[name].kind == "switch":
                value = rest.pop(0) if rest and rest[0].lower() in (*_TRUE, *_OFF) else "true"
            elif not rest or rest[0].startswith("--"):
                raise FlagError(f"--{name} needs a value")
            else:
                value = rest.pop(0)
        refused = REFUSED.get(name)
        if refused is not None and value.lower() not in refused.nothing:
            raise FlagError(
                f"--{name} is an option of tritonserver that Manta does not support: "
                f"{refused.reason}"
            )
        _check_parts(name, value)
        yield name, value


def _check_parts(name: str, value: str) -> None:
    key, default = MEANINGFUL.get(name, ("", ""))
    given, equals, number = value.rpartition("=")
    if equals and key and given.rpartition(",")[2] == key and number != default:
        raise FlagError(f"--{name}: {key} is {default} and cannot be changed")


def _bool(name: str, value: str) -> bool:
    lower = value.lower()
    if lower not in (*_TRUE, *_OFF):
        raise FlagError(f"--{name} is true or false, not '{value}'")
    return lower in _TRUE
