"""What a replica does before it imports torch, and what it tells of errors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest

from deployments import replica
from deployments.types import ReplicaSpec
from tests import models

SPEC = ReplicaSpec(
    controller_application="manta",
    application="manta.m.1.7",
    deployment="m_gpu1",
    repository="/srv/models",
    model_name="m",
    version=1,
    config=models.config({"x": [2]}, {"y": [2]}),
    content_hash="h",
    fingerprint="f",
    kind="KIND_GPU",
    gpu=1,
    instances=1,
    threads=1,
    max_execution_s=1.0,
    environment={"CUDA_LAUNCH_BLOCKING": "1"},
)


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    before = dict(os.environ)
    os.environ.pop("MANTA_VISIBLE_DEVICES", None)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize(
    ("visible", "gpu", "device"),
    [("", 1, "1"), ("4,6", 1, "6"), ("4,6", 0, "4"), ("GPU-a,GPU-b", 1, "GPU-b"), ("4", 2, "2")],
)
def test_the_listed_index_is_the_only_device(visible: str, gpu: int, device: str) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = "0"  # what Ray chose, packing fractions
    if visible:
        os.environ["MANTA_VISIBLE_DEVICES"] = visible
    replica._set_environment(replace(SPEC, gpu=gpu))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == device
    assert os.environ["CUDA_LAUNCH_BLOCKING"] == "1"
    assert replica._device(SPEC) == "cuda:0"


def test_logical_gpus_and_cpu_groups_leave_the_devices_alone() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = "0"
    for spec in (replace(SPEC, logical_gpus=True), replace(SPEC, kind="KIND_CPU", gpu=None)):
        replica._set_environment(spec)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
        assert replica._device(spec) == "cpu"


def test_unexpected_errors_tell_no_place_on_this_host() -> None:
    error = OSError("cannot open /srv/models/m/1/model.pt beside /usr/lib/python3/site.py")
    text = replica._without_paths(error, SPEC)
    assert "/srv" not in text and "/usr" not in text and "model.pt" in text
