"""The command from its words to the new version: with real files, and one real compilation."""

from __future__ import annotations

import hashlib
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cluster import cli
from cluster.optimize import command
from cluster.optimize.export import Recipe, Refused
from cluster.optimize.options import Options
from cluster.optimize.target import OptimizeError
from configs.complete import normalise_version
from configs.parameters import ModelParameters
from deployments import runtimes
from deployments.errors import InvalidArgument
from deployments.repository import Repository
from tests import models

from . import repositories

ROOT = Path(__file__).parents[4]
# Speed is not what these tests are about: any is enough.
ANY = {"min_speedup": 1e-6, "min_each": 1e-6, "rounds": 1, "batch_sizes": (1,)}


def options(root: Path, name: str = "mlp", **more) -> Options:
    return Options(root, name, **{"threads": 1, **ANY, **more})


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def script(label: str, module: torch.nn.Module) -> Recipe:
    """A candidate that needs no compiler."""

    def make(folder: Path) -> None:
        torch.jit.script(module.eval()).save(str(folder / "model.pt"))

    return Recipe(label, "model.pt", make)


def versions(root: Path, name: str = "mlp") -> tuple[int, ...]:
    return Repository((root,)).find(name).versions


# --- the decision --------------------------------------------------------------------------------


def test_what_is_right_and_fast_enough_is_written(tmp_path: Path, capsys) -> None:
    repositories.scripted(tmp_path)
    code = command.run(options(tmp_path), lambda bench: [script("same", models.mlp())])
    assert code == command.WRITTEN and versions(tmp_path) == (1, 2)
    out = capsys.readouterr().out
    assert "mlp version 1: TorchScript, fp32, intra-op threads: 1, device: cpu" in out
    assert f"written {tmp_path}/mlp/2: same" in out


class Off(torch.nn.Module):
    """The model with one output a little off."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.net, self.by = models.mlp(), by

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.net(x)
        return y + self.by


class OneRowOff(torch.nn.Module):
    """Wrong for a full batch only, as a batch dimension that was fixed would be."""

    def __init__(self) -> None:
        super().__init__()
        self.net = models.mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.net(x)
        return y + 1 if x.size(0) == 8 else y


class Flatter(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sum(1)


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (Off(0.01), "its answers deviate by"),
        (OneRowOff(), "its answers deviate by"),
        (Flatter(), "output 'y' is float32[1], and the original's float32[1, 4]"),
        (models.RefusesNegative(), "it fails at batch size 1: "),
        (models.add_sub(), "model provides 2"),
    ],
)
def test_control_a_wrong_candidate_is_not_written(tmp_path: Path, capsys, module, text) -> None:
    repositories.scripted(tmp_path)
    code = command.run(options(tmp_path), lambda bench: [script("wrong", module)])
    assert code == command.NOT_BETTER and versions(tmp_path) == (1,)
    out = capsys.readouterr().out
    assert "wrong: not taken: " in out and text in out
    assert "nothing written" in out


def test_the_bound_is_the_users_to_set(tmp_path: Path) -> None:
    repositories.scripted(tmp_path)
    made = [script("off", Off(0.001))]
    assert command.run(options(tmp_path), lambda bench: made) == command.NOT_BETTER
    assert command.run(options(tmp_path, tolerance=0.5), lambda bench: made) == command.WRITTEN


def test_control_a_slow_candidate_is_not_written(tmp_path: Path, capsys) -> None:
    """Nothing is a thousand times as fast as itself."""
    repositories.scripted(tmp_path)
    asked = options(tmp_path, min_speedup=1000.0)
    code = command.run(asked, lambda bench: [script("same", models.mlp())])
    assert code == command.NOT_BETTER and versions(tmp_path) == (1,)
    assert "less than 1000.00" in capsys.readouterr().out


def test_one_that_cannot_be_made_does_not_stop_the_others(tmp_path: Path, capsys) -> None:
    def refuse(folder: Path) -> None:
        raise Refused("no way")

    made = [Recipe("first", "model.pt2", refuse), script("second", models.mlp())]
    repositories.scripted(tmp_path)
    assert command.run(options(tmp_path), lambda bench: made) == command.WRITTEN
    assert "first: not taken: no way" in capsys.readouterr().out


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    repositories.scripted(tmp_path)
    asked = options(tmp_path, dry_run=True)
    made = [script("same", models.mlp())]
    assert command.run(asked, lambda bench: made) == command.WRITTEN
    assert versions(tmp_path) == (1,)
    assert sorted(path.name for path in (tmp_path / "mlp").iterdir()) == ["1", "config.pbtxt"]


# --- what is not begun ---------------------------------------------------------------------------


class Noisy(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :4] + torch.rand(1)


class Counts(torch.nn.Module):
    """Its answers show nothing of what it keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))
        self.seen: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return x[:, :4]


@pytest.mark.parametrize(
    ("module", "more", "text"),
    [
        (Noisy(), {}, "other answers to the same inputs"),
        (Counts(), {}, "changes its state while it runs: seen"),
        (models.mlp(), {"batch_sizes": (9,)}, "batch size 9 is over max_batch_size, 8"),
        (models.RefusesNegative(), {}, "fails on a sample of 1 rows: .*negative value.*--samples"),
    ],
)
def test_models_that_cannot_be_judged(tmp_path: Path, module, more, text: str) -> None:
    repositories.scripted(tmp_path, module)
    with pytest.raises(OptimizeError, match=text):
        command.run(options(tmp_path, **more), lambda bench: [])
    assert versions(tmp_path) == (1,)


def test_a_missing_compiler_is_named(tmp_path: Path, monkeypatch) -> None:
    repositories.scripted(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(OptimizeError, match=r"C\+\+ compiler and none is installed.*g\+\+"):
        command.run(options(tmp_path))


def test_each_is_measured_with_the_threads_that_will_serve_it(tmp_path: Path, capsys) -> None:
    """NUM_THREADS is an eager model's, INTRA_OP_THREAD_COUNT that of what is made of it."""
    repositories.eager(tmp_path, code=repositories.TELLS_THREADS)
    with (tmp_path / "net" / "config.pbtxt").open("a") as file:
        for key, value in (
            ("NUM_THREADS", "2"),
            ("INTRA_OP_THREAD_COUNT", "3"),
            ("TORCH_COMPILE_OPTIONAL_PARAMETERS", '{\\"disable\\": true}'),
        ):
            file.write(f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}\n')
    for given, original, candidate in ((None, 2, 3), (1, 1, 1)):
        repositories.THREADS.clear()
        asked = options(tmp_path, "net", threads=given, tolerance=1e9, output=f"by_{given}")
        code = command.run(asked, lambda bench: [script("candidate", models.mlp())])
        assert code == command.WRITTEN
        assert repositories.THREADS == {original}
        assert torch.get_num_threads() == candidate  # which was measured last
    out = capsys.readouterr().out
    assert "intra-op threads: 2 (3 for a package)" in out and "intra-op threads: 1, " in out


# --- the command line ----------------------------------------------------------------------------


def test_words_become_options() -> None:
    asked = command.parse(
        "repo --model m --version 3 --precision bf16 --tolerance 0.1 --batch-sizes 8,1 --threads 2"
        " --min-speedup 1.5 --min-each 1 --samples s.npz --output fast --rounds 3 --dry-run".split()
    )
    assert asked == Options(
        Path("repo"), "m", 3, "bf16", 0.1, (1, 8), 2, 1.5, 1.0, Path("s.npz"), "fast", 3, True
    )
    assert command.parse(["repo", "--model=m"]) == Options(Path("repo"), "m")


@pytest.mark.parametrize(
    "words",
    [
        "",
        "repo",
        "repo --model m --precision int8",
        "repo --model m --batch-sizes 0",
        "repo --model m --tolerance 0",
        "repo --model m --threads 0",
        "repo --model m --rounds 2",
        "repo --model m --unknown 1",
    ],
)
def test_wrong_words_end_with_two(words: str, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["optimize", *words.split()])
    assert ended.value.code == 2
    assert "usage: manta optimize" in capsys.readouterr().err


def test_help_tells_of_both_commands(capsys) -> None:
    assert cli.main(["--help"]) == 0
    assert "manta optimize PATH --model NAME" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        cli.main(["optimize", "--help"])
    assert ended.value.code == 0
    assert "--precision" in capsys.readouterr().out


def test_what_cannot_be_done_is_said_and_ends_with_one(tmp_path: Path, capsys) -> None:
    assert cli.main(["optimize", str(tmp_path), "--model", "absent"]) == 1
    assert f"manta optimize: there is no model 'absent' in {tmp_path}" in capsys.readouterr().err
    assert cli.main(["optimize", str(tmp_path / "none"), "--model", "m"]) == 1


def test_the_command_line_itself_brings_no_torch() -> None:
    code = "import sys, cluster.cli, cluster.optimize.command; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing_half_made(tmp_path: Path, number: int) -> None:
    repositories.scripted(tmp_path)
    code = """
import os, signal, sys
from cluster.optimize import command, target

def run(options):
    source = target.read(options.repository, options.model, None, False)
    with target.Destination(source).workshop() as workshop:
        print(os.listdir(workshop.parent), flush=True)
        signal.pause()

command.run = run  # the real one takes longer to get as far
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup may be around the tests
sys.exit(command.main(sys.argv[1:]))
"""
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), "--model=mlp"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert ".optimizing." in process.stdout.readline()  # the control
        process.send_signal(number)
        assert process.wait(60) == 128 + number
    assert sorted(path.name for path in (tmp_path / "mlp").iterdir()) == ["1", "config.pbtxt"]


# --- with a compiler -----------------------------------------------------------------------------


@pytest.fixture(scope="session")
def optimised(request: pytest.FixtureRequest) -> Path:
    """A repository whose model has a compiled version 2 beside its scripted version 1.

    Compiled once and kept in pytest's cache, until torch, the processor or our sources change.
    """
    if shutil.which("g++") is None:
        pytest.skip("AOTI packages need g++")
    sources = sorted((ROOT / "cluster" / "optimize").glob("*.py"))
    facts = f"{torch.__version__} {torch.backends.cpu.get_cpu_capability()}".encode()
    facts += b"".join(path.read_bytes() for path in [*sources, Path(repositories.__file__)])
    assert request.config.cache is not None
    kept = Path(request.config.cache.mkdir("optimised"))
    folder = kept / hashlib.sha256(facts).hexdigest()[:16]
    if not (folder / "mlp" / "2").exists():
        shutil.rmtree(folder, ignore_errors=True)
        repositories.scripted(folder)
        threads = torch.get_num_threads()
        assert command.run(options(folder), lambda bench: bench.recipes()[:1]) == command.WRITTEN
        torch.set_num_threads(threads)
    return folder


def load(root: Path, version: int):
    """As the server does: one configuration, and each version's own files."""
    repository = Repository((root,))
    found = repository.find("mlp")
    files = repository.version_files(found, version)
    config = repository.read_config(found)
    config = normalise_version(config, repository.first_files(found), files, False)
    artifact = repository.artifact(found, version, config)
    return runtimes.load(artifact, config, ModelParameters(), "cpu", "KIND_CPU")


def test_the_compiled_version_answers_as_the_first(optimised: Path) -> None:
    """By the names of the configuration, which are none of the packages' own grammar."""
    first, second = load(optimised, 1), load(optimised, 2)
    assert (first.label, second.label) == ("TorchScript", "AOT Inductor")
    with torch.inference_mode():
        for rows in range(1, 9):
            given = torch.randn(rows, 8)
            wanted, got = first.run([given])[0], second.run([given])[0]
            assert torch.allclose(wanted, got, atol=1e-5)
            assert got.shape == (rows, 4)


def test_a_single_row_is_run_as_one(optimised: Path) -> None:
    """Not as two rows of which one is thrown away."""
    second = load(optimised, 2)
    second.run([torch.randn(1, 8)])
    assert second._fewest_rows == 1


@pytest.mark.parametrize("shape", [(9, 8), (0, 8), (2, 7), (8,)])
def test_control_what_the_package_was_not_made_for_is_refused(optimised: Path, shape) -> None:
    with pytest.raises(InvalidArgument, match="input 'x'"):
        load(optimised, 2).run([torch.randn(*shape)])
