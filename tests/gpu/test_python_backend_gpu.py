"""A TritonPythonModel on a CUDA device: tensors there and back, and what it is told of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from configs.parameters import ModelParameters
from deployments.instance import Instance
from deployments.pb_utils import tensor
from deployments.pb_utils.faults import TritonModelException
from deployments.pb_utils.tensor import Tensor
from deployments.types import Batch
from tests import models
from tests.models import config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SOURCE = """
import torch
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        assert args["model_instance_kind"] == "GPU"
        self.device = torch.device("cuda", int(args["model_instance_device_id"]))
        self.factor = torch.full((4,), 3.0, device=self.device)

    def execute(self, requests):
        answers = []
        for request in requests:
            x = torch.from_dlpack(pb_utils.get_input_tensor_by_name(request, "x")).to(self.device)
            y = pb_utils.Tensor.from_dlpack("y", x * self.factor)
            assert not y.is_cpu()
            answers.append(pb_utils.InferenceResponse([y]))
        return answers
"""


def test_a_model_answers_from_its_gpu(tmp_path):
    made = config({"x": (4,)}, {"y": (4,)}, backend="python", platform="")
    path = models.save_eager(SOURCE, tmp_path)
    instance = Instance("i", path, made, ModelParameters(), "cuda:0", "KIND_GPU")
    instance.load()
    x = np.arange(4, dtype=np.float32).reshape(1, 4)
    reply = instance.run(Batch((1, 1), ((x, x + 1),), ("y",)))
    for part, given in zip(reply.parts, (x, x + 1), strict=True):
        np.testing.assert_array_equal(part.outputs["y"].data, given * 3)
    instance.close()


def test_a_gpu_tensor_has_no_numpy_form_and_is_copied_to_the_host():
    made = Tensor.from_dlpack("y", torch.ones(1, 2, device="cuda:0"))
    with pytest.raises(TritonModelException, match="in GPU memory"):
        made.as_numpy()
    np.testing.assert_array_equal(tensor.to_output(made, "TYPE_FP32").data, [[1, 1]])
