"""Headers that reach a model as parameters, by stock clients of every kind and httpx."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from tests import models
from tests.serve import repository
from tests.serve.clients import aio_client, infer, infer_aio, loading, rows
from tests.serve.server import BIN, Server

# What it was told, as text.
TELLER = """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        answers = []
        for request in requests:
            told = np.array([[request.parameters()]], np.object_)
            answers.append(pb_utils.InferenceResponse([pb_utils.Tensor("told", told)]))
        return answers
"""
HEADERS = {"my_header_1": "my_value_1", "my_header_3": 'a "quoted" \\ value', "other": "x"}
WANTED = {"my_header_1": "my_value_1", "my_header_3": 'a "quoted" \\ value'}


@pytest.fixture(scope="module", autouse=True)
def loaded(server: Server, models_root: Path) -> Iterator[None]:
    models.save_eager(TELLER, models_root, "teller")
    text = repository.config(
        [repository.tensor("x", "1")],
        [repository.tensor("told", "1", "TYPE_STRING")],
        engine='backend: "python"',
        max_batch_size=1,
        more="",
    )
    repository.write_config(models_root, "teller", text)
    with loading(server, ["teller"]):
        yield


@pytest.fixture(params=["http", "grpc"])
def client(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


X = np.ones((1, 1), np.float32)


def told(reply: Any) -> Any:
    return json.loads(reply.as_numpy("told")[0, 0])


def test_headers_that_match_are_parameters(client: Any) -> None:
    reply = infer(client, "teller", {"x": X}, headers=dict(HEADERS), parameters={"key": 1})
    assert told(reply) == {**WANTED, "key": 1}
    assert told(infer(client, "teller", {"x": X})) == {}
    for number in range(3):  # each request has its own
        reply = infer(client, "teller", {"x": X}, headers={"my_header_1": str(number)})
        assert told(reply) == {"my_header_1": str(number)}


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_aio_clients_too(server: Server, protocol: str) -> None:
    async def ask() -> Any:
        async with aio_client(server, protocol) as one:
            return await infer_aio(one, "teller", {"x": X}, headers=dict(HEADERS))

    assert told(asyncio.run(ask())) == WANTED


def test_other_models_are_asked_as_ever(client: Any) -> None:
    for _ in range(3):
        reply = infer(client, "mlp", {"INPUT__0": rows(1, 8)}, headers=dict(HEADERS))
        assert reply.as_numpy("OUTPUT__0").shape == (1, 4)


@pytest.mark.parametrize("model", ["teller", "mlp"])
def test_reserved_names_are_refused(client: Any, model: str) -> None:
    arrays = {"x": X} if model == "teller" else {"INPUT__0": rows(1, 8)}
    with pytest.raises(InferenceServerException) as caught:
        infer(client, model, arrays, headers={"priority": "1"})
    assert caught.value.status() in ("400", "StatusCode.INVALID_ARGUMENT")
    assert "is reserved for Triton usage and cannot be forwarded" in caught.value.message()


def test_names_are_those_that_were_sent(server: Server) -> None:
    """By both roads over HTTP: a body in chunks goes the longer one."""
    document = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [1]}]}

    def chunks() -> Iterator[bytes]:
        yield json.dumps(document).encode()

    for content in (json.dumps(document).encode(), chunks()):
        reply = httpx.post(
            f"http://{server.http}/v2/models/teller/infer",
            content=content,
            headers={"My_Header-One": "a"},
            timeout=60,
        )
        assert json.loads(reply.json()["outputs"][0]["data"][0]) == {"My_Header-One": "a"}


def test_generate_forwards_headers_too(server: Server) -> None:
    reply = httpx.post(
        f"http://{server.http}/v2/models/teller/generate",
        json={"x": 1, "depth": 3},
        headers={"My_Header": "a"},
        timeout=60,
    )
    assert json.loads(reply.json()["told"]) == {"depth": 3, "My_Header": "a"}


def test_a_pattern_that_cannot_be_compiled_is_a_start_up_error(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(str(BIN / "manta"), "serve", f"--model-repository={tmp_path}"),
            "--grpc-header-forward-pattern=my_(header",
        ],
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 1
    assert "--grpc-header-forward-pattern: 'my_(header' is no regular" in done.stderr
