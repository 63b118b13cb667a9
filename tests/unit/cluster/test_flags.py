"""tritonserver's command line: both forms, unknown flags, and flags that are not done."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import cli
from cluster.cli import main, read_settings
from cluster.flags import FLAGS, NOT_DONE, FlagError, parse, usage
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
        (["repository"], "unexpected argument 'repository'"),
    ],
)
def test_refusals_name_the_flag(words: list[str], text: str) -> None:
    with pytest.raises(FlagError, match=text):
        parse(words)


def test_every_flag_sets_a_setting_that_exists() -> None:
    assert {flag.setting for flag in FLAGS.values()} <= set(ServerSettings.model_fields)
    assert not NOT_DONE & set(FLAGS)
    assert all(f"--{name}" in usage() for name in FLAGS)


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
