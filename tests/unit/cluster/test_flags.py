"""tritonserver's command line: both forms, unknown flags, and flags that are not done."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from cluster import cli
from cluster.cli import main, read_settings
from cluster.flags import FLAGS, MEANINGLESS, REFUSED, FlagError, parse, warnings
from configs.server import ServerSettings


def test_both_forms_and_repeated_flags() -> None:
    words = ["--model-repository=a", "--model-repository", "b", "--http-port", "9", "--id=x"]
    assert parse(words) == {"model_repository": ("a", "b"), "http_port": "9", "id": "x"}


@pytest.mark.parametrize(("text", "value"), [("true", True), ("1", True), ("False", False)])
def test_booleans(text: str, value: bool) -> None:
    assert parse([f"--exit-on-error={text}"]) == {"exit_on_error": value}


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--disable-auto-complete-config"], True),
        (["--disable-auto-complete-config", "--id=x"], True),
        (["--disable-auto-complete-config", "false"], False),
        (["--disable-auto-complete-config=true"], True),
        (["--strict-model-config=false"], False),
    ],
)
def test_a_switch_may_stand_alone(words: list[str], value: bool) -> None:
    assert parse(words)["disable_auto_complete_config"] is value


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--no-such-flag=1"], "unknown option '--no-such-flag'"),
        (["--cache-config=local,size=1"], "--cache-config is an option of tritonserver"),
        (["--http-port"], "--http-port needs a value"),
        (["--exit-on-error=maybe"], "--exit-on-error is true or false"),
        (["--log-verbose=loud"], "--log-verbose is true or false"),
        (["--http-thread-count"], "--http-thread-count needs a value"),
        (["--backend-config=default-max-batch-size=8"], "default-max-batch-size is 4"),
        (["repository"], "unexpected argument 'repository'"),
    ],
)
def test_refusals_name_the_flag(words: list[str], text: str) -> None:
    with pytest.raises(FlagError, match=text):
        parse(words)


def test_every_flag_sets_a_setting_that_exists() -> None:
    assert {flag.setting for flag in FLAGS.values()} <= set(ServerSettings.model_fields)


def test_an_option_is_of_one_kind() -> None:
    assert not set(FLAGS) & set(MEANINGLESS)
    assert not set(FLAGS) & set(REFUSED)
    assert not set(MEANINGLESS) & set(REFUSED)


# As `tritonserver --help` of 2.6x lists them; what Manta adds is not here.
TRITON = """
allow-client-shm allow-cpu-metrics allow-gpu-metrics allow-grpc allow-http allow-metrics
allow-sagemaker allow-vertex-ai backend-config backend-directory buffer-manager-thread-count
cache-config cache-directory cuda-memory-pool-byte-size cuda-virtual-address-size
disable-auto-complete-config enable-peer-access exit-on-error exit-timeout-secs grpc-address
grpc-header-forward-pattern grpc-http2-max-ping-strikes grpc-http2-max-pings-without-data
grpc-http2-min-recv-ping-interval-without-data grpc-infer-allocation-pool-size
grpc-infer-response-compression-level grpc-infer-thread-count grpc-keepalive-permit-without-calls
grpc-keepalive-time grpc-keepalive-timeout grpc-max-connection-age grpc-max-connection-age-grace
grpc-max-response-pool-size grpc-port grpc-restricted-protocol grpc-root-cert grpc-server-cert
grpc-server-key grpc-use-ssl grpc-use-ssl-mutual host-policy http-address
http-header-forward-pattern http-max-input-size http-port http-restricted-api http-thread-count id
load-model log-error log-file log-format log-info log-verbose log-warning metrics-address
metrics-config metrics-interval-ms metrics-port min-supported-compute-capability model-config-name
model-control-mode model-load-gpu-limit model-load-retry-count model-load-thread-count
model-namespacing model-repository model-store pinned-memory-pool-byte-size rate-limit
rate-limit-resource repoagent-directory repository-poll-secs response-cache-byte-size
reuse-grpc-port reuse-http-port sagemaker-port sagemaker-safe-port-range sagemaker-thread-count
strict-model-config strict-readiness trace-config trace-count trace-file trace-level
trace-log-frequency trace-rate vertex-ai-default-model vertex-ai-port vertex-ai-thread-count
""".split()


def test_every_option_of_tritonserver_is_known() -> None:
    assert set(TRITON) <= {*FLAGS, *MEANINGLESS, *REFUSED}
    assert {*MEANINGLESS, *REFUSED} <= set(TRITON)


def test_what_has_no_meaning_here_is_warned_of_once_by_name() -> None:
    words = ["--http-thread-count=8", "--http-port=1", "--http-thread-count", "9"]
    words += ["--host-policy=gpu_0,numa-node=0", "--backend-config=default-max-batch-size=4"]
    assert parse(words) == {"http_port": "1"}
    told = warnings(words)
    assert [line.split()[0] for line in told] == [
        "--http-thread-count",
        "--host-policy",
        "--backend-config",
    ]
    assert all("has no effect: " in line and line.partition(": ")[2] for line in told)
    assert warnings(["--http-port=1"]) == []


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_option_asks_for_nothing_only_with_its_own_values(name: str) -> None:
    for value in REFUSED[name].nothing:
        assert parse([f"--{name}={value}"]) == {} and warnings([f"--{name}={value}"]) == []
    with pytest.raises(FlagError, match=f"^--{name} is an option of tritonserver") as caught:
        parse([f"--{name}=something"])
    assert REFUSED[name].reason in str(caught.value)


@pytest.mark.parametrize(("given", "level"), [("true", 1), ("False", 0), ("0", 0), ("2", 2)])
def test_verbosity_is_a_number_or_a_boolean(given: str, level: int) -> None:
    settings = ServerSettings(**parse([f"--log-verbose={given}"]))
    assert settings.log_verbose == level


def test_older_names_of_trace_options_say_the_same() -> None:
    old = ["--trace-file=t", "--trace-level=MAX", "--trace-level=TENSORS", "--trace-rate", "7"]
    old += ["--trace-count=-1", "--trace-log-frequency=3"]
    new = ["triton,file=t", "level=MAX", "level=TENSORS", "rate=7", "count=-1"]
    assert parse(old)["trace_config"] == (*new, "triton,log-frequency=3")
    assert parse([f"--trace-config={entry}" for entry in new])["trace_config"] == tuple(new)
    for words in (["--trace-rate=x"], ["--trace-config", "nonsense=1"], ["--trace-level=LOUD"]):
        with pytest.raises(ValueError, match="trace_config: "):
            ServerSettings(**parse(words))


def test_spans_without_their_extra_are_refused_before_a_server_starts(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http", None)
    words = ["serve", f"--model-repository={tmp_path}", "--trace-config=mode=opentelemetry"]
    assert main(words) == 1
    assert "pip install 'manta-server[otel]'" in capsys.readouterr().err


def test_the_trace_file_is_found_from_here(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = [f"--model-repository={tmp_path}", "--trace-config=rate=5"]
    settings = read_settings([*words, "--trace-config=triton,file=t.json", "--trace-level=on"])
    assert settings.trace_config == ("rate=5", f"triton,file={tmp_path}/t.json", "level=on")
    with pytest.raises(FlagError, match="trace file .* cannot be written there"):
        read_settings([*words, "--trace-config=triton,file=nowhere/t.json"])


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """As it was: `manta serve` loads its profile into it."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize(
    ("words", "wanted"), [([], True), (["--fork-server=false"], False), (["--http-port=7"], True)]
)
def test_the_profile_comes_before_the_settings(tmp_path: Path, monkeypatch, words, wanted) -> None:
    """What it says of forks counts, unless the command line says otherwise."""
    monkeypatch.delenv("MANTA_FORK_SERVER", raising=False)
    seen: list[ServerSettings] = []

    def serve(settings: ServerSettings) -> int:
        seen.append(settings)
        return 0

    monkeypatch.setattr(cli, "serve", serve)
    assert main(["serve", f"--model-repository={tmp_path}", *words]) == 0
    assert [settings.fork_server for settings in seen] == [wanted]
    monkeypatch.setenv("MANTA_FORK_SERVER", "0")
    main(["serve", f"--model-repository={tmp_path}", "--fork-server=true"])
    main(["serve", f"--model-repository={tmp_path}"])
    assert [settings.fork_server for settings in seen[1:]] == [True, False]


def test_the_log_file_is_found_from_here(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = [f"--model-repository={tmp_path}", "--log-file=manta.log", "--log-format=json"]
    settings = read_settings(words)
    assert (settings.log_file, settings.log_format) == (str(tmp_path / "manta.log"), "json")
    with pytest.raises(FlagError, match="log file"):
        read_settings([words[0], "--log-file=no/such/folder/manta.log"])


def test_warnings_are_shown_and_the_server_starts(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(cli, "serve", lambda settings: 0)
    words = [f"--model-repository={tmp_path}", "--grpc-infer-thread-count=2"]
    assert main(["serve", *words]) == 0
    told = capsys.readouterr().err
    assert told.startswith("manta serve: --grpc-infer-thread-count has no effect")


def test_settings_from_the_command_line(tmp_path: Path) -> None:
    settings = read_settings(
        [
            f"--model-repository={tmp_path}",
            "--model-control-mode=explicit",
            "--load-model=a",
            "--load-model",
            "b",
            "--http-port=9000",
        ]
    )
    assert settings.model_repository == (str(tmp_path),)
    assert settings.load_model == ("a", "b")
    assert settings.http_port == 9000
    assert settings.exit_on_error and settings.strict_readiness


def test_restricted_groups_and_ports_options(tmp_path: Path) -> None:
    settings = read_settings(
        [
            f"--model-repository={tmp_path}",
            "--http-restricted-api=health,metadata:k=a=b",
            "--http-restricted-api",
            "inference:j=w",
            "--grpc-restricted-protocol=trace:k=v",
            "--grpc-keepalive-time=1000",
            "--grpc-keepalive-permit-without-calls",
            "0",
            "--grpc-infer-response-compression-level=high",
            "--grpc-max-response-pool-size=8",
        ]
    )
    one, two = settings.http_restricted_api
    assert (one.apis, one.key, two.apis) == (("health", "metadata"), "k", ("inference",))
    assert one.value.get_secret_value() == "a=b"
    assert settings.grpc_restricted_protocol[0].apis == ("trace",)
    assert settings.grpc_keepalive_time_ms == 1000
    assert settings.grpc_keepalive_permit_without_calls is False
    assert settings.grpc_infer_response_compression_level == "high"
    assert settings.grpc_max_response_pool_size == 8


def test_what_haproxy_does_not_take_is_warned_of(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(cli, "serve", lambda settings: 0)
    words = ["serve", f"--model-repository={tmp_path}", "--grpc-max-connection-age=5000"]
    assert main(words) == 0
    assert "grpc_max_connection_age_ms: HAProxy has the gRPC port" in capsys.readouterr().err
    assert main([*words, "--grpc-lane=false"]) == 0
    assert "HAProxy" not in capsys.readouterr().err


def test_a_wrong_group_is_told_without_its_value(tmp_path: Path, capsys) -> None:
    for group in ("nonsense:k=s3cr3t", "health:s3cr3t", "trace:s3 cr3t=v", "trace:k=s3cr3té"):
        words = ["serve", f"--model-repository={tmp_path}", f"--http-restricted-api={group}"]
        assert main(words) == 1
        told = capsys.readouterr()
        assert "http_restricted_api" in told.err and "cr3t" not in told.err + told.out


def test_serve_config_and_command_offer_the_same_services() -> None:
    config = yaml.safe_load((Path(cli.__file__).parents[1] / "serve_config.yaml").read_text())
    assert tuple(config["grpc_options"]["grpc_servicer_functions"]) == cli.PROXY_SERVICES


@pytest.mark.parametrize(
    "words",
    [
        ["serve", "--model-repository=/no/such/place"],
        ["serve", "--http-port=70000"],
        ["serve", "--http-port=7", "--grpc-port=7"],
        ["serve", "--model-control-mode=sometimes"],
        ["serve", "--model-namespacing=true"],
        ["serve", "--repository-poll-secs=0"],
        ["serve", "--file-override-directory=/no/such/place"],
        ["serve", "--unknown"],
        ["serve", "--metrics-config=summary_latencies=maybe"],
        ["serve", "--log-format=xml"],
        ["frobnicate"],
        [],
    ],
)
def test_a_wrong_command_line_ends_with_1(words: list[str], capsys: pytest.CaptureFixture) -> None:
    assert main(words) == 1
    captured = capsys.readouterr()
    assert captured.err or captured.out


def test_a_pattern_that_cannot_be_compiled_names_its_flag(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for flag in ("--http-header-forward-pattern", "--grpc-header-forward-pattern"):
        assert main(["serve", f"--model-repository={tmp_path}", f"{flag}=my_(header"]) == 1
        assert f"{flag}: 'my_(header' is no regular expression" in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture) -> None:
    assert main(["serve", "--help"]) == 0
    assert "--model-repository" in capsys.readouterr().out
