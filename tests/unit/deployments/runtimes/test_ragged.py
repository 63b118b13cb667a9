from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.errors import ConfigError
from configs.model import BatchInput, ModelConfig, ModelInput
from configs.parameters import ModelParameters
from deployments.errors import ExecutionFailed
from deployments.instance import Instance
from deployments.runtimes import ragged
from deployments.signature import Signature, Slot
from deployments.types import Batch
from tests import models
from tests.models import config
from tests.ragged import KINDS, SOURCE, packed, packed_config, told

CPU = torch.device("cpu")
Start = Callable[..., Instance]
OUTPUTS = ("OUTPUT__0", "OUTPUT__1", "OUTPUT__2")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Loads the packed model as `kind`; closes it after the test."""
    opened: list[Instance] = []

    def make(made: ModelConfig, kind: str = "torchscript") -> Instance:
        if kind == "eager":
            path = models.save_eager(SOURCE, tmp_path)
            made = made.model_copy(update={"runtime": "model.py", "platform": ""})
        else:
            path = models.save_torchscript(packed(tmp_path / "packed.py"), tmp_path)
        parameters = ModelParameters(torch_compile_optional_parameters={"disable": True})
        instance = Instance("i", path, made, parameters, "cpu", "KIND_CPU")
        opened.append(instance)
        instance.load()
        return instance

    yield make
    for instance in opened:
        instance.close()


def batch_of(*shapes: tuple[int, ...], spoilt: int | None = None) -> Batch:
    """Members count up from their own hundred; the spoilt one counts down from below zero."""
    arrays: list[np.ndarray] = []
    for k, shape in enumerate(shapes):
        values = np.arange(np.prod(shape), dtype=np.float32) + 100 * k
        arrays.append((-1 - values if k == spoilt else values).reshape(shape))
    ids = tuple(np.full((shape[0], 1), k, np.int32) for k, shape in enumerate(shapes))
    return Batch(tuple(shape[0] for shape in shapes), (tuple(arrays), ids), OUTPUTS)


def doubled(batch: Batch, members: tuple[int, ...]) -> np.ndarray:
    arrays = [batch.inputs[0][k] for k in members]
    return np.concatenate([np.asarray(array).ravel() * 2 for array in arrays])


def made(kind: str, *shapes: tuple[int, ...], data_type: str = "TYPE_INT32") -> torch.Tensor:
    one = BatchInput(kind=kind, target_name=("t",), data_type=data_type, source_input=("x",))
    of = ragged.of(config({"x": (-1,)}, {"y": (-1,)}, batch_input=(one,)))
    assert of is not None
    (tensor,) = of.generate([shapes], CPU)
    return tensor


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("BATCH_ELEMENT_COUNT", [6, 0, 2]),
        ("BATCH_ACCUMULATED_ELEMENT_COUNT", [6, 6, 8]),
        ("BATCH_ACCUMULATED_ELEMENT_COUNT_WITH_ZERO", [0, 6, 6, 8]),
        ("BATCH_ITEM_SHAPE", [[3, 1], [3, 1], [0, 7], [1, 2]]),
        ("BATCH_ITEM_SHAPE_FLATTEN", [3, 1, 3, 1, 0, 7, 1, 2]),
    ],
)
@pytest.mark.parametrize("data_type", ["TYPE_INT32", "TYPE_FP32"])
def test_each_kind(kind, expected, data_type):
    tensor = made(kind, (2, 3, 1), (1, 0, 7), (1, 1, 2), data_type=data_type)
    assert tensor.tolist() == expected
    assert tensor.dtype == (torch.int32 if data_type == "TYPE_INT32" else torch.float32)


def test_the_largest_count_is_a_shape():
    assert made("BATCH_MAX_ELEMENT_COUNT_AS_SHAPE", (2, 3), (1, 9), (1, 0)).shape == (9,)
    assert made("BATCH_MAX_ELEMENT_COUNT_AS_SHAPE", (1, 0)).shape == (0,)


def test_items_of_rows_alone_have_no_sizes():
    assert made("BATCH_ITEM_SHAPE", (2,), (1,)).shape == (3, 0)


def test_a_plain_model_has_none_of_this():
    assert ragged.of(config({"x": (-1,)}, {"y": (-1,)})) is None


@pytest.mark.parametrize("kind", ["torchscript", "eager"])
@pytest.mark.parametrize(
    "shapes",
    [
        [(1, 3), (2, 1), (1, 5)],
        [(1, 4), (1, 4)],
        [(3, 2)],
        [(1, 0), (1, 2)],
    ],
)
def test_a_model_is_told_what_is_in_its_batch(start, kind, shapes):
    batch = batch_of(*shapes)
    (part,) = start(packed_config(), kind).run(batch).parts
    assert part.error is None
    np.testing.assert_array_equal(part.outputs["OUTPUT__0"].data, doubled(batch, part.members))
    rows = sum(batch.rows)
    assert part.outputs["OUTPUT__1"].data.tolist() == [told(shapes)] * rows
    assert len(part.outputs["OUTPUT__2"].data) == rows


def test_two_sizes_and_a_whole_that_came_joined(start):
    instance = start(packed_config(rank=2))
    shapes = [(1, 2, 3), (2, 2, 3)]
    batch = batch_of(*shapes)
    whole = [np.concatenate([np.asarray(one) for one in members]) for members in batch.inputs]
    for one in (batch, Batch(batch.rows, ((), ()), OUTPUTS, (whole[0], whole[1]))):
        (part,) = instance.run(one).parts
        assert part.error is None
        np.testing.assert_array_equal(part.outputs["OUTPUT__0"].data, doubled(batch, (0, 1)))
        assert part.outputs["OUTPUT__1"].data[0].tolist() == told(shapes)


def test_a_culprit_fails_alone_and_the_others_are_told_of_themselves(start):
    shapes: list[tuple[int, ...]] = [(1, 3), (1, 2), (2, 1)]
    batch = batch_of(*shapes, spoilt=1)
    parts = {part.members: part for part in start(packed_config()).run(batch).parts}
    assert isinstance(parts[(1,)].error, ExecutionFailed)
    for k in (0, 2):
        outputs = parts[(k,)].outputs
        np.testing.assert_array_equal(outputs["OUTPUT__0"].data, doubled(batch, (k,)))
        assert outputs["OUTPUT__1"].data[0].tolist() == told([shapes[k]])


# --- where they go -------------------------------------------------------------------------------


def script(*arguments: str) -> Signature:
    return Signature(
        tuple(Slot(i, f"ARGS[{i}]", ("ARGS", i), a, False) for i, a in enumerate(arguments))
    )


def generated(inputs: list[str], targets: list[str]) -> ModelConfig:
    return config(
        [ModelInput(name=name, data_type="TYPE_FP32", dims=(-1,)) for name in inputs],
        {"y": (-1,)},
        batch_input=tuple(
            BatchInput(target_name=(t,), data_type="TYPE_INT32", source_input=(inputs[0],))
            for t in targets
        ),
    )


@pytest.mark.parametrize(
    ("inputs", "targets", "places"),
    [
        (["b", "a"], ["d", "c"], [1, 0, 3, 2]),
        (["x__2", "y__0"], ["c__3", "d__1"], [2, 0, 3, 1]),
        (["first", "second"], ["c", "third"], [0, 1, 2, 3]),
    ],
)
def test_targets_follow_the_convention_of_the_inputs(inputs, targets, places):
    binding = ragged.bind_all(generated(inputs, targets), script("a", "b", "c", "d"))
    assert [slot.position for slot in binding.inputs] == places


@pytest.mark.parametrize(
    ("inputs", "targets", "text"),
    [
        (["a", "b"], ["c", "other"], "batch input 'other' must be an argument of forward, which"),
        (["x__0", "x__1"], ["c", "y__3"], "batch input 'c' must be of the form <name>__<index>"),
        (["x__0", "x__1"], ["y__2", "y__9"], "'y__9' is not an input of the model; it offers"),
        (["x__0", "x__1"], ["y__2", "y__1"], "'y__1' and input 'x__1' are the same input"),
        (["x__0", "x__1"], ["y__2"], "configuration expects 3 inputs, model provides 4"),
    ],
)
def test_targets_that_mean_nothing(inputs, targets, text):
    with pytest.raises(ConfigError, match=text) as caught:
        ragged.bind_all(generated(inputs, targets), script("a", "b", "c", "d"))
    field: Any = caught.value.args[2]
    assert field == "input" or field.startswith("batch_input["), field


def test_kinds_are_all_there():
    from tritonclient.grpc import model_config_pb2 as pb

    assert {kind for kind, _ in KINDS.values()} == set(pb.BatchInput.Kind.keys())
