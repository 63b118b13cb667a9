"""Optional inputs; the other checks are reached through `inference`."""

from __future__ import annotations

import numpy as np
import pytest

from configs.model import ModelInput
from deployments.contract import Contract
from deployments.errors import InvalidArgument
from deployments.types import InferRequest, Tensor
from tests.models import config


def contract(*names, optional=(), max_batch_size=8, dims=(2,)):
    inputs = [
        ModelInput(name=n, data_type="TYPE_FP32", dims=dims, optional=n in optional) for n in names
    ]
    return Contract("m", config(inputs, {"O": (2,)}, max_batch_size=max_batch_size))


def request(*names, shape=(1, 2)):
    tensors = tuple(Tensor(n, "FP32", shape, np.zeros(shape, np.float32)) for n in names)
    return InferRequest("m", "", "", tensors)


def test_an_absent_input_is_none_and_keeps_requests_apart():
    made = contract("a", "b", "c", optional=("b", "c"))
    alone, both, other = (made.admit(request(*names)) for names in ("a", "ab", "ac"))
    assert [one is None for one in alone.inputs] == [False, True, True]
    assert [one is None for one in both.inputs] == [False, False, True]
    assert len({alone.key, both.key, other.key}) == 3
    assert made.admit(request("b", "a")).key == both.key


@pytest.mark.parametrize(
    ("names", "missing"), [("b", "'a'"), ("", "'a'"), ("abcd", ""), ("bc", "'a'")]
)
def test_missing_required_inputs(names, missing):
    made = contract("a", "b", "c", optional=("b", "c"))
    got = ",".join(f"'{name}'" for name in names)
    with pytest.raises(InvalidArgument) as caught:
        made.admit(request(*names))
    assert str(caught.value) == (
        f"expected number of inputs between 1 and 3 but got {len(names)} inputs for model 'm'. Got "
        f"input(s) [{got}], but missing required input(s) [{missing}]. Please provide all required "
        "input(s)."
    )


def test_without_optional_inputs_the_text_stays():
    with pytest.raises(InvalidArgument, match=r"expected 2 inputs but got 1 inputs .* \['b'\]"):
        contract("a", "b").admit(request("a"))
    assert contract("a", "b").admit(request("a", "b")).key == ()


def test_unknown_inputs_are_refused():
    with pytest.raises(InvalidArgument, match="unexpected inference input 'z' for model 'm'"):
        contract("a", "b", optional=("b",)).admit(request("a", "z"))


def test_all_optional():
    unbatched = contract("a", optional=("a",), max_batch_size=0)
    assert unbatched.admit(request()).inputs == (None,)
    with pytest.raises(InvalidArgument, match="batch-size must be >= 1"):
        contract("a", optional=("a",)).admit(request())


def test_variable_dims_beside_an_absent_input():
    made = contract("a", "b", optional=("b",), dims=(-1,))
    assert made.admit(request("a", shape=(1, 2))).key != made.admit(request("a", shape=(1, 3))).key
    assert made.admit(request("a")).key == made.admit(request("a", shape=(4, 2))).key
