from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import ConfigError
from configs.parameters import ModelParameters
from deployments import runtimes
from deployments.errors import ExecutionFailed, InvalidArgument
from tests import models
from tests.models import config, string_input, string_output

A, B = torch.arange(4.0).reshape(1, 4), torch.ones(1, 4)


def load(path: Path, made):
    return runtimes.load(path, made, ModelParameters(), "cpu", "KIND_CPU")


def run(tmp_path, module, made, *inputs):
    return load(models.save_torchscript(module, tmp_path), made).run(inputs)


def test_forward_names_in_reversed_order(tmp_path):
    made = config({"b": (4,), "a": (4,)}, {"OUTPUT__1": (4,), "OUTPUT__0": (4,)})
    difference, total = run(tmp_path, models.add_sub(), made, B, A)
    assert torch.equal(difference, A - B)
    assert torch.equal(total, A + B)


def test_dictionary_input(tmp_path):
    made = config({"B": (4,), "A": (4,)}, {"O": (4,)})
    assert torch.equal(run(tmp_path, models.DictInput(), made, B, A)[0], A - B)


def test_strings(tmp_path):
    made = config([string_input("words")], [string_output("O")])
    assert run(tmp_path, models.Strings(), made, ["a\0", "b"]) == [["a\0!", "b!"]]


def test_gap_in_ordinals_is_a_load_error(tmp_path):
    made = config({"x__0": (4,), "x__7": (4,)}, {"O": (4,)})
    with pytest.raises(ConfigError, match=r"input\[1\].name: input 'x__7'"):
        run(tmp_path, models.add_sub(), made)


def test_output_index_that_does_not_exist(tmp_path):
    made = config({"a": (4,), "b": (4,)}, {"OUTPUT__2": (4,)})
    text = "The output OUTPUT__2 .* refers to an output index which doesn't exist. This model has 2"
    with pytest.raises(ConfigError, match=text) as caught:
        run(tmp_path, models.add_sub(), made, A, B)
    assert caught.value.args[2] == "output[0].name"
    assert "it offers RESULT[0], RESULT[1]" in str(caught.value)


@pytest.mark.parametrize("module", [models.TensorList(), models.Nested()])
def test_nested_results_need_result_names(tmp_path, module):
    """The type of a list does not tell how long it is, so that only a run shows it."""
    path = models.save_torchscript(module, tmp_path)
    with pytest.raises(ExecutionFailed, match="PyTorch execute failure: output must be of type"):
        load(path, config({"x": (4,)}, {"OUTPUT__0": (4,), "OUTPUT__1": (4,)})).run([A])
    name = "RESULT[1]" if isinstance(module, models.TensorList) else "RESULT[1][double]"
    assert torch.equal(load(path, config({"x": (4,)}, {name: (4,)})).run([A])[0], A * 2)
    if isinstance(module, models.TensorList):
        with pytest.raises(InvalidArgument, match=r"This model returned list\(Tensor, Tensor\)"):
            load(path, config({"x": (4,)}, {"RESULT[5]": (4,)})).run([A])
    else:
        with pytest.raises(ConfigError, match=r"it offers RESULT\[0\], RESULT\[1\]\[<key>\]"):
            load(path, config({"x": (4,)}, {"RESULT[5]": (4,)}))


class Flag(torch.nn.Module):
    def forward(self, x: torch.Tensor, flag: bool) -> torch.Tensor:
        return x


def test_other_argument_types_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="takes 'flag' of type bool"):
        run(tmp_path, Flag(), config({"x": (4,), "flag": (1,)}, {"O": (4,)}))


class Trap:
    """Unpickling this would be seen."""

    def __reduce__(self):
        return (pytest.fail, ("the file was unpickled",))


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_module_is_refused_and_not_unpickled(tmp_path, zipped):
    path = models.version_folder(tmp_path) / "model.pt"
    module = models.add_sub()
    module.__dict__["trap"] = Trap()
    torch.save(module, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ConfigError, match="pickled module.*torch.jit.script") as caught:
        load(path, config({"a": (4,), "b": (4,)}, {"O": (4,)}))
    assert str(tmp_path) not in str(caught.value)
    assert not zipped or "tests.models.AddSub" in str(caught.value)


def test_state_dict_is_refused(tmp_path):
    path = models.version_folder(tmp_path) / "model.pt"
    torch.save(models.mlp().state_dict(), path)
    with pytest.raises(ConfigError, match=r"model/1/model.pt: .*state dict.*constants\.pkl"):
        load(path, config({"a": (4,)}, {"O": (4,)}))


@pytest.mark.parametrize("content", [b"", b"no archive at all", pickle.dumps([1])])
def test_unreadable_file(tmp_path, content):
    path = models.version_folder(tmp_path) / "model.pt"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load(path, config({"a": (4,)}, {"O": (4,)}))
    assert str(tmp_path) not in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="model/1/model.pt: cannot find"):
        load(tmp_path / "model" / "1" / "model.pt", config({"a": (4,)}, {"O": (4,)}))


class ConvNet(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(3, 8, 3)
        self.norm = torch.nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.relu(self.norm(self.conv(x)))
        return y.mean((2, 3))


def test_freezing_is_on_request_and_the_same_to_the_last_digits(tmp_path):
    """Without it, answers are bit for bit those of torch.jit.load."""
    path = models.save_torchscript(ConvNet().eval(), tmp_path)
    made = config({"x": (3, 8, 8)}, {"y": (8,)})
    asked = ModelParameters(enable_freezing=True)
    frozen: Any = runtimes.load(path, made, asked, "cpu", "KIND_CPU")
    plain: Any = load(path, made)
    assert not list(frozen.module.parameters()) and list(plain.module.parameters())
    assert frozen.weight_pointer() not in (0, plain.weight_pointer())
    direct = torch.jit.load(str(path))
    with torch.inference_mode():
        for rows in (1, 2, 8):
            x = torch.randn(rows, 3, 8, 8)
            (want,), (got,) = plain.run([x]), frozen.run([x])
            assert torch.equal(want, direct(x))
            assert torch.allclose(want, got, atol=1e-5)


def test_freezing_keeps_the_names_of_the_arguments(tmp_path):
    path = models.save_torchscript(models.add_sub(), tmp_path)
    made = config({"b": (4,), "a": (4,)}, {"OUTPUT__1": (4,), "OUTPUT__0": (4,)})
    asked = ModelParameters(enable_freezing=True)
    frozen: Any = runtimes.load(path, made, asked, "cpu", "KIND_CPU")
    difference, total = frozen.run([B, A])
    assert torch.equal(difference, A - B) and torch.equal(total, A + B)
