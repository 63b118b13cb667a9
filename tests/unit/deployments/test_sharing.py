"""What weight sharing saves, who may share, and the cleaning of the device's cache."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from configs.errors import ConfigError
from configs.parameters import ModelParameters
from deployments.errors import ExecutionFailed
from deployments.instance import Instance
from deployments.types import Batch
from deployments.weights import WeightCache, weight_key
from tests import models
from tests.models import config

WIDTH = 4096
WEIGHT_BYTES = WIDTH * WIDTH * 4
WIDE = config({"x": (WIDTH,)}, {"y": (WIDTH,)})
ONE = config({"x": (4,)}, {"y": (4,)})


class Wide(torch.nn.Module):
    """64 MB of weights in one piece."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


def grown_by(act: Callable[[], Any]) -> tuple[int, Any]:
    """What this process has more of after `act`, in bytes, and what `act` returned."""
    gc.collect()
    before = psutil.Process().memory_info().rss
    result = act()
    gc.collect()
    return psutil.Process().memory_info().rss - before, result


def four(path: Path, cache: WeightCache | None) -> list[Instance]:
    instances = [
        Instance(f"i{k}", path, WIDE, ModelParameters(), "cpu", "KIND_CPU", cache, 1)
        for k in range(4)
    ]
    batch = Batch((1,), ((np.ones((1, WIDTH), np.float32),),), ("y",))
    for instance in instances:
        instance.load()
        (part,) = instance.run(batch).parts
        assert part.error is None and part.outputs["y"].data[0, 0] == WIDTH
    return instances


def close(instances: list[Instance]) -> None:
    for instance in instances:
        instance.close()


@pytest.mark.parametrize("sharing", [True, False])
def test_four_instances_have_the_weights_once_when_they_share(tmp_path, sharing):
    """And, as the control, four times when they do not."""
    path = models.save_torchscript(Wide().eval(), tmp_path)
    warm, _ = grown_by(lambda: close(four(path, WeightCache())))
    assert warm < WEIGHT_BYTES / 2  # and nothing of it stays
    grown, instances = grown_by(lambda: four(path, WeightCache() if sharing else None))
    pointers = {instance.weight_pointer() for instance in instances}
    close(instances)
    if sharing:
        assert len(pointers) == 1 and 0.9 * WEIGHT_BYTES < grown < 1.1 * WEIGHT_BYTES
    else:
        assert len(pointers) == 4 and grown > 3.5 * WEIGHT_BYTES


@pytest.mark.parametrize("kind", ["KIND_CPU", "KIND_GPU"])
def test_sixteen_instances_are_fifteen_reuses(tmp_path, caplog, kind):
    path, cache = models.save_torchscript(models.identity(), tmp_path), WeightCache()
    instances = [
        Instance(f"m_1_{k}", path, ONE, ModelParameters(), "cpu", kind, cache) for k in range(16)
    ]
    with caplog.at_level(logging.INFO, "ray.serve"), ThreadPoolExecutor(16) as pool:
        list(pool.map(Instance.load, instances))
    lines = [line for line in caplog.messages if "Reusing" in line]
    assert len(lines) == len(set(lines)) == 15
    assert all(line.startswith("Reusing TorchScript model for instance 'm_1_") for line in lines)
    close(instances)
    assert len(cache) == 0


def test_a_load_that_is_given_up_leaves_no_lease(tmp_path):
    path, cache = models.save_torchscript(models.identity(), tmp_path), WeightCache()
    started, go_on = threading.Event(), threading.Event()
    value: Any = None

    def slow() -> Any:
        started.set()
        assert go_on.wait(10)
        return value

    instance = Instance("i", path, ONE, ModelParameters(), "cpu", "KIND_CPU", cache)
    value = instance._load_runtime()
    with ThreadPoolExecutor(3) as pool:
        key = weight_key(path, "cpu", "KIND_CPU", ONE.name)
        first = pool.submit(cache.lease, key, slow)
        assert started.wait(10)
        waiting: Future[None] = pool.submit(instance.load)
        closing = pool.submit(instance.close)
        go_on.set()
        first.result(10).release()
        waiting.result(10)
        closing.result(10)
    assert len(cache) == 0 and instance.progress().state == "stopped"


def test_a_load_that_fails_leaves_no_trace_and_the_next_one_loads(tmp_path):
    path, cache = models.version_folder(tmp_path) / "model.pt", WeightCache()
    path.write_bytes(b"no archive")
    pair = [
        Instance(f"i{k}", path, ONE, ModelParameters(), "cpu", "KIND_CPU", cache) for k in range(2)
    ]
    for instance in pair:
        with pytest.raises(ConfigError):
            instance.load()
        assert len(cache) == 0
    models.save_torchscript(models.identity(), tmp_path)
    for instance in pair:
        instance.load()
    assert pair[0]._lease is not None and cache.leases(pair[0]._lease._key) == 2
    close(pair)
    assert len(cache) == 0


# --- cleaning ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "enabled", "expected"),
    [
        ("KIND_GPU", True, 3),
        ("KIND_MODEL", True, 3),
        ("KIND_CPU", True, 0),
        ("KIND_GPU", False, 0),
        ("KIND_MODEL", False, 0),
    ],
)
def test_the_cache_is_cleaned_once_per_execution_off_the_cpu(tmp_path, kind, enabled, expected):
    path, cleaned = models.save_torchscript(models.RefusesNegative(), tmp_path), list[int]()
    instance = Instance(
        "i",
        path,
        ONE,
        ModelParameters(enable_cache_cleaning=enabled),
        "cpu",
        kind,
        clean=lambda: cleaned.append(1),
    )
    instance.load()
    try:
        assert not cleaned  # loading is no execution
        for value in (1, 2, -1):  # the one that fails leaves memory behind, too
            row = np.full((1, 4), value, np.float32)
            (part,) = instance.run(Batch((1,), ((row,),), ("y",))).parts
            assert isinstance(part.error, ExecutionFailed) == (value < 0)
        assert len(cleaned) == instance.cleanings == expected
    finally:
        instance.close()
