"""What is wrong with the models of a repository, one finding at a time.

Reads and places as the Controller does, by its Planner, and loads as a replica does, in a process
that may crash or hang. Prints nothing. Called by `command`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configs.complete import runtime_kind
from configs.errors import ConfigError
from configs.parameters import parse_parameters
from configs.placement import GroupPlacement
from configs.server import ServerSettings
from deployments.errors import MantaError, Unavailable
from deployments.planner import Plan, Planner
from deployments.repository import Found, Repository

from ..machine import Machine
from . import trial


@dataclass(frozen=True, slots=True)
class Finding:
    kind: Literal["ok", "error", "warning", "note"]
    text: str


class Verdicts:
    """`limit_s` is what loading one version may take; None: nothing is loaded."""

    def __init__(self, roots: Sequence[Path], machine: Machine, limit_s: float | None) -> None:
        self._repository = Repository(roots)
        self._repository.check()
        settings = ServerSettings(model_repository=tuple(map(str, roots)))
        self._planner = Planner(settings, self._repository, "", machine, hashes=False)
        self._limit_s = limit_s
        self._compiling = 0  # loads that have imported torch's compiler

    def names(self) -> list[str]:
        return [found.name for found in self._repository.scan()]

    def of_model(self, name: str) -> Iterator[Finding]:
        """All findings of one model; raises nothing, whatever the model is like."""
        with _Warnings() as warnings:
            try:
                findings = list(self._of_model(name))
            except (ConfigError, MantaError) as error:
                findings = [Finding("error", _named(name, str(error)))]
        texts = dict.fromkeys(warnings.texts)
        yield from (Finding("warning", text) for text in texts)
        yield from dict.fromkeys(findings)  # what holds for all versions is told once

    def _of_model(self, name: str) -> Iterator[Finding]:
        found = self._repository.find(name)
        errors = [] if found.error else self._repository.config_errors(found, partial=True)
        if errors:
            yield from (Finding("error", str(error)) for error in errors)
            return
        plans, failed = self._planner.plan(name)
        for reason in failed.values():
            yield Finding("error", _named(name, reason))
        for plan in plans:
            yield from self._of_version(found, plan)

    def _of_version(self, found: Found, plan: Plan) -> Iterator[Finding]:
        told = f"{found.name} version {plan.number}"
        seconds, good, runtime = 0.0, True, ""
        for subject in self._subjects(found, plan):
            if isinstance(subject, Finding):
                good = good and subject.kind != "error"
                yield subject
                continue
            runtime = runtime or runtime_kind(plan.config, (subject.artifact.name,))
            if self._limit_s is None:
                continue
            if self._compiling > 1 and runtime in ("eager", "exported"):
                trial.import_compiler()  # the next ones are likely to need it too
            outcome = trial.load(subject, self._limit_s)
            self._compiling += outcome.compiler
            seconds += outcome.seconds
            good = good and outcome.error is None
            yield from (Finding("warning", text) for text in outcome.warnings)
            yield from (Finding("note", f"{told}: {text}") for text in outcome.notes)
            if outcome.error is not None:
                yield Finding("error", self._explain(found, outcome.error))
        if good:
            loaded = "not loaded" if self._limit_s is None else f"loaded in {seconds:.1f} s"
            yield Finding("ok", f"{told}: {runtime}, {_groups(plan)}, {loaded}")

    def _subjects(self, found: Found, plan: Plan) -> Iterator[trial.Subject | Finding]:
        """Each file with each kind of group that loads it, and what is wrong before any does."""
        kinds = {one.kind: one for one in plan.placements}
        missing = ""
        for capability in ("", *plan.config.cc_model_filenames):
            try:
                artifact = self._repository.artifact(found, plan.number, plan.config, capability)
            except Unavailable as error:
                missing = missing or ("" if capability else str(error))
                if capability:
                    yield Finding("error", _named(found.name, str(error)))
                continue
            parameters, warnings = parse_parameters(plan.config, (artifact.name,))
            yield from (Finding("warning", text) for text in warnings)
            for kind, placement in kinds.items():
                if not capability or kind == "KIND_GPU":
                    yield trial.Subject(artifact, plan.config, parameters, kind, placement.gpu)
        if missing:  # the Planner has seen to it that there is another
            yield Finding("note", f"{missing}; GPUs of a listed compute capability need it not")

    def _explain(self, found: Found, error: ConfigError | str) -> str:
        if isinstance(error, str):
            return _named(found.name, error)
        return str(self._repository.explain(found, error))


def _groups(plan: Plan) -> str:
    """`2 instances on KIND_CPU`, and so on for each kind; `2 (1 to 4)` where they are scaled."""
    kinds: dict[str, list[GroupPlacement]] = {}
    for one in plan.placements:
        kinds.setdefault(one.kind, []).append(one)
    return ", ".join(f"{_instances(each)} on {kind}" for kind, each in kinds.items())


def _instances(placements: Sequence[GroupPlacement]) -> str:
    count = sum(one.replicas * one.instances for one in placements)
    least, most = (
        sum(getattr(one.autoscaling, bound, one.replicas) * one.instances for one in placements)
        for bound in ("min_count", "max_count")
    )
    scaled = "" if least == most else f" ({least} to {most})"
    return f"{count}{scaled} instance{'' if most == 1 else 's'}"


def _named(name: str, text: str) -> str:
    """Texts of configuration errors begin with the model's directory; others are told theirs."""
    return text if text.startswith(f"{name}/") else f"{name}: {text}"


class _Warnings(logging.Handler):
    """What is logged here while a model is read."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())

    def __enter__(self) -> _Warnings:
        logging.getLogger("manta").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("manta").removeHandler(self)
