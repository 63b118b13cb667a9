"""Outputs cut by the shapes of inputs, through the Batcher that does it."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from deployments.batcher import Batcher, MemberResult
from deployments.errors import ExecutionFailed, MantaError, Unsupported
from deployments.scatter import Scatter
from deployments.scheduler import Entry, Group
from deployments.types import Batch, BatchReply, OutputArray, Part
from tests.models import config
from tests.ragged import packed_config

NAMES = ("OUTPUT__0", "OUTPUT__2")


class Place:
    def __init__(self, *parts: Part) -> None:
        self._reply = BatchReply(parts)

    async def execute(self, batch: Batch) -> BatchReply:
        return self._reply


def group_of(*shapes: tuple[int, ...]) -> Group:
    return Group(
        tuple(
            Entry(shape[0], (), 0, (np.zeros(shape, np.float32), np.zeros((shape[0], 1))), NAMES)
            for shape in shapes
        ),
        0,
    )


def results_of(group: Group, scatter: Scatter, *parts: Part) -> list[MemberResult | MantaError]:
    async def run() -> list[MemberResult | MantaError]:
        outcome = await Batcher("m", True, scatter=scatter).run(group, Place(*parts))
        return list(outcome.results)

    return asyncio.run(run())


def part(members: tuple[int, ...], elements: int, rows: int) -> Part:
    outputs = {
        "OUTPUT__0": OutputArray(np.arange(elements, dtype=np.float32)),
        "OUTPUT__2": OutputArray(np.arange(rows).reshape(rows, 1)),
    }
    return Part(members, outputs)


def output(result: MemberResult | MantaError, name: str) -> np.ndarray:
    assert isinstance(result, MemberResult), result
    return result.outputs[name].data


SHAPES = ((1, 3), (2, 2), (1, 0), (1, 5))


def test_elements_go_by_shapes_and_rows_by_rows():
    results = results_of(group_of(*SHAPES), Scatter(packed_config()), part((0, 1, 2, 3), 12, 5))
    start = row = 0
    for result, shape in zip(results, SHAPES, strict=True):
        count = int(np.prod(shape))
        expected = np.arange(start, start + count).reshape(shape)
        np.testing.assert_array_equal(output(result, "OUTPUT__0"), expected)
        rows = np.arange(row, row + shape[0]).reshape(-1, 1)
        np.testing.assert_array_equal(output(result, "OUTPUT__2"), rows)
        start, row = start + count, row + shape[0]


def test_each_part_of_a_batch_that_was_run_again_starts_anew():
    parts = (part((0, 3), 8, 2), part((1,), 4, 2), Part((2,), {}, ExecutionFailed("bad")))
    results = results_of(group_of(*SHAPES), Scatter(packed_config()), *parts)
    assert output(results[0], "OUTPUT__0").tolist() == [[0, 1, 2]]
    assert output(results[3], "OUTPUT__0").tolist() == [[3, 4, 5, 6, 7]]
    assert output(results[1], "OUTPUT__0").tolist() == [[0, 1], [2, 3]]
    assert isinstance(results[2], ExecutionFailed)


def test_fixed_sizes_are_the_outputs_own():
    """[rows, 3] of each member, whatever the size of its input."""
    made = packed_config()
    outputs = (made.output[0].model_copy(update={"dims": (3,)}), *made.output[1:])
    scatter = Scatter(made.model_copy(update={"output": outputs}))
    results = results_of(group_of((1, 9), (2, 1)), scatter, part((0, 1), 9, 3))
    assert output(results[0], "OUTPUT__0").tolist() == [[0, 1, 2]]
    assert output(results[1], "OUTPUT__0").tolist() == [[3, 4, 5], [6, 7, 8]]


def test_too_few_elements_fail_the_tail_alone():
    results = results_of(group_of(*SHAPES), Scatter(packed_config()), part((0, 1, 2, 3), 11, 5))
    assert output(results[1], "OUTPUT__0").shape == (2, 2)
    assert isinstance(results[3], Unsupported)
    with pytest.raises(Unsupported, match="expected at least 12 elements, got 11"):
        raise results[3]


def test_surplus_elements_are_dropped():
    results = results_of(group_of(*SHAPES), Scatter(packed_config()), part((0, 1, 2, 3), 99, 5))
    assert output(results[3], "OUTPUT__0").tolist() == [[7, 8, 9, 10, 11]]


def test_a_plain_model_has_none():
    assert not Scatter(config({"x": (4,)}, {"y": (4,)}))
