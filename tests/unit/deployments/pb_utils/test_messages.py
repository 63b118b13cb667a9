"""Requests and responses: what they say, what is refused by name, and calls of other models."""

from __future__ import annotations

import asyncio
import json
import threading
from concurrent.futures import Future

import numpy as np
import pytest

from deployments import errors
from deployments.errors import Code, Internal, MantaError
from deployments.pb_utils import surface
from deployments.pb_utils.calls import Waiting, Waits
from deployments.pb_utils.faults import TritonError, TritonModelException, heard, told
from deployments.types import InferRequest, InferResponse
from deployments.types import Tensor as WireTensor

X = np.ones((1, 2), np.float32)


class Doubler:
    """Answers at once: twice every input, or an error for what is not named `double`."""

    def __init__(self) -> None:
        self.asked: list[tuple[InferRequest, float | None]] = []
        self.verbs: list[tuple[object, ...]] = []

    def infer(self, request, timeout_s):
        self.asked.append((request, timeout_s))
        done: Future[InferResponse | MantaError] = Future()
        if request.model_name != "double":
            done.set_result(errors.UnknownModel(request.model_name))
            return done
        outputs = tuple(
            WireTensor("y", one.datatype, one.shape, one.data if one.name == "s" else one.data * 2)
            for one in request.inputs
        )
        done.set_result(InferResponse("double", "1", request.id, outputs))
        return done

    def control(self, verb, *args):
        self.verbs.append((verb, *args))
        done: Future[object] = Future()
        done.set_result(Internal("no such model") if args[0] == "none" else True)
        return done


@pytest.fixture
def calls() -> Doubler:
    return Doubler()


@pytest.fixture
def pb(calls):
    return surface.build(calls, "/models/m/1")


def test_exec_asks_another_model(pb, calls):
    request = pb.InferenceRequest(
        model_name="double",
        model_version=3,
        request_id="r",
        requested_output_names=["y"],
        inputs=[pb.Tensor("x", X)],
        timeout=2_500_000,
        parameters={"depth": 2},
    )
    response = request.exec()
    assert not response.has_error() and response.error() is None
    assert pb.get_output_tensor_by_name(response, "y").as_numpy().tolist() == [[2, 2]]
    assert pb.get_output_tensor_by_name(response, "z") is None
    ((sent, timeout_s),) = calls.asked
    assert (sent.model_name, sent.model_version, sent.id) == ("double", "3", "r")
    assert [one.name for one in sent.outputs] == ["y"] and timeout_s == 2.5
    assert sent.parameters == {"depth": 2} and json.loads(request.parameters()) == {"depth": 2}


def test_exec_carries_strings(pb):
    words = np.array([[b"a"], [b"b\0"]], np.object_)
    request = pb.InferenceRequest(model_name="double", inputs=[pb.Tensor("s", words)])
    assert request.exec().output_tensors()[0].as_numpy().tolist() == [[b"a"], [b"b\0"]]


def test_a_failure_is_the_responses_error(pb):
    response = pb.InferenceRequest(model_name="nobody", inputs=[]).exec()
    assert response.has_error() and response.output_tensors() == []
    assert "unknown model: 'nobody'" in response.error().message()
    assert response.error().code() == pb.TritonError.NOT_FOUND


def test_async_exec_sends_all_before_it_waits(pb, calls):
    async def run():
        sent = [
            pb.InferenceRequest(model_name="double", inputs=[pb.Tensor("x", X * k)]).async_exec()
            for k in range(3)
        ]
        assert len(calls.asked) == 3
        return await asyncio.gather(*sent)

    answers = asyncio.run(run())
    assert [one.output_tensors()[0].as_numpy()[0, 0] for one in answers] == [0, 2, 4]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda r: r(model_name="double", inputs=[]).exec(decoupled=True), "decoupled"),
        (lambda r: r(model_name="double", inputs=[], flags=1).exec(), "sequences"),
        (lambda r: r(model_name="double", inputs=[], correlation_id=4).exec(), "sequences"),
        (lambda r: r(inputs=[]).exec(), "needs a model_name"),
        (lambda r: r(model_name="double", inputs=[X]), "must be a pb_utils.Tensor and not ndarray"),
        (lambda r: r(model_name="d", inputs=[], parameters={"a": [1]}), "must be a bool"),
        (lambda r: r().get_response_sender(), "decoupled models, which are not supported"),
        (lambda r: r().set_release_flags(2), "rescheduling of requests is not supported"),
    ],
)
def test_what_is_refused_by_name(pb, calls, make, reason):
    with pytest.raises(TritonModelException, match=reason):
        make(pb.InferenceRequest)
    assert calls.asked == []


def test_responses_hold_tensors_or_an_error(pb):
    with pytest.raises(TritonModelException, match="must be a list"):
        pb.InferenceResponse(pb.Tensor("y", X))
    with pytest.raises(TritonModelException, match="and not ndarray"):
        pb.InferenceResponse([X])
    with pytest.raises(TritonModelException, match="TritonError and not str"):
        pb.InferenceResponse([], error="no")
    with pytest.raises(TritonModelException, match="parameters of a response"):
        pb.InferenceResponse([], parameters={"a": 1})
    with pytest.raises(TritonModelException, match="MetricFamily"):
        pb.MetricFamily("name", "help", pb.MetricFamily.COUNTER)


def test_every_code_of_tritons_is_one_of_ours_and_back():
    names = [name for name in vars(TritonError) if name.isupper()]
    assert len(names) == 8
    for name in names:
        error = told(TritonError("words", getattr(TritonError, name)))
        assert error.code is Code[name] and str(error) == "words"
        assert heard(error).code() == getattr(TritonError, name)
    assert told(TritonError("words")).code is Code.INTERNAL
    with pytest.raises(TritonModelException, match="99 is not an error code"):
        TritonError("words", 99)


def test_other_models_can_be_managed(pb, calls):
    assert pb.is_model_ready("m", "2") is True
    pb.load_model("m", config="{}")
    pb.unload_model("m", unload_dependents=True)
    assert calls.verbs == [
        ("ready", "m", "2"),
        ("load", "m", {"config": "{}"}),
        ("unload", "m", {"unload_dependents": True}),
    ]
    with pytest.raises(TritonModelException, match="no such model"):
        pb.load_model("none")


def test_without_a_server_nobody_can_be_called():
    alone = surface.build(None, "")
    with pytest.raises(TritonModelException, match="cannot be called from here"):
        alone.InferenceRequest(model_name="m", inputs=[]).exec()
    with pytest.raises(TritonModelException, match="cannot be reached from here"):
        alone.is_model_ready("m")


def test_configs_are_looked_up_by_name(pb):
    config = {"input": [{"name": "a"}], "output": [{"name": "b"}], "model_transaction_policy": {}}
    assert pb.get_input_config_by_name(config, "a") == {"name": "a"}
    assert pb.get_output_config_by_name(config, "a") is None
    assert pb.using_decoupled_model_transaction_policy(config) is False
    assert pb.get_model_dir() == "/models/m/1"


def test_the_clock_of_a_run_stands_while_it_waits():
    now = [100]
    waits = Waits(lambda: now[0])
    waits.begin()
    assert waits.shifted(100) == 100 and waits.shifted(None) is None
    now[0] = 110
    waits.enter()
    now[0] = 120
    waits.enter()  # two at a time are waited for once
    assert waits.shifted(100) is None
    waits.leave()
    assert waits.shifted(100) is None
    now[0] = 150
    waits.leave()
    assert waits.shifted(100) == 140
    waits.begin()
    assert waits.shifted(150) == 150


def test_a_call_is_waited_for_until_it_is_answered():
    class Slow:
        def __init__(self):
            self.sent: Future[object] = Future()

        def infer(self, request, timeout_s):
            return self.sent

        def control(self, verb, *args):
            raise RuntimeError("no loop")

    slow, waits = Slow(), Waits()
    waiting = Waiting(slow, waits)
    sent = waiting.infer(InferRequest("m", "", "", ()), None)
    assert waits.shifted(5) is None
    answer = threading.Thread(target=lambda: slow.sent.set_result(None))
    answer.start()
    answer.join()
    assert sent.done() and waits.shifted(5) is not None
    with pytest.raises(RuntimeError):
        waiting.control("load", "m")
    assert waits.shifted(5) is not None
