"""CUDA graphs where there is no device: nothing is recorded. With one: tests/gpu."""

from __future__ import annotations

from typing import Any

import torch

from configs.parameters import ModelParameters
from deployments import runtimes
from deployments.runtimes.graphs import Graphed
from deployments.runtimes.torchscript import TorchScript
from tests import models
from tests.models import config, string_input, string_output


def test_on_the_host_nothing_is_recorded(tmp_path):
    path = models.save_torchscript(models.mlp(), tmp_path)
    asked = ModelParameters(enable_cuda_graphs=True)
    made = config({"x": (8,)}, {"y": (4,)})
    runtime = runtimes.load(path, made, asked, "cpu", "KIND_CPU")
    assert isinstance(runtime, TorchScript)
    graphed: Any = Graphed(runtime)
    x = torch.randn(3, 8)
    with torch.inference_mode():
        assert torch.equal(graphed.run([x])[0], models.mlp()(x))
    assert not graphed._recordings
    assert graphed.weight_pointer() == runtime.weight_pointer()


def test_strings_are_never_recorded(tmp_path):
    path = models.save_torchscript(models.Strings(), tmp_path)
    made = config([string_input("words")], [string_output("O")])
    runtime = runtimes.load(path, made, ModelParameters(), "cpu", "KIND_CPU")
    assert Graphed(runtime).run([["a", "b"]]) == [["a!", "b!"]]
