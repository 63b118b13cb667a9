"""Tensors of traces: what is kept of them, and the text that Triton writes."""

from __future__ import annotations

import numpy as np
import pytest

from deployments.tensors import encode_bytes, join_shape
from deployments.traced_tensors import (
    MAX_ELEMENTS,
    MAX_STRING_BYTES,
    described,
    inputs_of,
    outputs_of,
)
from deployments.types import Tensor

from .serving import config, tensor


def text_of(datatype, array, shape=None):
    (kept,) = outputs_of([Tensor("y", datatype, shape or array.shape, array)])
    return described(kept)


@pytest.mark.parametrize(
    ("datatype", "array", "data"),
    [
        ("INT32", np.array([[1, -2], [3, 4]], np.int32), "1,-2,3,4"),
        ("FP32", np.array([[0.5, 1e20], [float("inf"), 2]], np.float32).T, "0.5,inf,1e+20,2.0"),
        ("FP16", np.array([[0.5], [2]], np.float16), "0.5,2.0"),
        ("BF16", np.array([[0x3F80], [0xC000]], np.uint16), "1.0,-2.0"),
        ("BOOL", np.array([[True], [False]]), "1,0"),
        ("UINT64", np.array([[2**64 - 1]], np.uint64), "18446744073709551615"),
        ("INT8", np.zeros((2, 0), np.int8), ""),
    ],
)
def test_data_and_shape_are_written_with_commas(datatype, array, data):
    found = text_of(datatype, array)
    if datatype == "FP32":  # 1e20 is none of float32's
        found["data"] = found["data"].replace("1.0000000200408773e+20", "1e+20")
    shape = ",".join(map(str, array.shape))
    assert found == {"name": "y", "data": data, "shape": shape, "dtype": datatype}


def test_strings_are_text_whatever_their_bytes():
    data = encode_bytes([b"a", b"", b"\xff", "ü".encode()])
    assert text_of("BYTES", data, (2, 2))["data"] == "a,,\ufffd,ü"


def test_a_copy_is_kept_and_not_the_bytes():
    array = np.ones((1, 3), np.float32)
    (kept,) = outputs_of([Tensor("y", "FP32", (1, 3), array)])
    array[:] = 7  # the arena's next user
    assert described(kept)["data"] == "1.0,1.0,1.0"


def test_large_tensors_are_cut_and_say_so():
    found = text_of("INT8", np.zeros((2, MAX_ELEMENTS), np.int8))
    assert found["truncated"] and found["shape"] == f"2,{MAX_ELEMENTS}"
    assert found["data"].count(",") == MAX_ELEMENTS - 1
    assert "truncated" not in text_of("INT8", np.zeros((1, MAX_ELEMENTS), np.int8))
    found = text_of("BYTES", encode_bytes([b"x" * MAX_STRING_BYTES] * 2), (2,))
    assert found["truncated"] and found["data"] == ""


def test_inputs_are_the_models_and_absent_ones_are_left_out():
    string, fp32 = "TYPE_STRING", "TYPE_FP32"
    inputs = [tensor("a", fp32, (2,)), tensor("b", string, (-1,)), tensor("c", string, (-1, -1))]
    model = config("m", [*inputs, tensor("d", fp32, (1,))], [tensor("y", fp32, (1,))])
    strings = encode_bytes([b"p", b"q"])
    arrays = (np.ones((1, 2), np.float32), strings, join_shape((1, 2, 1), strings), None)
    found = [described(each) for each in inputs_of(model, 1, arrays)]
    assert [(each["name"], each["shape"]) for each in found] == [
        ("a", "1,2"),
        ("b", "1,2"),
        ("c", "1,2,1"),
    ]
    assert [each["data"] for each in found] == ["1.0,1.0", "p,q", "p,q"]
