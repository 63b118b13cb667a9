from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch as safetensors
import torch

from configs.errors import ConfigError
from configs.parameters import ModelParameters
from deployments import runtimes
from deployments.errors import ExecutionFailed
from tests import models
from tests.models import config, string_input, string_output

A = torch.arange(4.0).reshape(1, 4)
HEAD = "import torch\nfrom torch.nn import Linear, Module\n"
SCALE = (
    HEAD
    + """
class Scale(Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.full((4,), 2.0))
    def forward(self, x):
        return x * self.w
"""
)
NESTED = (
    HEAD
    + """
class Net(Module):
    def forward(self, x, pair, *, bias):
        return {"sum": (x + pair[0] + pair[1], [bias])}
"""
)
ONE = ({"x": (4,)}, {"y": (4,)})


def load(path, inputs, outputs, kind="KIND_CPU", **options):
    parameters = ModelParameters(torch_compile_optional_parameters=options or {"disable": True})
    made = config(inputs, outputs, runtime="model.py")
    return runtimes.load(path, made, parameters, "cpu", kind)


def test_without_weights(tmp_path):
    runtime = load(models.save_eager(SCALE, tmp_path), *ONE)
    assert torch.equal(runtime.run([A])[0], A * 2)


def test_state_dict_beside_it(tmp_path):
    path = models.save_eager(SCALE, tmp_path, state={"w": torch.full((4,), 5.0)})
    assert torch.equal(load(path, *ONE).run([A])[0], A * 5)


TIED = (
    HEAD
    + """
class Tied(Module):
    def __init__(self):
        super().__init__()
        self.a = Linear(4, 4, bias=False)
        self.b = Linear(4, 4, bias=False)
        self.b.weight = self.a.weight
    def forward(self, x):
        return self.b(self.a(x))
"""
)


def test_safetensors_beside_it(tmp_path):
    path = models.save_eager(SCALE, tmp_path)
    safetensors.save_file({"w": torch.full((4,), 7.0)}, path.with_suffix(".safetensors"))
    assert torch.equal(load(path, *ONE).run([A])[0], A * 7)


@pytest.mark.parametrize("names", [("a.weight",), ("b.weight",), ("a.weight", "b.weight")])
def test_safetensors_of_tied_weights(tmp_path, names):
    """The format holds a tensor once; files that hold a copy under each name are as good."""
    path = models.save_eager(TIED, tmp_path)
    weights = {name: torch.eye(4) * 3 for name in names}
    safetensors.save_file(weights, path.with_suffix(".safetensors"))
    assert torch.equal(load(path, *ONE).run([A])[0], A * 9)


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ({"v": torch.ones(4)}, "do not fit Scale: Missing key.* 'w'; Unexpected key.* 'v'"),
        ({"w": torch.ones(3)}, "size mismatch"),
        (None, "not a file of safetensors"),
    ],
)
def test_wrong_safetensors(tmp_path, state, text):
    path = models.save_eager(SCALE, tmp_path)
    weights = path.with_suffix(".safetensors")
    if state is None:
        weights.write_bytes(b"no such thing")
    else:
        safetensors.save_file(state, weights)
    with pytest.raises(ConfigError, match=text) as caught:
        load(path, *ONE)
    assert caught.value.args[1] == "model/1/model.safetensors"


def test_weights_in_both_forms(tmp_path):
    path = models.save_eager(SCALE, tmp_path, state={"w": torch.ones(4)})
    safetensors.save_file({"w": torch.ones(4)}, path.with_suffix(".safetensors"))
    with pytest.raises(ConfigError, match="weights in model.pt and in model.safetensors; keep one"):
        load(path, *ONE)


def test_without_the_package_the_error_says_what_to_install(tmp_path, monkeypatch):
    path = models.save_eager(SCALE, tmp_path)
    safetensors.save_file({"w": torch.ones(4)}, path.with_suffix(".safetensors"))
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ConfigError, match=r"install manta-server\[safetensors\]"):
        load(path, *ONE)


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ({"v": torch.ones(4)}, "Missing key"),
        ({"w": torch.ones(3)}, "size mismatch"),
        (models.add_sub(), "not a state dict of plain tensors"),
        (torch.ones(4), "a Tensor, not a state dict"),
    ],
)
def test_wrong_weights(tmp_path, state, text):
    with pytest.raises(ConfigError, match=text) as caught:
        load(models.save_eager(SCALE, tmp_path, state=state), *ONE)
    assert caught.value.args[1] == "model/1/model.pt"


def test_alphabetically_first_class_of_the_file(tmp_path):
    source = SCALE + "class Alpha(Module):\n    def forward(self, x):\n        return x - 1\n"
    assert torch.equal(load(models.save_eager(source, tmp_path), *ONE).run([A])[0], A - 1)


def test_no_class(tmp_path):
    with pytest.raises(ConfigError, match="no subclass of torch.nn.Module"):
        load(models.save_eager("import torch\n", tmp_path), *ONE)
    with pytest.raises(ConfigError, match='TritonPythonModel needs backend: "python"'):
        load(models.save_eager("class TritonPythonModel: ...\n", tmp_path, "other"), *ONE)


def test_names_of_two_models_do_not_meet(tmp_path):
    first = load(models.save_eager(SCALE, tmp_path, "one"), *ONE)
    other = SCALE.replace("2.0", "3.0")
    second = load(models.save_eager(other, tmp_path, "two"), *ONE)
    assert torch.equal(first.run([A])[0], A * 2)
    assert torch.equal(second.run([A])[0], A * 3)
    assert "model" not in sys.modules and str(tmp_path) not in "".join(sys.path)


@pytest.mark.parametrize(
    ("source", "text"),
    [("import nothing_of_that_name", "ModuleNotFoundError"), ("1 +", "SyntaxError")],
)
def test_import_failure(tmp_path, source, text):
    with pytest.raises(ConfigError, match=f"model/1/model.py: failed to import: {text}") as caught:
        load(models.save_eager(source, tmp_path), *ONE)
    assert str(tmp_path) not in str(caught.value)


def test_constructor_with_arguments(tmp_path):
    source = HEAD + "class Net(Module):\n    def __init__(self, size):\n        pass\n"
    with pytest.raises(ConfigError, match=r"Net\(\) failed, which is called without arguments"):
        load(models.save_eager(source, tmp_path), *ONE)


def test_nested_names(tmp_path):
    runtime = load(
        models.save_eager(NESTED, tmp_path),
        {"KWARGS[bias]": (4,), "ARGS[1][1]": (4,), "ARGS[0]": (4,), "ARGS[1][0]": (4,)},
        {"RESULT[sum][1][0]": (4,), "RESULT[sum][0]": (4,)},
    )
    bias, total = runtime.run([A * 10, A, A * 2, A * 3])
    assert torch.equal(bias, A * 10)
    assert torch.equal(total, A * 6)


def test_dict_result_needs_result_names(tmp_path):
    inputs = {"ARGS[0]": (4,), "ARGS[1][0]": (4,), "ARGS[1][1]": (4,), "KWARGS[bias]": (4,)}
    runtime = load(models.save_eager(NESTED, tmp_path), inputs, {"y": (4,)})
    with pytest.raises(ExecutionFailed, match=r"dict\(sum: tuple"):
        runtime.run([A, A, A, A])


def test_kind_model_takes_the_device_of_its_parameters(tmp_path):
    assert load(models.save_eager(SCALE, tmp_path), *ONE, kind="KIND_MODEL").device.type == "cpu"
    bare = HEAD + "class Net(Module):\n    def forward(self, x):\n        return x\n"
    with pytest.raises(ConfigError, match="cannot determine the device"):
        load(models.save_eager(bare, tmp_path), *ONE, kind="KIND_MODEL")


def test_compile_parameters_reach_torch(tmp_path):
    path = models.save_eager(SCALE, tmp_path)
    assert torch.equal(load(path, *ONE, backend="eager", fullgraph=True).run([A])[0], A * 2)
    with pytest.raises(ConfigError, match="unexpected keyword argument 'nonsense'"):
        load(path, *ONE, nonsense=1, backend="eager")


def test_what_is_not_compiled_leaves_the_compiler_alone(tmp_path):
    """Which takes seconds to import, in each replica."""
    code = f"""
import sys
from pathlib import Path
from tests.unit.deployments.runtimes import test_eager as t
runtime = t.load(t.models.save_eager(t.SCALE, Path({str(tmp_path)!r})), *t.ONE, **OPTIONS)
assert t.torch.equal(runtime.run([t.A])[0], t.A * 2)
print("torch._dynamo" in sys.modules)
"""
    told = []
    for options in ({"disable": True}, {"disable": True, "backend": "eager"}):
        done = subprocess.run(
            [sys.executable, "-c", code.replace("OPTIONS", repr(options))],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        told.append(done.stdout.strip())
        assert told[-1], done.stderr
    assert told == ["False", "True"]


def test_a_compiled_model_takes_object_arrays(tmp_path):
    source = HEAD + (
        "import numpy as np\nclass Net(Module):\n    def forward(self, words):\n"
        "        return np.array([word * 2 for word in words.flat], object)"
    )
    made = config([string_input("words")], [string_output("y")], runtime="model.py")
    options = ModelParameters(torch_compile_optional_parameters={"backend": "eager"})
    path = models.save_eager(source, tmp_path)
    runtime = runtimes.load(path, made, options, "cpu", "KIND_CPU")
    for words in ([b"a", b"\xff"], [b"other"]):
        (found,) = runtime.run([np.array(words, object)])
        assert isinstance(found, np.ndarray)
        assert found.tolist() == [word * 2 for word in words]


def test_missing_compiler_is_said_at_load(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    path = models.save_eager(SCALE, tmp_path)
    with pytest.raises(ConfigError, match="needs a C\\+\\+ compiler and none is installed"):
        load(path, *ONE, dynamic=True)
    load(path, *ONE, disable=True)
