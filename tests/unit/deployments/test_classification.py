from __future__ import annotations

import math

import numpy as np
import pytest

from deployments import classification
from deployments.errors import InvalidArgument
from deployments.tensors import decode_bytes
from deployments.types import MemoryRange, RequestedOutput, Tensor

LABELS = ("cat", "dog", "", "bird")


def tensor(values, dtype=np.float32):
    array = np.array(values, dtype)
    return Tensor("Y", "FP32", array.shape, array)


def classes(values, count, labels=(), batched=True, dtype=np.float32):
    answer = classification.classify(tensor(values, dtype), count, labels, batched)
    assert (answer.name, answer.datatype) == ("Y", "BYTES")
    return answer.shape, [text.decode() for text in decode_bytes("Y", answer.data)]


def test_best_first_with_six_decimals():
    shape, texts = classes([[0.1, 0.9, -2.5]], 3)
    assert (shape, texts) == ((1, 3), ["0.900000:1", "0.100000:0", "-2.500000:2"])


def test_integers_are_written_as_integers():
    low, high = -(2**63), 2**63 - 1
    _, texts = classes([[low, high, 0]], 3, dtype=np.int64)
    assert texts == [f"{high}:1", "0:2", f"{low}:0"]
    _, texts = classes([[0, 2**64 - 1, 7]], 2, dtype=np.uint64)
    assert texts == [f"{2**64 - 1}:1", "7:2"]


def test_labels_where_there_are_some():
    _, texts = classes([[1, 2, 3, 4, 5]], 5, LABELS, dtype=np.int32)
    assert texts == ["5:4", "4:3:bird", "3:2", "2:1:dog", "1:0:cat"]


def test_labels_are_utf_8():
    answer = classification.classify(tensor([[1.0]]), 1, ("größe",), True)
    assert decode_bytes("Y", answer.data) == ["1.000000:0:größe".encode()]


@pytest.mark.parametrize(
    ("values", "count", "batched", "shape"),
    [
        ([[1, 2, 3], [4, 5, 6]], 2, True, (2, 2)),
        ([[1, 2, 3], [4, 5, 6]], 9, True, (2, 3)),
        ([[1, 2, 3], [4, 5, 6]], 2, False, (2,)),
        ([[1, 2, 3], [4, 5, 6]], 2**70, False, (6,)),
        ([[[1, 2], [3, 4]]], 3, True, (1, 3)),
        ([1, 2, 3], 2, False, (2,)),
        ([1, 2, 3], 2, True, (3, 1)),
        (5, 2, False, (1,)),
        ([[], []], 2, True, (2, 0)),
        ([], 2, False, (0,)),
    ],
)
def test_shapes(values, count, batched, shape):
    got, texts = classes(values, count, batched=batched)
    assert (got, len(texts)) == (shape, math.prod(shape))


def test_each_row_has_its_own_best():
    _, texts = classes([[1, 2], [4, 3]], 1, ("a", "b"))
    assert texts == ["2.000000:1:b", "4.000000:0:a"]


def test_of_equal_scores_the_lower_index_comes_first():
    _, texts = classes([[1, 7, 7, 0, 7]], 4, dtype=np.uint8)
    assert texts == ["7:1", "7:2", "7:4", "1:0"]
    _, texts = classes([[0.0, -0.0, 0.0]], 3)
    assert texts == ["0.000000:0", "-0.000000:1", "0.000000:2"]


def test_what_is_no_number_comes_last():
    _, texts = classes([[math.nan, -math.inf, math.nan, math.inf, 0]], 5)
    assert texts == ["inf:3", "0.000000:4", "-inf:1", "nan:0", "nan:2"]


def test_a_transposed_output():
    values = np.arange(6, dtype=np.float32).reshape(3, 2).T
    answer = classification.classify(Tensor("Y", "FP32", (2, 3), values), 1, (), True)
    assert decode_bytes("Y", answer.data) == [b"4.000000:2", b"5.000000:2"]


def reference(row, count):
    def key(index):
        value = row[index].item()
        lost = isinstance(value, float) and math.isnan(value)
        return lost, 0 if lost else -value, index

    return sorted(range(len(row)), key=key)[:count]


ODD = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1.5, -2.0]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int8, np.uint8, np.int64, np.uint64])
@pytest.mark.parametrize("elements", [1, 7, 1024, 1025, 5000])
def test_the_best_of_many_are_those_of_a_full_sort(dtype, elements):
    random = np.random.default_rng(elements)
    if np.dtype(dtype).kind == "f":
        few = random.choice(ODD, (3, elements)).astype(dtype)
        many = random.standard_normal((3, elements)).astype(dtype)
        mostly_lost = np.where(random.random((3, elements)) < 0.001, many, math.nan).astype(dtype)
        tables = [few, many, mostly_lost]
    else:
        ends = np.iinfo(dtype)
        few = random.choice(np.array([ends.min, ends.max, 1], dtype), (3, elements))
        tables = [few, random.integers(ends.min, ends.max, (3, elements), dtype)]
    for table in tables:
        for count in {1, min(5, elements), max(1, elements // 5), elements}:
            order = classification.top(table, count)
            assert order.shape == (3, count)
            for row, places in zip(table, order, strict=True):
                assert places.tolist() == reference(row, count)


# --- what cannot be classified ----------------------------------------


@pytest.mark.parametrize("datatype", ["BOOL", "FP16", "BF16", "BYTES"])
def test_types_without_classes(datatype):
    with pytest.raises(InvalidArgument) as caught:
        classification.check(RequestedOutput("Y", classification=1), datatype)
    assert str(caught.value) == (
        f"class result not available for output due to unsupported type '{datatype}'"
    )


@pytest.mark.parametrize("datatype", ["FP32", "FP64", "INT8", "UINT64"])
def test_types_with_classes(datatype):
    classification.check(RequestedOutput("Y", classification=1), datatype)


def test_classes_do_not_go_into_shared_memory():
    output = RequestedOutput("Y", False, 1, MemoryRange("r", 8))
    with pytest.raises(InvalidArgument, match="both 'shared_memory_region' and 'classification'"):
        classification.check(output, "FP32")


def shaped(*shape):
    """A tensor of that shape which takes no memory."""
    return Tensor("Y", "FP32", shape, np.broadcast_to(np.float32(0), shape))


@pytest.mark.parametrize(
    ("shape", "count", "batched"),
    [
        ((1, 1_000_001), 1, True),
        ((1_000_001,), 1, False),
        ((2, 500_001), 1, False),
        ((2, 600_000), 600_000, True),
        ((1001, 1000), 2**80, True),
    ],
)
def test_too_much_to_classify(shape, count, batched):
    with pytest.raises(InvalidArgument, match="^classification output tensor too large$"):
        classification.effort(shaped(*shape), count, batched)


def test_effort_grows_with_the_output_and_with_the_count():
    assert classification.effort(shaped(1, 1_000_000), 1_000_000, True) > 1 << 30
    assert classification.effort(shaped(64, 1_000_000), 1, True) > 1 << 30
    assert classification.effort(shaped(1, 1000), 5, True) < 1 << 18
    assert classification.effort(shaped(1, 0), 5, True) == 0
