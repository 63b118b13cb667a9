"""The same network as the file of each runtime: the same answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import models, runtimes
from benchmarks.models import MODELS, Model
from configs import pbtxt
from configs.complete import runtime_kind
from deployments.runtimes import eager


@pytest.fixture
def model() -> Model:
    return MODELS["mlp"]


@pytest.fixture
def script(tmp_path: Path, model: Model) -> Path:
    return models.build(model, tmp_path / "models")


def written(runtime: str, model: Model, script: Path) -> tuple[Path, str]:
    version = script.parent.parent / runtime / "1"
    version.mkdir(parents=True)
    return version, runtimes.write(runtime, model, script, version)


@pytest.mark.parametrize("runtime", ["torchscript", "eager"])
def test_the_configuration_is_of_that_runtime(runtime: str, model: Model, script: Path):
    version, engine = written(runtime, model, script)
    text = engine + model.config(1000)
    config = pbtxt.parse(text, "config.pbtxt", model.name)
    files = [file.name for file in version.iterdir()]
    assert runtime_kind(config, files) == runtime


def test_the_class_answers_as_torchscript_does(model: Model, script: Path):
    version, _ = written("eager", model, script)
    module = eager._construct(eager._import(version / "model.py", "model.py"), "model.py")
    module.load_state_dict(torch.load(version / "model.pt", weights_only=True))
    row = model.one_row()
    with torch.inference_mode():
        answer = module(torch.from_numpy(row)).numpy()
    np.testing.assert_allclose(answer, models.expected(model, script, row), atol=1e-5)


def test_the_program_takes_any_batch_and_answers_as_torchscript_does(model: Model, script: Path):
    program = runtimes.program(model).module()
    for count in (1, 5, models.MAX_BATCH):
        row = model.one_row().repeat(count, axis=0)
        with torch.inference_mode():
            answer = program(torch.from_numpy(row)).numpy()
        np.testing.assert_allclose(answer, models.expected(model, script, row), atol=1e-5)


def test_what_is_costly_is_made_once(model: Model, script: Path):
    first, engine = written("exported", model, script)
    (kept,) = script.parent.glob("mlp-exported-*.pt2")
    assert (first / "model.pt2").read_bytes() == kept.read_bytes()
    assert 'platform: "torch_export"' in engine
    kept.write_bytes(b"kept")
    again = script.parent.parent / "again"
    again.mkdir()
    runtimes.write("exported", model, script, again)
    assert (again / "model.pt2").read_bytes() == b"kept"
