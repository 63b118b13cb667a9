from __future__ import annotations

from typing import Any

import pytest
import torch

from configs.parameters import ModelParameters
from deployments import runtimes
from deployments.runtimes import graphs
from deployments.runtimes.graphs import Graphed
from tests import models
from tests.models import config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ASKED = ModelParameters(enable_cuda_graphs=True)


def load(tmp_path, module, inputs, outputs) -> Any:
    path = models.save_torchscript(module, tmp_path)
    made = config(inputs, outputs, max_batch_size=64)
    runtime = runtimes.load(path, made, ASKED, "cuda:0", "KIND_GPU")
    assert isinstance(runtime, Graphed)
    return runtime


def test_replays_answer_as_the_model_does(tmp_path):
    runtime = load(tmp_path, models.mlp(), {"INPUT__0": (8,)}, {"y": (4,)})
    direct = models.mlp().to("cuda:0")
    kept = []
    with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
        for rows in (1, 5, 1, 5, 64):
            x = torch.randn(rows, 8, device="cuda:0")
            (got,) = runtime.run([x])
            kept.append((got, direct(x)))
        torch.cuda.synchronize()
    assert len(runtime._recordings) == 3
    # All of them at the end: no answer is overwritten by a later replay.
    assert all(torch.allclose(got, want, atol=1e-3) for got, want in kept)


def test_control_what_looks_at_values_is_run_as_it_is(tmp_path):
    runtime = load(tmp_path, models.RefusesNegative(), {"x": (8,)}, {"y": (8,)})
    with torch.inference_mode():
        x = torch.rand(2, 8, device="cuda:0")
        assert torch.equal(runtime.run([x])[0], x * 2)
        assert list(runtime._recordings.values()) == [None]
        with pytest.raises(Exception, match="negative value"):
            runtime.run([-x])


def test_the_number_of_recordings_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(graphs, "SHAPES_LIMIT", 2)
    runtime = load(tmp_path, models.mlp(), {"INPUT__0": (8,)}, {"y": (4,)})
    with torch.inference_mode():
        for rows in range(1, 6):
            assert runtime.run([torch.zeros(rows, 8, device="cuda:0")])[0].shape == (rows, 4)
    assert len(runtime._recordings) == 2
