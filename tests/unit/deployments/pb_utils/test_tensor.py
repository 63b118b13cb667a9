"""pb_utils.Tensor: numpy and torch in and out, and what neither can carry."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from configs.dtypes import DATATYPES
from deployments.errors import InvalidArgument
from deployments.pb_utils import datatypes, tensor
from deployments.pb_utils.faults import TritonModelException
from deployments.pb_utils.tensor import Tensor
from deployments.tensors import decode_bytes, encode_bytes

NUMERIC = [one for one in DATATYPES if one.numpy and one.wire != "BF16"]


@pytest.mark.parametrize("kind", NUMERIC, ids=lambda kind: kind.wire)
def test_numbers_go_to_torch_and_back_without_a_copy(kind):
    array = np.array([[0, 1], [1, 0]], kind.numpy)
    made = Tensor("x", array)
    assert made.name() == "x" and made.shape() == [2, 2] and made.is_cpu()
    assert datatypes.triton_to_numpy_type(made.triton_dtype()) is array.dtype.type
    seen = torch.utils.dlpack.from_dlpack(made)
    assert str(seen.dtype) == f"torch.{kind.torch}" and seen.data_ptr() == array.ctypes.data
    back = Tensor.from_dlpack("y", seen)
    assert back.as_numpy().ctypes.data == array.ctypes.data
    np.testing.assert_array_equal(back.as_numpy(), array)
    assert tensor.config_type(back) == kind.config


def test_capsules_go_through_torchs_own_functions():
    given = torch.arange(6.0).reshape(2, 3)
    made = Tensor.from_dlpack("x", given.__dlpack__())
    again = torch.utils.dlpack.from_dlpack(made.to_dlpack())
    assert torch.equal(again, given) and again.data_ptr() == given.data_ptr()


def test_bf16_is_torchs_alone():
    given = torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16)
    made = Tensor.from_dlpack("x", given)
    with pytest.raises(TritonModelException, match="BF16, which numpy has not"):
        made.as_numpy()
    carried = tensor.to_output(made, "TYPE_BF16").data
    assert carried.dtype == np.uint16
    back = tensor.from_wire("x", "BF16", (1, 2), carried)
    assert torch.equal(torch.utils.dlpack.from_dlpack(back), given)


def test_strings_of_any_shape():
    given = np.array([[b"a\0b", "ü"], [7, b""]], np.object_)
    made = Tensor("s", given)
    assert datatypes.triton_to_numpy_type(made.triton_dtype()) is np.object_
    out = tensor.to_output(made, "TYPE_STRING")
    assert out.shape == (2, 2) and out.offsets is not None and len(out.offsets) == 5
    assert decode_bytes("s", out.data) == [b"a\0b", "ü".encode(), b"7", b""]
    back = tensor.from_wire("s", "BYTES", (2, 2), out.data)
    assert back.as_numpy().tolist() == [[b"a\0b", "ü".encode()], [b"7", b""]]
    with pytest.raises(TritonModelException, match="BYTES, which DLPack has not"):
        made.to_dlpack()


def test_fixed_width_bytes_are_strings_too():
    assert Tensor("s", np.array([b"ab", b"c"])).as_numpy().tolist() == [b"ab", b"c"]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([1.0], "must be made of a numpy array and not of list"),
        (np.array(["a"]), "use np.object_ for strings"),
        (np.array([1j]), "complex128, which is not supported"),
        (np.array(["2020-01-01"], "datetime64[D]"), "which is not supported"),
    ],
)
def test_what_is_no_tensor(value, reason):
    with pytest.raises(TritonModelException, match=reason):
        Tensor("x", value)


def test_what_dlpack_cannot_bring():
    with pytest.raises(TritonModelException, match="not contiguous"):
        Tensor.from_dlpack("x", torch.zeros(2, 3).t())
    with pytest.raises(TritonModelException, match="none of Triton's types"):
        Tensor.from_dlpack("x", torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(TritonModelException, match="no DLPack tensor"):
        Tensor.from_dlpack("x", "text")


def test_strided_and_foreign_arrays_are_made_plain():
    grid = np.arange(6, dtype=">f4").reshape(2, 3)
    made = Tensor("x", grid.T)
    assert made.as_numpy().flags.c_contiguous and made.as_numpy().dtype.isnative
    np.testing.assert_array_equal(made.as_numpy(), grid.T)


def test_an_output_is_nobody_elses_memory():
    array = np.ones((1, 2), np.float32)
    out = tensor.to_output(Tensor("y", array), "TYPE_FP32")
    array[:] = 5
    assert out.data.tolist() == [[1, 1]]
    with pytest.raises(InvalidArgument, match="'y' is a scalar"):
        tensor.to_output(Tensor("y", np.array(1, np.float32)), "TYPE_FP32")


def test_what_cannot_be_written_to_is_copied_and_the_rest_is_not():
    frozen = np.ones((2,), np.float32)
    frozen.flags.writeable = False
    tensor.from_wire("x", "FP32", (2,), frozen).as_numpy()[0] = 3
    assert frozen.tolist() == [1, 1]
    plain = np.ones((2,), np.float32)
    tensor.from_wire("x", "FP32", (2,), plain).as_numpy()[0] = 3
    assert plain.tolist() == [3, 1]


def test_the_public_conversions():
    assert datatypes.triton_string_to_numpy("TYPE_FP16") is np.float16
    assert datatypes.triton_string_to_numpy("TYPE_STRING") is np.object_
    assert datatypes.numpy_to_triton_type(np.float32) == 11
    assert datatypes.numpy_to_triton_type(np.dtype("int64")) == 9
    assert datatypes.numpy_to_triton_type(np.complex64) is None
    wire = datatypes.serialize_byte_tensor(np.array([[b"ab"], ["c"]], np.object_))
    assert wire == encode_bytes([b"ab", b"c"]).tobytes()
    assert datatypes.deserialize_bytes_tensor(wire).tolist() == [b"ab", b"c"]
    for cut in (wire[:3], wire[:-1]):
        with pytest.raises(ValueError, match="cut off"):
            datatypes.deserialize_bytes_tensor(cut)
