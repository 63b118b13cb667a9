"""Configurations as JSON: the same rules as for the file, and what clients are shown comes back."""

from __future__ import annotations

import json

import pytest

from configs import given, pbtxt
from configs.errors import ConfigError

TEXT = """
backend: "pytorch"
platform: "pytorch_libtorch"
max_batch_size: 8
version_policy { specific { versions: [ 1, 3 ] } }
input { name: "a" data_type: TYPE_FP32 dims: [ -1, 4 ] reshape { shape: [ -1, 2, 2 ] } }
input { name: "s" data_type: TYPE_STRING dims: 1 reshape { shape: [] } optional: true }
output { name: "b" data_type: TYPE_INT64 dims: 4 label_filename: "labels.txt" }
instance_group { name: "g" kind: KIND_GPU count: 2 gpus: [ 0, 1 ] }
dynamic_batching { preferred_batch_size: [ 4, 8 ] max_queue_delay_microseconds: 100 }
optimization { input_pinned_memory { enable: true } }
parameters { key: "INFERENCE_MODE" value { string_value: "false" } }
cc_model_filenames { key: "9.0" value: "h.pt" }
model_warmup {
  name: "w" batch_size: 1
  inputs { key: "a" value { data_type: TYPE_FP32 dims: [ 2, 4 ] zero_data: true } }
  inputs { key: "s" value { data_type: TYPE_STRING dims: 1 zero_data: true } }
}
"""


def test_what_clients_are_shown_can_be_given():
    config = pbtxt.parse(TEXT, "m/config.pbtxt", "m")
    shown = pbtxt.to_json(config)
    assert given.parse(json.dumps(shown), "m") == config


def test_names_of_enums_and_of_fields_in_both_spellings():
    text = '{"maxBatchSize": 4, "input": [{"name": "x", "dataType": "TYPE_FP16", "dims": ["-1"]}]}'
    config = given.parse(text, "m", partial=True)
    assert (config.name, config.max_batch_size, config.open_batch) == ("m", 4, False)
    assert (config.input[0].data_type, config.input[0].dims) == ("TYPE_FP16", (-1,))


@pytest.mark.parametrize(("text", "is_open"), [("{}", True), ('{"max_batch_size": 0}', False)])
def test_a_batch_size_that_nobody_gives_is_the_models_to_tell(text, is_open):
    assert given.parse(text, "m", partial=True).open_batch is is_open


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "^config: Expecting value"),
        ("null", "^config: it is not a JSON object"),
        ('{"max_batch_size": 1', "^config: Expecting"),
        ('{"max_batch": 1}', 'no field named "max_batch"'),
        ('{"input": [{"nme": "x"}]}', 'no field named "nme"'),
        ('{"input": 5}', "config: "),
        ('{"dynamic_batching": 5}', "config: "),
        ('{"parameters": []}', "config: "),
        ('{"max_batch_size": 1e400}', "config: "),
        ('{"max_batch_size": "many"}', "config: "),
        ('{"max_batch_size": 4294967296}', "config: "),
        ('{"input": [{"data_type": "TYPE_FP33"}]}', "TYPE_FP33"),
        ('{"input": [{"name": "x", "data_type": 999, "dims": [1]}]}', "config: "),
        ('{"name": "n"}', "^config: name: the name 'n' must be left out or equal"),
        ('{"sequence_batching": {}}', "^config: sequence_batching: sequence batching is not"),
        ('{"version_policy": {"latest": {}}}', "^config: version_policy.latest.num_versions"),
        ('{"input": ' + "[" * 100_000, "config: "),
        ('{"input": ' + "[" * 300 + "]" * 300 + "}", "config: "),
    ],
)
def test_what_is_no_configuration_is_told_why(text, reason):
    with pytest.raises(ConfigError, match=reason) as caught:
        given.parse(text, "m", partial=True)
    assert len(str(caught.value)) < 1000
