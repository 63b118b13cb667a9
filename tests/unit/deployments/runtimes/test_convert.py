from __future__ import annotations

import struct
import weakref

import numpy as np
import pytest
import torch

from configs import dtypes
from configs.model import ModelInput, ModelOutput
from deployments.errors import ExecutionFailed, InvalidArgument
from deployments.runtimes import convert
from tests.models import string_input

CPU = torch.device("cpu")
NUMERIC = [datatype for datatype in dtypes.DATATYPES if datatype.torch]


def declared(data_type: str = "TYPE_FP32") -> ModelInput:
    return ModelInput(name="x", data_type=data_type, dims=(-1,))


def wire(*elements: bytes) -> np.ndarray:
    data = b"".join(struct.pack("<I", len(e)) + e for e in elements)
    return np.frombuffer(data, np.uint8)


@pytest.mark.parametrize("datatype", NUMERIC, ids=lambda d: d.wire)
@pytest.mark.parametrize("members", [1, 3])
def test_every_datatype_there_and_back(datatype, members):
    values = np.arange(4 * members).reshape(members, 4).astype(datatype.numpy)
    arrays = [values[k : k + 1] for k in range(members)]
    tensor = convert.build_tensor(declared(datatype.config), arrays, CPU)
    assert tensor.dtype == getattr(torch, datatype.torch)
    convert.check_output(ModelOutput(name="x", data_type=datatype.config), tensor)
    back = convert.read_output(tensor).data
    assert back.dtype == np.dtype(datatype.numpy)
    np.testing.assert_array_equal(back, values)


def test_one_member_is_not_copied_and_read_only_memory_gives_no_warning():
    array = np.frombuffer(bytes(16), np.float32).reshape(1, 4)
    tensor = convert.build_tensor(declared(), [array], CPU)
    assert tensor.data_ptr() == array.ctypes.data


def test_a_tensor_keeps_its_memory_alive():
    owner = np.ones((1, 4), np.float32)
    array, watch = owner[:], weakref.ref(owner)
    array.flags.writeable = False
    del owner
    tensor = convert.build_tensor(declared(), [array], CPU)
    del array
    assert watch() is not None
    del tensor
    assert watch() is None


def test_unaligned_and_strided_members():
    raw = np.frombuffer(bytes(1) + np.arange(4, dtype=np.float32).tobytes(), np.uint8)[1:]
    unaligned = raw.view(np.float32).reshape(1, 4)
    assert convert.build_tensor(declared(), [unaligned], CPU).tolist() == [[0, 1, 2, 3]]
    strided = np.arange(8, dtype=np.float32).reshape(4, 2).T
    assert convert.build_tensor(declared(), [strided], CPU).tolist() == strided.tolist()


@pytest.mark.parametrize("members", [1, 2])
def test_zero_size(members):
    tensor = convert.build_tensor(declared(), [np.zeros((3, 0), np.float32)] * members, CPU)
    assert tensor.shape == (3 * members, 0)
    assert convert.read_output(tensor).data.shape == (3 * members, 0)


def test_strings_there_and_back():
    strings = convert.decode_strings(string_input("s"), wire(b"a\0b", "ü".encode(), b""), 3, True)
    assert strings == ["a\0b", "ü", ""]
    encoded = convert.encode_strings(strings)
    assert encoded.data.tobytes() == wire(b"a\0b", "ü".encode(), b"").tobytes()
    assert encoded.offsets is not None and encoded.offsets.tolist() == [0, 7, 13, 17]
    nothing = convert.encode_strings([])
    assert nothing.data.size == 0 and nothing.offsets is not None


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (wire(b"\xff"), "not UTF-8"),
        (wire(b"abc")[:-1], "incomplete string data"),
        (np.zeros(3, np.uint8), "incomplete string length"),
        (np.full(4, 255, np.uint8), "incomplete string data"),
        (wire(b"a", b"b"), "expected 1, got 2"),
        (wire(), "expected 1, got 0"),
    ],
)
def test_bad_strings(array, text):
    with pytest.raises(InvalidArgument, match=text):
        convert.decode_strings(string_input("s"), array, 1, True)


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (torch.zeros(2, dtype=torch.int32), InvalidArgument, "model provides TYPE_INT32"),
        (torch.zeros(2, dtype=torch.complex64), InvalidArgument, "TYPE_INVALID .complex64"),
        (["a"], InvalidArgument, "TYPE_FP32 for output 'y', model provides TYPE_STRING"),
        (torch.tensor(1.0), InvalidArgument, "output 'y' is a scalar"),
        (1.5, InvalidArgument, r"must be of type Tensor or List\[str\].*float"),
        (None, InvalidArgument, "NoneType"),
        (torch.eye(2).to_sparse(), ExecutionFailed, "sparse"),
    ],
)
def test_outputs_that_do_not_fit(value, error, text):
    with pytest.raises(error, match=text):
        convert.check_output(ModelOutput(name="y", data_type="TYPE_FP32"), value)


def test_fresh_results_are_not_copied_and_views_are():
    fresh = torch.ones(2, 4) + 1
    assert convert.read_output(fresh).data.ctypes.data == fresh.data_ptr()
    view = fresh[1:]
    assert convert.read_output(view).data.ctypes.data != view.data_ptr()


def test_wrong_array_type():
    with pytest.raises(InvalidArgument, match="holds float64"):
        convert.build_tensor(declared(), [np.zeros((1, 4))], CPU)
