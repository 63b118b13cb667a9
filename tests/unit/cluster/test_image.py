"""The image: linted, and its steps run in order, without Docker and changing no machine."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib
import yaml

from tests.unit.cluster.dockerfile import Build, Stage, stages
from tests.unit.cluster.manifests import CLUSTER, ROOT, container, groups, rayservice

FILE = CLUSTER / "Dockerfile"


def built() -> tuple[Stage, Stage]:
    build, runtime = stages(FILE.read_text())
    return build, runtime


def arguments(stage: Stage) -> dict[str, str]:
    return dict(value.split("=", 1) for value in stage.of("ARG"))


def test_hadolint_finds_nothing() -> None:
    linter = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([linter, FILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_control_hadolint_finds_something(tmp_path: Path) -> None:
    bad = tmp_path / "Dockerfile"
    bad.write_text(FILE.read_text().replace("--no-install-recommends ", ""))
    linter = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([linter, bad], capture_output=True, text=True)
    assert done.returncode == 1 and "DL3015" in done.stdout


def test_rays_version_is_one_everywhere() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    _, runtime = built()
    manifest = rayservice(CLUSTER / "base")["spec"]["rayClusterConfig"]["rayVersion"]
    assert arguments(runtime)["RAY_VERSION"] == pins["ray"] == manifest
    # and the build itself compares it with what it has installed
    assert any("ray.__version__ == '${RAY_VERSION}'" in step for step in runtime.of("RUN"))


def test_torchs_builds_are_of_the_pinned_version() -> None:
    build, _ = built()
    [install] = [step for step in build.of("RUN") if step.rstrip().endswith(" torch")]
    assert "--constraint constraints.txt" in install
    assert "whl/cpu" in install and re.search(r"whl/cu\d+", install)
    assert arguments(build)["VARIANT"] == "cpu"


def test_nothing_is_compiled_in_the_image_unless_asked_for() -> None:
    build, runtime = built()
    assert build.base == runtime.base and build.base.endswith("-slim-bookworm")
    assert arguments(runtime)["COMPILER"] == "0"
    steps = " ".join(runtime.of("RUN"))
    compilers = re.findall(r"\b(?:gcc|g\+\+|clang|build-essential)(?![\w+])", steps)
    assert compilers == ["g++"] or not compilers, compilers
    assert re.search(r'if \[ "\$\{COMPILER\}" = 1 \]; then apt-get install [^;]*g\+\+; fi', steps)
    assert "pip" not in steps


def test_nobody_is_root() -> None:
    _, runtime = built()
    [user] = runtime.of("USER")
    context = container(dict(groups(rayservice(CLUSTER / "base")))["cpu"])
    pod = dict(groups(rayservice(CLUSTER / "base")))["cpu"]["template"]["spec"]
    wanted = pod["securityContext"]
    assert user == f"{wanted['runAsUser']}:{wanted['runAsGroup']}"
    ports = {str(port["containerPort"]) for port in context["ports"]}
    assert set(runtime.of("EXPOSE")[0].split()) <= ports
    # Kubernetes replaces both; by hand they make `docker run` serve /models.
    assert yaml.safe_load(runtime.of("ENTRYPOINT")[0]) == ["manta"]
    assert yaml.safe_load(runtime.of("CMD")[0]) == ["serve", "--model-repository=/models"]


def test_all_that_is_installed_is_copied() -> None:
    build, _ = built()
    copied = [word for value in build.of("COPY") for word in value.split()[:-1]]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["setuptools"]["packages"]
    assert {package.partition(".")[0] for package in packages} <= set(copied)
    assert {"pyproject.toml", "README.md", "LICENSE", "constraints.txt"} <= set(copied)
    ignored = (CLUSTER / "Dockerfile.dockerignore").read_text().split("\n")
    assert {f"!{name}" for name in copied} <= set(ignored)
    assert all((ROOT / name).exists() for name in copied)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_the_steps_in_order(tmp_path: Path) -> None:
    """As far as they go without the root of a machine: packages of the system are passed over."""
    root = tmp_path / "image"
    root.mkdir()
    build = Build(ROOT, root, {"TORCH_INDEX": "none"})
    build.run(FILE.read_text())
    assert [step.split()[0] for step in build.passed_over] == ["apt-get", "groupadd"]

    models = tmp_path / "models" / "model" / "1"
    models.mkdir(parents=True)
    (models / "model.pt").write_bytes(b"")
    (models.parent / "config.pbtxt").write_text(
        'platform: "pytorch_libtorch" max_batch_size: 8 '
        'input { name: "x" data_type: TYPE_FP32 dims: 4 } '
        'output { name: "y" data_type: TYPE_FP32 dims: 4 }'
    )

    def run(*words: str) -> str:
        done = subprocess.run(
            words,
            env={**build.environment, "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    binaries = root / "opt" / "manta" / "bin"
    manta = shutil.which("manta", path=build.environment["PATH"])
    assert manta is not None and Path(manta).parent == binaries
    assert "manta serve" in run(manta, "--help")
    manifest = list(yaml.safe_load_all(run(manta, "deploy", str(models.parents[1]), "--dry-run")))
    assert manifest[0]["spec"]["rayClusterConfig"]["rayVersion"] in run("ray", "--version")
    modules = run(
        str(binaries / "python"),
        "-c",
        "import deployments.app, deployments.instance, cluster; print(cluster.__file__)",
    )
    assert modules.startswith(str(root)), "what was built and not what is here"
    packages = (root / "opt" / "manta" / "packages.txt").read_text()
    assert "manta-server @" in packages and "\ntorch==2" in packages
