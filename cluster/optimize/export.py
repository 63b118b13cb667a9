"""The candidates: ways to turn a loaded model into a file that a runtime loads.

Owns torch.export, AOT Inductor and TorchScript's own freezing, and the words for what they refuse.
Whether a candidate is right or fast is not known here.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from configs import dtypes
from configs.complete import DEFAULT_FILES, RuntimeKind
from configs.model import ModelConfig
from deployments.runtimes import aoti, eager, faults, torchscript
from deployments.runtimes.outputs import pick

from .samples import Samples

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
_EXAMPLE_ROWS = 4  # any number but 1, which torch takes to be special
_REASON_LENGTH = 300

Original = eager.Eager | torchscript.TorchScript
Style = Literal["autocast", "cast"]


class Refused(Exception):
    """Why this candidate cannot be made of this model."""


@dataclass(frozen=True)
class Recipe:
    """`make` writes the file into the folder that it is given, or raises Refused."""

    label: str
    filename: str
    make: Callable[[Path], None]


def recipes(
    load: Callable[[], Original],
    runtime: RuntimeKind,
    config: ModelConfig,
    samples: Samples,
    precision: str,
) -> list[Recipe]:
    """`load` gives a copy of the model of the candidate's own, which export may change."""

    def package(label: str, style: Style | None) -> Recipe:
        def make(folder: Path) -> None:
            Packager(load(), config, samples, precision, style).write(folder)

        return Recipe(label, DEFAULT_FILES["aoti"], make)

    if precision in PRECISIONS:
        return [
            package(f"AOTI, {precision} autocast", "autocast"),
            package(f"AOTI, all in {precision}", "cast"),
        ]
    if runtime == "eager":
        return [package("AOTI", None)]
    frozen = DEFAULT_FILES["torchscript"]
    return [
        package("AOTI", None),
        Recipe("frozen TorchScript", frozen, lambda folder: _freeze(load(), folder / frozen)),
    ]


def _freeze(original: Original, file: Path) -> None:
    """Weights become constants, and batch norms a part of the convolutions before them."""
    freeze: Any = torch.jit.freeze
    try:
        freeze(original.module).save(str(file))
    except RuntimeError as error:
        raise Refused(reason(error)) from error


# --- the model with plain tensors in and out -----------------------------------------------------


class _Flat(nn.Module):
    """Takes and returns tensors by position, in the order of the package, in configured types."""

    def __init__(
        self,
        inner: Callable[..., Any],
        original: Original,
        config: ModelConfig,
        orders: tuple[Sequence[int], Sequence[int]],
        style: Style | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if isinstance(inner, nn.Module):
            self.inner = inner
        self._call = (inner,)  # a tuple hides a scripted method from nn.Module
        self._original, self._config = (original,), config
        self._inputs, self._outputs = orders
        self._style, self._dtype = style, dtype

    def forward(self, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        inputs: list[Any] = [None] * len(given)
        for place, tensor in zip(self._inputs, given, strict=True):
            cast = self._style == "cast" and tensor.is_floating_point()
            inputs[place] = tensor.to(self._dtype) if cast else tensor
        around: Any = nullcontext()
        if self._style == "autocast":
            around = torch.autocast(given[0].device.type, self._dtype)
        with around:
            found = self._run(inputs)
        return tuple(self._configured(place, found[place]) for place in self._outputs)

    def _run(self, inputs: list[Any]) -> list[Any]:
        (original,), (inner,) = self._original, self._call
        if isinstance(original, eager.Eager):
            arguments, keywords = original.arrange(inputs)
            result = inner(*arguments, **keywords)
            return pick(result, self._config, original.binding, list_is_tuple=True)
        result = inner(*original.arrange(inputs))
        if isinstance(result, list):  # as the translation returns a tuple
            result = tuple(result)
        return pick(result, self._config, original.binding, list_is_tuple=False)

    def _configured(self, place: int, value: Any) -> torch.Tensor:
        if not isinstance(value, torch.Tensor):
            raise Refused(f"output '{self._config.output[place].name}' is no tensor")
        if self._style is None or not value.is_floating_point():
            return value
        name = dtypes.from_config(self._config.output[place].data_type).torch
        wanted: torch.dtype = getattr(torch, str(name))
        return value.to(wanted) if wanted.is_floating_point else value


def orders(original: Original) -> tuple[list[int], list[int]]:
    """Config indices in the package's order: by the model's own positions as far as it has them,
    so that names such as INPUT__1 stay true."""

    def order(slots: Sequence[Any]) -> list[int]:
        places = range(len(slots))
        if any(slot.position < 0 for slot in slots):
            return list(places)
        return sorted(places, key=lambda k: slots[k].position)

    return order(original.binding.inputs), order(original.binding.outputs)


# --- export and compilation ----------------------------------------------------------------------


class Packager:
    def __init__(
        self,
        original: Original,
        config: ModelConfig,
        samples: Samples,
        precision: str,
        style: Style | None,
    ) -> None:
        self._original = original
        self._config = config
        self._samples = samples
        self._style = style
        self._dtype = PRECISIONS.get(precision)
        self._precision = precision
        self._orders = orders(original)
        self._fewest = 1

    def write(self, folder: Path) -> None:
        """model.pt2 in `folder`; takes a C++ compiler and tens of seconds. Raises Refused."""
        program = self.program()
        try:
            with torch.no_grad(), _rows_from(self._fewest), _quiet():
                torch._inductor.aoti_compile_and_package(
                    program,
                    package_path=str(folder / DEFAULT_FILES["aoti"]),
                    inductor_configs=self._options(),
                )
        except Exception as error:
            raise Refused(f"it does not compile: {reason(error)}") from error

    def _options(self) -> dict[str, Any]:
        names = [t.name for t in self._config.input], [t.name for t in self._config.output]
        inputs, outputs = (
            json.dumps([all_names[k] for k in order])
            for all_names, order in zip(names, self._orders, strict=True)
        )
        metadata = {
            aoti.INPUTS_KEY: inputs,
            aoti.OUTPUTS_KEY: outputs,
            aoti.FEWEST_KEY: str(self._fewest),
            "manta_precision": self._precision,
            "manta_torch": torch.__version__,
        }
        return {
            "freezing": True,  # weights become constants, laid out for the kernels that read them
            # Compilation believes a batch to be at least 2 where it has to think about strides.
            # One row is tried like every other size; less than that is the runtime's to refuse. A
            # package that does want 2 has to say so: the runtime then adds a row.
            "aot_inductor.check_lowerbound": self._fewest > 1,
            "aot_inductor.metadata": metadata,
            # Otherwise the code runs on as many threads as this process has now, wherever it runs.
            "cpp.dynamic_threads": True,
        }

    def program(self) -> Any:
        """From the first way that leads to one. Raises Refused."""
        reasons = []
        for name, way in self._ways():
            try:
                program = self._any_rows(way)
            except Exception as error:
                reasons.append(f"{name}: {reason(error)}" if name else reason(error))
            else:
                _refuse_state(program, self._fewest)
                return program
        raise Refused("it cannot be exported: " + "; ".join(reasons))

    def _any_rows(self, way: Callable[[], Callable[..., Any]]) -> Any:
        """With one row or more; where the code is another for a single row, with two or more."""
        with _quiet():
            inner = way()
            try:
                self._fewest = 1
                return self._export(inner)
            except Exception:
                if self._config.max_batch_size <= 2:
                    raise
                self._fewest = 2
                return self._export(inner)

    def _ways(self) -> list[tuple[str, Callable[[], Callable[..., Any]]]]:
        """A scripted model is translated node by node; where a node has no translation, it is run
        once with symbolic shapes. Neither follows a branch or a size silently: both refuse."""
        original = self._original
        if isinstance(original, eager.Eager):
            return [("", lambda: original.module)]
        method = original.module._c._get_method("forward")
        return [
            ("translated", lambda: _translate(original, self._example())),
            ("run", lambda: method),
        ]

    def _example(self) -> list[torch.Tensor]:
        largest = self._config.max_batch_size
        return self._samples.batch(min(_EXAMPLE_ROWS, largest))

    def _export(self, inner: Callable[..., Any]) -> Any:
        if self._style == "cast":
            if not isinstance(inner, nn.Module):
                raise Refused("its weights are constants of the code")
            inner = inner.to(self._dtype)
        flat = _Flat(inner, self._original, self._config, self._orders, self._style, self._dtype)
        example = self._example()
        with torch.no_grad(), _rows_from(self._fewest), _plain_code():
            return torch.export.export(
                flat.eval(),
                tuple(example[place] for place in self._orders[0]),
                dynamic_shapes=(self._free_dimensions(),),
                strict=False,
            )

    def _free_dimensions(self) -> tuple[dict[int, Any], ...]:
        largest = self._config.max_batch_size
        batching = int(largest > 0)
        rows = torch.export.Dim("rows", min=self._fewest, max=largest) if largest > 1 else None
        found = []
        for place in self._orders[0]:
            dims: dict[int, Any] = {} if rows is None else {0: rows}
            for axis, size in enumerate(self._config.input[place].model_dims, start=batching):
                if size < 0:
                    dims[axis] = torch.export.Dim.DYNAMIC
            found.append(dims)
        return tuple(found)


def _translate(original: torchscript.TorchScript, example: list[torch.Tensor]) -> nn.Module:
    from torch._export.converter import TS2EPConverter

    class Found(Exception):
        pass

    class Converter(TS2EPConverter):
        """Stops at the graph: the converter's own export leaves the sizes to chance."""

        def retrace_as_exported_program(self, gm: Any, name_to_constant: Any) -> Any:
            raise Found(gm)

    converter: Any = Converter
    try:
        converter(original.module, tuple(original.arrange(list(example)))).convert()
    except Found as found:
        module: nn.Module = found.args[0]
        return module
    raise Refused("the conversion came to no graph")


def _refuse_state(program: Any, fewest: int) -> None:
    with torch.no_grad(), _rows_from(fewest), _quiet():
        signature = program.run_decompositions({}).graph_signature  # which makes writes visible
    if signature.buffers_to_mutate:
        written = {name.removeprefix("inner.") for name in signature.buffers_to_mutate.values()}
        names = ", ".join(sorted(written))
        raise Refused(f"the model changes its own state while it runs: {names}")
    if signature.user_inputs_to_mutate:
        raise Refused("the model changes its inputs")


def _rows_from(fewest: int) -> Any:
    """torch.export takes a free dimension to be at least 2, unless it is told to forget that."""
    from torch.fx.experimental import _config

    return _config.patch(backed_size_oblivious=fewest == 1)  # type: ignore[attr-defined]


@contextmanager
def _plain_code() -> Iterator[None]:
    """Without what bakes in the shapes that it sees: TorchScript's profiling executor, and the
    fused attention of torch.nn, whose parts the compiler fuses better."""
    jit: Any = torch.jit
    attention: Any = torch.backends.mha
    fast = attention.get_fastpath_enabled()
    attention.set_fastpath_enabled(False)
    try:
        with jit.optimized_execution(False):
            yield
    finally:
        attention.set_fastpath_enabled(fast)


@contextmanager
def _quiet() -> Iterator[None]:
    """What torch prints of graphs that it refuses would bury what the user should read."""
    logger = logging.getLogger("torch")
    level = logger.level
    with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            logger.setLevel(level)


def reason(error: BaseException) -> str:
    """An error of export or compilation in a line or two."""
    text = faults.clean_text(error)
    if "specialized it to be a constant" in text:
        return (
            "the code fixes a size that must stay free (it makes a number of a batch size or of a "
            "-1 dimension, or branches on one)"
        )
    if "data-dependent" in text.lower() or "_local_scalar_dense" in text:
        return "the code depends on values of its inputs, which a compiled graph cannot follow"
    line = " ".join(text.split())
    return line if len(line) <= _REASON_LENGTH else line[:_REASON_LENGTH] + " ..."
