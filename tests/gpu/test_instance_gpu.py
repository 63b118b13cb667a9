from __future__ import annotations

import numpy as np
import pytest
import torch

from configs.parameters import ModelParameters
from deployments.instance import FatalDeviceError, Instance
from deployments.types import Batch
from deployments.weights import WeightCache
from tests import models
from tests.models import config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def start(path, made, cache=None, kind="KIND_GPU", **parameters) -> Instance:
    instance = Instance("i", path, made, ModelParameters(**parameters), "cuda:0", kind, cache)
    instance.load()
    return instance


def batch(rows: int) -> Batch:
    values = np.random.default_rng(rows).random((rows, 8), np.float32)
    return Batch((1,) * rows, (tuple(values[k : k + 1] for k in range(rows)),), ("y",))


MLP = config({"x": (8,)}, {"y": (4,)}, max_batch_size=64)


def forward_named(tmp_path):
    return models.save_torchscript(models.mlp(), tmp_path)


def test_results_equal_the_host(tmp_path):
    made = config({"INPUT__0": (8,)}, {"y": (4,)}, max_batch_size=64)
    instance = start(forward_named(tmp_path), made, enable_cache_cleaning=True)
    for rows in (1, 5, 64):
        work = batch(rows)
        (part,) = instance.run(work).parts
        direct = (
            models.mlp()(
                torch.from_numpy(np.concatenate([a for a in work.inputs[0] if a is not None]))
            )
            .detach()
            .numpy()
        )
        np.testing.assert_allclose(part.outputs["y"].data, direct, atol=1e-3)
    instance.close()


def test_streams_over_shared_weights(tmp_path):
    made = config({"INPUT__0": (8,)}, {"y": (4,)}, max_batch_size=64)
    cache, path = WeightCache(), forward_named(tmp_path)
    pair = [start(path, made, cache) for _ in range(2)]
    assert pair[0].weight_pointer() == pair[1].weight_pointer() != 0
    work = batch(16)
    replies = [f.result(60) for f in [i.submit(work) for i in pair * 10]]
    first = replies[0].parts[0].outputs["y"].data
    for reply in replies:
        np.testing.assert_allclose(reply.parts[0].outputs["y"].data, first, atol=1e-3)
    for instance in pair:
        instance.close()
    assert len(cache) == 0


WIDE_USE = """
import torch
class Net(torch.nn.Module):
    def forward(self, x):
        used = torch.zeros(1 << 24, device=x.device)
        return x + used[:1]
"""


@pytest.mark.parametrize("kind", ["KIND_GPU", "KIND_MODEL"])
@pytest.mark.parametrize("cleaning", [True, False])
def test_cleaning_returns_what_a_run_has_used(tmp_path, cleaning, kind):
    """64 MB a run stay with the allocator unless the cache is emptied: that is the control."""
    namespace: dict = {}
    exec(WIDE_USE, namespace)
    traced = torch.jit.trace(namespace["Net"]().cuda(), torch.zeros(1, 8, device="cuda:0"))
    path = models.version_folder(tmp_path) / "model.pt"
    torch.jit.save(traced, str(path))
    made = config({"x": (8,)}, {"y": (8,)}, max_batch_size=64)
    instance = start(path, made, kind=kind, enable_cache_cleaning=cleaning)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    for _ in range(3):
        assert instance.run(batch(4)).parts[0].error is None
    kept = torch.cuda.memory_reserved() - before
    assert instance.cleanings == (3 if cleaning else 0)
    assert kept < (1 << 24) if cleaning else kept >= (1 << 26)
    instance.close()


HUNGRY = """
import torch
class Net(torch.nn.Module):
    def forward(self, x):
        if x.shape[0] > 2:
            torch.empty(1 << 46, dtype=torch.uint8, device=x.device)
        return x * 2
"""


def test_out_of_memory_is_answered(tmp_path):
    made = config({"x": (8,)}, {"y": (8,)}, runtime="model.py")
    path = models.save_eager(HUNGRY, tmp_path)
    instance = start(path, made, torch_compile_optional_parameters={"disable": True})
    reply = instance.run(batch(8))
    assert {part.error for part in reply.parts} == {None}
    assert sorted(k for part in reply.parts for k in part.members) == [*range(8)]
    instance.close()


def test_kind_model_without_a_device_goes_to_the_first_gpu(tmp_path):
    made = config({"INPUT__0": (8,)}, {"y": (4,)}, max_batch_size=64)
    instance = start(forward_named(tmp_path), made, kind="KIND_MODEL")
    assert instance._runtime is not None and instance._runtime.device.type == "cuda"
    assert instance.run(batch(3)).parts[0].error is None
    instance.close()


def test_fatal_error_class():
    assert issubclass(FatalDeviceError, Exception)
