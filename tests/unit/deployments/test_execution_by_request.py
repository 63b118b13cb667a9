"""One batch through a TritonPythonModel: each request by itself, and each with its own fate."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import Future

import numpy as np
import pytest

from configs.model import ModelInput, ModelOutput
from configs.parameters import ModelParameters
from deployments import execution_by_request, tensors
from deployments.desk import SendAgain
from deployments.doorway import Doorway
from deployments.errors import Internal, InvalidArgument, NotFound
from deployments.instance import Instance
from deployments.local import LocalClient
from deployments.types import Batch, BatchReply, RequestFacts
from tests import models
from tests.models import config

HEAD = "import numpy as np\nimport json\nimport triton_python_backend_utils as pb_utils\n"

# Doubles x. Its words: below 0 raises, 100 is an error of its own, 200 a lacking output, 300 a
# wrong datatype, 400 no response at all. `seen` counts the requests of the call.
DOUBLE = (
    HEAD
    + """
class TritonPythonModel:
    def execute(self, requests):
        answers = []
        for request in requests:
            x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
            if x.min() < 0:
                x[:] = 9999
                raise ValueError("negative value in /models/secret/x.npy")
            if x.max() == 400:
                return answers
            if x.max() == 100:
                code = pb_utils.TritonError.NOT_FOUND
                error = pb_utils.TritonError("a hundred", code)
                answers.append(pb_utils.InferenceResponse(error=error))
                continue
            y = (x * 2).astype(np.float64 if x.max() == 300 else np.float32)
            seen = np.full(x.shape, len(requests), np.float32)
            outputs = [pb_utils.Tensor("y", y), pb_utils.Tensor("seen", seen)]
            answers.append(pb_utils.InferenceResponse(outputs[1:] if x.max() == 200 else outputs))
        return answers
"""
)
MADE = config({"x": (-1,)}, {"y": (-1,), "seen": (-1,)}, backend="python", platform="")


def x(*values: float) -> np.ndarray:
    return np.array([values], np.float32)


def batch_of(*members: np.ndarray, outputs=("seen", "y"), facts=()) -> Batch:
    return Batch(tuple(len(m) for m in members), (tuple(members),), outputs, facts=facts)


@pytest.fixture
def start(tmp_path):
    opened: list[Instance] = []

    def make(source: str, made=MADE, calls=None) -> Instance:
        path = models.save_eager(source, tmp_path)
        one = Instance("i", path, made, ModelParameters(), "cpu", "KIND_CPU", calls=calls)
        opened.append(one)
        one.load()
        return one

    yield make
    for instance in opened:
        instance.close()


def fates(reply: BatchReply) -> dict[int, object]:
    return {k: part.error for part in reply.parts for k in part.members}


def test_requests_come_one_by_one_in_one_call(start):
    reply = start(DOUBLE).run(batch_of(x(1), x(2, 3), x(4)))
    assert [part.members for part in reply.parts] == [(0,), (1,), (2,)]
    assert [part.outputs["y"].data.tolist() for part in reply.parts] == [[[2]], [[4, 6]], [[8]]]
    assert {float(part.outputs["seen"].data.flat[0]) for part in reply.parts} == {3}
    # One execution of three rows, told by one of its parts.
    assert [part.run_rows for part in reply.parts] == [3, 0, 0]
    assert min(reply.parts[1].input_ns, reply.parts[1].infer_ns, reply.parts[1].output_ns) > 0


def test_an_error_of_one_response_is_that_requests_alone(start):
    reply = start(DOUBLE).run(batch_of(x(100), x(2), x(200), x(300)))
    found = fates(reply)
    assert isinstance(found[0], NotFound) and str(found[0]) == "a hundred"
    assert found[1] is None and reply.parts[1].run_rows == 4
    assert isinstance(found[2], Internal) and "lacks output 'y'" in str(found[2])
    assert isinstance(found[3], InvalidArgument)
    assert "expects datatype TYPE_FP32 for output 'y', model provides TYPE_FP64" in str(found[3])


def test_what_raises_is_run_apart_so_that_only_the_culprit_fails(start):
    reply = start(DOUBLE).run(batch_of(x(1), x(-1), x(3)))
    found = fates(reply)
    assert found[0] is None and found[2] is None
    assert str(found[1]) == (
        "Failed to process the request(s) for model instance 'i', message: "
        "ValueError: negative value in x.npy"
    )
    assert [part.outputs["y"].data.tolist() for part in reply.parts[::2]] == [[[2]], [[6]]]
    # Control: it was one call at first, and each by itself then.
    assert {float(part.outputs["seen"].data.flat[0]) for part in reply.parts[::2]} == {1}
    assert [part.run_rows for part in reply.parts] == [1, 0, 1]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("None", "it returned None"),
        ("[]", "it returned 0 for 1"),
        ("[None]", "the list holds None"),
        ("[3]", "the list holds a int"),
        ("pb_utils.InferenceResponse()", "it returned a InferenceResponse"),
        ("__import__('sys').exit(3)", r"the model called sys.exit\(3\)"),
    ],
)
def test_what_is_no_list_of_responses(start, answer, reason):
    source = f"{HEAD}\nclass TritonPythonModel:\n    def execute(self, requests):\n        "
    instance = start(source + f"return {answer}")
    (part,) = instance.run(batch_of(x(1))).parts
    assert isinstance(part.error, Internal)
    assert reason.replace("\\", "") in str(part.error)


def test_a_list_too_short_is_found_out_and_its_members_run_apart(start):
    found = fates(start(DOUBLE).run(batch_of(x(1), x(400))))
    assert found[0] is None and "it returned 0 for 1" in str(found[1])


TELLS = (
    HEAD
    + """
class TritonPythonModel:
    def execute(self, requests):
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor("told", np.array([json.dumps([
                request.request_id(), json.loads(request.parameters()),
                request.requested_output_names(), request.model_name(), request.model_version(),
                request.correlation_id(), request.flags(), request.timeout(),
                request.is_cancelled(),
            ])], np.object_))])
            for request in requests
        ]
"""
)


def test_each_request_tells_what_its_client_said(start):
    made = config(
        [ModelInput(name="x", data_type="TYPE_FP32", dims=(-1,))],
        [ModelOutput(name="told", data_type="TYPE_STRING", dims=(1,))],
        backend="python",
        platform="",
        name="m",
    )
    facts = (
        RequestFacts("first", '{"depth": 3}', ("told",)),
        RequestFacts("", "{}", ("told",)),
    )
    reply = start(TELLS, made).run(batch_of(x(1), x(2), outputs=("told",), facts=facts))
    told = [
        json.loads(tensors.decode_bytes("told", part.outputs["told"].data)[0])
        for part in reply.parts
    ]
    assert told == [
        ["first", {"depth": 3}, ["told"], "m", 1, 0, 0, 0, False],
        ["", {}, ["told"], "m", 1, 0, 0, 0, False],
    ]


UPPER = (
    HEAD
    + """
class TritonPythonModel:
    def execute(self, requests):
        answers = []
        for request in requests:
            words = pb_utils.get_input_tensor_by_name(request, "words").as_numpy()
            made = np.array([[word.upper() for word in row] for row in words], np.object_)
            answers.append(pb_utils.InferenceResponse([pb_utils.Tensor("upper", made)]))
        return answers
"""
)


def test_strings_are_object_arrays_of_their_shape(start):
    made = config(
        [ModelInput(name="words", data_type="TYPE_STRING", dims=(2,))],
        [ModelOutput(name="upper", data_type="TYPE_STRING", dims=(2,))],
        backend="python",
        platform="",
    )
    wire = tensors.encode_bytes([b"a", b"b\0", b"c", b"d"])
    (part,) = start(UPPER, made).run(Batch((2,), ((wire,),), ("upper",))).parts
    out = part.outputs["upper"]
    assert out.shape == (2, 2)
    assert tensors.decode_bytes("upper", out.data) == [b"A", b"B\0", b"C", b"D"]


def test_joined_inputs_are_cut_and_asked_for_again_when_a_run_fails(start):
    instance = start(DOUBLE)
    whole = np.array([[1], [2], [3]], np.float32)
    reply = instance.run(Batch((1, 2), ((),), ("y",), (whole,)))
    assert [part.outputs["y"].data.tolist() for part in reply.parts] == [[[2]], [[4], [6]]]
    with pytest.raises(SendAgain) as caught:
        instance.run(Batch((1, 1), ((),), ("y",), (np.array([[1], [-1]], np.float32),)))
    assert caught.value.how == "singly"


def test_over_the_channel_facts_arrive_and_batches_are_sent_again(start):
    instance = start(DOUBLE)

    async def drive() -> list[BatchReply]:
        door = Doorway(1, lambda _, sock, router: instance.attach(sock, router))
        address = door.open()
        assert address is not None
        told = asyncio.Event()
        client = await LocalClient.connect(address, 0, "router", "model", told.set, 30.0)
        await asyncio.wait_for(told.wait(), 30)
        facts = (RequestFacts("a", "{}", ("y",)), RequestFacts("b", '{"k": 1}', ("seen",)))
        replies = []
        for members in ((x(1), x(2)), (x(1), x(-1))):
            batch = Batch((1, 1), (members,), ("seen", "y"), facts=facts)
            replies.append(await asyncio.wait_for(client.execute(batch), 30))
        await client.aclose()
        door.close()
        return replies

    good, mixed = asyncio.run(drive())
    assert [sorted(part.outputs) for part in good.parts] == [["y"], ["seen"]]
    assert good.parts[0].run_rows == 2
    found = fates(mixed)
    assert found[0] is None and "negative value" in str(found[1])


WAITS = (
    HEAD
    + """
class TritonPythonModel:
    def execute(self, requests):
        answers = []
        for request in requests:
            ask = pb_utils.InferenceRequest(model_name="other", inputs=request.inputs())
            answer = ask.exec()
            y = pb_utils.get_output_tensor_by_name(answer, "y")
            answers.append(pb_utils.InferenceResponse([y, pb_utils.Tensor("seen", y.as_numpy())]))
        return answers
"""
)


class Silent:
    """Answers when the test says so."""

    def __init__(self) -> None:
        self.sent: Future[object] = Future()
        self.asked: Future[object] = Future()

    def infer(self, request, timeout_s):
        self.asked.set_result(request)
        return self.sent

    def control(self, verb, *args):
        raise NotImplementedError


def test_an_instance_that_waits_for_another_model_does_not_hang(start):
    from deployments.types import InferResponse, Tensor

    silent = Silent()
    instance = start(WAITS, calls=silent)
    sent = instance.submit(batch_of(x(1)))
    silent.asked.result(30)
    progress = instance.progress()
    assert progress.state == "running" and progress.running_since_ns is None
    silent.sent.set_result(InferResponse("other", "1", "", (Tensor("y", "FP32", (1, 1), x(7)),)))
    (part,) = sent.result(30).parts
    assert part.outputs["y"].data.tolist() == [[7]]


def test_control_an_instance_that_runs_has_a_clock(start):
    source = HEAD + (
        "import threading\nGO = threading.Event()\nIN = threading.Event()\n"
        "class TritonPythonModel:\n    def execute(self, requests):\n"
        "        IN.set()\n        GO.wait(30)\n"
    )
    instance = start(source)
    import sys

    module = next(
        m
        for name, m in sys.modules.items()
        if name.startswith("manta_python_") and hasattr(m, "GO")
    )
    sent = instance.submit(batch_of(x(1)))
    assert module.IN.wait(30)
    assert instance.progress().running_since_ns is not None
    module.GO.set()
    assert sent.result(30).parts[0].error is not None
    del sys.modules[module.__name__]


def test_finalize_is_called_when_the_instance_closes(start, tmp_path):
    mark = tmp_path / "gone"
    source = (
        "class TritonPythonModel:\n    def execute(self, requests): ...\n"
        f"    def finalize(self):\n        open({str(mark)!r}, 'w').close()\n"
    )
    instance = start(source)
    assert not mark.exists()
    instance.close()
    assert mark.exists()


def test_whoever_waits_for_a_run_is_told_to_those_that_it_calls():
    """Of each model as many as wait for one of its requests."""

    def waiting(*chains):
        facts = tuple(RequestFacts(chain=chain) for chain in chains)
        return execution_by_request._waiting(facts)

    assert waiting() == waiting((), ()) == ()
    assert waiting(("a/1", "b/1"), (), ("a/1", "b/1")) == ("a/1", "b/1")
    assert sorted(waiting(("a/1",), ("c/1",))) == ["a/1", "c/1"]
    assert sorted(waiting(("a/1", "b/1"), ("a/1", "a/1"))) == ["a/1", "a/1", "b/1"]


CANCELS = (
    HEAD
    + """
import asyncio

class TritonPythonModel:
    async def execute(self, requests):
        answers = []
        for request in requests:
            x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
            task = asyncio.ensure_future(asyncio.sleep(0))
            if x.min() < 0:
                task.cancel()
            await task
            outputs = [pb_utils.Tensor("y", x), pb_utils.Tensor("seen", x)]
            answers.append(pb_utils.InferenceResponse(outputs))
        return answers
"""
)


def test_a_task_that_a_model_cancels_is_its_requests_alone(start):
    """It is no Exception in Python, and must not end the instance."""
    instance = start(CANCELS)
    found = fates(instance.run(batch_of(x(1), x(-1))))
    assert found[0] is None and "execute was cancelled" in str(found[1])
    assert fates(instance.run(batch_of(x(2)))) == {0: None}
