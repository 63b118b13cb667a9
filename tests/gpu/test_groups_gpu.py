"""Where models go on a real GPU, by the kind of their group, and which file they are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from configs.complete import artifact_filename
from configs.errors import ConfigError
from configs.parameters import ModelParameters
from deployments import replica, runtimes
from deployments.runtimes import devices
from tests import models
from tests.models import config
from tests.unit.deployments.test_replica import SPEC

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PLAIN = ModelParameters(torch_compile_optional_parameters={"disable": True})
EAGER = """
import torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(8, 4, device="{device}")
    def forward(self, x):
        return self.layer(x)
"""


def test_the_capability_of_this_gpu_chooses_the_file():
    major, minor = torch.cuda.get_device_capability(0)
    own = devices.compute_capability("cuda:0")
    assert own == f"{major}.{minor}"
    files = {own: "own.pt", "1.0": "other.pt"}
    made = config({"x": (8,)}, {"y": (4,)}, cc_model_filenames=files)
    spec = replace(SPEC, config=made, gpu=0)
    assert artifact_filename(made, (), replica._capability(spec)) == "own.pt"
    host = replace(spec, kind="KIND_CPU", gpu=None)  # the control
    assert artifact_filename(made, (), replica._capability(host)) == "model.pt"


@pytest.mark.parametrize("kind", ["KIND_MODEL", "KIND_CPU"])
def test_a_torchscript_model_that_names_no_device_goes_to_the_first_gpu(tmp_path, kind):
    """Only where it may choose: the control stays on the host."""
    path = models.save_torchscript(models.mlp(), tmp_path)
    made = config({"INPUT__0": (8,)}, {"y": (4,)})
    runtime: Any = runtimes.load(path, made, PLAIN, "cpu", kind)
    wanted = "cuda:0" if kind == "KIND_MODEL" else "cpu"
    assert runtime.device == torch.device(wanted)
    with torch.inference_mode():
        (got,) = runtime.run([torch.ones(2, 8, device=wanted)])
        torch.testing.assert_close(got.cpu(), models.mlp()(torch.ones(2, 8)), atol=1e-3, rtol=1e-3)


def test_a_torchscript_model_keeps_the_devices_that_it_names(tmp_path):
    path = models.save_torchscript(models.mlp().to("cuda:0"), tmp_path)
    made = config({"INPUT__0": (8,)}, {"y": (4,)})
    runtime: Any = runtimes.load(path, made, PLAIN, "cpu", "KIND_MODEL")
    assert {p.device.type for p in runtime.module.parameters()} == {"cuda"}
    assert runtime.device == torch.device("cpu")  # it moves its inputs itself


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_an_eager_model_goes_to_the_first_gpu_or_stays_where_it_is(tmp_path, device):
    path = models.save_eager(EAGER.format(device=device), tmp_path)
    made = config({"x": (8,)}, {"y": (4,)}, runtime="model.py")
    runtime: Any = runtimes.load(path, made, PLAIN, "cpu", "KIND_MODEL")
    assert runtime.device == torch.device("cuda:0")
    with torch.inference_mode():
        (got,) = runtime.run([torch.ones(2, 8, device="cuda:0")])
    assert got.shape == (2, 4)


def test_a_package_for_the_host_does_not_load_on_a_gpu(tmp_path, seed_package):
    made = config({"INPUT__0": (16,)}, {"OUTPUT__0": (16,)}, platform="torch_aoti")
    with pytest.raises(ConfigError, match="compiled for cpu, and this instance runs on cuda"):
        runtimes.load(seed_package, made, ModelParameters(), "cuda:0", "KIND_GPU")
