"""Strings and empty tensors in the model's view and back; the rest of the contract is in
test_inference, over the verbs."""

from __future__ import annotations

import numpy as np
import pytest

from configs.model import ModelConfig, ModelInput, ModelOutput, Reshape
from deployments.contract import Contract
from deployments.errors import Internal, InvalidArgument
from deployments.runtimes.strings import decode_objects, encode
from deployments.tensors import encode_bytes
from deployments.types import InferRequest, OutputArray, Tensor


def contract(
    dims: tuple[int, ...],
    reshape: tuple[int, ...] | None = None,
    data_type: str = "TYPE_STRING",
    max_batch_size: int = 4,
) -> tuple[Contract, ModelConfig]:
    """One input x and one output y alike; reshape is the model's view of both."""
    shape = None if reshape is None else Reshape(shape=reshape)
    facts = {"data_type": data_type, "dims": dims, "reshape": shape}
    config = ModelConfig(
        name="m",
        max_batch_size=max_batch_size,
        input=(ModelInput.model_validate({"name": "x", **facts}),),
        output=(ModelOutput.model_validate({"name": "y", **facts}),),
    )
    return Contract("m", config), config


def request(shape: tuple[int, ...], data: np.ndarray, datatype: str = "BYTES") -> InferRequest:
    return InferRequest("m", "", "", (Tensor("x", datatype, shape, data),))


def strings(count: int) -> list[bytes]:
    return [b"\0\xff%d" % k for k in range(count)]


@pytest.mark.parametrize(
    ("dims", "reshape", "shape", "seen"),
    [
        ((-1, -1), None, (2, 3, 1), (2, 3, 1)),
        ((-1, -1), None, (2, 0, 5), (2, 0, 5)),
        ((-1, 2), None, (2, 3, 2), (2, 3, 2)),
        ((2, 3), (3, 2), (1, 2, 3), (1, 3, 2)),
        ((-1, 2, -1), (2, -1, 1, -1), (1, 3, 2, 5), (1, 2, 3, 1, 5)),
        ((1,), (), (4, 1), (4,)),
    ],
)
def test_strings_of_any_shape_reach_the_model_and_come_back(dims, reshape, shape, seen):
    made, config = contract(dims, reshape)
    texts = strings(int(np.prod(shape)))
    work = made.admit(request(shape, encode_bytes(texts)))
    (array,) = work.inputs
    assert array is not None and work.rows == shape[0]
    objects = decode_objects(config.input[0], array, work.rows, True)
    assert objects.shape == seen and objects.ravel().tolist() == texts
    (answer,) = made.answer(("y",), {"y": encode("y", objects)})
    assert answer.shape == shape and answer.data.tobytes() == encode_bytes(texts).tobytes()


def test_strings_of_other_shapes_share_no_batch():
    made, _ = contract((-1, -1))
    keys = {
        made.admit(request(shape, encode_bytes(strings(6)))).key
        for shape in ((1, 2, 3), (1, 3, 2), (3, 2, 1), (3, 1, 2), (2, 1, 3))
    }
    assert len(keys) == 5


def test_the_count_of_strings_is_checked_against_the_shape():
    made, _ = contract((-1, -1))
    with pytest.raises(InvalidArgument, match="expected 6 string elements for inference input 'x'"):
        made.admit(request((1, 2, 3), encode_bytes(strings(5))))
    with pytest.raises(InvalidArgument, match="unexpected number of string elements 7 "):
        made.admit(request((1, 2, 3), encode_bytes(strings(7))))


def test_ragged_inputs_share_a_batch_whatever_their_shape():
    _, config = contract((-1, -1), None, "TYPE_FP32")
    (x,) = config.input
    for flag, keys in ((False, 3), (True, 1)):
        other = x.model_copy(update={"name": "other", "dims": (2,)})
        entries = (x.model_copy(update={"allow_ragged_batch": flag}), other)
        made = Contract("m", config.model_copy(update={"input": entries}))
        found = set()
        for shape in ((1, 2, 3), (1, 3, 2), (2, 3, 1)):
            tensors = (
                Tensor("x", "FP32", shape, np.zeros(shape, np.float32)),
                Tensor("other", "FP32", (shape[0], 2), np.zeros((shape[0], 2), np.float32)),
            )
            found.add(made.admit(InferRequest("m", "", "", tensors)).key)
        assert len(found) == keys


def test_other_inputs_of_a_ragged_model_still_have_to_agree():
    _, config = contract((-1,), None, "TYPE_FP32")
    (x,) = config.input
    entries = (x.model_copy(update={"allow_ragged_batch": True, "name": "r"}), x)
    made = Contract("m", config.model_copy(update={"input": entries}))
    keys = []
    for ragged, other in ((3, 2), (5, 2), (3, 4)):
        tensors = tuple(
            Tensor(name, "FP32", (1, size), np.zeros((1, size), np.float32))
            for name, size in (("r", ragged), ("x", other))
        )
        keys.append(made.admit(InferRequest("m", "", "", tensors)).key)
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize(
    ("dims", "reshape", "shape", "seen"),
    [
        ((-1,), None, (3, 0), (3, 0)),
        ((-1, 2), (2, -1), (3, 0, 2), (3, 2, 0)),
        ((2, -1), (-1, 1, 2), (1, 2, 0), (1, 0, 1, 2)),
        ((-1, -1), (-1, -1, 1), (2, 0, 5), (2, 0, 5, 1)),
    ],
)
def test_empty_tensors_are_reshaped_both_ways(dims, reshape, shape, seen):
    made, _ = contract(dims, reshape, "TYPE_FP32")
    work = made.admit(request(shape, np.empty(shape, np.float32), "FP32"))
    (array,) = work.inputs
    assert array is not None and array.shape == seen
    (answer,) = made.answer(("y",), {"y": OutputArray(array)})
    assert answer.shape == answer.data.shape == shape


@pytest.mark.parametrize("shape", [(1, 3), (1, 0), (1, 2, 0)])
def test_an_output_that_reshape_does_not_fit(shape):
    made, _ = contract((-1, 2, -1), (2, -1, 1, -1), "TYPE_FP32")
    with pytest.raises(Internal, match="cannot be given the configured dims"):
        made.answer(("y",), {"y": OutputArray(np.zeros(shape, np.float32))})


def test_the_shape_of_an_output_without_reshape_is_the_models_own():
    made, _ = contract((4,), None, "TYPE_FP32")
    (answer,) = made.answer(("y",), {"y": OutputArray(np.zeros((1, 16), np.float32))})
    assert answer.shape == (1, 16)
