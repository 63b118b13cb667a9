"""Samples of `model_warmup` against the configuration that they stand in."""

from __future__ import annotations

import pytest

from configs.errors import ConfigError
from configs.model import ModelConfig, ModelInput, ModelWarmup, WarmupInput
from configs.warmup import check_warmup, data_files, size_bytes

ROW = WarmupInput(data_type="TYPE_FP32", dims=(2, 3), random_data=True)
SAMPLE = ModelWarmup(name="s", batch_size=4, inputs={"a": ROW})
GOOD = ModelConfig(
    name="m",
    max_batch_size=4,
    input=(
        ModelInput(name="a", data_type="TYPE_FP32", dims=(2, -1)),
        ModelInput(name="b", data_type="TYPE_INT32", dims=(1,), optional=True),
    ),
    model_warmup=(SAMPLE,),
)


def _row(**changes):
    return _sample(inputs={"a": ROW.model_copy(update=changes)})


def _sample(**changes):
    return (SAMPLE.model_copy(update=changes),)


def _file(name):
    return _row(random_data=None, input_data_file=name)


@pytest.mark.parametrize(
    ("samples", "field", "reason"),
    [
        (_sample(batch_size=5), ".batch_size", "batch size 5 of warmup sample 's' must be at"),
        (_sample(inputs={}), ".inputs", "warmup sample 's' lacks input 'a'"),
        (
            _sample(inputs={"a": ROW, "A": ROW}),
            '.inputs["A"]',
            "warmup sample 's' has an unexpected input 'A'; the model has 'a', 'b'",
        ),
        (_row(data_type="TYPE_INVALID"), '.inputs["a"].data_type', "'a' to have data_type set"),
        (_row(data_type="TYPE_FP64"), '.inputs["a"].data_type', "has TYPE_FP64 for input 'a'"),
        (
            _row(dims=(2, -1)),
            '.inputs["a"].dims[1]',
            "warmup setting expects all variable-size dimensions are specified for input 'a'",
        ),
        (_row(dims=(2, -2)), '.inputs["a"].dims[1]', "-2 must be 0 or greater"),
        (_row(dims=(3, 3)), '.inputs["a"].dims', "[3, 3] for input 'a', whose dims are [2, -1]"),
        (_row(dims=(4, 2, 3)), '.inputs["a"].dims', "the batch dimension is left out"),
        (_row(dims=(2, 2**60)), '.inputs["a"].dims', "too many elements"),
        (_row(random_data=None), '.inputs["a"]', "input 'a' to have input_data_type set"),
        *(
            (_file(name), '.inputs["a"].input_data_file', "must not leave the folder 'warmup'")
            for name in ("", "/etc/passwd", "../1/model.pt", "x/../../y", "a\\..\\b", "a\0b")
        ),
    ],
)
def test_refuses(samples, field, reason):
    with pytest.raises(ConfigError) as caught:
        check_warmup(GOOD.model_copy(update={"model_warmup": samples}))
    assert caught.value.args[2] == f"model_warmup[0]{field}"
    assert reason in caught.value.reason


@pytest.mark.parametrize(
    "samples",
    [
        (SAMPLE, SAMPLE),
        _row(random_data=None, zero_data=False),
        _row(dims=(2, 0)),
        _file("sub/a..b.raw"),
        _sample(batch_size=0, inputs={"unknown": WarmupInput()}),  # left out, as in Triton
    ],
)
def test_accepts(samples):
    check_warmup(GOOD.model_copy(update={"model_warmup": samples}))


def test_a_model_without_batching_takes_one_row():
    flat = GOOD.model_copy(update={"max_batch_size": 0})
    check_warmup(flat.model_copy(update={"model_warmup": _sample(batch_size=1)}))
    with pytest.raises(ConfigError, match="must be at most 1"):
        check_warmup(flat.model_copy(update={"model_warmup": _sample(batch_size=2)}))


def test_inputs_that_are_yet_to_be_completed_are_not_compared():
    check_warmup(GOOD.model_copy(update={"input": ()}))
    bare = ModelInput(name="a")
    check_warmup(GOOD.model_copy(update={"input": (bare,)}))


def test_files_and_sizes():
    two = GOOD.model_copy(update={"model_warmup": (SAMPLE, *_file("a.raw"))})
    ((path, relative, name, given),) = data_files(two)
    assert path == 'model_warmup[1].inputs["a"].input_data_file' and relative == "warmup/a.raw"
    assert name == "a" and size_bytes(given) == 24
    assert size_bytes(ROW.model_copy(update={"data_type": "TYPE_STRING"})) == 0
