"""Joined inputs, as the channel brings them; batches by member are in test_instance."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch

from deployments.desk import SendAgain
from deployments.errors import ExecutionFailed, InvalidArgument
from deployments.types import Batch
from tests import models
from tests.models import config, string_input
from tests.ragged import packed, packed_config, told

from .channels import ONE, batch_of, drive, place, rows, whole


def joined(batch: Batch) -> Batch:
    return Batch(batch.rows, ((),), batch.outputs, (whole(batch),))


@drive
async def test_a_joined_input_reaches_the_model_as_it_is():
    source = (
        "import torch\nclass Net(torch.nn.Module):\n    def forward(self, x):\n"
        "        return torch.full((x.shape[0], 1), x.data_ptr())"
    )
    made = config({"x": (-1,)}, {"y": (1,)}, max_batch_size=64)
    made = made.model_copy(
        update={"output": (made.output[0].model_copy(update={"data_type": "TYPE_INT64"}),)}
    )
    async with place(source, made) as at:
        one = joined(batch_of(*rows(3)))
        (part,) = (await asyncio.wrap_future(at.instance.submit(one))).parts
        assert one.joined[0] is not None and part.members == (0, 1, 2)
        assert set(part.outputs["y"].data.flatten().tolist()) == {one.joined[0].ctypes.data}


@drive
async def test_what_the_model_may_have_changed_is_asked_for_again():
    async with place(models.RefusesNegative()) as at:
        batch = batch_of(*rows(2), -rows(1)[0])
        with pytest.raises(SendAgain) as caught:
            await asyncio.wrap_future(at.instance.submit(joined(batch)))
        assert caught.value.how == "singly"
        assert at.instance.progress().state == "idle"


@drive
async def test_without_batching_members_are_cut_out():
    made = ONE.model_copy(update={"max_batch_size": 0})
    async with place(models.identity(), made) as at:
        batch = batch_of(*rows(3))
        parts = (await asyncio.wrap_future(at.instance.submit(joined(batch)))).parts
        assert [part.members for part in parts] == [(0,), (1,), (2,)]
        for part, row in zip(parts, rows(3), strict=True):
            np.testing.assert_array_equal(part.outputs["y"].data, row)


@drive
async def test_ragged_members_come_over_the_channel_joined_or_not(tmp_path):
    """Equal shapes are joined on their way; a culprit among them has them sent once more, apart."""
    async with place(packed(tmp_path / "packed.py"), packed_config()) as at:
        client = await at.connect()
        for shapes in ([(1, 3), (2, 3)], [(1, 3), (2, 5), (1, 0)]):
            for culprit in (None, 1):
                x = [np.full(s, -1 if k == culprit else k + 1, "f4") for k, s in enumerate(shapes)]
                ids = [np.full((s[0], 1), k, "i4") for k, s in enumerate(shapes)]
                names = ("OUTPUT__0", "OUTPUT__1", "OUTPUT__2")
                batch = Batch(tuple(s[0] for s in shapes), (tuple(x), tuple(ids)), names)
                for part in (await client.execute(batch)).parts:
                    if part.error is not None:
                        assert part.members == (culprit,)
                        continue
                    flat = np.concatenate([x[k].ravel() * 2 for k in part.members])
                    assert part.outputs["OUTPUT__0"].data.tolist() == flat.tolist()
                    expected = told([shapes[k] for k in part.members])
                    assert part.outputs["OUTPUT__1"].data[0].tolist() == expected
        await client.aclose()


# Changes what it is given, and has no memory at its first run.
ONCE = """
import torch
class Net(torch.nn.Module):
    runs = 0
    def forward(self, x):
        x.mul_(10)
        self.runs += 1
        if self.runs == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x
"""


class Once(torch.nn.Module):
    """The same, beside strings."""

    def __init__(self) -> None:
        super().__init__()
        self.runs = 0

    def forward(self, words: list[str], x: torch.Tensor) -> torch.Tensor:
        x.mul_(10)
        self.runs += 1
        if self.runs == 1:
            raise RuntimeError("CUDA out of memory")
        return x


@drive
async def test_a_member_alone_is_not_run_again_on_what_a_failed_run_has_changed():
    async with place(ONCE) as at:
        (row,) = rows(1)
        (part,) = (await asyncio.wrap_future(at.instance.submit(batch_of(row.copy())))).parts
        assert isinstance(part.error, ExecutionFailed)
        (part,) = (await asyncio.wrap_future(at.instance.submit(batch_of(row.copy())))).parts
        np.testing.assert_array_equal(part.outputs["y"].data, row * np.float32(10))


@drive
async def test_nor_is_one_that_ran_alone_because_its_neighbours_are_bad():
    inputs = config([string_input("words")], {"y": (-1,)}).input
    made = config({"x": (-1,)}, {"y": (-1,)}, max_batch_size=64)
    made = made.model_copy(update={"input": (*inputs, *made.input)})
    strings = tuple(np.frombuffer(b"\1\0\0\0" + text, np.uint8) for text in (b"a", b"\xff"))
    async with place(Once(), made) as at:
        members = rows(2)
        wanted = members[0] * np.float32(10)
        batch = Batch((1, 1), (strings, tuple(members)), ("y",))
        parts = (await asyncio.wrap_future(at.instance.submit(batch))).parts
        good, bad = sorted(parts, key=lambda part: part.members)
        assert isinstance(bad.error, InvalidArgument)
        assert good.error is None
        np.testing.assert_array_equal(good.outputs["y"].data, wanted)
