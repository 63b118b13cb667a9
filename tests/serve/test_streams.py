"""ModelStreamInfer, deadlines, cancellation and health, with clients as tritonclient has them.

Through the Router's own port (HAProxy and grpc.aio), and through Serve's proxy.
"""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc as grpcio
import httpx
import numpy as np
import pytest
import torch
import tritonclient.grpc as grpcclient
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from tests.serve import repository
from tests.serve.clients import aio_client, infer, inputs, pending, rows, statistics
from tests.serve.server import Server, manta_serve, wait_for

HELD = np.full((1, 1), -1.0, np.float32)
SHORT = np.zeros((1, 1), np.float32)
FINAL = "triton_final_response"
SECRET = "s3cr3t-v4lue"
PROBES = 8


@pytest.fixture(scope="module")
def by_proxy(models_root: Path) -> Iterator[Server]:
    flags = ["--listener=serve", "--model-control-mode=explicit"]
    flags += ["--load-model=mlp", "--load-model=slow"]
    flags.append(f"--http-restricted-api=model-repository:X-Admin={SECRET}")
    flags.append(f"--grpc-restricted-protocol=model-repository,metadata:admin={SECRET}")
    with manta_serve(models_root, *flags) as one:
        one.wait_ready()
        # Serve's proxy opens its ports one after the other.
        with grpcio.insecure_channel(one.grpc) as channel:
            request = health_pb2.HealthCheckRequest()
            health = health_pb2_grpc.HealthStub(channel)
            reply = health.Check(request, timeout=60, wait_for_ready=True)
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
        yield one


@pytest.fixture(params=["router", "proxy"])
def road(request: pytest.FixtureRequest) -> Server:
    name = "server" if request.param == "router" else "by_proxy"
    server: Server = request.getfixturevalue(name)
    return server


@pytest.fixture
def triton(road: Server) -> Iterator[grpcclient.InferenceServerClient]:
    client = grpcclient.InferenceServerClient(road.grpc)
    yield client
    client.close()


class Answers:
    """A callback that keeps what it is told."""

    def __init__(self) -> None:
        self.told: queue.Queue[Any] = queue.Queue()

    def __call__(self, result: Any, error: Any) -> None:
        self.told.put((result, error))

    def next(self) -> Any:
        return self.told.get(timeout=60)

    def rest(self) -> list[Any]:
        found = []
        while not self.told.empty():
            found.append(self.told.get())
        return found


def ask(client: Any, model: str, arrays: Any, request_id: str = "", **more: Any) -> None:
    client.async_stream_infer(model, inputs(grpcclient, arrays), request_id=request_id, **more)


# --- streams ----------------------------------------


def test_start_stream_async_stream_infer_stop_stream(triton: Any) -> None:
    answers = Answers()
    triton.start_stream(callback=answers)
    data = [rows(1 + number % 3, 8, number) for number in range(20)]
    for number, x in enumerate(data):
        final = {"enable_empty_final_response": True} if number % 2 else {}
        ask(triton, "mlp", {"INPUT__0": x}, str(number), **final)
    triton.stop_stream()
    told = answers.rest()
    assert len(told) == 20
    for number, (result, error) in enumerate(told):
        assert error is None
        response = result.get_response()
        assert (response.id, response.model_name) == (str(number), "mlp")
        assert response.parameters[FINAL].bool_param
        with torch.inference_mode():
            expected = repository.mlp()(torch.from_numpy(data[number])).numpy()
        np.testing.assert_allclose(result.as_numpy("OUTPUT__0"), expected, atol=1e-5)


def test_stream_infer_of_the_aio_client(road: Server) -> None:
    data = [rows(1, 8, number) for number in range(6)]

    async def use() -> list[Any]:
        async def requests() -> Any:
            for number, x in enumerate(data):
                yield {
                    "model_name": "mlp",
                    "inputs": inputs(grpcclient, {"INPUT__0": x}),
                    "request_id": str(number),
                }

        async with aio_client(road, "grpc") as client:
            return [pair async for pair in client.stream_infer(inputs_iterator=requests())]

    for number, (result, error) in enumerate(asyncio.run(use())):
        assert error is None and result.get_response().id == str(number)
        with torch.inference_mode():
            expected = repository.mlp()(torch.from_numpy(data[number])).numpy()
        np.testing.assert_allclose(result.as_numpy("OUTPUT__0"), expected, atol=1e-5)


def test_errors_are_told_in_the_band_and_the_stream_goes_on(triton: Any) -> None:
    answers = Answers()
    triton.start_stream(callback=answers)
    bad: list[Any] = [
        ("nowhere", rows(1, 8), {}, "unknown model: 'nowhere'"),
        ("mlp", rows(1, 8), {"model_version": "9"}, "version 9 is not found"),
        ("mlp", rows(1, 8), {"model_version": "-1"}, "integer > 0"),
        ("mlp", rows(1, 9), {}, "[request id: 3] unexpected shape"),
        ("mlp", rows(33, 8), {}, "batch-size must be <= 32"),
        ("mlp", rows(1, 8), {"sequence_id": 7, "sequence_start": True}, "'sequence_id' is not sup"),
    ]
    for number, (model, x, more, _) in enumerate(bad):
        ask(triton, model, {"INPUT__0": x}, str(number), **more)
        ask(triton, "mlp", {"INPUT__0": rows(1, 8)}, f"good {number}")
    for number, (_, _, _, text) in enumerate(bad):
        result, error = answers.next()
        assert result is None and text in error.message()
        assert "Traceback" not in error.message()
        result, error = answers.next()
        assert error is None and result.get_response().id == f"good {number}"
    triton.stop_stream()
    assert answers.rest() == []


def test_an_error_has_the_id_of_its_request(road: Server) -> None:
    message = service_pb2.ModelInferRequest(model_name="nowhere", id="mine")
    with grpcio.insecure_channel(road.grpc) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        (answer,) = list(stub.ModelStreamInfer(iter([message]), timeout=60))
    assert answer.infer_response.id == "mine" and "nowhere" in answer.error_message
    assert answer.infer_response.parameters[FINAL].bool_param


def test_with_triton_grpc_error_the_first_error_ends_the_stream(triton: Any) -> None:
    answers = Answers()
    triton.start_stream(callback=answers, headers={"triton_grpc_error": "true"})
    ask(triton, "mlp", {"INPUT__0": rows(1, 8)}, "1")
    ask(triton, "nowhere", {"INPUT__0": rows(1, 8)}, "2")
    result, error = answers.next()
    assert error is None and result.get_response().id == "1"
    result, error = answers.next()
    assert result is None and error.status() == "StatusCode.NOT_FOUND"
    assert "unknown model: 'nowhere'" in error.message()
    with pytest.raises(InferenceServerException, match="no longer in valid state"):
        ask(triton, "mlp", {"INPUT__0": rows(1, 8)})
    triton.stop_stream()


def test_a_stream_is_answered_in_order_while_its_requests_run_at_the_same_time(
    road: Server, triton: Any
) -> None:
    with repository.holding(road.repository / "slow") as go:
        before = statistics(triton, "mlp")["success"]
        answers = Answers()
        triton.start_stream(callback=answers)
        ask(triton, "slow", {"s": HELD}, "1")
        for number in range(2, 5):
            ask(triton, "mlp", {"INPUT__0": rows(1, 8)}, str(number))
        wait_for(lambda: statistics(triton, "mlp")["success"] == before + 3, 60, "all have run")
        assert answers.told.empty()
        go()
        assert [answers.next()[0].get_response().id for _ in range(4)] == list("1234")
        triton.stop_stream()


def test_a_stream_may_carry_more_than_is_in_work_at_a_time(triton: Any) -> None:
    answers = Answers()
    triton.start_stream(callback=answers)
    for number in range(300):
        ask(triton, "mlp", {"INPUT__0": rows(1, 8)}, str(number))
    triton.stop_stream()
    assert [pair[0].get_response().id for pair in answers.rest()] == list(map(str, range(300)))


def test_twenty_megabytes_on_a_stream(grpc: Any) -> None:
    x, answers = rows(1, 5 << 20), Answers()
    grpc.start_stream(callback=answers)
    for number in range(4):
        ask(grpc, "big", {"x": x}, str(number))
    for number in range(4):
        result, error = answers.next()
        assert error is None and result.get_response().id == str(number)
        assert np.array_equal(result.as_numpy("OUTPUT__0"), x)
    grpc.stop_stream()


# --- what nobody waits for is not run ----------------------------------------


def executions(server: Server, client: Any) -> int:
    """Of `slow`, after both instances have run what they had."""
    calls = [Answers() for _ in range(PROBES)]
    for call in calls:
        client.async_infer("slow", inputs(grpcclient, {"s": SHORT}), call)
    assert all(call.next()[1] is None for call in calls)
    return statistics(client, "slow")["execution_count"]


def by_stream(client: Any, answers: Answers, deadline_s: float | None) -> Callable[[], None]:
    client.start_stream(callback=answers, stream_timeout=deadline_s)
    for number in range(10):
        ask(client, "slow", {"s": HELD}, str(number))
    return lambda: client.stop_stream(cancel_requests=True)


def by_calls(client: Any, answers: Answers, deadline_s: float | None) -> Callable[[], None]:
    one = inputs(grpcclient, {"s": HELD})
    calls = [client.async_infer("slow", one, answers, client_timeout=deadline_s) for _ in range(10)]

    def cancel() -> None:
        for call in calls:
            call.cancel()

    return cancel


WAYS = {"stream": (by_stream, 1), "calls": (by_calls, 10)}


@pytest.mark.parametrize("way", WAYS)
def test_cancelled_work_is_not_run(road: Server, triton: Any, way: str) -> None:
    """At most what the two instances had at that time: what ran, and what waited beside it."""
    begin, errors = WAYS[way]
    answers = Answers()
    with repository.holding(road.repository / "slow") as go:
        before = executions(road, triton)
        cancel = begin(triton, answers, None)
        wait_for(lambda: pending(road) >= 6, 60, "they wait")
        cancel()
        told = [answers.next() for _ in range(errors)]
        assert {error.status() for _, error in told} == {"StatusCode.CANCELLED"}
        wait_for(lambda: pending(road) == 0, 60, "they have left the queue")
        go()
        assert executions(road, triton) - before - PROBES <= 4
    assert answers.rest() == []
    triton.stop_stream()


@pytest.mark.parametrize("way", WAYS)
def test_work_past_its_deadline_is_not_run(road: Server, triton: Any, way: str) -> None:
    begin, errors = WAYS[way]
    answers = Answers()
    with repository.holding(road.repository / "slow") as go:
        before = executions(road, triton)
        begin(triton, answers, 2.0)
        told = [answers.next() for _ in range(errors)]
        assert {error.status() for _, error in told} == {"StatusCode.DEADLINE_EXCEEDED"}
        wait_for(lambda: pending(road) == 0, 60, "they have left the queue")
        go()
        assert executions(road, triton) - before - PROBES <= 4
    triton.stop_stream()


@pytest.mark.parametrize("way", WAYS)
def test_control_what_is_waited_for_is_run(road: Server, triton: Any, way: str) -> None:
    begin, _ = WAYS[way]
    answers = Answers()
    with repository.holding(road.repository / "slow") as go:
        before = executions(road, triton)
        begin(triton, answers, None)
        wait_for(lambda: pending(road) >= 6, 60, "they wait")
        go()
        assert [answers.next()[1] for _ in range(10)] == [None] * 10
        assert executions(road, triton) - before - PROBES == 10
    triton.stop_stream()


# --- health, reflection, explicit contents ----------------------------------------


def test_health_by_the_standard_service(road: Server) -> None:
    with grpcio.insecure_channel(road.grpc) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "inference.GRPCInferenceService", "anything"):
            reply = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=30)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpcio.RpcError) as caught:
            list(health.Watch(health_pb2.HealthCheckRequest(), timeout=30))
        assert caught.value.code() is grpcio.StatusCode.UNIMPLEMENTED


def services(server: Server) -> set[str]:
    question = reflection_pb2.ServerReflectionRequest(list_services="")
    with grpcio.insecure_channel(server.grpc) as channel:
        reflect = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
        (reply,) = list(reflect(iter([question]), timeout=30))
    return {service.name for service in reply.list_services_response.service}


def test_reflection(server: Server, by_proxy: Server) -> None:
    assert {"inference.GRPCInferenceService", "grpc.health.v1.Health"} <= services(server)
    with pytest.raises(grpcio.RpcError) as caught:  # metadata are restricted there
        services(by_proxy)
    assert caught.value.code() is grpcio.StatusCode.UNIMPLEMENTED


def test_explicit_contents(road: Server) -> None:
    x = rows(1, 8)
    tensor = service_pb2.ModelInferRequest.InferInputTensor(
        name="INPUT__0", datatype="FP32", shape=[1, 8]
    )
    tensor.contents.fp32_contents.extend(x.ravel().tolist())
    message = service_pb2.ModelInferRequest(model_name="mlp", inputs=[tensor])
    with grpcio.insecure_channel(road.grpc) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        reply = stub.ModelInfer(message, timeout=30)
        with torch.inference_mode():
            expected = repository.mlp()(torch.from_numpy(x)).numpy()
        got = np.frombuffer(reply.raw_output_contents[0], np.float32).reshape(1, 4)
        np.testing.assert_allclose(got, expected, atol=1e-5)
        message.raw_input_contents.append(x.tobytes())
        with pytest.raises(grpcio.RpcError) as caught:
            stub.ModelInfer(message, timeout=30)
    assert caught.value.code() is grpcio.StatusCode.INVALID_ARGUMENT
    assert "contents field must not be specified" in caught.value.details()


# --- restrictions through Serve's proxy ----------------------------------------


def test_serves_proxy_keeps_to_the_restrictions(by_proxy: Server) -> None:
    url = f"http://{by_proxy.http}/v2/repository/index"
    reply = httpx.post(url, timeout=60)
    assert reply.status_code == 403
    assert reply.json() == {"error": "This API is restricted, expecting header 'X-Admin'"}
    assert httpx.post(url, headers={"x-admin": SECRET}, timeout=60).status_code == 200
    client = grpcclient.InferenceServerClient(by_proxy.grpc)
    for call in (client.get_model_repository_index, client.get_server_metadata):
        with pytest.raises(InferenceServerException, match="expecting header") as caught:
            call()
        assert caught.value.status() == "StatusCode.UNAVAILABLE"
        call(headers={"triton-grpc-protocol-admin": SECRET})
    assert client.is_server_live()
    assert infer(client, "mlp", {"INPUT__0": rows(1, 8)}).as_numpy("OUTPUT__0").shape == (1, 4)
    client.close()
    logs = [by_proxy.output()]
    logs += [path.read_text(errors="replace") for path in by_proxy.folder.rglob("*.log")]
    assert not [text for text in logs if SECRET in text]
