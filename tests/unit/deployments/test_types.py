from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest

from configs.model import ModelConfig
from deployments import types
from deployments.errors import ReplicaLost

CLASSES = [each for each in vars(types).values() if dataclasses.is_dataclass(each)]

SAMPLES = [
    types.InferRequest("m", "", "7", (types.Tensor("x", "FP32", (1,), np.ones(1)),)),
    types.Batch((1, 2), ((np.ones(1), None),), ("y",)),
    types.BatchReply((types.Part((0,), {}, ReplicaLost("m")),)),
    types.Snapshot(
        1,
        2,
        True,
        True,
        (
            types.VersionSnapshot(
                "m",
                1,
                types.ModelState.READY,
                "",
                ModelConfig(name="m"),
                "a",
                (types.Target("d", 2),),
            ),
        ),
    ),
]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_all_are_frozen_and_slotted(kind):
    assert kind.__dataclass_params__.frozen
    assert "__slots__" in vars(kind)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: type(sample).__name__)
def test_what_crosses_processes_pickles(sample):
    again = pickle.loads(pickle.dumps(sample, protocol=5))
    assert repr(again) == repr(sample)


def test_states_are_the_protocol_names():
    assert [state.value for state in types.ModelState] == [
        "UNKNOWN",
        "LOADING",
        "READY",
        "UNLOADING",
        "UNAVAILABLE",
    ]
