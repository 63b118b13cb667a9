"""The original and its candidates side by side, each loaded by the runtime that would serve it.

Owns who is tried with what; what is made is `export`'s business, what counts is `judge`'s. Called
by `command`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from configs.complete import runtime_kind
from configs.errors import ConfigError
from configs.model import ModelConfig
from configs.parameters import parse_parameters
from deployments import runtimes
from deployments.runtimes import eager, faults, settings

from . import export, samples
from .export import Recipe, Refused
from .judge import (
    TOLERANCES,
    Candidate,
    Deviation,
    Wrong,
    bound,
    deviation,
    measure,
    note_times,
)
from .options import Options
from .target import Destination, OptimizeError, Source, serving_threads

ORIGINAL = "as it is"
_LEAST_S = 0.1  # of one measurement, so that short calls are counted in numbers

Answers = dict[tuple[int, bool], list[torch.Tensor]]


class Bench:
    def __init__(
        self, source: Source, destination: Destination, options: Options, workshop: Path
    ) -> None:
        """Loads and runs the original. Raises OptimizeError."""
        self._source, self._destination = source, destination
        self._options, self._workshop = options, workshop
        self._tolerance = options.tolerance or TOLERANCES[options.precision]
        self._device = "cuda:0" if source.kind == "KIND_GPU" else "cpu"
        self._threads = {ORIGINAL: options.threads or source.threads()}
        torch.set_num_threads(self._threads[ORIGINAL])
        self.sizes = self._checked_sizes()
        settings.apply_process(source.parameters, source.runtime)
        samples.check_config(source.config)
        with self._guard():
            reference = self._load(source.artifact, source.config, plain=True)
            before = _state(reference)
            self.samples = samples.build(
                source.config, reference.run, reference.device, options.samples
            )
            self._wanted = self._answers(reference)
            self._check_steady(reference, before)
            self.served = self._load(source.artifact, source.config)
        self.candidates = [Candidate(ORIGINAL)]
        self.files: dict[str, Path] = {}
        self._loaded: dict[str, Any] = {ORIGINAL: self.served}

    def recipes(self) -> list[Recipe]:
        """What there is to try. Raises OptimizeError without a compiler."""
        if missing := eager.missing_compiler():
            raise OptimizeError(f"AOT Inductor needs {missing}: install g++, or set CXX")
        source = self._source
        # Without the guard: what is loaded in inference mode cannot be exported.
        return export.recipes(
            lambda: self._load(source.artifact, source.config, plain=True),
            source.runtime,
            source.config,
            self.samples,
            self._options.precision,
        )

    def judge(self, made: Sequence[Recipe]) -> None:
        """Makes, tries and measures every candidate."""
        for number, recipe in enumerate(made):
            self.candidates.append(self.attempt(recipe, self._workshop / str(number)))
        self._measure()

    def attempt(self, recipe: Recipe, folder: Path) -> Candidate:
        """Makes one, loads it as a server would, and compares its answers."""
        candidate = Candidate(recipe.label)
        print(f"trying {recipe.label} ...", flush=True)
        folder.mkdir()
        file = folder / recipe.filename
        self._threads[recipe.label] = self.threads(recipe.filename)
        try:
            recipe.make(folder)
            torch.set_num_threads(self._threads[recipe.label])
            with self._guard():
                runtime = self._load(file, self._destination.version_config(recipe.filename))
                candidate.deviation = self._compare(runtime)
        except (Refused, Wrong, OptimizeError) as error:
            candidate.refusal = str(error)
            return candidate
        bound(candidate, self._tolerance)
        self.files[recipe.label], self._loaded[recipe.label] = file, runtime
        return candidate

    # --- answers ---------------------------------------------------------------------------------

    def _cases(self) -> list[tuple[int, bool]]:
        """Batch size, and whether the free dimensions are the shorter ones."""
        sizes = samples.checked_sizes(self._source.config, self.sizes)
        shapes = (False,) if self.samples.shorter is None else (False, True)
        return [(size, shorter) for size in sizes for shorter in shapes]

    def _answers(self, runtime: Any) -> Answers:
        found: Answers = {}
        for size, shorter in self._cases():
            try:
                values = runtime.run(self.samples.batch(size, shorter))
            except Exception as error:
                raise OptimizeError(
                    f"the model fails on a sample of {size or 1} rows: {faults.clean_text(error)}; "
                    "give real inputs with --samples FILE.npz"
                ) from None
            found[size, shorter] = [v.clone() if isinstance(v, torch.Tensor) else v for v in values]
        return found

    def _compare(self, runtime: Any) -> Deviation:
        worst = Deviation()
        for (size, shorter), wanted in self._wanted.items():
            try:
                got = runtime.run(self.samples.batch(size, shorter))
            except Exception as error:
                raise Wrong(f"it fails at batch size {size}: {faults.clean_text(error)}") from None
            worst = worst.worse(deviation(wanted, got, self._names))
        return worst

    def _check_steady(self, runtime: Any, before: dict[str, torch.Tensor]) -> None:
        """A package is compiled once and for all: state would be lost or shared by nobody. And
        what differs from itself cannot be compared, such as drop-out that is left on."""
        changed = [k for k, v in _state(runtime).items() if not torch.equal(before[k], v)]
        if changed:
            raise OptimizeError(f"the model changes its state while it runs: {', '.join(changed)}")
        again = self._answers(runtime)
        for case, wanted in self._wanted.items():
            if deviation(wanted, again[case], self._names).relative > self._tolerance:
                raise OptimizeError(
                    "the model gives other answers to the same inputs when run again"
                )

    @property
    def _names(self) -> list[str]:
        return [tensor.name for tensor in self._source.config.output]

    # --- times -----------------------------------------------------------------------------------

    def _measure(self) -> None:
        running = [candidate for candidate in self.candidates if not candidate.refusal]
        if len(running) < 2:
            return
        for size in self.sizes:
            inputs = self.samples.batch(size)
            calls = {c.label: self._call(c.label, inputs) for c in running}
            with self._guard():
                taken = measure(calls, self._options.rounds, _LEAST_S)
            note_times(running, taken, size)

    def threads(self, filename: str = "") -> int:
        """Intra-op threads of the original, or of a version that has this file: each is measured
        with what it will be served with, and an eager model's number is not a package's."""
        if not filename:
            return self._threads[ORIGINAL]
        config = self._destination.version_config(filename)
        kind = runtime_kind(config, (filename,))
        try:
            parameters, _ = parse_parameters(config, (filename,))
        except ConfigError as error:
            raise OptimizeError(f"as a new version, {error}") from None
        return self._options.threads or serving_threads(config, parameters, kind)

    def _call(self, label: str, inputs: Sequence[torch.Tensor]) -> Callable[[], object]:
        runtime, threads = self._loaded[label], self._threads[label]

        def call() -> None:
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
            runtime.run(inputs)
            if runtime.device.type == "cuda":
                torch.cuda.synchronize(runtime.device)

        return call

    # --- what both need --------------------------------------------------------------------------

    def _checked_sizes(self) -> tuple[int, ...]:
        largest = self._source.config.max_batch_size
        given = self._options.batch_sizes
        if given and given[-1] > largest:
            raise OptimizeError(f"batch size {given[-1]} is over max_batch_size, {largest}")
        return given or samples.default_sizes(self._source.config)

    def _load(self, file: Path, config: ModelConfig, plain: bool = False) -> Any:
        """`plain`: the model itself, whose answers are its own, without anything that is done to it
        for speed when it is served."""
        parameters = self._source.parameters
        if plain:
            options = parameters.torch_compile_optional_parameters | {"disable": True}
            changes = {
                "torch_compile_optional_parameters": options,
                "enable_freezing": False,
                "enable_cuda_graphs": False,
            }
            parameters = parameters.model_copy(update=changes)
        try:
            return runtimes.load(file, config, parameters, self._device, self._source.kind)
        except ConfigError as error:
            raise OptimizeError(str(error)) from None

    def _guard(self) -> Any:
        return settings.guard(self._source.parameters, self._source.runtime)


def _state(runtime: Any) -> dict[str, torch.Tensor]:
    state = runtime.module.state_dict()
    return {name: t.clone() for name, t in state.items() if isinstance(t, torch.Tensor)}
