from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from configs.model import ModelInput, Reshape
from deployments.errors import ExecutionFailed, InvalidArgument
from deployments.runtimes import strings
from deployments.tensors import decode_bytes, encode_bytes, join_shape
from tests.models import string_input


def wire(*elements: bytes) -> np.ndarray:
    return encode_bytes(elements)


def declared(*dims: int, reshape: Reshape | None = None) -> ModelInput:
    return ModelInput(name="s", data_type="TYPE_STRING", dims=dims, reshape=reshape)


def objects(*rows: list[Any]) -> np.ndarray:
    return np.array(rows, object)


def test_lists_there_and_back():
    data = wire(b"a\0b", "ü".encode(), b"")
    found = strings.decode_strings(string_input("s"), data, 3, True)
    assert found == ["a\0b", "ü", ""]
    encoded = strings.encode_strings(found)
    assert encoded.data.tobytes() == data.tobytes()
    assert encoded.offsets is not None and encoded.offsets.tolist() == [0, 7, 13, 17]
    nothing = strings.encode_strings([])
    assert nothing.data.size == 0 and nothing.offsets is not None


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (wire(b"good", b"\xff"), "element 1 of input 's' is not UTF-8"),
        (wire(b"abc")[:-1], "incomplete string data"),
        (np.zeros(3, np.uint8), "incomplete string length"),
        (np.full(4, 255, np.uint8), "incomplete string data"),
        (wire(b"a", b"b", b"c"), "expected 2, got 3"),
        (wire(), "expected 2, got 0"),
    ],
)
def test_bad_lists(array, text):
    with pytest.raises(InvalidArgument, match=text):
        strings.decode_strings(string_input("s"), array, 2, True)


@pytest.mark.parametrize(
    ("tensor", "rows", "batching", "shape"),
    [
        (declared(2), 3, True, (3, 2)),
        (declared(-1), 3, True, (3, 2)),
        (declared(-1, 3), 1, False, (2, 3)),
        (declared(6), 1, False, (6,)),
        (declared(1, reshape=Reshape()), 6, True, (6,)),
        (declared(2, reshape=Reshape(shape=(1, 2))), 3, True, (3, 1, 2)),
    ],
)
def test_the_shape_of_objects_follows_from_their_count(tensor, rows, batching, shape):
    elements = [b"", b"\0", b"\xff\xfe", b"a\0b", b"long" * 99, "ü".encode()]
    made = strings.decode_objects(tensor, wire(*elements), rows, batching)
    assert made.dtype == object and made.shape == shape
    assert made.ravel().tolist() == elements


def test_objects_of_two_variable_sizes_come_with_their_shape():
    tensor = declared(-1, -1)
    elements = [b"1", b"2", b"3", b"4", b"5", b"6"]
    for shape in ((1, 2, 3), (1, 3, 2), (2, 3, 1)):
        sent = join_shape(shape, wire(*elements))
        made = strings.decode_objects(tensor, sent, shape[0], True)
        assert made.shape == shape and made.ravel().tolist() == elements
    empty = strings.decode_objects(tensor, join_shape((2, 0, 5), wire()), 2, True)
    assert empty.shape == (2, 0, 5)


def test_no_objects():
    assert strings.decode_objects(declared(-1), wire(), 3, True).shape == (3, 0)


@pytest.mark.parametrize(("dims", "text"), [((2,), "expected 4, got 3"), ((2, -1), "multiple of")])
def test_a_count_that_fits_no_shape(dims, text):
    with pytest.raises(InvalidArgument, match=text):
        strings.decode_objects(declared(*dims), wire(b"a", b"b", b"c"), 2, True)


@pytest.mark.parametrize(
    ("value", "shape"),
    [
        (objects([b"a", b"b"], [b"c", "ü"]), (2, 2)),
        (np.array([["a", "b"], ["c", "ü"]]), (2, 2)),
        (np.char.encode(np.array([["a", "b"], ["c", "ü"]]), "utf-8"), (2, 2)),
        ([["a", b"b"], ["c", "ü"]], (2, 2)),
        (np.array([[["a", "b"]], [["c", "ü"]]], object).transpose(1, 0, 2), (1, 2, 2)),
        (["a", b"b", "c", "ü"], None),
        (objects([b"a", b"b"], [b"c", "ü"]).ravel(), None),
    ],
)
def test_whatever_holds_text_is_encoded(value, shape):
    assert strings.is_text(value)
    encoded = strings.encode("y", value)
    assert encoded.shape == shape
    assert decode_bytes("y", encoded.data) == [b"a", b"b", b"c", "ü".encode()]
    assert encoded.offsets is not None and len(encoded.offsets) == 5


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
def test_nothing_keeps_its_shape(shape):
    encoded = strings.encode("y", np.empty(shape, object))
    assert encoded.data.size == 0 and (encoded.shape or (0,)) == shape


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (objects([b"a", 1]), InvalidArgument, "'y' must hold only str or bytes, and holds int"),
        (objects([None, b"a"]), InvalidArgument, "holds NoneType"),
        ([["a"], ["b", "c"]], InvalidArgument, "'y' must hold only str or bytes"),
        ([["a"], "b"], InvalidArgument, "'y' must hold only str or bytes"),
        (np.array(b"a", object), InvalidArgument, "scalar"),
        (["\ud800"], ExecutionFailed, "not UTF-8"),
        (np.array([["\ud800"]]), ExecutionFailed, "not UTF-8"),
    ],
)
def test_text_that_is_none(value, error, text):
    with pytest.raises(error, match=text):
        strings.encode("y", value)


@pytest.mark.parametrize("value", [[1.0], [["a"], 2], np.zeros(2), "a", b"a", None, ("a",)])
def test_what_is_no_text(value):
    assert not strings.is_text(value)
