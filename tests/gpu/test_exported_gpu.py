from __future__ import annotations

import warnings

import pytest
import torch

from configs.model import ModelConfig
from configs.parameters import ModelParameters
from deployments import runtimes
from deployments.runtimes import autocomplete, compiling
from tests import models

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BARE = ModelConfig(name="model", backend="pytorch", platform="torch_export", open_batch=True)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_program_of_the_host_runs_on_the_device(tmp_path, monkeypatch, compiled):
    monkeypatch.setenv(compiling.FOLDER, str(tmp_path / "kept"))
    path = models.version_folder(tmp_path) / "model.pt2"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(models.export_seed(), str(path))
    parameters = ModelParameters(compile_on_load=compiled)
    config = autocomplete.complete(path, BARE, parameters, "cuda:0", "KIND_GPU")
    runtime = runtimes.load(path, config, parameters, "cuda:0", "KIND_GPU")
    assert runtime.device.type == "cuda"
    values = [torch.rand(3, 16) for _ in config.input]
    found = runtime.run([value.cuda() for value in values])
    h, v, key_a, key_2, kw1, kw2 = values
    out = models.Seed()(h, v, {"keyA": key_a, "key2": key_2}, kwarg1=kw1, kw_arg2=kw2)
    named = dict(zip([tensor.name for tensor in config.output], found, strict=True))
    answer = named["RESULT[AAA]"]
    assert isinstance(answer, torch.Tensor)
    torch.testing.assert_close(answer.cpu(), out["AAA"])
