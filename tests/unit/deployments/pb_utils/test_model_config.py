"""auto_complete_config's object: it adds, and never contradicts what the user wrote."""

from __future__ import annotations

import json

import pytest

from deployments.pb_utils.model_config import ModelConfig

X = {"name": "x", "data_type": "TYPE_FP32", "dims": [4]}


def made(**fields) -> ModelConfig:
    return ModelConfig(json.dumps({"name": "m", "max_batch_size": 0, **fields}))


def test_it_fills_an_empty_configuration():
    config = made()
    config.set_max_batch_size(8)
    config.set_dynamic_batching()
    config.add_input({**X, "optional": True})
    config.add_output({**X, "name": "y", "dims": (2, -1)})
    config.set_model_transaction_policy({"decoupled": False})
    assert config.as_dict() == {
        "name": "m",
        "max_batch_size": 8,
        "dynamic_batching": {},
        "input": [{**X, "optional": True}],
        "output": [{"name": "y", "data_type": "TYPE_FP32", "dims": [2, -1]}],
    }


def test_what_it_hands_out_is_a_copy():
    config = made(input=[X])
    config.as_dict()["input"].clear()
    assert config.as_dict()["input"] == [X]


def test_what_the_user_wrote_stays():
    config = made(
        max_batch_size=4,
        dynamic_batching={"max_queue_delay_microseconds": 7},
        input=[{"name": "x", "data_type": "TYPE_INVALID", "dims": [4], "format": "FORMAT_NCHW"}],
    )
    config.set_max_batch_size(16)
    config.set_dynamic_batching()
    config.add_input(X)
    known = config.as_dict()
    assert known["max_batch_size"] == 4
    assert known["dynamic_batching"] == {"max_queue_delay_microseconds": 7}
    assert known["input"] == [{**X, "format": "FORMAT_NCHW"}]


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (lambda c: c.set_max_batch_size(2), "has max_batch_size 4, and .* sets 2"),
        (lambda c: c.add_input({**X, "dims": [5]}), r"'x' of model 'm' has dims \[4\] in the"),
        (lambda c: c.add_input({**X, "data_type": "TYPE_INT8"}), "has data_type TYPE_FP32"),
        (lambda c: c.add_input({"name": "z", "dims": [1]}), "input 'z' lacks 'data_type'"),
        (lambda c: c.add_output({"dims": [1]}), "output lacks 'name'"),
        (lambda c: c.add_output({**X, "optional": True}), "output 'x' has 'optional', and may"),
        (lambda c: c.add_input({**X, "reshape": {}}), "input 'x' has 'reshape', and may have"),
        (lambda c: c.set_model_transaction_policy({"decoupled": True}), "decoupled models are"),
        (lambda c: c.set_model_transaction_policy({"other": 1}), "sets 'other' of the"),
    ],
)
def test_a_contradiction_is_an_error(act, reason):
    with pytest.raises(ValueError, match=reason):
        act(made(max_batch_size=4, input=[X]))


def test_another_scheduler_is_not_replaced():
    with pytest.raises(ValueError, match="has sequence_batching, and"):
        made(sequence_batching={}).set_dynamic_batching()
