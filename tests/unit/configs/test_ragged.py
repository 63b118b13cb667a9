from __future__ import annotations

import pytest

from configs import ragged
from configs.checks import check
from configs.errors import ConfigError
from configs.model import BatchInput, BatchOutput, ModelConfig, ModelOutput, Reshape
from configs.pbtxt import parse, to_json
from tests.models import config
from tests.ragged import packed_config

PACKED = packed_config()
INPUT = BatchInput(target_name=("t",), data_type="TYPE_INT32", source_input=("x",))
OUTPUT = BatchOutput(target_name=("y",), source_input=("x",))
TEXT = """
platform: "pytorch_libtorch"
max_batch_size: 8
input { name: "x" data_type: TYPE_FP32 dims: -1 allow_ragged_batch: true }
output { name: "y" data_type: TYPE_FP32 dims: -1 }
batch_input {
  kind: BATCH_ITEM_SHAPE_FLATTEN target_name: "t" data_type: TYPE_FP32 source_input: "x"
}
batch_output {
  target_name: "y"
  kind: BATCH_SCATTER_WITH_INPUT_SHAPE
  source_input: "x"
}
"""


def ragged_config(**changes) -> ModelConfig:
    return config({"x": (-1,)}, {"y": (-1,)}).model_copy(update=changes)


def test_they_are_read_and_shown():
    made = parse(TEXT, "m/config.pbtxt", "m")
    assert made.input[0].allow_ragged_batch
    assert made.batch_input[0].kind == "BATCH_ITEM_SHAPE_FLATTEN"
    assert made.batch_output == (OUTPUT,)
    shown = to_json(made)
    assert shown["batch_input"] == [
        {
            "kind": "BATCH_ITEM_SHAPE_FLATTEN",
            "target_name": ["t"],
            "data_type": "TYPE_FP32",
            "source_input": ["x"],
        }
    ]
    assert shown["batch_output"][0]["kind"] == "BATCH_SCATTER_WITH_INPUT_SHAPE"
    assert shown["input"][0]["allow_ragged_batch"] is True


def test_an_error_names_its_line():
    with pytest.raises(ConfigError, match=r"m/config.pbtxt:7: batch_input\[0\].source_input: "):
        parse(TEXT.replace('source_input: "x"', 'source_input: "z"', 1), "m/config.pbtxt", "m")


@pytest.mark.parametrize("made", [PACKED, packed_config(rank=3), ragged_config()])
def test_accepts(made):
    check(made)
    for kind in ("torchscript", "eager"):
        ragged.check_kind(made, kind)


def test_more_that_is_accepted():
    outputs = (ModelOutput(name="y", data_type="TYPE_FP32", dims=(4,)),)
    check(ragged_config(output=outputs, batch_output=(OUTPUT,)))
    check(ragged_config(max_batch_size=0, batch_input=(INPUT,), batch_output=(OUTPUT,)))


def changed(**changes) -> tuple[BatchInput, ...]:
    return (INPUT.model_copy(update=changes),)


def scattered(**changes) -> tuple[BatchOutput, ...]:
    return (OUTPUT.model_copy(update=changes),)


DEEP = (
    ModelOutput(name="y", data_type="TYPE_FP32", dims=(-1, -1), reshape=Reshape(shape=(-1, 1, -1))),
)
TEXTS = (ModelOutput(name="y", data_type="TYPE_STRING", dims=(-1,)),)


@pytest.mark.parametrize(
    ("changes", "field", "text"),
    [
        ({"batch_input": changed(target_name=())}, "batch_input[0].target_name", "exactly one"),
        (
            {"batch_input": changed(target_name=("a", "b"))},
            "batch_input[0].target_name",
            "one target",
        ),
        ({"batch_input": changed(target_name=("x",))}, "batch_input[0].target_name", "already an"),
        ({"batch_input": (INPUT, INPUT)}, "batch_input[1].target_name", "'t' is already"),
        (
            {"batch_input": changed(data_type="TYPE_INT64")},
            "batch_input[0].data_type",
            "'t' must be TYPE_INT32 or TYPE_FP32, not TYPE_INT64",
        ),
        ({"batch_input": changed(source_input=())}, "batch_input[0].source_input", "source input"),
        (
            {"batch_input": changed(source_input=("z",))},
            "batch_input[0].source_input",
            "unknown source input 'z'; the inputs are 'x'",
        ),
        (
            {"batch_input": changed(kind="BATCH_ITEM_SHAPE"), "max_batch_size": 0},
            "batch_input[0].kind",
            "needs a batch dimension",
        ),
        (
            {"batch_output": scattered(target_name=("z",))},
            "batch_output[0].target_name",
            "not an out",
        ),
        ({"batch_output": (OUTPUT, OUTPUT)}, "batch_output[1].target_name", "scattered already"),
        (
            {"batch_output": scattered(source_input=("z",))},
            "batch_output[0].source_input",
            "unknown",
        ),
        ({"batch_output": (OUTPUT,), "output": TEXTS}, "batch_output[0].target_name", "strings"),
        (
            {"batch_output": (OUTPUT,), "output": DEEP},
            "batch_output[0].source_input",
            "variable size where input 'x' has no dimension",
        ),
    ],
)
def test_refuses(changes, field, text):
    with pytest.raises(ConfigError, match=text) as caught:
        check(ragged_config(**changes))
    assert caught.value.args[2] == field


def test_an_optional_input_is_no_source():
    optional = (ragged_config().input[0].model_copy(update={"optional": True}),)
    with pytest.raises(ConfigError, match="'x' is optional"):
        check(ragged_config(input=optional, batch_input=(INPUT,)))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"input": PACKED.input[:1]}, "input[0].allow_ragged_batch"),
        ({"batch_input": (INPUT,)}, "batch_input"),
        ({"batch_output": (OUTPUT,)}, "batch_output"),
    ],
)
def test_other_kinds_of_models_refuse_by_name(changes, field):
    made = ragged_config(**changes)
    for kind in ("aoti", "exported"):
        with pytest.raises(ConfigError, match="are for TorchScript and eager models") as caught:
            ragged.check_kind(made, kind)
        assert caught.value.args[2] == field
    if field.startswith("input"):
        ragged.check_kind(made, "python")  # it sees each request by itself
    else:
        with pytest.raises(ConfigError):
            ragged.check_kind(made, "python")


def test_what_the_model_sees():
    assert [tensor.name for tensor in ragged.widened(PACKED).input] == [
        *("x", "id", "counts", "sums", "starts", "most", "items", "flat")
    ]
    assert ragged.widened(ragged_config()).input == ragged_config().input
    assert ragged.sources(PACKED) == (0,) * 6
    assert ragged.scattered(PACKED) == {"OUTPUT__0": (0, (-1, -1))}
