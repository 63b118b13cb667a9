"""tritonserver's command line, as data: which flag sets which of our settings, and which are known
but not done. Called by `cli`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal


class FlagError(Exception):
    """A command line that cannot be served; the text names the flag."""


Kind = Literal["text", "number", "bool", "list", "switch"]


@dataclass(frozen=True)
class Flag:
    """`setting` is a field of ServerSettings; `help` is shown by --help. A `switch` may stand
    without a value."""

    setting: str
    kind: Kind
    help: str


FLAGS: dict[str, Flag] = {
    "model-repository": Flag("model_repository", "list", "path of a model repository; repeatable"),
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
    "allow-grpc": Flag("allow_grpc", "bool", "serve gRPC"),
    "grpc-address": Flag("grpc_address", "text", "address that gRPC binds"),
    "grpc-port": Flag("grpc_port", "number", "port of gRPC"),
    "grpc-header-forward-pattern": Flag(
        "grpc_header_forward_pattern", "text", "metadata that becomes request parameters: a regex"
    ),
    "allow-metrics": Flag("allow_metrics", "bool", "serve metrics"),
    "metrics-address": Flag("metrics_address", "text", "address that metrics bind"),
    "metrics-port": Flag("metrics_port", "number", "port of metrics"),
    "allow-client-shm": Flag("allow_client_shm", "bool", "clients may use shared memory"),
    "log-verbose": Flag("log_verbose", "number", "0 is quiet, 1 and more log what Ray logs"),
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
    "max-file-override-bytes": Flag(
        "max_file_override_bytes", "number", "most that the files of one load may weigh"
    ),
    "compile-cache": Flag("compile_cache", "text", "folder for what COMPILE_ON_LOAD compiles"),
    "logical-gpus": Flag("logical_gpus", "bool", "run GPU instances on the CPU, to test placement"),
    "allow-insecure-cluster": Flag(
        "allow_insecure_cluster", "bool", "run on a Ray cluster without token authentication"
    ),
}

# Known to tritonserver, not done here yet: refused by name instead of ignored.
NOT_DONE = frozenset(
    """
    allow-cpu-metrics allow-gpu-metrics allow-sagemaker allow-vertex-ai
    backend-config backend-directory buffer-manager-thread-count cache-config cache-directory
    cuda-memory-pool-byte-size cuda-virtual-address-size
    enable-peer-access grpc-http2-max-pings-without-data
    grpc-http2-max-ping-strikes grpc-http2-min-recv-ping-interval-without-data
    grpc-infer-allocation-pool-size grpc-infer-response-compression-level grpc-infer-thread-count
    grpc-keepalive-permit-without-calls grpc-keepalive-time grpc-keepalive-timeout
    grpc-max-connection-age grpc-max-connection-age-grace grpc-max-response-pool-size
    grpc-restricted-protocol grpc-root-cert grpc-server-cert grpc-server-key grpc-use-ssl
    grpc-use-ssl-mutual host-policy http-restricted-api
    http-thread-count log-error log-file log-format log-info log-warning metrics-config
    metrics-interval-ms min-supported-compute-capability model-load-gpu-limit
    model-namespacing pinned-memory-pool-byte-size rate-limit
    rate-limit-resource repoagent-directory response-cache-byte-size
    reuse-grpc-port reuse-http-port sagemaker-port sagemaker-safe-port-range
    sagemaker-thread-count trace-config trace-count trace-file trace-level
    trace-log-frequency trace-rate vertex-ai-default-model vertex-ai-port vertex-ai-thread-count
    """.split()
)

_TRUE = ("true", "1", "on", "yes")
_FALSE = ("false", "0", "off", "no")


def parse(arguments: Sequence[str]) -> dict[str, Any]:
    """Settings from `--a=b` and `--a b`. Raises FlagError for what is unknown or not done."""
    settings: dict[str, Any] = {}
    for name, value in _pairs(arguments):
        flag = FLAGS[name]
        if flag.kind == "list":
            settings[flag.setting] = (*settings.get(flag.setting, ()), value)
        elif flag.kind in ("bool", "switch"):
            settings[flag.setting] = _bool(name, value)
        else:
            settings[flag.setting] = value
    return settings


def _pairs(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            raise FlagError(f"unexpected argument '{argument}'")
        name, equals, value = argument[2:].partition("=")
        if name in NOT_DONE:
            raise FlagError(f"--{name} is an option of tritonserver that Manta does not support")
        if name not in FLAGS:
            raise FlagError(f"unknown option '--{name}'")
        if not equals:
            if FLAGS[name].kind == "switch":
                value = rest.pop(0) if rest and rest[0].lower() in (*_TRUE, *_FALSE) else "true"
                yield name, value
                continue
            if not rest or rest[0].startswith("--"):
                raise FlagError(f"--{name} needs a value")
            value = rest.pop(0)
        yield name, value


def _bool(name: str, value: str) -> bool:
    lower = value.lower()
    if lower not in (*_TRUE, *_FALSE):
        raise FlagError(f"--{name} is true or false, not '{value}'")
    return lower in _TRUE


def usage() -> str:
    width = max(len(name) for name in FLAGS) + 4
    lines = [f"  --{name:<{width}}{flag.help}" for name, flag in FLAGS.items()]
    return "\n".join(["usage: manta serve [--option=value | --option value] ...", "", *lines])
