"""Each option of tritonserver, as its users write it: what it sets, or that it is warned of."""

from __future__ import annotations

import pytest

from cluster.cli import main
from cluster.flags import FLAGS, MEANINGLESS, parse, warnings
from cluster.usage import usage
from configs.server import ServerSettings

from .test_flags import TRITON

# Option, value, and what the setting is then. Only values that are not the default say something.
GIVEN = {
    "allow-client-shm": ("true", True),
    "allow-cpu-metrics": ("false", False),
    "allow-gpu-metrics": ("0", False),
    "allow-grpc": ("false", False),
    "allow-http": ("false", False),
    "allow-metrics": ("false", False),
    "disable-auto-complete-config": ("true", True),
    "exit-on-error": ("false", False),
    "exit-timeout-secs": ("7", 7.0),
    "grpc-address": ("127.0.0.2", "127.0.0.2"),
    "grpc-header-forward-pattern": ("my_.*", "my_.*"),
    "grpc-http2-max-ping-strikes": ("3", 3),
    "grpc-http2-max-pings-without-data": ("4", 4),
    "grpc-http2-min-recv-ping-interval-without-data": ("5000", 5000),
    "grpc-infer-response-compression-level": ("low", "low"),
    "grpc-keepalive-permit-without-calls": ("1", True),
    "grpc-keepalive-time": ("6000", 6000),
    "grpc-keepalive-timeout": ("7000", 7000),
    "grpc-max-connection-age": ("8000", 8000),
    "grpc-max-connection-age-grace": ("9000", 9000),
    "grpc-max-response-pool-size": ("10", 10),
    "grpc-port": ("9001", 9001),
    "grpc-restricted-protocol": ("health:k=v", 1),
    "grpc-root-cert": ("/tls/ca.pem", "/tls/ca.pem"),
    "grpc-server-cert": ("/tls/server.pem", "/tls/server.pem"),
    "grpc-server-key": ("/tls/server.key", "/tls/server.key"),
    "grpc-use-ssl": ("true", True),
    "grpc-use-ssl-mutual": ("1", True),
    "http-address": ("127.0.0.3", "127.0.0.3"),
    "http-header-forward-pattern": ("(?-i)x", "(?-i)x"),
    "http-max-input-size": ("1048576", 1048576),
    "http-port": ("9000", 9000),
    "http-restricted-api": ("metadata,health:k=v", 1),
    "id": ("mine", "mine"),
    "load-model": ("*", ("*",)),
    "log-error": ("false", False),
    "log-file": ("/tmp/x.log", "/tmp/x.log"),
    "log-format": ("ISO8601", "ISO8601"),
    "log-info": ("false", False),
    "log-verbose": ("2", 2),
    "log-warning": ("0", False),
    "metrics-address": ("127.0.0.4", "127.0.0.4"),
    "metrics-config": ("summary_latencies=true", ("summary_latencies=true",)),
    "metrics-interval-ms": ("500", 500),
    "metrics-port": ("9002", 9002),
    "model-config-name": ("chosen", "chosen"),
    "model-control-mode": ("explicit", "explicit"),
    "model-load-retry-count": ("2", 2),
    "model-load-thread-count": ("8", 8),
    "model-repository": ("/models", ("/models",)),
    "model-store": ("/models", ("/models",)),
    "repository-poll-secs": ("3", 3.0),
    "strict-model-config": ("true", True),
    "strict-readiness": ("false", False),
    "trace-config": ("rate=5", ("rate=5",)),
    "trace-count": ("5", ("count=5",)),
    "trace-file": ("/tmp/t.json", ("triton,file=/tmp/t.json",)),
    "trace-level": ("TIMESTAMPS", ("level=TIMESTAMPS", "triton,file=/tmp/t.json")),
    "trace-log-frequency": ("5", ("triton,log-frequency=5",)),
    "trace-rate": ("5", ("rate=5",)),
}
# Options that mean something only beside others.
CERTIFICATES = tuple(f"--grpc-{name}=/f" for name in ("server-cert", "server-key", "root-cert"))
BESIDE = {
    "grpc-root-cert": ("--grpc-use-ssl=false",),
    "grpc-server-cert": ("--grpc-use-ssl=false",),
    "grpc-server-key": ("--grpc-use-ssl=false",),
    "grpc-use-ssl": CERTIFICATES,
    "grpc-use-ssl-mutual": CERTIFICATES,
    "load-model": ("--model-control-mode=explicit",),
    "trace-level": ("--trace-file=/tmp/t.json",),
}


def test_none_is_forgotten() -> None:
    assert set(GIVEN) == set(TRITON) & set(FLAGS)


@pytest.mark.parametrize("name", GIVEN)
def test_it_sets_what_it_says(name: str) -> None:
    value, wanted = GIVEN[name]
    setting = FLAGS[name].setting
    for words in ([f"--{name}={value}"], [f"--{name}", value]):
        assert warnings(words) == []
        settings = ServerSettings(**parse([*words, *BESIDE.get(name, ())]))
        got = getattr(settings, setting)
        assert (len(got) if wanted == 1 and type(wanted) is int else got) == wanted
        assert getattr(ServerSettings(), setting) != got


@pytest.mark.parametrize("name", MEANINGLESS)
def test_what_has_no_meaning_sets_nothing_and_is_warned_of_once(name: str) -> None:
    words = [f"--{name}=1", f"--{name}", "1", f"--{name}=1"]
    assert parse(words) == {}
    (line,) = warnings(words)
    assert line == f"--{name} has no effect: {MEANINGLESS[name]}" and MEANINGLESS[name]


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_is_the_grouped_list(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--http-port=7", word]) == 0
    assert capsys.readouterr().out == usage() + "\n"
