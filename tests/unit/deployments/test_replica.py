"""What a replica does before it imports torch, and what it tells of errors."""

from __future__ import annotations

import asyncio
import os
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from configs.model import ModelWarmup, WarmupInput
from deployments import instance as instances
from deployments import replica, warmup
from deployments.types import Batch, BatchReply, Part, ReplicaSpec
from tests import models

from .channels import Place, batch_of, drive, place, rows, until

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


class Recorded:
    """An instance that writes down what it is told."""

    name = "m_1_m_0_0"

    def __init__(self) -> None:
        self.calls: list[str] = []

    def load(self) -> None:
        self.calls.append("load")

    def warm(self, batch: Batch) -> BatchReply:
        self.calls.append("warm")
        return BatchReply((Part((0,), {}),))


@pytest.mark.parametrize(("passive", "calls"), [(False, ["load", "warm"]), (True, ["load"])])
def test_passive_instances_are_loaded_and_not_warmed(passive: bool, calls: list[str]) -> None:
    zeros = WarmupInput(data_type="TYPE_FP32", dims=(2,), zero_data=True)
    asked = ModelWarmup(name="w", batch_size=1, count=1, inputs={"x": zeros})
    config = SPEC.config.model_copy(update={"model_warmup": (asked,)})
    samples = warmup.prepare(config, "eager", Path)
    instance: Any = Recorded()
    replica._bring_up(instance, samples, replace(SPEC, config=config, passive=passive))
    assert instance.calls == calls


@pytest.mark.parametrize("changes", [{"kind": "KIND_CPU"}, {"logical_gpus": True}])
def test_only_a_device_has_a_compute_capability(changes: dict[str, object]) -> None:
    config = SPEC.config.model_copy(update={"cc_model_filenames": {"9.0": "h.pt"}})
    assert replica._capability(replace(SPEC, config=config, **changes)) == ""  # type: ignore[arg-type]
    assert replica._capability(SPEC) == ""  # nothing to choose: torch is not asked


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


HOLDS = (
    "import threading\nimport torch\nGO_ON = threading.Event()\n"
    "class Net(torch.nn.Module):\n    def forward(self, x):\n"
    "        assert GO_ON.wait(10)\n        return x"
)


def go_on(instance) -> None:
    sys.modules[type(instance._runtime.module).__module__].GO_ON.set()


@drive
async def test_a_batch_goes_where_least_is_done_and_is_refused_when_its_turn_does_not_come():
    async with place(HOLDS) as first, place(HOLDS) as second:
        both = [first.instance, second.instance]
        running = [asyncio.create_task(replica._run_on(both, batch_of(*rows(1)))) for _ in range(4)]
        await asyncio.sleep(0.05)
        assert [instance.slots.held for instance in both] == [2, 2]
        turns = [asyncio.create_task(replica._run_on(both, batch_of(*rows(1)))) for _ in range(9)]
        gone = turns.pop(0)
        await asyncio.sleep(0)
        gone.cancel()
        assert all([reply.refused for reply in await asyncio.gather(*turns)])
        for instance in both:
            go_on(instance)
        assert not any([reply.refused for reply in await asyncio.gather(*running)])
        assert not (await replica._run_on(both, batch_of(*rows(1)))).refused
        assert [instance.slots.held for instance in both] == [0, 0]
        assert max(instance.slots.peak_held for instance in both) == 2


@drive
async def test_a_batch_that_waits_for_its_turn_gets_it():
    async with place(models.identity()) as at:
        replies = [replica._run_on([at.instance], batch_of(*rows(1))) for _ in range(4)]
        assert not any([reply.refused for reply in await asyncio.gather(*replies)])


def test_unexpected_errors_tell_no_place_on_this_host() -> None:
    error = OSError("cannot open /srv/models/m/1/model.pt beside /usr/lib/python3/site.py")
    text = replica._without_paths(error, SPEC)
    assert "/srv" not in text and "/usr" not in text and "model.pt" in text


# --- the end -------------------------------------------------------------------------------------


def leaving(at: Place, max_execution_s: float = 30.0) -> asyncio.Task[None]:
    """What Serve awaits before it kills the process."""
    one: Any = types.SimpleNamespace(
        _instances=[at.instance],
        _doorway=at.door,
        _spec=replace(SPEC, max_execution_s=max_execution_s),
    )
    return asyncio.create_task(replica.ModelReplica.__del__(one))


@drive
async def test_what_a_replica_has_by_a_connection_is_answered_before_it_ends(monkeypatch):
    """However long it runs: longer here than a thread is waited for."""
    monkeypatch.setattr(instances, "_JOIN_S", 0.0)
    async with place(HOLDS) as at:
        client = await at.connect()
        replies = [client.execute(batch_of(*rows(1))) for _ in range(2)]
        await until(lambda: at.instance.slots.held > 0)  # the other one may not be read yet
        ending = leaving(at)
        await asyncio.wait({ending}, timeout=0.3)
        assert not ending.done()
        go_on(at.instance)
        assert not any([reply.refused for reply in await asyncio.gather(*replies)])
        await until(lambda: not client.idle)  # it is told to send no more
        await client.aclose()  # as a Router does that has heard of it
        await ending


@drive
async def test_a_batch_that_comes_too_late_is_handed_back_or_answered(monkeypatch):
    async with place(models.identity()) as at:
        client = await at.connect()
        ending = leaving(at)
        replies = [await client.execute(batch_of(*rows(1))) for _ in range(3)]
        assert len(replies) == 3 and client.open  # none is lost
        await client.aclose()
        await ending


@pytest.mark.parametrize("why", ["its Router has ended", "it hangs"])
@drive
async def test_control_nobody_waits_for_what_nobody_asks_for_or_never_ends(monkeypatch, why):
    monkeypatch.setattr(instances, "_JOIN_S", 0.0)
    async with place(HOLDS) as at:
        client = await at.connect()
        reply = client.execute(batch_of(*rows(1)))
        await until(lambda: at.instance.slots.held == 1)
        if why == "it hangs":
            await leaving(at, max_execution_s=0.05)
        else:
            ending = leaving(at)
            await client.aclose()
            await ending
        assert at.instance.slots.held == 1
        go_on(at.instance)
        await asyncio.wait({reply})
        await client.aclose()
        reply.exception()
