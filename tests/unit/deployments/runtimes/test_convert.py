from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch

from configs import dtypes
from configs.model import ModelInput, ModelOutput
from deployments.errors import ExecutionFailed, InvalidArgument
from deployments.runtimes import convert

CPU = torch.device("cpu")
Y = ModelOutput(name="y", data_type="TYPE_FP32")
NUMERIC = [datatype for datatype in dtypes.DATATYPES if datatype.torch]


def declared(data_type: str = "TYPE_FP32") -> ModelInput:
    return ModelInput(name="x", data_type=data_type, dims=(-1,))


@pytest.mark.parametrize("datatype", NUMERIC, ids=lambda d: d.wire)
@pytest.mark.parametrize("members", [1, 3])
def test_every_datatype_there_and_back(datatype, members):
    values = np.arange(4 * members).reshape(members, 4).astype(datatype.numpy)
    arrays = [values[k : k + 1] for k in range(members)]
    tensor = convert.build_tensor(declared(datatype.config), arrays, CPU)
    assert tensor.dtype == getattr(torch, datatype.torch)
    convert.check_output(ModelOutput(name="x", data_type=datatype.config), tensor)
    back = convert.read_output(Y, tensor).data
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
    assert convert.read_output(Y, tensor).data.shape == (3 * members, 0)


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (torch.zeros(2, dtype=torch.int32), InvalidArgument, "model provides TYPE_INT32"),
        (torch.zeros(2, dtype=torch.complex64), InvalidArgument, "TYPE_INVALID .complex64"),
        (["a"], InvalidArgument, "TYPE_FP32 for output 'y', model provides TYPE_STRING"),
        (np.array([b"a"]), InvalidArgument, "output 'y', model provides TYPE_STRING"),
        (np.ones(2), InvalidArgument, "must be of type Tensor"),
        (torch.tensor(1.0), InvalidArgument, "output 'y' is a scalar"),
        (1.5, InvalidArgument, r"must be of type Tensor or List\[str\].*float"),
        (None, InvalidArgument, "NoneType"),
        (torch.eye(2).to_sparse(), ExecutionFailed, "sparse"),
    ],
)
def test_outputs_that_do_not_fit(value, error, text):
    with pytest.raises(error, match=text):
        convert.check_output(Y, value)


def test_fresh_results_are_not_copied_and_views_are():
    fresh = torch.ones(2, 4) + 1
    assert convert.read_output(Y, fresh).data.ctypes.data == fresh.data_ptr()
    view = fresh[1:]
    assert convert.read_output(Y, view).data.ctypes.data != view.data_ptr()


def test_wrong_array_type():
    with pytest.raises(InvalidArgument, match="holds float64"):
        convert.build_tensor(declared(), [np.zeros((1, 4))], CPU)
