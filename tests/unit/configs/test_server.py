"""ServerSettings: defaults, environment, what is refused."""

from __future__ import annotations

import os

import pytest
from pydantic import ValidationError

from configs.server import ServerSettings


@pytest.fixture(autouse=True)
def environment():
    """The process's environment, given back as it was."""
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith(("MANTA_", "TORCH_", "CUDA_"))]:
        del os.environ[name]
    yield
    os.environ.clear()
    os.environ.update(before)


def test_defaults_are_closed_and_bounded():
    settings = ServerSettings()
    assert settings.http_address == settings.grpc_address == settings.metrics_address == "127.0.0.1"
    assert settings.model_repository == ("examples/model_repository",)
    assert settings.model_control_mode == "none"
    assert not settings.allow_insecure_cluster and not settings.allow_file_override
    assert settings.http_max_input_size_bytes == 1 << 26
    assert not settings.allow_client_shm


def test_every_field_is_described():
    assert all(field.description for field in ServerSettings.model_fields.values())


def test_paths_and_addresses_come_from_the_environment():
    os.environ["MANTA_MODEL_REPOSITORY"] = os.pathsep.join(["/a", "", "b"])
    os.environ["MANTA_GRPC_ADDRESS"] = "0.0.0.0"
    os.environ["MANTA_HTTP_ADDRESS"] = ""
    settings = ServerSettings()
    assert settings.model_repository == ("/a", "b")
    assert (settings.http_address, settings.grpc_address) == ("127.0.0.1", "0.0.0.0")
    assert ServerSettings(model_repository=["c"]).model_repository == ("c",)


@pytest.mark.parametrize(
    ("text", "wanted"), [(None, False), ("", False), ("0", False), ("1", True), ("false", False)]
)
def test_forks_are_the_environments_to_turn_on_and_the_settings_to_overrule(text, wanted):
    if text is not None:
        os.environ["MANTA_FORK_SERVER"] = text
    assert ServerSettings().fork_server is wanted
    assert ServerSettings(fork_server=False).fork_server is False


def test_nonsense_in_the_environment_is_refused():
    os.environ["MANTA_FORK_SERVER"] = "perhaps"
    with pytest.raises(ValidationError, match=r"fork_server\n.*valid boolean"):
        ServerSettings()


def test_forks_that_are_asked_for_want_linux(monkeypatch):
    monkeypatch.setattr("sys.platform", "darwin")
    os.environ["MANTA_FORK_SERVER"] = "1"
    assert ServerSettings().fork_server  # the profile is the same everywhere
    with pytest.raises(ValidationError, match="fork_server needs Linux"):
        ServerSettings(fork_server=True)


def test_the_memory_of_clients_wants_linux(monkeypatch):
    assert ServerSettings(allow_client_shm=True, listener="serve").allow_client_shm
    monkeypatch.setattr("sys.platform", "darwin")
    with pytest.raises(ValidationError, match="allow_client_shm needs Linux"):
        ServerSettings(allow_client_shm=True)


def test_replicas_get_the_variables_of_torch_and_cuda():
    os.environ.update(CUDA_LAUNCH_BLOCKING="1", CUDA_VISIBLE_DEVICES="0", TORCH_LOGS="all")
    given = ServerSettings().environment
    assert given["CUDA_LAUNCH_BLOCKING"] == "1" and given["TORCH_LOGS"] == "all"
    assert "CUDA_VISIBLE_DEVICES" not in given and "PATH" not in given


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"modle_repository": ["x"]}, "Extra inputs"),
        ({"model_repository": []}, "at least 1"),
        ({"model_control_mode": "sometimes"}, "'none', 'poll' or 'explicit'"),
        ({"repository_poll_s": 0}, "greater than 0"),
        ({"model_config_name": "../x"}, "match pattern"),
        ({"model_config_name": "a\n"}, "match pattern"),
        ({"model_load_retry_count": -1}, "greater than or equal to 0"),
        ({"load_model": ["a"]}, "needs model_control_mode 'explicit'"),
        ({"http_port": 65536}, "65535"),
        ({"http_port": 0}, "greater than or equal to 1"),
        ({"listener": "serve", "allow_http": False}, "allow_http"),
        ({"listener": "serve", "grpc_address": "127.0.0.1"}, "binds all interfaces"),
        ({"http_port": 9, "metrics_port": 9}, "http_port and metrics_port are both 9"),
        ({"max_queue_s": float("inf")}, "finite"),
        ({"gpu_fraction": 0}, "greater than 0"),
        ({"listener": "haproxy"}, "listener"),
        ({"http_header_forward_pattern": "("}, "--http-header-forward-pattern: '\\(' is no reg"),
        ({"grpc_header_forward_pattern": "*"}, "--grpc-header-forward-pattern: "),
        ({"allow_client_shm": True, "router_replicas": 2}, "needs router_replicas 1"),
        ({"log_format": "xml"}, "log_format"),
        ({"log_verbose": -1}, "greater than or equal to 0"),
        ({"metrics_interval_ms": 0}, "greater than or equal to 1"),
        ({"metrics_config": ["cache_latencies=true"]}, "unknown 'cache_latencies=true'"),
    ],
)
def test_refused(given, reason):
    with pytest.raises(ValidationError, match=reason):
        ServerSettings(**given)


def test_ports_may_be_shared_with_what_is_off():
    assert ServerSettings(http_port=8001, allow_grpc=False).http_port == 8001


def test_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        ServerSettings().__setattr__("http_port", 1)
