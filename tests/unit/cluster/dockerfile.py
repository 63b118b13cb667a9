"""Runs the steps of a Dockerfile in order without Docker, in a folder instead of a file system.

Paths of the image that the steps name are rewritten to lie in that folder. Steps that would change
the machine itself (`SYSTEM`) are passed over, and told. Called by test_image.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dockerfile_parse import DockerfileParser

SYSTEM = ("apt-get", "groupadd")
# Folders that the image's steps make and use.
OWN = ("/opt/manta", "/src")
STEP_S = 1500


@dataclass(frozen=True, slots=True)
class Step:
    name: str
    value: str


@dataclass(frozen=True, slots=True)
class Stage:
    base: str
    alias: str
    steps: tuple[Step, ...]

    def of(self, name: str) -> list[str]:
        return [step.value for step in self.steps if step.name == name]


def stages(text: str) -> list[Stage]:
    parser = DockerfileParser(fileobj=io.BytesIO(text.encode()))
    found: list[Stage] = []
    for line in parser.structure:
        step = Step(line["instruction"], line["value"])
        if step.name == "FROM":
            base, _, alias = step.value.partition(" AS ")
            found.append(Stage(base, alias, ()))
        elif found and step.name != "COMMENT":
            last = found[-1]
            found[-1] = Stage(last.base, last.alias, (*last.steps, step))
    return found


@dataclass
class Build:
    """One build: `root` stands for the image's file system, `passed_over` are steps not run."""

    context: Path
    root: Path
    arguments: Mapping[str, str]
    passed_over: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)

    def run(self, text: str) -> None:
        for stage in stages(text):
            self._run_stage(stage)

    def _run_stage(self, stage: Stage) -> None:
        shutil.rmtree(self.root / "src", ignore_errors=True)  # of the stage before
        base = os.path.dirname(getattr(sys, "_base_executable", sys.executable))
        # pip finds its registry as it does here.
        ours = {k: v for k, v in os.environ.items() if k.startswith(("PIP_", "SSL_", "HOME"))}
        self.environment = {**ours, "PATH": f"{base}:/usr/bin:/bin"}
        values: dict[str, str] = {}
        folder = self.root
        for step in stage.steps:
            if step.name == "ARG":
                name, _, default = step.value.partition("=")
                values[name] = self.arguments.get(name, default)
            elif step.name in ("ENV", "LABEL"):
                if step.name == "ENV":
                    self.environment |= dict(self._pairs(step.value))
            elif step.name == "WORKDIR":
                folder = self._place(step.value)
                folder.mkdir(parents=True, exist_ok=True)
            elif step.name == "COPY":
                self._copy(step.value, folder)
            elif step.name == "RUN":
                self._command(step.value, folder, values)

    def _pairs(self, text: str) -> Iterator[tuple[str, str]]:
        for word in shlex.split(text):
            name, _, value = word.partition("=")
            yield name, self._rewritten(value.replace("$PATH", self.environment["PATH"]))

    def _place(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    def _rewritten(self, text: str) -> str:
        for path in OWN:
            text = re.sub(rf"(?<![\w/]){path}(?=[\s/:\"']|$)", str(self._place(path)), text)
        return text

    def _copy(self, text: str, folder: Path) -> None:
        words = text.split()
        if words[0].startswith("--from="):
            _, source, target = words
            assert source == target  # stages share `root`: what is copied is there already
            assert self._place(source).is_dir()
            return
        *sources, target = words
        for source in sources:
            path, goal = self.context / source, folder / target
            if path.is_dir():
                skipped = shutil.ignore_patterns("__pycache__", "overlays", "monitoring")
                shutil.copytree(path, goal, ignore=skipped, symlinks=True)
            else:
                shutil.copy(path, goal / path.name)

    def _command(self, text: str, folder: Path, values: Mapping[str, str]) -> None:
        if text.split()[0] in SYSTEM:
            self.passed_over.append(text)
            return
        done = subprocess.run(
            ["/bin/sh", "-c", self._rewritten(text)],
            cwd=folder,
            env={**self.environment, **values},
            capture_output=True,
            text=True,
            timeout=STEP_S,
        )
        assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
