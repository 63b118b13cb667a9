"""Without a GPU nothing moves; what moves with one is tested in tests/gpu."""

from __future__ import annotations

import pytest
import torch

from deployments.runtimes import devices
from tests import models


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu has the other half")
def test_without_a_gpu_a_model_stays_where_it_is():
    module = models.mlp()
    assert not devices.settle(module)
    assert {p.device.type for p in module.parameters()} == {"cpu"}


def test_a_model_that_names_a_device_keeps_it():
    module = models.mlp().to("meta")
    assert not devices.settle(module)
    assert not devices.settle(models.identity())  # nothing to move
