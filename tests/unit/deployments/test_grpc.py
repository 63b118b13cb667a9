from __future__ import annotations

import asyncio
import logging
import pickle
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc.aio as client
from tritonclient.utils import InferenceServerException

from deployments.errors import InvalidArgument
from deployments.grpc import STREAM, VERBS, handle
from deployments.grpc_services import GrpcServicer, add_services, serve_proxy_method
from deployments.grpc_stubs import model_config_pb2, service_pb2_grpc
from deployments.grpc_stubs import service_pb2 as pb
from deployments.tensors import encode_bytes

from .serving import Server, linear

X = np.array([[1.0, -2.0, 3.0, 0.5]], np.float32)


def over_grpc(use, server=None):
    """`await use(server, triton client, raw stub)` against a real server on a free port."""
    server = server or Server()

    async def run():
        listener = grpc.aio.server()
        add_services(GrpcServicer(server.inference), listener)
        address = f"127.0.0.1:{listener.add_insecure_port('127.0.0.1:0')}"
        await listener.start()
        try:
            async with grpc.aio.insecure_channel(address) as channel:
                async with client.InferenceServerClient(address) as triton:
                    stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
                    return await use(server, triton, stub)
        finally:
            await listener.stop(None)

    return asyncio.run(run())


def triton_input(name, array, datatype):
    entry = client.InferInput(name, list(array.shape), datatype)
    entry.set_data_from_numpy(array)
    return entry


def request(*inputs, raw=(), model="linear", **more):
    return pb.ModelInferRequest(model_name=model, inputs=inputs, raw_input_contents=raw, **more)


def entry(name="INPUT__0", datatype="FP32", shape=(1, 4), **more):
    return pb.ModelInferRequest.InferInputTensor(name=name, datatype=datatype, shape=shape, **more)


def good():
    return request(entry(), raw=[X.tobytes()])


def ask(server, verb, message):
    return asyncio.run(handle(verb, message, server.inference))


@pytest.fixture(scope="module")
def server():
    return Server()


# --- the stock client ----------------------------------------


def test_the_stock_client_gets_right_answers():
    async def use(server, triton, stub):
        result = await triton.infer("linear", [triton_input("INPUT__0", X, "FP32")], request_id="7")
        np.testing.assert_array_equal(result.as_numpy("OUTPUT__0"), linear(X)[0])
        assert (result.get_response().id, result.get_response().model_version) == ("7", "1")
        strings = np.array([[b"a\0b"], [b""], [b"\xff"]], np.object_)
        result = await triton.infer("echo_BYTES", [triton_input("X", strings, "BYTES")])
        assert result.as_numpy("Y").tolist() == strings.tolist()
        a, b = np.arange(4, dtype=np.int32)[None], np.ones((1, 4), np.int32)
        result = await triton.infer(
            "add_sub",
            [triton_input("INPUT0", a, "INT32"), triton_input("INPUT1", b, "INT32")],
            outputs=[client.InferRequestedOutput("OUTPUT1")],
        )
        assert result.as_numpy("OUTPUT0") is None
        np.testing.assert_array_equal(result.as_numpy("OUTPUT1"), a - b)

    over_grpc(use)


def test_the_stock_client_gets_every_verb():
    async def use(server, triton, stub):
        assert await triton.is_server_live() and await triton.is_server_ready()
        assert await triton.is_model_ready("linear")
        assert not await triton.is_model_ready("nobody")
        assert (await triton.get_server_metadata()).name == "triton"
        metadata = await triton.get_model_metadata("linear")
        assert (list(metadata.versions), list(metadata.inputs[0].shape)) == (["1"], [-1, 4])
        assert (await triton.get_model_config("linear")).config.max_batch_size == 8
        statistics = await triton.get_inference_statistics("linear")
        assert statistics.model_stats[0].inference_count == 2**40
        index = await triton.get_model_repository_index()
        assert ("linear", "1", "READY") in [(m.name, m.version, m.state) for m in index.models]
        await triton.load_model("linear")
        await triton.unload_model("linear")
        asked = [call[0] for call in server.controller.calls]
        assert asked == ["statistics", "on_disk", "load", "unload"]

    over_grpc(use, Server(model_control_mode="explicit"))


def test_errors_reach_the_stock_client_with_status_and_text():
    async def use(server, triton, stub):
        bad = [triton_input("INPUT__0", np.ones((9, 4), np.float32), "FP32")]
        with pytest.raises(InferenceServerException) as error:
            await triton.infer("linear", bad, request_id="7")
        assert error.value.status() == "StatusCode.INVALID_ARGUMENT"
        assert error.value.message() == (
            "[request id: 7] inference request batch-size must be <= 8 for 'linear'"
        )
        for call in (triton.load_model("linear"), triton.unload_model("linear")):
            with pytest.raises(InferenceServerException) as error:
                await call
            assert error.value.status() == "StatusCode.UNAVAILABLE"

    over_grpc(use)


def test_a_client_that_cancels_takes_its_request_along():
    async def use(server, triton, stub):
        gate = server.gates["linear"]
        gate.hold = []
        call = stub.ModelInfer(good())
        while not gate.hold:
            await asyncio.sleep(0.001)
        call.cancel()
        while not gate.cancelled:
            await asyncio.sleep(0.001)
        gate.hold = None
        assert (await stub.ModelInfer(good())).raw_output_contents[0]

    over_grpc(use)


def test_an_expired_deadline_takes_its_request_along():
    async def use(server, triton, stub):
        gate = server.gates["linear"]
        gate.hold = []
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.ModelInfer(good(), timeout=0.05)
        assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        while not gate.cancelled:
            await asyncio.sleep(0.001)

    over_grpc(use)


def test_every_rpc_of_the_service_is_there():
    assert {STREAM, *VERBS} == {
        method.name for method in pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods
    }


# --- typed contents ----------------------------------------


@pytest.mark.parametrize(
    ("datatype", "field", "values", "numpy"),
    [
        ("BOOL", "bool_contents", [True, False], np.bool_),
        ("INT8", "int_contents", [-128, 127], np.int8),
        ("INT16", "int_contents", [-1, 1], np.int16),
        ("INT32", "int_contents", [-(2**31), 1], np.int32),
        ("INT64", "int64_contents", [-(2**63), 1], np.int64),
        ("UINT8", "uint_contents", [0, 255], np.uint8),
        ("UINT16", "uint_contents", [0, 65535], np.uint16),
        ("UINT32", "uint_contents", [0, 2**32 - 1], np.uint32),
        ("UINT64", "uint64_contents", [0, 2**64 - 1], np.uint64),
        ("FP32", "fp32_contents", [0.5, float("-inf")], np.float32),
        ("FP64", "fp64_contents", [0.1, 2.0], np.float64),
    ],
)
def test_typed_contents(server, datatype, field, values, numpy):
    contents = pb.InferTensorContents(**{field: values})
    message = request(entry("X", datatype, (1, 2), contents=contents), model=f"echo_{datatype}")
    reply = ask(server, "ModelInfer", message)
    assert reply.raw_output_contents[0] == np.array(values, numpy).tobytes()
    assert not reply.outputs[0].HasField("contents")


def test_typed_strings(server):
    contents = pb.InferTensorContents(bytes_contents=[b"a\0", b"\xff"])
    reply = ask(
        server,
        "ModelInfer",
        request(entry("X", "BYTES", (2, 1), contents=contents), model="echo_BYTES"),
    )
    assert reply.raw_output_contents[0] == encode_bytes([b"a\0", b"\xff"]).tobytes()


# --- bad input ----------------------------------------


def typed(**fields):
    return pb.InferTensorContents(**fields)


def parameter(**value):
    return pb.InferParameter(**value)


RAW = X.tobytes()
SHM = {"shared_memory_region": parameter(string_param="r")}
OUTPUT = pb.ModelInferRequest.InferRequestedOutputTensor

ABUSE = [
    (request(entry(), raw=[RAW], model="nobody"), "NOT_FOUND", "unknown model: 'nobody'"),
    (request(entry(), raw=[RAW], model_version="x"), "INVALID_ARGUMENT", "integer > 0"),
    (request(entry(), raw=[RAW], model_version="-1"), "INVALID_ARGUMENT", "integer > 0"),
    (request(entry(), raw=[RAW], model_version="9"), "NOT_FOUND", "version 9 is not found"),
    (
        request(entry(contents=typed(fp32_contents=[1.0] * 4)), raw=[RAW]),
        "INVALID_ARGUMENT",
        "contents field must not be specified when using raw_input_contents for 'INPUT__0'",
    ),
    (request(entry(), raw=[RAW, RAW]), "INVALID_ARGUMENT", "entries in raw_input_contents, got 2"),
    (request(entry(), entry("b"), raw=[RAW]), "INVALID_ARGUMENT", "raw_input_contents, got 1"),
    (request(entry()), "INVALID_ARGUMENT", "unable to find data for input tensor 'INPUT__0'"),
    (
        request(entry(contents=typed(int_contents=[1] * 4))),
        "INVALID_ARGUMENT",
        "unable to find data for input tensor 'INPUT__0'",
    ),
    (
        request(entry(contents=typed(fp32_contents=[1.0] * 3))),
        "INVALID_ARGUMENT",
        "Expected 16, got 12",
    ),
    (
        request(entry("X", "FP16", (1, 1), contents=typed(fp32_contents=[1.0])), model="echo_FP16"),
        "INVALID_ARGUMENT",
        "unable to find data for input tensor 'X'",
    ),
    (
        request(entry("X", "INT8", (1, 1), contents=typed(int_contents=[128])), model="echo_INT8"),
        "INVALID_ARGUMENT",
        "out of range for INT8",
    ),
    (
        request(
            entry("X", "BYTES", (2, 1), contents=typed(bytes_contents=[b""])), model="echo_BYTES"
        ),
        "INVALID_ARGUMENT",
        "expected 2 string elements",
    ),
    (
        request(entry(contents=typed(fp32_contents=[1.0] * 4, int_contents=[1]))),
        "INVALID_ARGUMENT",
        "unexpected explicit tensor data for input tensor 'INPUT__0' for model 'linear' of type "
        "'INT32', expected datatype 'FP32'",
    ),
    (
        request(entry("X", "BF16", (1, 1), contents=typed(fp32_contents=[1.0])), model="echo_BF16"),
        "INVALID_ARGUMENT",
        "unable to find data for input tensor 'X'",
    ),
    (
        request(
            entry("X", "UINT8", (1, 1), contents=typed(uint_contents=[256])), model="echo_UINT8"
        ),
        "INVALID_ARGUMENT",
        "out of range for UINT8",
    ),
    (
        request(entry(contents=typed()), raw=[RAW]),
        "INVALID_ARGUMENT",
        "contents field must not be specified when using raw_input_contents for 'INPUT__0'",
    ),
    (
        request(
            entry("INPUT0", "INT32"),
            entry("INPUT1", "INT32", contents=typed(int_contents=[1] * 4)),
            raw=[RAW],
            model="add_sub",
        ),
        "INVALID_ARGUMENT",
        "contents field must not be specified when using raw_input_contents for 'INPUT1'",
    ),
    (request(entry(), raw=[RAW[:-1]]), "INVALID_ARGUMENT", "Expected 16, got 15"),
    (request(entry(shape=(-1, 4)), raw=[RAW]), "INVALID_ARGUMENT", "negative dimension"),
    (request(entry(shape=(2**4, 2**60 + 2)), raw=[RAW]), "INVALID_ARGUMENT", "exceed maximum size"),
    (request(entry(shape=(2**2, 2**60 + 2)), raw=[RAW]), "INVALID_ARGUMENT", "byte size overflow"),
    (request(entry(shape=(1,) * 10_000), raw=[RAW]), "INVALID_ARGUMENT", "dimensions"),
    (request(entry(datatype="FP8"), raw=[RAW]), "INVALID_ARGUMENT", "invalid datatype 'FP8'"),
    (request(), "INVALID_ARGUMENT", "expected 1 inputs but got 0 inputs"),
    (request(entry(), entry(), raw=[RAW, RAW]), "INVALID_ARGUMENT", "already exists in request"),
    (request(*[entry(str(i)) for i in range(1025)]), "INVALID_ARGUMENT", "at most 1024 inputs"),
    (request(entry(parameters=SHM)), "UNIMPLEMENTED", "Client shared memory is disabled"),
    (
        request(entry(), raw=[RAW], outputs=[OUTPUT(name="OUTPUT__0", parameters=SHM)]),
        "UNIMPLEMENTED",
        "Client shared memory is disabled",
    ),
    (request(entry(), raw=[RAW], outputs=[OUTPUT(name="z")]), "INVALID_ARGUMENT", "output 'z'"),
    (
        request(
            entry(),
            raw=[RAW],
            outputs=[
                OUTPUT(name="OUTPUT__0", parameters={"classification": parameter(int64_param=0)})
            ],
        ),
        "INVALID_ARGUMENT",
        "invalid value for 'classification'",
    ),
    (
        request(
            entry(),
            raw=[RAW],
            outputs=[
                OUTPUT(name="OUTPUT__0", parameters={"classification": parameter(string_param="2")})
            ],
        ),
        "INVALID_ARGUMENT",
        "'classification'",
    ),
    (
        request(entry(), raw=[RAW], parameters={"triton_x": parameter(bool_param=True)}),
        "INVALID_ARGUMENT",
        "reserved for Triton usage",
    ),
    (request(entry(), raw=[RAW], parameters={"x": parameter()}), "INVALID_ARGUMENT", "no value"),
    (
        request(
            entry(),
            raw=[RAW],
            parameters={"triton_enable_empty_final_response": parameter(string_param="true")},
        ),
        "INVALID_ARGUMENT",
        "invalid value type for 'triton_enable_empty_final_response' parameter",
    ),
    (
        request(entry(), raw=[RAW], parameters={"priority": parameter(uint64_param=1)}),
        "UNIMPLEMENTED",
        "'priority' is not supported",
    ),
    (
        request(entry("X", shape=(1, 1)), raw=[RAW[:4]], model="failing"),
        "INTERNAL",
        "PyTorch execute failure",
    ),
    (request(entry("X", shape=(1, 1)), raw=[RAW[:4]], model="full"), "UNAVAILABLE", "queue size"),
    (
        request(entry("X", shape=(1, 1)), raw=[RAW[:4]], model="crashing"),
        "INTERNAL",
        "internal error",
    ),
]


def test_bad_requests():
    """Each gets its status and text, and the next good request its answer."""

    async def use(server, triton, stub):
        for message, code, text in ABUSE:
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await stub.ModelInfer(message)
            assert error.value.code().name == code, error.value.details()
            assert text in error.value.details()
            assert "/secret" not in error.value.details()
            reply = await stub.ModelInfer(good())
            assert reply.raw_output_contents[0] == linear(X)[0].tobytes()

    over_grpc(use)


def test_a_long_text_still_fits_the_trailers():
    async def use(server, triton, stub):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.ModelInfer(request(entry("é" * 9000), raw=[RAW]))
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    over_grpc(use)


def test_the_one_permitted_triton_parameter(server):
    flag = {"triton_enable_empty_final_response": parameter(bool_param=True)}
    assert ask(server, "ModelInfer", request(entry(), raw=[RAW], parameters=flag)).outputs


@pytest.mark.parametrize(
    ("verb", "message"),
    [
        ("RepositoryIndex", pb.RepositoryIndexRequest(repository_name="r")),
        ("RepositoryModelLoad", pb.RepositoryModelLoadRequest(repository_name="r")),
        ("RepositoryModelUnload", pb.RepositoryModelUnloadRequest(repository_name="r")),
    ],
)
def test_repository_names_are_refused(server, verb, message):
    with pytest.raises(Exception, match="'repository_name' specification is not supported"):
        ask(server, verb, message)


def test_while_closing_new_calls_are_told():
    async def use(server, triton, stub):
        server.publish(closing=True)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.ModelInfer(good())
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        assert error.value.details().startswith("GRPC server is shutting down and has stopped")

    over_grpc(use)


# --- Serve's proxy ----------------------------------------


class Ingress:
    """As the Router is, for Serve's proxy."""

    ModelInfer = serve_proxy_method("ModelInfer")

    def __init__(self, inference):
        self.grpc_verbs = GrpcServicer(inference)


class ProxyContext:
    """The two setters that the proxy reads back."""

    code: Any = None
    details = ""

    def set_code(self, code):
        self.code = code

    def set_details(self, details):
        self.details = details


def test_the_same_verbs_through_serves_proxy(server, caplog):
    context, ingress = ProxyContext(), Ingress(server.inference)
    with caplog.at_level(logging.WARNING):
        reply = asyncio.run(ingress.ModelInfer(good(), grpc_context=context))
        assert (context.code, reply.raw_output_contents[0]) == (None, linear(X)[0].tobytes())
        bad = request(model="nobody")
        assert asyncio.run(ingress.ModelInfer(bad, grpc_context=context)) == pb.ModelInferResponse()
    assert context.code is grpc.StatusCode.NOT_FOUND
    assert "is not found" in context.details
    assert caplog.text == ""


def test_messages_survive_pickling():
    for message in (good(), model_config_pb2.ModelConfig(name="m")):
        assert pickle.loads(pickle.dumps(message)) == message


def load_request(name="linear", **parameters):
    return pb.RepositoryModelLoadRequest(
        model_name=name,
        parameters={
            key.replace("__", ":").replace("_pt", "/m.pt"): pb.ModelRepositoryParameter(**value)
            for key, value in parameters.items()
        },
    )


@pytest.mark.parametrize(
    ("parameters", "code"),
    [
        ({"config": {"string_param": "{}"}}, None),
        ({"config": {"string_param": "{}"}, "file__1_pt": {"bytes_param": b"x"}}, None),
        ({"config": {"bytes_param": b"{}"}}, "INVALID_ARGUMENT"),
        ({"config": {"string_param": "{}"}, "file__1_pt": {"string_param": "eA=="}},
         "INVALID_ARGUMENT"),
        ({"file__1_pt": {"bytes_param": b"x"}}, "INTERNAL"),
        ({"x": {"string_param": "1"}}, "INVALID_ARGUMENT"),
        ({"config": {}}, None),  # an empty text, which the Controller will not like
    ],
)  # fmt: skip
def test_load_with_parameters(parameters, code):
    async def use(server, triton, stub):
        call = stub.RepositoryModelLoad(load_request(**parameters))
        if code is None:
            await call
            assert server.controller.calls[-1][:2] == ("load", "linear")
            return
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call
        assert error.value.code() is grpc.StatusCode[code]
        assert server.controller.calls == []

    over_grpc(use, Server(model_control_mode="explicit", allow_file_override=True))


def test_file_overrides_are_off_unless_enabled():
    async def use(server, triton, stub):
        with pytest.raises(InferenceServerException, match="File overrides are disabled") as error:
            await triton.load_model("linear", config="{}", files={"file:1/model.pt": b"x"})
        assert error.value.status() == "StatusCode.UNIMPLEMENTED"

    over_grpc(use, Server(model_control_mode="explicit"))


@pytest.mark.parametrize("name", ["..", "../m", "", " ", "%2e%2e%2f", "a\r\nb", "x" * 256])
def test_a_name_that_can_be_no_models_is_an_invalid_argument(name):
    messages = {
        "ModelReady": pb.ModelReadyRequest(name=name),
        "ModelMetadata": pb.ModelMetadataRequest(name=name),
        "ModelConfig": pb.ModelConfigRequest(name=name),
        "ModelInfer": request(entry(), raw=[RAW], model=name),
        "RepositoryModelLoad": load_request(name),
        "RepositoryModelUnload": pb.RepositoryModelUnloadRequest(model_name=name),
    }
    server = Server(model_control_mode="explicit")
    for verb, message in messages.items():
        with pytest.raises(InvalidArgument, match="odel name"):
            ask(server, verb, message)
    assert server.controller.calls == []
