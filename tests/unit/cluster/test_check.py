"""`manta check` over a repository of broken models, and over one of good ones."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cluster import cli
from tests.unit.cluster.broken import BROKEN, build_broken, build_good, build_hanging

ROOT = Path(__file__).parents[3]


def check(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Not in this process: the models run in forks, and pytest's has threads of torch's."""
    return subprocess.run(
        [sys.executable, "-m", "cluster.cli", "check", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=240,
    )


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("check") / "models"
    build_broken(root)
    return root


@pytest.fixture(scope="module")
def told(broken: Path) -> subprocess.CompletedProcess[str]:
    return check(broken, "--gpus=1")


@pytest.fixture(scope="module")
def errors(told: subprocess.CompletedProcess[str]) -> dict[str, list[str]]:
    """The errors of each model, which each begin with its name."""
    found: dict[str, list[str]] = {name: [] for name in BROKEN}
    for line in told.stdout.split("error: ")[1:]:
        name = line.replace("unable to find '", "").partition("/")[0].partition(":")[0]
        found[name].append(line)
    return found


@pytest.mark.parametrize("name", BROKEN)
def test_each_broken_model_has_its_own_reason(errors: dict[str, list[str]], name: str) -> None:
    assert len(errors[name]) == len(BROKEN[name].told), errors[name]
    for line, words in zip(errors[name], BROKEN[name].told, strict=True):
        for word in words:
            assert word in line


def test_all_are_told_at_once_and_the_exit_code_says_so(
    told: subprocess.CompletedProcess[str], errors: dict[str, list[str]], broken: Path
) -> None:
    assert told.returncode == 1, told.stderr
    count = sum(len(one.told) for one in BROKEN.values())
    assert len(BROKEN) >= 20 and sum(map(len, errors.values())) == count
    assert told.stdout.endswith(
        f"{len(BROKEN)} models: 0 good versions, {count} errors, 0 warnings\n"
    )
    reasons = {line.replace(name, "") for name, lines in errors.items() for line in lines}
    assert len(reasons) == count, "two of them say the same"
    assert "Traceback" not in told.stdout + told.stderr and str(broken) not in told.stdout


def test_a_good_repository_is_good(tmp_path: Path) -> None:
    """The control. A parameter that nobody knows is a warning and no error."""
    build_good(tmp_path / "models")
    told = check(tmp_path / "models")
    assert told.returncode == 0, told.stdout + told.stderr
    lines = told.stdout.splitlines()
    assert lines[0].startswith("ok: eager version 1: eager, 1 instance on KIND_CPU, loaded in")
    assert "INFERENCE_MOOD" in lines[1] and "did you mean 'INFERENCE_MODE'" in lines[1]
    assert lines[2].startswith("ok: script version 1: torchscript, 1 instance on KIND_CPU, loaded")
    assert lines[3] == "2 models: 2 good versions, 0 errors, 1 warning"


def test_one_model_read_only(
    broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What only loading would tell is not told, and no code of the model's runs."""
    build_hanging(tmp_path)
    arguments = [str(broken), str(tmp_path), "--model=hangs", "--model", "no_file"]
    assert cli.main(["check", *arguments, "--no-load", "--gpus=0"]) == 1
    first, second, last = capsys.readouterr().out.splitlines()
    assert first == "ok: hangs version 1: eager, 1 instance on KIND_CPU, not loaded"
    assert second.startswith("error: ") and "no_file/1/model.pt" in second
    assert last == "2 models: 1 good version, 1 error, 0 warnings"


def test_bounds_of_instances_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_hanging(tmp_path)
    config = tmp_path / "hangs" / "config.pbtxt"
    bounds = '{\\"min_count\\": 0, \\"max_count\\": 3}'
    scaled = f'\nparameters {{ key: "AUTOSCALING" value {{ string_value: "{bounds}" }} }}\n'
    config.write_text(config.read_text() + scaled)
    assert cli.main(["check", str(tmp_path), "--no-load", "--gpus=0"]) == 0
    assert "eager, 1 (0 to 3) instances on KIND_CPU, not loaded" in capsys.readouterr().out
    config.write_text(config.read_text().replace("max_count", "max_replicas"))
    assert cli.main(["check", str(tmp_path), "--no-load", "--gpus=0"]) == 1
    assert "unknown field 'max_replicas'" in capsys.readouterr().out


def test_files_of_compute_capabilities_are_looked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_good(tmp_path)
    config = tmp_path / "script" / "config.pbtxt"
    files = "".join(
        f'cc_model_filenames {{ key: "{key}" value: "{name}" }}\n'
        for key, name in (("9.0", "model.pt"), ("8.6", "other.pt"))
    )
    config.write_text(config.read_text() + files + "instance_group { kind: KIND_GPU }\n")
    assert cli.main(["check", str(tmp_path), "--model=script", "--no-load", "--gpus=1"]) == 1
    (error,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("error: ")]
    assert "unable to find 'script/1/other.pt'" in error


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_model_that_hangs_is_given_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In this process: the fork computes nothing that the threads of torch would be missed for."""
    build_hanging(tmp_path)
    assert cli.main(["check", str(tmp_path), "--gpus=0", "--timeout=0.5"]) == 1
    expected = "error: hangs: failed to load model 'hangs': it did not load within 0.5 s\n"
    assert expected in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_that_a_model_leaves_behind_holds_nothing_up(tmp_path: Path) -> None:
    """It has the pipe to us open, and is ended with the fork that started it."""
    from cluster.check import trial

    def work() -> dict[str, int]:
        pid = os.fork()
        if pid == 0:
            time.sleep(600)
            os._exit(0)
        return {"left": pid}

    told, _ = trial.fork(work, 60)
    assert told is not None
    end_s = time.monotonic() + 30
    while not ended(told["left"]):
        assert time.monotonic() < end_s, "the process that the fork started is still there"
        time.sleep(0.05)


def ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_wrong_command_line_and_a_wrong_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["check", str(tmp_path), "--gpus", "-1"])
    assert caught.value.code == 2
    capsys.readouterr()
    assert cli.main(["check", str(tmp_path / "nowhere"), "--gpus=0"]) == 1
    assert "nowhere' is not a directory" in capsys.readouterr().err
    assert cli.main(["check", str(tmp_path), "--gpus=0"]) == 1
    assert "there is no model" in capsys.readouterr().out


def test_help_says_that_code_runs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["check", "--help"])
    assert caught.value.code == 0
    assert "runs that" in (told := capsys.readouterr().out) and "--no-load" in told
