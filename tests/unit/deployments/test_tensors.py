from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.dtypes import DATATYPES
from deployments import tensors
from deployments.errors import Internal, InvalidArgument
from deployments.types import Tensor

NUMERIC = [each for each in DATATYPES if each.numpy]


@pytest.mark.parametrize("kind", NUMERIC, ids=lambda kind: kind.wire)
def test_binary_round_trip_is_exact_and_copies_nothing(kind):
    data = np.arange(6).astype(kind.numpy).tobytes()
    tensor = tensors.from_binary("x", kind.wire, (2, 3), memoryview(data), "m")
    assert tensor.data.shape == (2, 3)
    assert tensor.data.dtype == np.dtype(kind.numpy)
    assert not tensor.data.flags.owndata
    assert bytes(tensors.to_binary(tensor)) == data


def test_a_strided_array_leaves_in_row_major_order():
    data = np.arange(6, dtype=np.int32).reshape(2, 3).T
    wire = tensors.to_binary(Tensor("x", "INT32", (3, 2), data))
    assert np.frombuffer(wire, np.int32).tolist() == data.flatten().tolist()


@pytest.mark.parametrize("got", [0, 31, 33, 40])
def test_binary_size_must_match(got):
    with pytest.raises(InvalidArgument) as error:
        tensors.from_binary("INPUT0", "FP32", (1, 8), bytes(got), "pt_identity")
    assert str(error.value) == (
        "input byte size mismatch for input 'INPUT0' for model 'pt_identity'. "
        f"Expected 32, got {got}"
    )


@pytest.mark.parametrize("datatype", ["FP32", "BYTES", "BF16"])
def test_zero_elements(datatype):
    tensor = tensors.from_binary("x", datatype, (0, 4), b"", "m")
    assert tensor.data.size == 0
    assert bytes(tensors.to_binary(tensor)) == b""
    if datatype != "BF16":
        assert tensors.from_json("x", datatype, (0, 4), None).data.size == 0


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ((2**32, 2**32), "causes total element count to exceed maximum size of"),
        ((2**4, 2**60 + 2), "causes total element count to exceed maximum size of"),
        ((0, 2**62, 2**62), "causes total element count to exceed maximum size of"),
        ((2**2, 2**60 + 2), "byte size overflow for input"),
        ((1,) * 65, "dimensions"),
        ((1,) * 100_000, "dimensions"),
        ((-1, 2), "negative dimension"),
    ],
)
def test_shapes_that_no_array_can_have(shape, text):
    for make in (tensors.from_binary, tensors.from_json):
        with pytest.raises(InvalidArgument, match=text):
            make("x", "FP32", shape, b"")


@pytest.mark.parametrize("datatype", ["", "FP8", "TYPE_FP32", None])
def test_unknown_datatype(datatype):
    with pytest.raises(InvalidArgument, match="invalid datatype"):
        tensors.from_binary("x", datatype, (1,), b"0000")


@given(st.lists(st.binary(max_size=9), max_size=9))
def test_strings_round_trip(elements):
    assert tensors.decode_bytes("x", tensors.encode_bytes(elements)) == elements


@pytest.mark.parametrize(
    ("wire", "text"),
    [
        (b"\x01\0\0", "incomplete string length indicator"),
        (b"\x05\0\0\0abc", "incomplete string data"),
        (b"\xff\xff\xff\xffabc", "incomplete string data"),
        (b"\x01\0\0\0a" * 3, "unexpected number of string elements 3"),
        (b"\x01\0\0\0a", "expected 2 string elements"),
    ],
)
def test_wrong_strings(wire, text):
    with pytest.raises(InvalidArgument, match=text):
        tensors.check_strings("x", np.frombuffer(wire, np.uint8), 2, "m")


def test_too_many_strings():
    wire = np.zeros(4 * (tensors.MAX_STRINGS + 1), np.uint8)
    with pytest.raises(InvalidArgument, match="string elements"):
        tensors.decode_bytes("x", wire)


@pytest.mark.parametrize(
    "data", [[1, 2, 3, 4], [[1, 2], [3, 4]], [[[1], [2, 3]], 4], [1, [2, [3], 4]]]
)
def test_json_may_nest_in_any_way(data):
    assert tensors.from_json("x", "INT16", (2, 2), data).data.tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("datatype", "data", "error"),
    [
        ("INT8", [128], InvalidArgument),
        ("INT8", [-129], InvalidArgument),
        ("UINT8", [-1], InvalidArgument),
        ("UINT64", [2**64], InvalidArgument),
        ("INT32", [1.0], Internal),
        ("INT32", [True], Internal),
        ("FP32", [True], Internal),
        ("FP32", ["1"], Internal),
        ("FP32", [None], Internal),
        ("FP64", [10**400], InvalidArgument),
        ("BOOL", [1], Internal),
        ("BYTES", [1], Internal),
        ("BYTES", ["\ud800"], InvalidArgument),
        ("FP32", {}, Internal),
        ("FP32", [{}], Internal),
        ("FP32", "1", Internal),
        ("FP16", [1.0], InvalidArgument),
        ("BF16", [1.0], InvalidArgument),
    ],
)
def test_json_elements_have_the_right_type_and_range(datatype, data, error):
    with pytest.raises(error):
        tensors.from_json("x", datatype, (1,), data)


@pytest.mark.parametrize(
    ("datatype", "data"),
    [
        ("INT8", [-128, 127]),
        ("UINT64", [0, 2**64 - 1]),
        ("INT64", [-(2**63), 2**63 - 1]),
        ("FP32", [1, 2.5]),
        ("FP64", [float("inf"), -0.0]),
        ("BOOL", [True, False]),
    ],
)
def test_json_values_survive(datatype, data):
    tensor = tensors.from_json("x", datatype, (2,), data)
    assert list(tensors.to_json_data(tensor)) == data


def test_json_count_must_match():
    with pytest.raises(Internal) as fewer:
        tensors.from_json("x", "FP32", (4,), [1.0])
    assert str(fewer.value) == "Failed to parse 'data' field: shape does not match true shape"
    with pytest.raises(Internal) as more:
        tensors.from_json("x", "FP32", (1,), [1.0, 2.0])
    assert str(more.value) == (
        "Unable to parse 'data': Shape does not match true shape of 'data' field"
    )


@pytest.mark.parametrize("beside", [[], [1.0]])
def test_nesting_is_bounded(beside):
    def nested(depth):
        data: list = [1.0]
        for _ in range(depth - 1):
            data = [data, *beside]
        return data

    count = 1 + 49 * len(beside)
    assert tensors.from_json("x", "FP32", (count,), nested(50)).data.size == count
    with pytest.raises(InvalidArgument) as error:
        tensors.from_json("x", "FP32", (1,), nested(120))
    assert str(error.value) == "JSON nesting depth exceeds maximum allowed limit (100)"


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_half_precision_has_no_json(datatype):
    tensor = tensors.from_binary("y", datatype, (1,), b"\0\0")
    with pytest.raises(InvalidArgument, match=f"sending {datatype} data via JSON is not supported"):
        tensors.to_json_data(tensor)


def test_strings_in_json_are_utf8():
    text = Tensor("y", "BYTES", (2,), tensors.encode_bytes(["é\0".encode(), b""]))
    assert tensors.to_json_data(text) == ["é\0", ""]
    with pytest.raises(InvalidArgument, match="not UTF-8"):
        tensors.to_json_data(Tensor("y", "BYTES", (1,), tensors.encode_bytes([b"\xff"])))
