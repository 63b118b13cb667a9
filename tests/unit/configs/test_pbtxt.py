"""Text -> ModelConfig -> proto and JSON, and what errors say."""

from __future__ import annotations

import logging

import pytest
from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2 as pb

from configs.complete import normalise
from configs.errors import ConfigError
from configs.model import (
    DynamicBatching,
    InstanceGroup,
    ModelWarmup,
    Reshape,
    VersionPolicy,
    WarmupInput,
)
from configs.pbtxt import examine, locate, parse, to_json, to_proto

TEXT = """\
name: "m"
platform: "pytorch_libtorch"
max_batch_size: 8
input [
  { name: "INPUT__0" data_type: TYPE_FP32 dims: [ 3, -1 ] format: FORMAT_NONE },
  {
    name: "INPUT__1"
    data_type: TYPE_INT64
    dims: [ 1 ]
    reshape { shape: [ ] }
  }
]
output { name: "OUTPUT__0" data_type: TYPE_FP32 dims: -1 label_filename: "labels.txt" }
instance_group { kind: KIND_GPU count: 2 gpus: [ 0, 1 ] }
dynamic_batching { preferred_batch_size: [ 4, 8 ] max_queue_delay_microseconds: 100 }
version_policy { specific { versions: [ 1, 3 ] } }
parameters { key: "INFERENCE_MODE" value { string_value: "true" } }
optimization { input_pinned_memory { enable: false } }
"""


def _parse(text, name="m"):
    return parse(text, f"{name}/config.pbtxt", name)


def _error(text, name="m"):
    with pytest.raises(ConfigError) as caught:
        _parse(text, name)
    return str(caught.value)


def test_parses_into_frozen_models():
    config = _parse(TEXT)
    assert config.name == "m"
    assert [i.name for i in config.input] == ["INPUT__0", "INPUT__1"]
    assert config.input[0].dims == (3, -1)
    assert config.input[1].reshape == Reshape(shape=())
    assert config.input[1].model_dims == ()
    assert config.output[0].label_filename == "labels.txt"
    assert config.instance_group == (InstanceGroup(kind="KIND_GPU", count=2, gpus=(0, 1)),)
    assert config.dynamic_batching == DynamicBatching(
        preferred_batch_size=(4, 8), max_queue_delay_microseconds=100
    )
    assert config.version_policy == VersionPolicy(specific=(1, 3))
    assert config.parameters == {"INFERENCE_MODE": "true"}
    with pytest.raises(ValueError, match="frozen"):
        config.name = "other"


@pytest.mark.parametrize(
    "policy", ["", "version_policy { all { } }", "version_policy { latest { num_versions: 2 } }"]
)
def test_proto_round_trip(policy):
    text = TEXT.replace("version_policy { specific { versions: [ 1, 3 ] } }", policy)
    assert to_proto(_parse(text)) == text_format.Parse(text, pb.ModelConfig())


def test_the_order_of_answers_is_read_and_shown():
    text = TEXT.replace("microseconds: 100", "microseconds: 100 preserve_ordering: true")
    assert to_proto(_parse(text)) == text_format.Parse(text, pb.ModelConfig())
    for given, wanted in ((text, True), (TEXT, False)):
        shown = to_json(normalise(_parse(given), [], has_gpu=True))
        assert shown["dynamic_batching"]["preserve_ordering"] is wanted


def test_json_has_every_scalar_and_numbers_as_numbers():
    data = to_json(normalise(_parse(TEXT), [], has_gpu=True))
    assert data["input"][0]["dims"] == [3, -1]
    assert data["input"][0]["optional"] is False
    assert data["input"][1]["reshape"] == {"shape": []}
    assert data["dynamic_batching"]["max_queue_delay_microseconds"] == 100
    assert data["dynamic_batching"]["priority_levels"] == 0
    assert data["version_policy"] == {"specific": {"versions": [1, 3]}}
    assert data["parameters"] == {"INFERENCE_MODE": {"string_value": "true"}}
    assert data["cc_model_filenames"] == {}
    assert data["metric_tags"] == {}
    assert data["runtime"] == ""
    assert data["optimization"]["input_pinned_memory"] == {"enable": False}
    assert data["optimization"]["output_pinned_memory"] == {"enable": True}
    assert "sequence_batching" not in data
    assert json_format.ParseDict(data, pb.ModelConfig()).max_batch_size == 8


def test_groups_and_files_by_capability_are_shown_as_they_are():
    """Also what says nothing, and all that a client of Triton would look for."""
    text = TEXT + (
        "instance_group { name: 'spare' kind: KIND_CPU count: 1 passive: true host_policy: 'cpu' }"
        "cc_model_filenames { key: '9.0' value: 'h.pt' }"
        "cc_model_filenames { key: '8.6' value: 'a.pt' }"
    )
    assert to_proto(_parse(text)) == text_format.Parse(text, pb.ModelConfig())
    data = to_json(normalise(_parse(text), [], has_gpu=True))
    assert data["cc_model_filenames"] == {"9.0": "h.pt", "8.6": "a.pt"}
    common: dict[str, list[str]] = {"profile": [], "secondary_devices": []}
    assert data["instance_group"] == [
        {
            "name": "m_0",
            "kind": "KIND_GPU",
            "count": 2,
            "gpus": [0, 1],
            "passive": False,
            "host_policy": "",
            **common,
        },
        {
            "name": "spare",
            "kind": "KIND_CPU",
            "count": 1,
            "gpus": [],
            "passive": True,
            "host_policy": "cpu",
            **common,
        },
    ]


WARMUP = (
    TEXT
    + """\
model_warmup [
  {
    name: "zero sample"
    batch_size: 4
    inputs { key: "INPUT__0" value { data_type: TYPE_FP32 dims: [ 3, 5 ] zero_data: false } }
    inputs {
      key: "INPUT__1" value { data_type: TYPE_INT64 dims: [ 1 ] input_data_file: "raw" }
    }
    count: 2
  },
  { name: "left out" }
]
"""
)


def test_warmup_samples():
    config = _parse(WARMUP)
    assert config.model_warmup == (
        ModelWarmup(
            name="zero sample",
            batch_size=4,
            inputs={
                "INPUT__0": WarmupInput(data_type="TYPE_FP32", dims=(3, 5), zero_data=False),
                "INPUT__1": WarmupInput(data_type="TYPE_INT64", dims=(1,), input_data_file="raw"),
            },
            count=2,
        ),
        ModelWarmup(name="left out"),
    )
    assert to_proto(config) == text_format.Parse(WARMUP, pb.ModelConfig())
    shown = to_json(config)["model_warmup"][0]
    assert shown["inputs"]["INPUT__0"]["dims"] == [3, 5]
    assert shown["count"] == 2


def test_an_error_in_a_warmup_sample_names_its_line():
    assert _error(WARMUP.replace("[ 3, 5 ]", "[ 3, -1 ]", 1)).startswith(
        'm/config.pbtxt:23: model_warmup[0].inputs["INPUT__0"].dims[1]: warmup setting expects all '
        "variable-size dimensions are specified for input 'INPUT__0'"
    )


def test_name_is_the_directory():
    assert _parse(TEXT.replace('name: "m"\n', "", 1)).name == "m"
    assert _error(TEXT, "other").startswith("other/config.pbtxt:1: name: the name 'm' must")


def test_alias_of_default_model_filename(caplog):
    with caplog.at_level(logging.WARNING, "manta.configs"):
        config = _parse('\n# default_model_name: "no"\ndefault_model_name: "net.pt"\n' + TEXT)
    assert config.default_model_filename == "net.pt"
    assert caplog.messages == [
        "m/config.pbtxt:3: default_model_name is taken as default_model_filename"
    ]
    both = "default_model_name: 'net.pt'\ndefault_model_filename: \"%s\"\n" + TEXT
    assert _parse(both % "net.pt").default_model_filename == "net.pt"
    assert _error(both % "b.pt").startswith("m/config.pbtxt:1: default_model_name: differs from")
    assert "has no field" in _error(TEXT.replace("format:", "default_model_name:"))


@pytest.mark.parametrize(
    ("change", "to", "expected"),
    [
        ("max_batch_size: 8", "max_batch: 8", "m/config.pbtxt:3: max_batch: Message type"),
        ("TYPE_INT64", "TYPE_INT65", "m/config.pbtxt:8: input[1].data_type: "),
        ("max_batch_size: 8", "max_batch_size: 'x'", "m/config.pbtxt:3: max_batch_size: "),
        ("data_type: TYPE_INT64", "", "m/config.pbtxt:6: input[1].data_type: model input"),
        ("dims: [ 1 ]", "dims: [ 0 ]", "m/config.pbtxt:9: input[1].dims[0]: 0 must be"),
        (
            "TYPE_FP32",
            "TYPE_STRING",
            "m/config.pbtxt:5: input[0].dims: only 1-dimensional List of String is supported as "
            "input for 'INPUT__0'",
        ),
        ("dynamic_batching {", "sequence_batching {} #", "m/config.pbtxt:15: sequence_batching: "),
        (
            "version_policy",
            "sequence_batching { } #",
            "m/config.pbtxt:16: sequence_batching: Field",
        ),
        ("count: 2", "profile: '0'", "m/config.pbtxt:14: instance_group[0].profile: profiles are"),
        ("labels.txt", "../labels.txt", "m/config.pbtxt:13: output[0].label_filename: file name"),
    ],
)
def test_errors_name_file_line_and_field(change, to, expected):
    assert _error(TEXT.replace(change, to, 1)).startswith(expected)


SHARING = 'parameters { key: "ENABLE_WEIGHT_SHARING" value { string_value: "%s" } }\n'


@pytest.mark.parametrize("scheduling", ["sequence_batching { }", "dynamic_batching { }"])
@pytest.mark.parametrize("value", ["true", "On", "1", "false", "0"])
def test_weights_are_not_shared_by_a_model_that_keeps_state(scheduling, value):
    text = TEXT[: TEXT.index("dynamic_batching")] + scheduling + SHARING % value
    _, errors = examine(text, "m/config.pbtxt", "m")
    stateful = scheduling.startswith("sequence") and value not in ("false", "0")
    reason = "a model that keeps state between requests cannot share its weights"
    assert any(reason in str(error) for error in errors) == stateful


def test_long_and_deep_text_gives_a_short_error():
    for text in ("x" * 100_000, "input {" * 5_000, "max_batch_size: " + "9" * 4_000):
        assert len(_error(text)) < 1_000


def test_locates_an_error_of_a_later_step():
    error = ConfigError("no", field='parameters["INFERENCE_MODE"]')
    assert str(locate(error, TEXT, "m/config.pbtxt")) == (
        'm/config.pbtxt:17: parameters["INFERENCE_MODE"]: no'
    )
    other = ConfigError("no", file="m/labels.txt")
    assert locate(other, TEXT, "m/config.pbtxt") is other


def test_examine_tells_all_that_is_wrong_where_parse_raises_the_first():
    text = TEXT.replace('"m"', '"n"').replace("gpus: [ 0, 1 ]", "gpus: [ 0, 0 ]")
    text = text.replace("preferred_batch_size: [ 4, 8 ]", "preferred_batch_size: [ 9 ]")
    config, errors = examine(text, "m/config.pbtxt", "m")
    assert config is not None
    fields = ["name", "dynamic_batching.preferred_batch_size[0]", "instance_group[0].gpus"]
    assert [error.args[2] for error in errors] == fields
    assert str(errors[0]) == _error(text)
    assert all(str(error).startswith("m/config.pbtxt:") for error in errors)
    assert examine(TEXT, "m/config.pbtxt", "m")[1] == []


def test_examine_tells_of_text_that_cannot_be_read():
    config, (error,) = examine("platfrm: 1", "m/config.pbtxt", "m")
    assert config is None and "platfrm" in str(error)
