"""TritonPythonModel over a real server: strings in, another model asked, strings come out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tritonclient.utils import InferenceServerException

from tests import models
from tests.serve import repository
from tests.serve.clients import aio_client, infer, infer_aio, loading, rows, statistics
from tests.serve.server import Server, wait_for

HEAD = """
import asyncio
import json
import numpy as np
import triton_python_backend_utils as pb_utils
"""

# Numbers as text -> `mlp`, which is TorchScript -> what it says of them, as text and numbers.
READER = (
    HEAD
    + """
class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        self.digits = int(config["parameters"]["digits"]["string_value"])
        out = pb_utils.get_output_config_by_name(config, "scores")
        self.dtype = pb_utils.triton_string_to_numpy(out["data_type"])
        pb_utils.Logger.log_info("reader is here")

    def execute(self, requests):
        return [self.one(request) for request in requests]

    def one(self, request):
        texts = pb_utils.get_input_tensor_by_name(request, "text").as_numpy()
        texts = [row[0].decode() for row in texts]
        if "crash" in texts:
            raise RuntimeError("this text crashes the reader")
        if "refuse" in texts:
            return pb_utils.InferenceResponse(
                error=pb_utils.TritonError("no such text", pb_utils.TritonError.NOT_FOUND)
            )
        if "nobody" in texts:
            answer = pb_utils.InferenceRequest(
                model_name="nobody", requested_output_names=["y"], inputs=[]
            ).exec()
            return pb_utils.InferenceResponse(error=answer.error())
        numbers = np.array([text.split() for text in texts], self.dtype)
        asked = pb_utils.InferenceRequest(
            model_name="mlp",
            requested_output_names=["OUTPUT__0"],
            inputs=[pb_utils.Tensor("INPUT__0", numbers)],
        ).exec()
        if asked.has_error():
            raise pb_utils.TritonModelException(asked.error().message())
        scores = pb_utils.get_output_tensor_by_name(asked, "OUTPUT__0").as_numpy()
        best = [str(round(float(row.max()), self.digits)) for row in scores]
        labels = [[f"class {row.argmax()}", text] for row, text in zip(scores, best)]
        return pb_utils.InferenceResponse([
            pb_utils.Tensor("scores", scores.astype(self.dtype)),
            pb_utils.Tensor("labels", np.array(labels, np.object_)),
        ])
"""
)

# Asks `mlp` twice at once, by DLPack, and tells what it was told.
TELLER = (
    HEAD
    + """
import torch

class TritonPythonModel:
    async def execute(self, requests):
        return [await self.one(request) for request in requests]

    async def one(self, request):
        x = torch.from_dlpack(pb_utils.get_input_tensor_by_name(request, "x"))
        asked = [
            pb_utils.InferenceRequest(
                model_name="mlp",
                model_version=1,
                inputs=[pb_utils.Tensor.from_dlpack("INPUT__0", part)],
            ).async_exec()
            for part in (x, x * 2)
        ]
        answers = await asyncio.gather(*asked)
        y = sum(torch.from_dlpack(one.output_tensors()[0]) for one in answers)
        told = json.dumps({
            "id": request.request_id(),
            "parameters": json.loads(request.parameters()),
            "outputs": sorted(request.requested_output_names()),
            "ready": [pb_utils.is_model_ready(name) for name in ("mlp", "nobody")],
        })
        return pb_utils.InferenceResponse([
            pb_utils.Tensor.from_dlpack("y", y),
            pb_utils.Tensor("told", np.array([[told]] * len(x), np.object_)),
        ])
"""
)

# Calls itself as often as x says, and `slow` with it.
ROUND = (
    HEAD
    + """
class TritonPythonModel:
    def execute(self, requests):
        answers = []
        for request in requests:
            x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
            asked = pb_utils.InferenceRequest(
                model_name="round" if x[0, 0] > 0 else "slow",
                inputs=[pb_utils.Tensor("x" if x[0, 0] > 0 else "s", np.abs(x))],
                timeout=0 if x[0, 0] > -5 else 200_000,
            ).exec()
            if asked.has_error():
                answers.append(pb_utils.InferenceResponse(error=asked.error()))
            else:
                y = asked.output_tensors()[0].as_numpy()
                answers.append(pb_utils.InferenceResponse([pb_utils.Tensor("y", y)]))
        return answers
"""
)

BARE = (
    HEAD
    + """
class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config):
        config.set_max_batch_size(6)
        config.set_dynamic_batching()
        config.add_input({"name": "word", "data_type": "TYPE_STRING", "dims": [1]})
        config.add_output({"name": "length", "data_type": "TYPE_INT64", "dims": [1]})
        return config

    def execute(self, requests):
        return [self.one(request) for request in requests]

    def one(self, request):
        words = request.inputs()[0].as_numpy()
        lengths = np.array([[len(word[0])] for word in words], np.int64)
        return pb_utils.InferenceResponse([pb_utils.Tensor("length", lengths)])
"""
)

BROKEN = (
    HEAD
    + """
class TritonPythonModel:
    def initialize(self, args):
        open(args["model_repository"] + "/vocabulary.txt")
    def execute(self, requests):
        pass
"""
)

PYTHON = 'backend: "python"'
# So long that four rows are one batch, however slowly they come: all requests here bring as many.
HELD = "dynamic_batching { preferred_batch_size: [ 4 ] max_queue_delay_microseconds: 20000000 }\n"
NAMES = ("reader", "teller", "round", "bare")


def write(root: Path) -> None:
    def save(name: str, source: str, text: str) -> None:
        models.save_eager(source, root, name)
        repository.write_config(root, name, text)

    one, four = repository.tensor("x", "8"), repository.tensor("y", "4")
    text = repository.tensor("text", "1", "TYPE_STRING")
    scores = repository.tensor("scores", "4")
    labels = repository.tensor("labels", "2", "TYPE_STRING")
    more = HELD + repository.parameter("digits", "3")
    save("reader", READER, repository.config([text], [scores, labels], engine=PYTHON, more=more))
    told = repository.tensor("told", "1", "TYPE_STRING")
    two = "dynamic_batching { }\ninstance_group [ { kind: KIND_CPU count: 2 } ]\n"
    save("teller", TELLER, repository.config([one], [four, told], engine=PYTHON, more=two))
    alone = repository.config(
        [repository.tensor("x", "1")],
        [repository.tensor("y", "1")],
        engine=PYTHON,
        max_batch_size=1,
        more="",
    )
    save("round", ROUND, alone)
    save("bare", BARE, PYTHON)
    save("broken_python", BROKEN, alone)
    packed = repository.parameter("EXECUTION_ENV_PATH", "env.tar.gz")
    save("packed_python", BROKEN, alone + packed)


@pytest.fixture(scope="module")
def python_models(server: Server, models_root: Path) -> Iterator[None]:
    write(models_root)
    with loading(server, NAMES):
        yield


pytestmark = pytest.mark.usefixtures("python_models")


@pytest.fixture(params=["http", "grpc"])
def client(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def texts(numbers: np.ndarray) -> np.ndarray:
    return np.array([[" ".join(str(float(n)) for n in row).encode()] for row in numbers], object)


def direct(numbers: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        answer: np.ndarray = repository.mlp()(torch.from_numpy(numbers)).numpy()
    return answer


def test_strings_go_in_another_model_is_asked_and_strings_come_out(client: Any) -> None:
    numbers = rows(4, 8)
    reply = infer(client, "reader", {"text": texts(numbers)})
    wanted = direct(numbers)
    np.testing.assert_allclose(reply.as_numpy("scores"), wanted, rtol=1e-5, atol=1e-5)
    labels = reply.as_numpy("labels")
    assert labels.shape == (4, 2)
    for row, (label, best) in zip(wanted, labels, strict=True):
        assert label.decode() == f"class {row.argmax()}"
        assert float(best) == pytest.approx(float(row.max()), abs=1e-3)


def test_strings_in_json_too(server: Server) -> None:
    import httpx

    numbers = rows(4, 8)
    body = {
        "inputs": [
            {
                "name": "text",
                "datatype": "BYTES",
                "shape": [4, 1],
                "data": [text.decode() for (text,) in texts(numbers)],
            }
        ],
        "outputs": [{"name": "labels"}],
    }
    reply = httpx.post(f"http://{server.http}/v2/models/reader/infer", json=body, timeout=60)
    (output,) = reply.json()["outputs"]
    assert output["shape"] == [4, 2]
    assert output["data"][::2] == [f"class {row.argmax()}" for row in direct(numbers)]


@pytest.mark.parametrize(
    ("word", "status", "reason"),
    [
        ("crash", "INTERNAL", "RuntimeError: this text crashes the reader"),
        ("refuse", "NOT_FOUND", "no such text"),
        ("nobody", "NOT_FOUND", "unknown model: 'nobody'"),
        ("1 2 3", "INTERNAL", "unexpected shape for input 'INPUT__0' for model 'mlp'"),
        ("one two three", "INTERNAL", "ValueError: could not convert string to float"),
    ],
)
def test_each_error_has_its_status_and_no_path(
    client: Any, word: str, status: str, reason: str
) -> None:
    with pytest.raises(InferenceServerException) as caught:
        infer(client, "reader", {"text": np.array([[word.encode()]] * 4, object)})
    assert reason in caught.value.message()
    assert "Traceback" not in caught.value.message() and "/1/" not in caught.value.message()
    numbers = {"INTERNAL": "500", "NOT_FOUND": "404"}
    assert caught.value.status() in (f"StatusCode.{status}", numbers[status])


@pytest.mark.parametrize("protocol", ["http", "grpc"])
@pytest.mark.parametrize("word", ["", "crash", "refuse"])
def test_one_bad_request_of_a_batch_fails_alone(
    server: Server, http: Any, protocol: str, word: str
) -> None:
    """Without a bad one, the control: four requests are one execution."""
    numbers = rows(4, 8)
    asked = [texts(numbers[k : k + 1]) for k in range(4)]
    if word:
        asked[1] = np.array([[word.encode()]], object)
    before = statistics(http, "reader")

    async def run() -> list[Any]:
        async with aio_client(server, protocol) as one:
            calls = [infer_aio(one, "reader", {"text": text}) for text in asked]
            return await asyncio.gather(*calls, return_exceptions=True)

    replies = asyncio.run(run())
    wanted = direct(numbers)
    for k, reply in enumerate(replies):
        if word and k == 1:
            assert isinstance(reply, InferenceServerException)
            continue
        np.testing.assert_allclose(reply.as_numpy("scores"), wanted[k : k + 1], rtol=1e-5)
    after = statistics(http, "reader")
    bad = int(bool(word))
    assert after["success"] - before["success"] == 4 - bad
    assert after["fail"] - before["fail"] == bad
    # A response's own error leaves the others where they are; what raises has them run apart.
    executions = after["execution_count"] - before["execution_count"]
    assert executions == (3 if word == "crash" else 1)


def test_async_execute_asks_several_models_at_once(client: Any) -> None:
    x = rows(2, 8)
    reply = infer(client, "teller", {"x": x}, request_id="seven", parameters={"depth": 3})
    np.testing.assert_allclose(reply.as_numpy("y"), direct(x) + direct(x * 2), rtol=1e-4, atol=1e-5)
    told = json.loads(reply.as_numpy("told")[0, 0])
    assert told["id"] == "seven" and told["parameters"] == {"depth": 3}
    assert told["outputs"] == ["told", "y"]
    assert told["ready"] == [True, False]


def test_two_instances_answer_many_at_once(server: Server) -> None:
    x = rows(24, 8)
    wanted = direct(x) + direct(x * 2)

    async def run() -> list[Any]:
        async with aio_client(server, "grpc") as one:
            calls = [infer_aio(one, "teller", {"x": x[k : k + 1]}) for k in range(len(x))]
            return await asyncio.gather(*calls)

    for k, reply in enumerate(asyncio.run(run())):
        np.testing.assert_allclose(reply.as_numpy("y"), wanted[k : k + 1], rtol=1e-4, atol=1e-5)


def test_a_request_is_told_what_its_own_client_wants(http: Any) -> None:
    import tritonclient.http as httpclient

    outputs = [httpclient.InferRequestedOutput("told")]
    reply = infer(http, "teller", {"x": rows(1, 8)}, outputs=outputs, request_id="a")
    assert json.loads(reply.as_numpy("told")[0, 0])["outputs"] == ["told"]
    assert reply.as_numpy("y") is None


def test_a_model_that_calls_itself_does_not_wait_for_ever(client: Any) -> None:
    with pytest.raises(InferenceServerException) as caught:
        infer(client, "round", {"x": np.array([[1]], np.float32)})
    assert "'round' is called by itself (round/1 -> round/1)" in caught.value.message()
    assert caught.value.status() in ("503", "StatusCode.UNAVAILABLE")
    # Control: another model, which takes its time, is waited for.
    reply = infer(client, "round", {"x": np.array([[-0.5]], np.float32)})
    assert reply.as_numpy("y").tolist() == [[1.0]]


def test_a_call_that_takes_too_long_ends_by_its_own_limit(client: Any) -> None:
    with pytest.raises(InferenceServerException, match="'slow' did not answer in time"):
        infer(client, "round", {"x": np.array([[-5.5]], np.float32)})
    # And the next is answered: the instance is free again.
    reply = infer(client, "round", {"x": np.array([[0]], np.float32)})
    assert reply.as_numpy("y").tolist() == [[0.0]]


def test_a_called_model_that_has_others_waiting_is_waited_for(server: Server) -> None:
    """More calls than `slow` has instances, from inside and outside at once."""
    half = np.array([[0.2]], np.float32)

    async def run() -> list[Any]:
        async with aio_client(server, "http") as one:
            calls = [infer_aio(one, "slow", {"s": half}) for _ in range(6)]
            calls += [infer_aio(one, "round", {"x": -half}) for _ in range(3)]
            return await asyncio.gather(*calls)

    replies = asyncio.run(run())
    assert all(reply.as_numpy("y").tolist() == [[half[0, 0] * 2]] for reply in replies[6:])


def test_a_model_completes_its_own_configuration(server: Server, client: Any) -> None:
    words = np.array([[b"one"], [b"three"]], object)
    assert infer(client, "bare", {"word": words}).as_numpy("length").tolist() == [[3], [5]]
    config = server.get("/v2/models/bare/config").json()
    assert config["max_batch_size"] == 6 and "dynamic_batching" in config
    assert [(one["name"], one["data_type"], one["dims"]) for one in config["input"]] == [
        ("word", "TYPE_STRING", [1])
    ]
    metadata = server.get("/v2/models/bare").json()
    assert metadata["platform"] == "python"
    assert metadata["outputs"] == [{"name": "length", "datatype": "INT64", "shape": [-1, 1]}]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("broken_python", "initialize failed: FileNotFoundError: [Errno 2] No such file"),
        ("packed_python", "packed execution environments are not supported"),
    ],
)
def test_what_does_not_load_says_why(
    server: Server, http: Any, models_root: Path, name: str, reason: str
) -> None:
    with pytest.raises(InferenceServerException) as caught:
        http.load_model(name)
    assert reason in caught.value.message()
    assert str(models_root) not in caught.value.message()
    assert "vocabulary.txt" in caught.value.message() or name == "packed_python"

    def told() -> bool:  # once the Router has heard of it
        index = {one["name"]: one.get("reason", "") for one in http.get_model_repository_index()}
        return reason in index.get(name, "")

    wait_for(told, 30, "the repository index says why")
