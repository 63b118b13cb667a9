"""The house rules that a reader relies on: no import cycles, and no torch in the Router."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("configs", "deployments", "cluster")


def modules() -> dict[str, Path]:
    found = {}
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of ours that are imported when this one is: not those inside functions."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    pending: list[ast.stmt] = list(ast.parse(path.read_text()).body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.dump(node.test):
            pending += node.body + node.orelse
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1]
            stem = ".".join([*base, node.module] if node.module else base)
            stem = stem if node.level else node.module or ""
            found |= {f"{stem}.{alias.name}" for alias in node.names} | {stem}
    return {one for one in found if one in known and one != name}


def test_no_import_cycles() -> None:
    known = modules()
    graph = {name: imports(name, path, known) for name, path in known.items()}
    # A package's __init__ that imports nothing of ours is no part of a cycle.
    done: set[str] = set()
    while True:
        free = {name for name, needs in graph.items() if needs <= done} - done
        if not free:
            break
        done |= free
    assert set(graph) == done, f"in or above a cycle: {sorted(set(graph) - done)}"


def test_configs_imports_nothing_of_deployments() -> None:
    known = modules()
    for name, path in known.items():
        if name.startswith("configs"):
            assert not {i for i in imports(name, path, known) if not i.startswith("configs")}


STATEMENTS = {
    "router": "import deployments.app, deployments.router",
    "runtime": "import deployments.instance",
    "deploy": "import cluster.deploy",
}


@pytest.fixture(scope="module")
def interpreters() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """All at once, since what they import takes them seconds."""
    tell = "import sys; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    started = {
        name: subprocess.Popen(
            [sys.executable, "-c", f"{statement}\n{tell}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for name, statement in STATEMENTS.items()
    }
    yield started
    for process in started.values():
        process.kill()
        process.communicate()


def _loaded(process: subprocess.Popen[str]) -> list[str]:
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    loaded: list[str] = ast.literal_eval(output.strip().splitlines()[-1])
    return loaded


def test_the_routers_imports_do_not_bring_torch(
    interpreters: dict[str, subprocess.Popen[str]],
) -> None:
    assert _loaded(interpreters["router"]) == ["numpy"]


def test_a_manifest_is_rendered_without_torch(
    interpreters: dict[str, subprocess.Popen[str]],
) -> None:
    assert "torch" not in _loaded(interpreters["deploy"])


def test_control_a_runtime_brings_torch(interpreters: dict[str, subprocess.Popen[str]]) -> None:
    assert _loaded(interpreters["runtime"]) == ["torch", "numpy"]
