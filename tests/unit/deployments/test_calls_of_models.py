"""Requests that a model makes: part of what was accepted, and never a wait for oneself."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from deployments.errors import Code, ShuttingDown, Unavailable, UnknownModel
from deployments.inference import Inference
from deployments.types import InferRequest, Target, Tensor

from .serving import Server, linear

X = np.ones((1, 4), np.float32)
ASKED = InferRequest("linear", "", "r", (Tensor("INPUT__0", "FP32", (1, 4), X),))


def ask(inference: Inference, request: InferRequest) -> np.ndarray:
    answer = asyncio.run(inference.infer_for_model(request))
    data: np.ndarray = answer.outputs[0].data
    return data


def test_a_models_request_is_answered_like_any_other():
    np.testing.assert_array_equal(ask(Server().inference, ASKED), linear(X)[0])
    with pytest.raises(Exception, match="unknown model: 'nobody'") as caught:
        ask(Server().inference, replace(ASKED, model_name="nobody"))
    assert isinstance(caught.value, UnknownModel)


def test_while_the_server_ends_what_was_accepted_still_calls_others():
    server = Server()
    server.publish(closing=True)
    np.testing.assert_array_equal(ask(server.inference, ASKED), linear(X)[0])
    with pytest.raises(ShuttingDown):  # the control: a client's request is refused
        asyncio.run(server.inference.infer(ASKED))


@pytest.mark.parametrize(
    ("chain", "slots", "refused"),
    [
        ((), 1, False),
        (("other/1",), 1, False),
        (("linear/7",), 1, False),  # another version has instances of its own
        (("linear/1",), 1, True),
        (("linear/1", "other/1"), 1, True),
        (("linear/1", "other/1"), 2, False),
        (("linear/1", "other/1", "linear/1"), 2, True),
    ],
)
def test_a_call_that_could_only_wait_for_itself_is_refused_at_once(chain, slots, refused):
    server = Server()
    server.versions = [
        replace(one, targets=(Target("all", slots),)) if one.model_name == "linear" else one
        for one in server.versions
    ]
    server.publish()
    asked = replace(ASKED, chain=chain)
    if not refused:
        np.testing.assert_array_equal(ask(server.inference, asked), linear(X)[0])
        return
    with pytest.raises(Unavailable, match="'linear' is called by itself") as caught:
        ask(server.inference, asked)
    assert caught.value.code is Code.UNAVAILABLE
    assert " -> ".join((*chain, "linear/1")) in str(caught.value)
    assert server.gates["linear"].submitted == []
