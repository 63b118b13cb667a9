"""Which models become a program, with which sizes free, and what is refused instead.

Nothing is compiled here: the exported program is run as it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.optimize import export, samples
from configs.model import ModelConfig
from configs.parameters import ModelParameters
from deployments import runtimes
from tests import models
from tests.models import config

CPU = torch.device("cpu")
PLAIN = ModelParameters(torch_compile_optional_parameters={"disable": True})


class SizeUser(torch.nn.Module):
    """Makes a tensor as large as the batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.size(0)
        return x.reshape(rows, -1) + torch.zeros(rows, 1)


class BatchBranch(torch.nn.Module):
    """Other code for large batches: a trace would serve one of the two for all."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.size(0) > 3:
            return x * 2
        return x * 3


class ValueBranch(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if bool(x.sum() > 0):
            return x * 2
        return x * 3


def vectors(*names: str) -> dict[str, tuple[int, ...]]:
    return {name: (4,) for name in names}


def load(path: Path, described: ModelConfig) -> Any:
    return runtimes.load(path, described, PLAIN, "cpu", "KIND_CPU")


class Made:
    """A model, its samples, and the program that is exported from it."""

    def __init__(
        self,
        path: Path,
        described: ModelConfig,
        style: export.Style | None = None,
        precision: str = "fp32",
    ) -> None:
        self.original = load(path, described)
        self.samples = samples.build(described, self.original.run, CPU)
        packager = export.Packager(
            load(path, described),
            described,
            self.samples,
            precision,
            style,
        )
        self.program = packager.program()
        self.orders = export.orders(self.original)

    def both(self, rows: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The original's answers and the program's, in config order."""
        given = self.samples.batch(rows)
        made = self.program.module()(*[given[place] for place in self.orders[0]])
        wanted = self.original.run(given)
        return wanted, [made[self.orders[1].index(k)] for k in range(len(wanted))]


def scripted(tmp_path: Path, module: torch.nn.Module, inputs, outputs, **more) -> Made:
    path = models.save_torchscript(module.eval(), tmp_path)
    keys = {key: more.pop(key) for key in ("style", "precision") if key in more}
    return Made(path, config(inputs, outputs, **more), **keys)


MODELS = {
    "mlp": (models.mlp(), {"x": (8,)}, {"y": (4,)}),
    "free": (models.mlp(), {"x": (-1, 8)}, {"y": (-1, 4)}),
    "size": (SizeUser(), vectors("x"), vectors("y")),
    "value branch": (ValueBranch(), vectors("x"), vectors("y")),
    "by number": (models.add_sub(), vectors("IN__1", "IN__0"), vectors("OUT__1", "OUT__0")),
    "by argument": (models.add_sub(), vectors("b", "a"), vectors("p", "q")),
    "dictionary": (models.DictInput(), vectors("A", "B"), vectors("y")),
    "identity": (models.identity(), vectors("x"), vectors("y")),
}


@pytest.mark.parametrize("name", MODELS)
def test_scripted_models_with_any_number_of_rows(tmp_path: Path, name: str) -> None:
    module, inputs, outputs = MODELS[name]
    made = scripted(tmp_path, module, inputs, outputs)
    for rows in (1, 2, 7, 8):
        wanted, got = made.both(rows)
        for right, mine in zip(wanted, got, strict=True):
            assert torch.equal(right, mine)


def test_numbered_names_stay_true(tmp_path: Path) -> None:
    """INPUT__1 is the second tensor of the package too, wherever the configuration lists it."""
    made = scripted(tmp_path, *MODELS["by number"])
    assert made.orders == ([1, 0], [1, 0])


@pytest.mark.parametrize("largest", [0, 1, 2])
def test_small_batches_and_none(tmp_path: Path, largest: int) -> None:
    dims = (3, 8) if largest == 0 else (8,)
    made = scripted(tmp_path, models.mlp(), {"x": dims}, {"y": (4,)}, max_batch_size=largest)
    wanted, got = made.both(largest)
    assert torch.equal(wanted[0], got[0])
    assert len(made.program.range_constraints) == (1 if largest > 1 else 0)


def test_control_code_that_depends_on_the_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(export.Refused, match="fixes a size that must stay free"):
        scripted(tmp_path, BatchBranch(), vectors("x"), vectors("y"))


def test_control_a_model_that_raises_by_value_is_refused(tmp_path: Path) -> None:
    with pytest.raises(export.Refused, match="depends on values of its inputs"):
        scripted(tmp_path, models.RefusesNegative(), vectors("x"), vectors("y"))


@pytest.mark.parametrize("style", ["autocast", "cast"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_less_precision_keeps_the_configured_types(tmp_path: Path, style, precision: str) -> None:
    made = scripted(
        tmp_path, models.mlp(), {"x": (8,)}, {"y": (4,)}, style=style, precision=precision
    )
    wanted, got = made.both(5)
    assert got[0].dtype == torch.float32
    assert not torch.equal(wanted[0], got[0])  # or it was computed as before
    assert torch.allclose(wanted[0], got[0], atol=0.02)


EAGER = """\
import torch


class Net(torch.nn.Module):
    def forward(self, ids, options):
        return {"double": options["scale"] * 2, "sum": ids + 1}
"""

COUNTER = """\
import torch


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x):
        self.count += 1
        return x + self.count
"""


def test_an_eager_model_with_containers(tmp_path: Path) -> None:
    path = models.save_eager(EAGER, tmp_path)
    described = config(
        {"ARGS[0]": (4,), "ARGS[1][scale]": (4,)},
        {"RESULT[sum]": (4,), "RESULT[double]": (4,)},
        runtime="model.py",
    )
    made = Made(path, described)
    for rows in (1, 8):
        wanted, got = made.both(rows)
        assert all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True))


def test_control_a_model_with_state_is_refused(tmp_path: Path) -> None:
    path = models.save_eager(COUNTER, tmp_path)
    with pytest.raises(export.Refused, match="changes its own state while it runs: count"):
        Made(path, config(vectors("x"), vectors("y"), runtime="model.py"))


def test_recipes_by_precision(tmp_path: Path) -> None:
    def labels(runtime, precision: str) -> list[str]:
        described = config({"x": (8,)}, {"y": (4,)})
        nothing = samples.Samples((), None, True)
        never: Any = None
        made = export.recipes(never, runtime, described, nothing, precision)
        return [recipe.label for recipe in made]

    assert labels("torchscript", "fp32") == ["AOTI", "frozen TorchScript"]
    assert labels("eager", "fp32") == ["AOTI"]
    assert labels("torchscript", "bf16") == ["AOTI, bf16 autocast", "AOTI, all in bf16"]


def test_reasons_are_short() -> None:
    assert len(export.reason(RuntimeError("a long story " * 100))) < 320


SINGLE = """\
import torch


class Net(torch.nn.Module):
    def forward(self, x):
        if x.size(0) == 1:
            return x[0].unsqueeze(0) * 2
        return x * 2
"""


def test_where_one_row_is_special_two_are_the_fewest(tmp_path: Path) -> None:
    """The package says so, and its runtime adds a row; the answers then decide."""
    path = models.save_eager(SINGLE, tmp_path)
    described = config(vectors("x"), vectors("y"), runtime="model.py")
    tried = samples.build(described, load(path, described).run, CPU)
    packager = export.Packager(load(path, described), described, tried, "fp32", None)
    program = packager.program()
    (found,) = program.range_constraints.values()
    assert (found.lower, found.upper) == (2, 8)
    options = packager._options()
    assert options["aot_inductor.check_lowerbound"] is True
    assert options["aot_inductor.metadata"]["manta_fewest_rows"] == "2"
