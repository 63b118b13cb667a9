"""Nested, keyword and optional inputs, and nested outputs, through real models."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from configs.errors import ConfigError
from configs.model import ModelInput
from configs.parameters import ModelParameters
from deployments import runtimes
from tests import models
from tests.models import config, string_input, string_output
from tests.structures import Structured

A, B, C = torch.arange(4.0).reshape(1, 4), torch.ones(1, 4), torch.full((1, 4), 3.0)
PLAIN = ModelParameters(torch_compile_optional_parameters={"disable": True})


def tensors(names, optional=()):
    return [
        ModelInput(name=n, data_type="TYPE_FP32", dims=(4,), optional=n in optional) for n in names
    ]


def script(tmp_path, module, inputs, outputs) -> Any:
    path = models.save_torchscript(module, tmp_path)
    return runtimes.load(path, config(inputs, outputs), ModelParameters(), "cpu", "KIND_CPU")


def eager(tmp_path, body, inputs, outputs) -> Any:
    head = "import torch\nfrom typing import *\nfrom torch import Tensor\n"
    path = models.save_eager(head + body, tmp_path)
    made = config(inputs, outputs, runtime="model.py")
    return runtimes.load(path, made, PLAIN, "cpu", "KIND_CPU")


INPUTS = ("ARGS[0]", "ARGS[1][1]", "ARGS[1][0]", "KWARGS[named][k][0]", "ARGS[3][right]")
OUTPUTS = ("RESULT[0][left]", "RESULT[0][1]", "RESULT[1][rest][0]", "RESULT[1][rest][1]")


def structured(tmp_path, *more):
    inputs = [*tensors((*INPUTS, "KWARGS[point][left]")), string_input("words"), *more]
    outputs = [*config({}, {n: (4,) for n in (*OUTPUTS, "OUTPUT__3")}).output]
    return script(tmp_path, Structured(), inputs, [*outputs, string_output("RESULT[2]")])


def test_torchscript_in_and_out(tmp_path):
    got = structured(tmp_path).run([A, B, C, A * 5, A * 6, A * 7, ["w"]])
    want = (A * 6, A * 7, C - B, A * 5, A * 2)
    for one, other in zip(got, want, strict=False):
        assert torch.equal(one, other)
    assert got[5] == ["w"]


@pytest.mark.parametrize(
    ("bias", "last", "want"),
    [(None, None, A * 2), (C, None, A * 2 + C), (None, B, A * 2 - B), (C, B, A * 2 + C - B)],
)
def test_torchscript_defaults_take_the_place_of_what_is_absent(tmp_path, bias, last, want):
    more = tensors(("bias", "KWARGS[last]"), optional=("bias", "KWARGS[last]"))
    runtime = structured(tmp_path, *more)
    got = runtime.run([A, B, C, A, A, A, ["w"], bias, last])
    assert torch.equal(got[4], want)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("RESULT[0]", r"returns \S*Point there.* it offers RESULT\[0\]\[0\], RESULT\[0\]\[1\]"),
        ("RESULT[0][middle]", "refers to an output which doesn't exist"),
        ("RESULT[1][rest]", r"returns List\[Tensor\] there"),
        ("RESULT[4]", "refers to an output which doesn't exist"),
        ("RESULT", "which is no Tensor and no List"),
        ("OUTPUT__4", "output index which doesn't exist. This model has 4 outputs"),
    ],
)
def test_results_are_checked_at_load(tmp_path, name, text):
    inputs = [*tensors((*INPUTS, "ARGS[3][left]")), string_input("words")]
    with pytest.raises(ConfigError, match=text) as caught:
        script(tmp_path, Structured(), inputs, {name: (4,)})
    assert name in str(caught.value)


class Plain(torch.nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x - y


def test_without_a_default_optional_is_refused(tmp_path):
    """Triton's text, where Triton's reason holds."""
    with pytest.raises(ConfigError, match="does not support optional input") as caught:
        script(tmp_path, Plain(), tensors(("x", "y"), optional=("y",)), {"O": (4,)})
    assert "'y'" in str(caught.value)


class Keys(torch.nn.Module):
    def forward(self, named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"difference": named["0"] - named["b"]}


def test_dictionary_alone(tmp_path):
    runtime: Any = script(tmp_path, Keys(), tensors(("b", "0")), {"RESULT[difference]": (4,)})
    assert torch.equal(runtime.run([A, B])[0], B - A)
    with pytest.raises(ConfigError, match="does not support optional input"):
        script(tmp_path, Keys(), tensors(("b", "0"), optional=("b",)), {"RESULT[d]": (4,)})


def test_traced_modules_keep_their_structure(tmp_path):
    path = models.version_folder(tmp_path) / "model.pt"
    with pytest.warns():
        traced = torch.jit.trace(
            lambda pair, named: {"sum": pair[0] + pair[1] + named["a"]},
            ((A, B), {"a": C}),
            strict=False,
        )
    traced.save(str(path))
    names = ("ARGS[0][1]", "ARGS[1][a]", "ARGS[0][0]")
    made = config(tensors(names), {"RESULT[sum]": (4,)})
    runtime: Any = runtimes.load(path, made, ModelParameters(), "cpu", "KIND_CPU")
    assert torch.equal(runtime.run([A, B, C])[0], A + B + C)


EAGER = """
class Point(NamedTuple):
    left: Tensor
    right: Tensor

class Net(torch.nn.Module):
    def forward(self, x, pair, xs: List[Tensor], point: Point, mask=None, /, *more, bias=None, **k):
        assert type(pair) is tuple and type(xs) is list and type(point) is Point
        total = x + (0 if mask is None else mask) + (0 if bias is None else bias)
        for one in more:
            total = total * one
        return {"total": total, "k": k, "swap": Point(point.right, [pair[1]["a"], *xs])}
"""
NET = ("ARGS[0]", "ARGS[1][0]", "ARGS[1][1][a]", "ARGS[2][0]", "ARGS[3][left]", "ARGS[3][right]")
GOT = {"RESULT[total]": (4,), "RESULT[swap][left]": (4,), "RESULT[swap][1][1]": (4,)}


def test_eager_in_and_out(tmp_path):
    runtime = eager(
        tmp_path, EAGER, tensors((*NET, "KWARGS[other]")), GOT | {"RESULT[k][other]": (4,)}
    )
    total, left, item, other = runtime.run([A, B, C, A * 4, A * 5, A * 6, A * 7])
    assert torch.equal(total, A) and torch.equal(left, A * 6)
    assert torch.equal(item, A * 4) and torch.equal(other, A * 7)


@pytest.mark.parametrize("mask", [None, B])
@pytest.mark.parametrize("bias", [None, C])
def test_eager_defaults(tmp_path, mask, bias):
    optional = ("ARGS[4]", "KWARGS[bias]")
    runtime = eager(tmp_path, EAGER, tensors((*NET, "ARGS[5]", *optional), optional), GOT)
    total = runtime.run([A, B, C, A, A, A, C, mask, bias])[0]
    assert torch.equal(total, (A + (0 if mask is None else B) + (0 if bias is None else C)) * C)


def test_eager_optional_by_order(tmp_path):
    body = "class Net(torch.nn.Module):\n    def forward(self, x, y=None):\n"
    body += "        return x if y is None else x - y\n"
    runtime = eager(tmp_path, body, tensors(("a", "b"), optional=("b",)), {"O": (4,)})
    assert torch.equal(runtime.run([A, None])[0], A)
    assert torch.equal(runtime.run([A, B])[0], A - B)
    with pytest.raises(ConfigError, match="'a': .* does not support optional input"):
        eager(tmp_path, body, tensors(("a", "b"), optional=("a",)), {"O": (4,)})
    with pytest.raises(ConfigError, match=r"'c' is not an input of the model; it offers ARGS\[0\]"):
        eager(tmp_path, body, tensors("abc"), {"O": (4,)})
