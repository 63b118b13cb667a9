"""Completing a configuration from what a model offers."""

from __future__ import annotations

import pytest

from configs.errors import ConfigError
from configs.model import DynamicBatching, ModelConfig, ModelInput, ModelOutput, Reshape
from configs.offer import Offer, Offered, check_batch, fill

X = Offered(("ARGS[0]", "INPUT__0"), "TYPE_FP32", (-1, 4))
IDS = Offered(("ARGS[1]", "INPUT__1"), "TYPE_INT64", (-1, -1))
Y = Offered(("RESULT[y]", "OUTPUT__0"), "TYPE_FP32", (-1, 3), True)
N = Offered(("RESULT[n]", "OUTPUT__1"), "TYPE_INT64", (-1,), True)
BATCHED = Offer((X, IDS), (Y, N), batching=True, most_rows=16)
FIXED = Offer((Offered(("ARGS[0]",), "TYPE_FP32", (3, 4)),), (Y,), batching=False, most_rows=3)


def made(offer=BATCHED, **fields):
    fields = {"open_batch": True} | fields
    return fill(ModelConfig(name="m", backend="pytorch", **fields), "exported", offer)


def read(tensors):
    return [(t.name, t.data_type, t.dims) for t in tensors]


def test_all_of_it():
    config = made()
    assert config.max_batch_size == 16 and not config.open_batch
    assert config.dynamic_batching == DynamicBatching(preferred_batch_size=(16,))
    assert read(config.input) == [
        ("ARGS[0]", "TYPE_FP32", (4,)),
        ("ARGS[1]", "TYPE_INT64", (-1,)),
    ]
    assert read(config.output) == [
        ("RESULT[y]", "TYPE_FP32", (3,)),
        ("RESULT[n]", "TYPE_INT64", (1,)),
    ]
    assert config.output[1].reshape == Reshape()  # one number per row


def test_a_batch_without_a_bound_gets_tritons_default():
    unbounded = Offer((X, IDS), (Y, N), batching=True)
    assert made(unbounded).max_batch_size == 4


def test_without_a_batch_dims_are_whole():
    config = made(FIXED)
    assert config.max_batch_size == 0 and config.dynamic_batching is None
    assert config.input[0].dims == (3, 4)


def test_what_is_written_wins():
    written = (ModelInput(name="INPUT__1", data_type="TYPE_INT64", dims=(7,)),)
    config = made(
        input=(*written, ModelInput(name="ARGS[0]")),
        output=(ModelOutput(name="OUTPUT__1"),),
        max_batch_size=2,
        open_batch=False,
    )
    assert config.max_batch_size == 2 and config.dynamic_batching is None
    assert read(config.input) == [
        ("INPUT__1", "TYPE_INT64", (7,)),
        ("ARGS[0]", "TYPE_FP32", (4,)),
    ]
    assert read(config.output) == [("OUTPUT__1", "TYPE_INT64", (1,))]


def test_a_batch_that_is_written_as_none_stays_none():
    config = made(max_batch_size=0, open_batch=False)
    assert config.max_batch_size == 0
    assert [t.dims for t in config.input] == [(-1, 4), (-1, -1)]


@pytest.mark.parametrize(("dims", "size"), [((4,), 16), ((8, 4), 0), ((-1, 4), 0)])
def test_written_dims_tell_whether_the_batch_is_part_of_them(dims, size):
    given = (ModelInput(name="ARGS[0]", dims=dims), ModelInput(name="ARGS[1]"))
    assert made(input=given).max_batch_size == size


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"max_batch_size": 32}, "max_batch_size is 32, .* batches of at most 16"),
        (
            {"input": (ModelInput(name="ARGS[0]", data_type="TYPE_FP64"),)},
            r"input\[0\].data_type: input 'ARGS\[0\]' is TYPE_FP64, and the model has TYPE_FP32",
        ),
        (
            {"input": (ModelInput(name="ARGS[0]", dims=(5,)),), "max_batch_size": 4},
            r"input\[0\].dims: input 'ARGS\[0\]' has dims \[5\], and the model has \[4\] behind",
        ),
        (
            {"output": (ModelOutput(name="RESULT[y]", dims=(3, 1)),), "max_batch_size": 4},
            r"output\[0\].dims: output 'RESULT\[y\]' has dims \[3, 1\]",
        ),
        ({"input": (ModelInput(name="unknown"),)}, "'unknown' must specify 'data_type'"),
    ],
)
def test_contradictions(fields, reason):
    with pytest.raises(ConfigError, match=reason):
        made(**{"open_batch": "max_batch_size" not in fields} | fields)


def test_a_fixed_batch():
    with pytest.raises(ConfigError, match=r"without a dynamic batch dimension.*ARGS\[0\] \[3, 4\]"):
        made(FIXED, max_batch_size=3, open_batch=False)
    one = Offer((Offered(("ARGS[0]",), "TYPE_FP32", (1, 4)),), None, batching=False, most_rows=1)
    check_batch(ModelConfig(max_batch_size=1), one)  # one row is what it takes
    unknown = Offer((Offered(("ARGS[0]",)),), None, batching=None)
    check_batch(ModelConfig(max_batch_size=9), unknown)


def test_an_output_without_a_batch():
    """Who asks for it gets no batches; who does not, gets them."""
    total = Offered(("RESULT[total]",), "TYPE_FP32", (7,), False)
    offer = Offer((X,), (Y, total), batching=True, most_rows=16)
    assert made(offer).max_batch_size == 0
    assert made(offer, output=(ModelOutput(name="RESULT[y]"),)).max_batch_size == 16
    with pytest.raises(ConfigError, match=r"output 'RESULT\[total\]' .* no batch .* \[7\]"):
        made(offer, output=(ModelOutput(name="RESULT[total]"),), max_batch_size=2, open_batch=False)


def test_outputs_that_no_configuration_can_name_are_left_out():
    odd = (Y, Offered(("RESULT[c]",), "", (-1, 2)), Offered(("RESULT[s]",), "TYPE_FP32", ()))
    offer = Offer((X,), odd, batching=False)
    assert [t.name for t in made(offer).output] == ["RESULT[y]"]


def test_names_of_ones_own_go_by_order_where_the_model_allows_it():
    given = (ModelInput(name="left"), ModelInput(name="right"))
    offer = Offer((X, IDS), (Y, N), batching=True, by_order=True)
    assert [t.data_type for t in made(offer, input=given).input] == ["TYPE_FP32", "TYPE_INT64"]
    with pytest.raises(ConfigError, match="'left' must specify 'data_type'"):
        made(BATCHED, input=given)
