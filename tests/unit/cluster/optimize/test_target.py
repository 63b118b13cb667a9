"""What is read, where the result goes, and that it goes there whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from cluster.optimize import disk
from cluster.optimize.target import Destination, OptimizeError, read, serving_threads
from configs.complete import normalise_version, runtime_kind
from deployments.planner import available_cpus
from deployments.repository import Repository

from . import repositories


def source(root: Path, name: str = "mlp", version: int | None = None):
    return read(root, name, version, has_gpu=False)


def test_the_newest_version_unless_one_is_named(tmp_path: Path) -> None:
    model = repositories.scripted(tmp_path)
    (model / "1").rename(model / "2")
    repositories.scripted(tmp_path)
    assert source(tmp_path).version == 2
    first = source(tmp_path, version=1)
    assert (first.version, first.runtime, first.artifact.name) == (1, "torchscript", "model.pt")


def test_threads_are_those_of_serving(tmp_path: Path) -> None:
    cpus = available_cpus()
    repositories.scripted(tmp_path)
    assert source(tmp_path).threads() == cpus
    two = repositories.MLP.replace("count: 1", f"count: {2 * cpus}")
    repositories.scripted(tmp_path, text=two)
    assert source(tmp_path).threads() == 1
    key = 'parameters { key: "INTRA_OP_THREAD_COUNT" value { string_value: "3" } }\n'
    repositories.scripted(tmp_path, text=repositories.MLP + key)
    assert source(tmp_path).threads() == 3
    repositories.eager(tmp_path)
    assert source(tmp_path, "net").threads() == 1
    key = 'parameters { key: "NUM_THREADS" value { string_value: "3" } }\n'
    with (tmp_path / "net" / "config.pbtxt").open("a") as file:
        file.write(key)
    eager = source(tmp_path, "net")
    assert eager.threads() == 3
    assert serving_threads(eager.config, eager.parameters, "aoti") == cpus


@pytest.mark.parametrize(
    ("name", "version", "text"),
    [
        ("absent", None, "there is no model 'absent'"),
        ("../mlp", None, "path traversal"),
        ("mlp", 9, "unable to find 'mlp/9'"),
        ("empty", None, "no version directory"),
        ("gpu", None, "no GPU is available"),
        ("python", None, "'python' is a model of the Python backend"),
        ("package", None, "version 2 of 'package' is a compiled package already; .*--version 1"),
        ("program", None, "version 1 of 'program' is a program of torch.export.*COMPILE_ON_LOAD"),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, name: str, version: int | None, text: str) -> None:
    repositories.scripted(tmp_path)
    (tmp_path / "empty").mkdir()
    gpu = repositories.MLP.replace("KIND_CPU", "KIND_GPU")
    repositories.scripted(tmp_path, name="gpu", text=gpu)
    python = repositories.MLP.replace('platform: "pytorch_libtorch"', 'backend: "python"')
    written = repositories.scripted(tmp_path, name="python", text=python)
    (written / "1" / "model.py").write_text("class TritonPythonModel: ...")
    package = repositories.scripted(tmp_path, name="package")
    (package / "2").mkdir()
    (package / "2" / "model.pt2").write_bytes(b"")
    program = repositories.scripted(
        tmp_path, name="program", text=repositories.MLP.replace("pytorch_libtorch", "torch_export")
    )
    (program / "1" / "model.pt").rename(program / "1" / "model.pt2")
    with pytest.raises(OptimizeError, match=text):
        source(tmp_path, name, version)


def write(root: Path, destination: Destination, filename: str = "model.pt2") -> Path:
    with destination.workshop() as workshop:
        made = workshop / filename
        made.write_bytes(b"made")
        return destination.publish(made, workshop)


def test_a_version_beside_the_old_one(tmp_path: Path) -> None:
    """Written whole, seen by the repository as version 2, and of its own kind."""
    model = repositories.scripted(tmp_path)
    text = (model / "config.pbtxt").read_text()
    destination = Destination(source(tmp_path, version=1))
    destination.check()
    assert write(tmp_path, destination) == model / "2"
    assert not destination.warning(2)
    assert sorted(os.listdir(model)) == ["1", "2", "config.pbtxt"]
    assert os.listdir(model / "2") == ["model.pt2"]
    assert (model / "config.pbtxt").read_text() == text
    repository = Repository((tmp_path,))
    assert repository.find("mlp").versions == (1, 2)
    config = destination.version_config("model.pt2")
    assert runtime_kind(config) == "aoti"
    assert repository.artifact(repository.find("mlp"), 2, config) == model / "2" / "model.pt2"
    assert write(tmp_path, destination) == model / "3"
    assert destination.warning(3) == (
        "version 2 appeared meanwhile: 3, made of version 1, has the higher number"
    )


def test_what_is_newer_by_now_keeps_its_place(tmp_path: Path) -> None:
    """The version was taken because it was the newest. The control has named it: see above."""
    model = repositories.scripted(tmp_path)
    destination = Destination(source(tmp_path))
    own = Destination(source(tmp_path), "fast")
    shutil.copytree(model / "1", model / "2")
    with pytest.raises(OptimizeError, match="version 2 appeared meanwhile; run this again"):
        write(tmp_path, destination)
    assert sorted(os.listdir(model)) == ["1", "2", "config.pbtxt"]
    assert write(tmp_path, own) == tmp_path / "fast" / "1"  # takes nobody's place
    assert write(tmp_path, Destination(source(tmp_path))) == model / "3"


def test_an_optimised_version_does_not_break_the_one_before(tmp_path: Path) -> None:
    """Version 10 comes before 9 where names are sorted as text, and nothing else tells the kind."""
    text = repositories.MLP.partition("\n")[2] + "version_policy { all { } }\n"
    model = repositories.scripted(tmp_path, text=text)
    (model / "1").rename(model / "9")
    assert write(tmp_path, Destination(source(tmp_path))) == model / "10"
    repository = Repository((tmp_path,))
    found = repository.find("mlp")
    kinds = {}
    for number in repository.select_versions(repository.read_config(found), found.versions)[0]:
        files = repository.version_files(found, number)
        config = normalise_version(
            repository.read_config(found), repository.first_files(found), files, False
        )
        assert repository.artifact(found, number, config).is_file()
        kinds[number] = runtime_kind(config, files)
    assert kinds == {9: "torchscript", 10: "aoti"}


@pytest.mark.parametrize("output", [None, "fast"])
def test_all_of_it_is_on_the_disk_before_it_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str | None
) -> None:
    labels = repositories.MLP.replace("dims: [ 4 ]", 'dims: [ 4 ] label_filename: "labels.txt"')
    model = repositories.scripted(tmp_path, text=labels)
    (model / "labels.txt").write_text("a\nb\nc\nd\n")
    synced: set[Path] = set()
    real = disk.move_new

    def move(made: Path, target: Path) -> None:
        for path in (made, *made.rglob("*")):
            assert path in synced, path
        synced.clear()
        real(made, target)

    monkeypatch.setattr(disk, "sync", synced.add)
    monkeypatch.setattr(disk, "move_new", move)
    written = write(tmp_path, Destination(source(tmp_path), output))
    assert (written / "model.pt2").is_file()
    assert synced == {tmp_path if output else model}  # where it has its name


def test_an_empty_folder_of_somebody_else_is_not_taken(tmp_path: Path) -> None:
    repositories.scripted(tmp_path)
    destination = Destination(source(tmp_path), "fast")
    destination.check()
    (tmp_path / "fast").mkdir()
    with pytest.raises(OptimizeError, match="cannot write .*fast: File exists"):
        write(tmp_path, destination)
    assert sorted(os.listdir(tmp_path)) == ["fast", "mlp"] and not os.listdir(tmp_path / "fast")


def test_while_it_is_made_nobody_takes_it_for_a_version(tmp_path: Path) -> None:
    model = repositories.scripted(tmp_path)
    with Destination(source(tmp_path)).workshop() as workshop:
        assert workshop.parent == model
        assert Repository((tmp_path,)).find("mlp").versions == (1,)
    assert sorted(os.listdir(model)) == ["1", "config.pbtxt"]
    with (
        pytest.raises(KeyboardInterrupt),
        Destination(source(tmp_path), "fast").workshop() as workshop,
    ):
        assert workshop.parent == tmp_path
        assert [found.name for found in Repository((tmp_path,)).scan()] == ["mlp"]
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["mlp"]


def test_a_model_of_its_own(tmp_path: Path) -> None:
    labels = repositories.MLP.replace("dims: [ 4 ]", 'dims: [ 4 ] label_filename: "labels.txt"')
    more = """version_policy { all { } }
model_warmup { batch_size: 1
  inputs { key: "x" value { data_type: TYPE_FP32 dims: [ 8 ] input_data_file: "x.raw" } } }
"""
    model = repositories.scripted(tmp_path, text=labels + more)
    (model / "labels.txt").write_text("a\nb\nc\nd\n")
    (model / "warmup").mkdir()
    (model / "warmup" / "x.raw").write_bytes(bytes(32))
    destination = Destination(source(tmp_path), "fast")
    destination.check()
    assert write(tmp_path, destination) == tmp_path / "fast" / "1"
    made = read(tmp_path, "mlp", None, has_gpu=False)
    assert made.version == 1  # the old one is as it was
    repository = Repository((tmp_path,))
    config = repository.read_config(repository.find("fast"))
    assert (config.platform, config.runtime, config.version_policy) == ("torch_aoti", "", None)
    assert (config.input[0].name, config.output[0].name) == ("x", "y")
    assert (tmp_path / "fast" / "labels.txt").is_file()
    assert list(repository.warmup_files(repository.find("fast"), config)) == ["warmup/x.raw"]
    with pytest.raises(OptimizeError, match="'fast' exists"):
        destination.check()
    with pytest.raises(OptimizeError, match="path traversal"):
        Destination(made, "../fast").check()


def test_a_chosen_file_name_wants_a_model_of_its_own(tmp_path: Path) -> None:
    named = repositories.MLP + 'default_model_filename: "net.pt"\n'
    model = repositories.scripted(tmp_path, text=named)
    (model / "1" / "model.pt").rename(model / "1" / "net.pt")
    with pytest.raises(OptimizeError, match=r'default_model_filename: "net.pt".*--output'):
        Destination(source(tmp_path)).check()
    Destination(source(tmp_path), "fast").check()


def test_a_policy_that_lists_versions_is_told_of(tmp_path: Path) -> None:
    listed = repositories.MLP + "version_policy { specific { versions: [ 1 ] } }\n"
    repositories.scripted(tmp_path, text=listed)
    assert "add 2 to serve it" in Destination(source(tmp_path)).note(2)
    assert not Destination(source(tmp_path)).note(1)
    assert not Destination(source(tmp_path), "fast").note(2)


@pytest.mark.parametrize("what", ["nothing", "the file", "the config"])
def test_a_model_that_changes_meanwhile_keeps_what_it_has(tmp_path: Path, what: str) -> None:
    model = repositories.scripted(tmp_path)
    destination = Destination(source(tmp_path))
    if what == "the file":
        (model / "1" / "model.pt").write_bytes(b"retrained")
    elif what == "the config":
        path = model / "config.pbtxt"
        path.write_text(path.read_text() + "\n")
    if what == "nothing":  # the control
        assert write(tmp_path, destination) == model / "2"
        return
    with pytest.raises(OptimizeError, match="has changed meanwhile"):
        write(tmp_path, destination)
    assert not any(path.name == "model.pt2" for path in model.rglob("*"))
