"""What Triton's example clients do, with tritonclient used as they use it, model for model.

Theirs with shared memory are in `test_shared_memory`, with classes in `test_classification`, on
streams also in `test_streams`. Those of sequences, ensembles and decoupled models are for models
that are refused by name.
"""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc as grpc_package
import numpy as np
import numpy.typing as npt
import pytest
import tritonclient.grpc as grpcclient
import tritonclient.grpc.aio as grpcaio
import tritonclient.http as httpclient
import tritonclient.http.aio as httpaio
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from tests.serve.clients import loading
from tests.serve.server import Server

SUMS = """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        return [self.one(request) for request in requests]

    def one(self, request):
        a, b = (
            pb_utils.get_input_tensor_by_name(request, name).as_numpy()
            for name in ("INPUT0", "INPUT1")
        )
        if a.dtype == np.object_:
            a, b = (np.vectorize(int)(each) for each in (a, b))
            text = np.vectorize(lambda n: str(n).encode(), otypes=[object])
            sums = [text(a + b), text(a - b)]
        else:
            sums = [a + b, a - b]
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor(f"OUTPUT{k}", each) for k, each in enumerate(sums)]
        )
"""
NAMES = {"simple": "TYPE_INT32", "simple_int8": "TYPE_INT8", "simple_string": "TYPE_STRING"}
SHAPE = [1, 16]
INT0 = np.arange(16, dtype=np.int32).reshape(SHAPE)
INT1 = np.ones(SHAPE, np.int32)
PROTOCOLS = ["http", "grpc"]


def config(name: str) -> str:
    of = f"data_type: {NAMES[name]} dims: [ 16 ]"
    given = ", ".join(f'{{ name: "INPUT{k}" {of} }}' for k in (0, 1))
    told = ", ".join(f'{{ name: "OUTPUT{k}" {of} }}' for k in (0, 1))
    return (
        f'name: "{name}" backend: "python" max_batch_size: 8\n'
        f"input [ {given} ]\noutput [ {told} ]\ninstance_group [ {{ kind: KIND_CPU }} ]\n"
    )


@pytest.fixture(scope="module", autouse=True)
def simple(server: Server, models_root: Path) -> Iterator[None]:
    for name in NAMES:
        version = models_root / name / "1"
        version.mkdir(parents=True)
        (version.parent / "config.pbtxt").write_text(config(name))
        (version / "model.py").write_text(SUMS)
    with loading(server, list(NAMES)):
        yield


def client_of(server: Server, protocol: str, **options: Any) -> Any:
    if protocol == "http":
        return httpclient.InferenceServerClient(url=server.http, **options)
    return grpcclient.InferenceServerClient(url=server.grpc, **options)


def given(
    module: Any,
    datatype: str = "INT32",
    a: npt.NDArray[Any] = INT0,
    b: npt.NDArray[Any] = INT1,
    **options: Any,
) -> list[Any]:
    made = [module.InferInput(f"INPUT{k}", SHAPE, datatype) for k in (0, 1)]
    for one, array in zip(made, (a, b), strict=True):
        one.set_data_from_numpy(array, **options)
    return made


def asked(module: Any) -> list[Any]:
    return [module.InferRequestedOutput(f"OUTPUT{k}") for k in (0, 1)]


def check(results: Any) -> None:
    np.testing.assert_array_equal(results.as_numpy("OUTPUT0"), INT0 + INT1)
    np.testing.assert_array_equal(results.as_numpy("OUTPUT1"), INT0 - INT1)


# --- one call ------------------------------------------------------------------------------------


@pytest.mark.parametrize("coding", [None, "gzip", "deflate"])
def test_simple_http_infer_client(server: Server, coding: str | None) -> None:
    with client_of(server, "http") as client:
        # The first input as JSON and the second as bytes; the outputs likewise.
        inputs = [httpclient.InferInput(f"INPUT{k}", SHAPE, "INT32") for k in (0, 1)]
        inputs[0].set_data_from_numpy(INT0, binary_data=False)
        inputs[1].set_data_from_numpy(INT1, binary_data=True)
        outputs = [
            httpclient.InferRequestedOutput("OUTPUT0", binary_data=True),
            httpclient.InferRequestedOutput("OUTPUT1", binary_data=False),
        ]
        results = client.infer(
            "simple",
            inputs,
            outputs=outputs,
            query_params={"test_1": 1, "test_2": 2},
            headers={"X-Anything": "1"},
            request_compression_algorithm=coding,
            response_compression_algorithm=coding,
        )
        response = results.get_response()
        assert (response["model_name"], response["model_version"]) == ("simple", "1")
        check(results)
        check(client.infer("simple", inputs))  # with all outputs, as nobody asks for some
        statistics = client.get_inference_statistics(model_name="simple")
        assert len(statistics["model_stats"]) == 1
        with pytest.raises(InferenceServerException, match="wrong_model_name"):
            client.get_inference_statistics(model_name="wrong_model_name")


def test_simple_grpc_infer_client(server: Server) -> None:
    with client_of(server, "grpc") as client:
        results = client.infer(
            "simple",
            given(grpcclient),
            outputs=asked(grpcclient),
            client_timeout=60.0,
            headers={"test": "1"},
            compression_algorithm="gzip",
        )
        check(results)
        assert len(client.get_inference_statistics(model_name="simple").model_stats) == 1
        with pytest.raises(InferenceServerException, match="wrong_model_name"):
            client.get_inference_statistics(model_name="wrong_model_name")
        with pytest.raises(InferenceServerException, match="Deadline Exceeded"):
            client.infer("simple", given(grpcclient), client_timeout=0.00001)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_simple_string_infer_client(server: Server, protocol: str) -> None:
    module = httpclient if protocol == "http" else grpcclient
    texts = [
        np.array([str(n).encode() for n in each.reshape(-1)], np.object_).reshape(SHAPE)
        for each in (INT0, INT1)
    ]
    as_json: dict[str, Any] = {"binary_data": False} if protocol == "http" else {}
    with client_of(server, protocol) as client:
        options: dict[str, Any]
        for options in ({}, as_json):
            inputs = given(module, "BYTES", texts[0], texts[1], **options)
            results = client.infer("simple_string", inputs, outputs=asked(module))
            for name, wanted in (("OUTPUT0", INT0 + INT1), ("OUTPUT1", INT0 - INT1)):
                told = [int(text) for text in results.as_numpy(name).reshape(-1)]
                assert told == list(wanted.reshape(-1))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_reuse_infer_objects_client(server: Server, protocol: str) -> None:
    module = httpclient if protocol == "http" else grpcclient
    inputs, outputs = given(module), asked(module)
    with client_of(server, protocol) as client:
        for _ in range(3):
            check(client.infer("simple", inputs, outputs=outputs))
        inputs[0].set_data_from_numpy(INT1)
        twice = client.infer("simple", inputs, outputs=outputs)
        np.testing.assert_array_equal(twice.as_numpy("OUTPUT0"), 2 * INT1)


def test_simple_grpc_custom_args_and_keepalive_clients(server: Server) -> None:
    arguments = [("grpc.primary_user_agent", "anything"), ("grpc.lb_policy_name", "pick_first")]
    keepalive = grpcclient.KeepAliveOptions(
        keepalive_time_ms=2**31 - 1,
        keepalive_timeout_ms=20000,
        keepalive_permit_without_calls=False,
        http2_max_pings_without_data=2,
    )
    for options in ({"channel_args": arguments}, {"keepalive_options": keepalive}):
        with client_of(server, "grpc", **options) as client:
            check(client.infer("simple", given(grpcclient), outputs=asked(grpcclient)))


# --- several at a time ---------------------------------------------------------------------------


def test_simple_http_async_infer_client(server: Server) -> None:
    with client_of(server, "http", concurrency=4) as client:
        pending = [
            client.async_infer("simple", given(httpclient), outputs=asked(httpclient))
            for _ in range(12)
        ]
        for one in pending:
            check(one.get_result())


def test_simple_grpc_async_infer_client(server: Server) -> None:
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()

    def keep(results: queue.Queue[tuple[Any, Any]], result: Any, error: Any) -> None:
        results.put((result, error))

    with client_of(server, "grpc") as client:
        for _ in range(12):
            client.async_infer(
                "simple", given(grpcclient), partial(keep, answers), outputs=asked(grpcclient)
            )
        for _ in range(12):
            result, error = answers.get(timeout=60)
            assert error is None
            check(result)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_simple_aio_infer_client(server: Server, protocol: str) -> None:
    module, aio = (httpclient, httpaio) if protocol == "http" else (grpcclient, grpcaio)

    async def run() -> None:
        async with aio.InferenceServerClient(
            url=server.http if protocol == "http" else server.grpc
        ) as client:
            calls = [
                client.infer("simple", given(module), outputs=asked(module)) for _ in range(12)
            ]
            for result in await asyncio.gather(*calls):
                check(result)
            assert await client.is_model_ready("simple")

    asyncio.run(run())


def test_a_stream_of_a_model_without_sequences(server: Server) -> None:
    """As simple_grpc_sequence_stream_infer_client does, for requests that belong to none."""
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    with client_of(server, "grpc") as client:
        client.start_stream(callback=lambda result, error: answers.put((result, error)))
        for number in range(12):
            client.async_stream_infer(
                "simple", given(grpcclient), outputs=asked(grpcclient), request_id=str(number)
            )
        for number in range(12):
            result, error = answers.get(timeout=60)
            assert error is None
            check(result)
            assert result.get_response().id == str(number)
        client.stop_stream()


# --- verbs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_simple_model_control(server: Server, protocol: str) -> None:
    options = {"network_timeout": 240} if protocol == "http" else {}  # a load takes its time
    with client_of(server, protocol, **options) as client:
        client.unload_model("simple_int8")
        assert not client.is_model_ready("simple_int8")
        client.load_model("simple_int8")
        assert client.is_model_ready("simple_int8")
        index = client.get_model_repository_index()
        found = (
            index
            if protocol == "http"
            else [{"name": one.name, "state": one.state} for one in index.models]
        )
        assert [one["state"] for one in found if one["name"] == "simple_int8"] == ["READY"]
        with pytest.raises(InferenceServerException, match="failed to load 'wrong_model_name'"):
            client.load_model("wrong_model_name")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_simple_health_metadata(server: Server, protocol: str) -> None:
    with client_of(server, protocol) as client:
        assert client.is_server_live(headers={"test": "1"})
        assert client.is_server_ready() and client.is_model_ready("simple")
        of_server, of_model = client.get_server_metadata(), client.get_model_metadata("simple")
        if protocol == "grpc":
            assert of_server.name and of_model.name == "simple"
            as_json = client.get_model_metadata("simple", as_json=True)
            assert [one["name"] for one in as_json["inputs"]] == ["INPUT0", "INPUT1"]
        else:
            assert of_server["name"] and of_model["name"] == "simple"
        with pytest.raises(InferenceServerException, match="unknown model: 'wrong_model_name'"):
            client.get_model_metadata("wrong_model_name")
        told = client.get_model_config("simple")
        batch = told["max_batch_size"] if protocol == "http" else told.config.max_batch_size
        assert batch == 8


# --- without tritonclient's own classes ----------------------------------------------------------


@pytest.fixture
def stub(server: Server) -> Iterator[Any]:
    with grpc_package.insecure_channel(server.grpc) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def request_of(name: str, datatype: str) -> Any:
    request = service_pb2.ModelInferRequest(model_name=name, id="my request id")
    for k in (0, 1):
        request.inputs.add(name=f"INPUT{k}", datatype=datatype, shape=SHAPE)
        request.outputs.add(name=f"OUTPUT{k}")
    return request


def numbers(response: Any, dtype: str) -> list[npt.NDArray[Any]]:
    return [
        np.frombuffer(raw, dtype).reshape(output.shape)
        for raw, output in zip(response.raw_output_contents, response.outputs, strict=True)
    ]


def test_grpc_client(stub: Any) -> None:
    """grpc_client.py: the generated stub alone, tensors as bytes."""
    assert stub.ServerLive(service_pb2.ServerLiveRequest()).live
    assert stub.ServerReady(service_pb2.ServerReadyRequest()).ready
    assert stub.ModelReady(service_pb2.ModelReadyRequest(name="simple", version="")).ready
    assert stub.ServerMetadata(service_pb2.ServerMetadataRequest()).extensions
    request = request_of("simple", "INT32")
    request.raw_input_contents.extend([INT0.tobytes(), INT1.tobytes()])
    response = stub.ModelInfer(request)
    assert response.id == "my request id"
    sums, differences = numbers(response, "<i4")
    np.testing.assert_array_equal(sums, INT0 + INT1)
    np.testing.assert_array_equal(differences, INT0 - INT1)


@pytest.mark.parametrize(
    "name, datatype, dtype", [("simple", "INT32", "<i4"), ("simple_int8", "INT8", "i1")]
)
def test_grpc_explicit_int_content_client(stub: Any, name: str, datatype: str, dtype: str) -> None:
    request = request_of(name, datatype)
    for tensor, array in zip(request.inputs, (INT0, INT1), strict=True):
        tensor.contents.int_contents.extend(array.reshape(-1).tolist())
    sums, differences = numbers(stub.ModelInfer(request), dtype)
    np.testing.assert_array_equal(sums, INT0 + INT1)
    np.testing.assert_array_equal(differences, INT0 - INT1)


def test_grpc_explicit_byte_content_client(stub: Any) -> None:
    request = request_of("simple_string", "BYTES")
    for tensor, array in zip(request.inputs, (INT0, INT1), strict=True):
        tensor.contents.bytes_contents.extend(str(n).encode() for n in array.reshape(-1))
    response = stub.ModelInfer(request)
    for raw, wanted in zip(response.raw_output_contents, (INT0 + INT1, INT0 - INT1), strict=True):
        lengths, told = 0, []
        while lengths < len(raw):
            size = int.from_bytes(raw[lengths : lengths + 4], "little")
            told.append(int(raw[lengths + 4 : lengths + 4 + size]))
            lengths += 4 + size
        assert told == list(wanted.reshape(-1))
