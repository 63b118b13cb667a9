"""Triton's surface over both protocols, with stock clients and bare HTTP."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
from tritonclient.utils import InferenceServerException

from tests.serve import repository
from tests.serve.clients import aio_client, infer, infer_aio, inputs, module_of, rows
from tests.serve.conftest import BROKEN
from tests.serve.server import Server


@pytest.fixture(params=["http", "grpc"])
def client(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def status(error: InferenceServerException) -> str:
    return str(error.status()).removeprefix("StatusCode.")


def test_health_and_metadata(client: Any) -> None:
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready("mlp") and client.is_model_ready("mlp", "1")
    assert not client.is_model_ready("mlp", "7")
    assert not client.is_model_ready("nowhere")
    assert not client.is_model_ready("pickled")


def test_server_and_model_metadata(http: Any, grpc: Any) -> None:
    assert http.get_server_metadata()["name"] == "triton"
    assert list(grpc.get_server_metadata().extensions) == http.get_server_metadata()["extensions"]
    metadata = http.get_model_metadata("mlp")
    assert metadata["platform"] == "pytorch_libtorch"
    assert metadata["versions"] == ["1"]
    assert metadata["inputs"] == [{"name": "INPUT__0", "datatype": "FP32", "shape": [-1, 8]}]
    assert grpc.get_model_metadata("mlp").outputs[0].shape == [-1, 4]


def test_config_is_the_normalised_one(http: Any, grpc: Any) -> None:
    config = http.get_model_config("mlp")
    assert config["backend"] == "pytorch"
    assert config["version_policy"] == {"latest": {"num_versions": 1}}
    assert config["instance_group"][0]["kind"] == "KIND_CPU"
    assert config["dynamic_batching"]["preferred_batch_size"] == [32]
    assert grpc.get_model_config("mlp").config.max_batch_size == 32
    assert http.get_model_config("eager_mlp")["default_model_filename"] == ""


def test_infer_with_version_id_and_requested_outputs(client: Any) -> None:
    x = rows(3, 8)
    asked = [module_of(client).InferRequestedOutput("OUTPUT__0")]
    reply = infer(
        client, "mlp", {"INPUT__0": x}, model_version="1", request_id="mine", outputs=asked
    )
    with torch.inference_mode():
        expected = repository.mlp()(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(reply.as_numpy("OUTPUT__0"), expected, atol=1e-5)
    response = reply.get_response()
    assert (response["id"] if isinstance(response, dict) else response.id) == "mine"


def test_infer_json_tensors(server: Server) -> None:
    x = rows(2, 8)
    body = {
        "id": "7",
        "inputs": [
            {"name": "INPUT__0", "datatype": "FP32", "shape": [2, 8], "data": x.tolist()},
        ],
        "outputs": [{"name": "OUTPUT__0"}],
    }
    reply = httpx.post(
        f"http://{server.http}/v2/models/mlp/versions/1/infer", json=body, timeout=60
    )
    assert reply.status_code == 200
    output = reply.json()["outputs"][0]
    with torch.inference_mode():
        expected = repository.mlp()(torch.from_numpy(x)).numpy()
    assert output["shape"] == [2, 4] and reply.json()["id"] == "7"
    np.testing.assert_allclose(np.array(output["data"]).reshape(2, 4), expected, atol=1e-5)


def test_infer_json_through_the_stock_client(http: Any) -> None:
    x = rows(1, 8)
    one = httpclient.InferInput("INPUT__0", [1, 8], "FP32")
    one.set_data_from_numpy(x, binary_data=False)
    asked = httpclient.InferRequestedOutput("OUTPUT__0", binary_data=False)
    reply = http.infer("mlp", [one], outputs=[asked])
    assert reply.as_numpy("OUTPUT__0").shape == (1, 4)


def test_strings_keep_nul_bytes_and_their_own_rows(client: Any) -> None:
    words = np.array([[b"a\0b"], ["Grüße".encode()], [b""]], dtype=np.object_)
    reply = infer(client, "strings", {"words": words})
    expected = [word + b"!" for word in words.ravel()]
    assert reply.as_numpy("OUTPUT__0").ravel().tolist() == expected


@pytest.mark.parametrize("megabytes", [0.5, 3.9, 4.1, 20, 70])
def test_large_tensors_in_both_directions(client: Any, megabytes: float) -> None:
    """The last is above --http-max-input-size, which does not count what follows the JSON."""
    x = rows(1, int(megabytes * (1 << 18)))
    reply = infer(client, "big", {"x": x})
    assert np.array_equal(reply.as_numpy("OUTPUT__0"), x)


def test_async_clients(server: Server, http: Any, grpc: Any) -> None:
    x = rows(1, 8)
    pending = http.async_infer("mlp", inputs(httpclient, {"INPUT__0": x}))
    expected = pending.get_result().as_numpy("OUTPUT__0")
    done, got = threading.Event(), []

    def callback(result: Any, error: Any) -> None:
        got.append((result, error))
        done.set()

    grpc.async_infer("mlp", inputs(grpcclient, {"INPUT__0": x}), callback)
    assert done.wait(60)
    result, error = got[0]
    assert error is None
    np.testing.assert_allclose(result.as_numpy("OUTPUT__0"), expected, atol=1e-6)

    async def both() -> list[Any]:
        answers = []
        for protocol in ("http", "grpc"):
            async with aio_client(server, protocol) as one:
                assert await one.is_server_ready()
                answers.append(await infer_aio(one, "mlp", {"INPUT__0": x}))
        return answers

    for answer in asyncio.run(both()):
        np.testing.assert_allclose(answer.as_numpy("OUTPUT__0"), expected, atol=1e-6)


BAD = [
    ("unknown model", "nowhere", {"INPUT__0": rows(1, 8)}, {}, "404", "NOT_FOUND"),
    (
        "unknown version",
        "mlp",
        {"INPUT__0": rows(1, 8)},
        {"model_version": "9"},
        "404",
        "NOT_FOUND",
    ),
    ("wrong width", "mlp", {"INPUT__0": rows(1, 9)}, {}, "400", "INVALID_ARGUMENT"),
    ("wrong type", "mlp", {"INPUT__0": np.ones((1, 8), np.int32)}, {}, "400", "INVALID_ARGUMENT"),
    ("wrong name", "mlp", {"INPUT__9": rows(1, 8)}, {}, "400", "INVALID_ARGUMENT"),
    ("too many rows", "mlp", {"INPUT__0": rows(33, 8)}, {}, "400", "INVALID_ARGUMENT"),
    ("no batch dimension", "mlp", {"INPUT__0": rows(8, 1)[:, 0]}, {}, "400", "INVALID_ARGUMENT"),
    ("model raises", "picky", {"x": -np.ones((1, 2), np.float32)}, {}, "500", "INTERNAL"),
    ("not loaded", "pickled", {"INPUT__0": rows(1, 8)}, {}, "404", "NOT_FOUND"),
]


@pytest.mark.parametrize("case", BAD, ids=[case[0] for case in BAD])
def test_bad_requests_get_their_status_and_no_detail_of_the_host(client: Any, case: Any) -> None:
    _, model, arrays, options, http_status, grpc_status = case
    with pytest.raises(InferenceServerException) as caught:
        infer(client, model, arrays, **options)
    assert status(caught.value) in (http_status, grpc_status)
    for leak in ("Traceback", "/site-packages", "/tmp", "ray::", 'File "'):
        assert leak not in caught.value.message()
    assert infer(client, "mlp", {"INPUT__0": rows(1, 8)}).as_numpy("OUTPUT__0").shape == (1, 4)


PATHS = [
    ("GET", "/v2/nothing", 404, "Not Found"),
    ("GET", "/nothing", 404, "Not Found"),
    ("DELETE", "/v2/health/live", 405, "Method Not Allowed"),
    ("GET", "/v2/models/mlp/infer", 405, "Method Not Allowed"),
    ("GET", "/v2/models/nowhere", 404, "unknown model: 'nowhere'"),
    ("GET", "/v2/models/mlp/versions/9/config", 404, "version 9"),
    ("GET", "/v2/models/mlp/versions/x", 404, "Not Found"),
    ("GET", "/v2/models/mlp/generate", 405, "Method Not Allowed"),
]


@pytest.mark.parametrize(("method", "path", "code", "text"), PATHS)
def test_unknown_paths_and_methods(
    server: Server, method: str, path: str, code: int, text: str
) -> None:
    reply = httpx.request(method, f"http://{server.http}{path}", timeout=60)
    assert reply.status_code == code
    assert reply.headers["content-type"] == "application/json"
    assert text in reply.json()["error"]


def test_malformed_json_is_500_and_nothing_is_lost(server: Server) -> None:
    url = f"http://{server.http}/v2/models/mlp/infer"
    reply = httpx.post(url, content=b'{"inputs": [', timeout=60)
    assert reply.status_code == 500 and "parse" in reply.json()["error"]
    headers = {"Inference-Header-Content-Length": "-3"}
    reply = httpx.post(url, content=b"{}", headers=headers, timeout=60)
    assert reply.status_code == 400
    assert server.live()


def test_readiness_paths_for_kuberay(server: Server) -> None:
    assert server.get("/-/healthz").text == "success"
    assert server.get("/-/routes").json() == {"/": "manta"}


def test_statistics_and_metrics_agree(server: Server, http: Any) -> None:
    stats = http.get_inference_statistics("mlp")["model_stats"][0]
    text = httpx.get(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=60).text
    line = 'nv_inference_request_success{model="mlp",version="1"} '
    assert f"{line}{stats['inference_stats']['success']['count']}\n" in text
    assert 'nv_inference_request_failure{model="mlp",reason="REJECTED",version="1"} 0' in text


def test_the_port_of_metrics_has_one_page(server: Server) -> None:
    url = f"http://127.0.0.1:{server.metrics_port}"
    reply = httpx.get(f"{url}/metrics", timeout=60)
    assert (reply.status_code, reply.headers["content-type"]) == (200, "text/plain; charset=utf-8")
    for method, path, code in (
        ("POST", "/metrics", 405),
        ("DELETE", "/metrics", 405),
        ("GET", "/v2/health/ready", 404),
        ("POST", "/v2/models/mlp/infer", 404),
    ):
        reply = httpx.request(method, url + path, timeout=60)
        assert reply.status_code == code and list(reply.json()) == ["error"]


def test_repository_index_tells_the_reasons(server: Server, http: Any, grpc: Any) -> None:
    index = {entry["name"]: entry for entry in http.get_model_repository_index()}
    assert index["mlp"] == {"name": "mlp", "version": "1", "state": "READY"}
    assert all(index[name]["state"] == "UNAVAILABLE" for name in BROKEN)
    assert "bad_field/config.pbtxt:1" in index["bad_field"]["reason"]
    assert "platfrm" in index["bad_field"]["reason"]
    assert "torch.save" in index["pickled"]["reason"]
    assert "INPUT__7" in index["bad_name"]["reason"]
    assert not any(str(server.repository) in index[name]["reason"] for name in BROKEN)
    assert index["spare"] == {"name": "spare"} or index["spare"]["state"] in (
        "READY",
        "UNAVAILABLE",
    )
    assert {one.name for one in grpc.get_model_repository_index().models} == set(index)


def test_index_of_ready_models_only(server: Server) -> None:
    url = f"http://{server.http}/v2/repository/index"
    ready = httpx.post(url, json={"ready": True}, timeout=60).json()
    assert {"mlp", "seed"} <= {entry["name"] for entry in ready}
    assert all(entry["state"] == "READY" for entry in ready)
    assert httpx.post(url, json={"ready": "yes"}, timeout=60).status_code == 400
