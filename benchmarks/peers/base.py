"""A server of somebody else, and the virtual environment that it lives in.

An environment is made once and kept; the packages it was asked for are its mark, so that another
version makes it anew. Torch goes in first and as pinned: a looser range would bring the newest
build and its CUDA.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from benchmarks.contestants import Contestant, Stage
from benchmarks.servers import ServerError

INSTALL_LIMIT_S = 1800
PROGRAMS = Path(__file__).resolve().parent / "programs"


def torch_pin() -> str:
    """The torch of this environment, without its local part ("+cpu")."""
    return f"torch=={metadata.version('torch').partition('+')[0]}"


class Peer(Contestant):
    """`packages` are pinned: figures of another version are figures of another server."""

    packages: tuple[str, ...] = ()

    def __init__(self, environments: Path) -> None:
        self.environment = environments / self.name

    @property
    def python(self) -> str:
        return str(self.environment / "bin" / "python")

    def program(self, name: str, stage: Stage, *arguments: str) -> tuple[str, ...]:
        """A program of `programs/` in this environment; `variables` tell it what to serve."""
        return (self.python, str(PROGRAMS / name), *arguments)

    def variables(self, stage: Stage) -> dict[str, str]:
        """What the programs read: the file, its shapes, how to batch."""
        model = stage.model
        return {
            "BENCH_MODEL": model.name,
            "BENCH_FILE": str(stage.file),
            "BENCH_ROW": json.dumps(model.row),
            "BENCH_DATATYPE": model.datatype,
            "BENCH_MAX_BATCH": str(stage.max_batch),
            "BENCH_DELAY_US": str(stage.delay_us),
            "PATH": f"{self.environment / 'bin'}{os.pathsep}{os.environ['PATH']}",
        }

    def version(self) -> str:
        return ", ".join(self.packages[:1])

    def install(self) -> None:
        """Raises ServerError with pip's last words."""
        wanted = [torch_pin(), *self.packages]
        mark = self.environment / "installed.json"
        if mark.is_file() and json.loads(mark.read_text()) == wanted:
            return
        shutil.rmtree(self.environment, ignore_errors=True)
        _run([sys.executable, "-m", "venv", str(self.environment)])
        pip = [self.python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        _run([*pip, wanted[0]])
        _run([*pip, *wanted])
        mark.write_text(json.dumps(wanted))


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=INSTALL_LIMIT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ServerError(f"installation: {error}") from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if not line.startswith("WARNING")]
        raise ServerError("installation: " + " ".join(lines[-3:])[-400:])
