"""Requests that mean harm: each gets its status, the server goes on, no memory stays.

What one process can prove as well is in `unit/deployments`; here it goes over real connections, by
HAProxy and by uvicorn's protocol, to the server that all other tests use.
"""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Iterator
from typing import Any

import grpc as grpcio
import httpx
import numpy as np
import pytest
import tritonclient.grpc as grpcclient
from tritonclient.grpc import service_pb2, service_pb2_grpc

from tests.serve.raw import ANSWER_S, LENGTH, LIMIT, MIB, SENT, TENSOR, X, body
from tests.serve.server import Server

pytestmark = pytest.mark.usefixtures("unharmed")


def post(server: Server, path: str, content: bytes, **headers: str) -> tuple[int, str]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    reply = httpx.post(f"http://{server.http}{path}", content=content, headers=named, timeout=60)
    assert len(reply.content) < 20_000
    document = reply.json() if reply.content else {}
    return reply.status_code, document.get("error", "") if isinstance(document, dict) else ""


# --- bodies --------------------------------------------------------------------------------------


def nested(depth: int) -> bytes:
    return b'{"a":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


PARSED = [
    "/v2/models/mlp/infer",
    "/v2/models/mlp/generate",
    "/v2/models/mlp/generate_stream",
    "/v2/models/mlp/trace/setting",
    "/v2/repository/index",
    "/v2/repository/models/nobody/load",
    "/v2/repository/models/nobody/unload",
    "/v2/logging",
    "/v2/trace/setting",
    "/v2/systemsharedmemory/region/r/register",
]


@pytest.mark.parametrize("path", PARSED)
def test_json_may_not_nest_too_deep(server: Server, path: str) -> None:
    for content in (nested(101), nested(120), b"[" * 250_000, b'{"a":' * 250_000):
        status, error = post(server, path, content)
        assert status == 400 and "JSON nesting depth exceeds maximum allowed limit (100)" in error
    for content in (nested(50), nested(100)):
        assert "nesting" not in post(server, path, content)[1]
    assert post(server, path, b'{"a"')[0] == 500


def binary(size: int) -> dict[str, Any]:
    return {**TENSOR, "parameters": {"binary_data_size": size}}


def outputs(**parameters: Any) -> bytes:
    return body(SENT, outputs=[{"name": "OUTPUT__0", "parameters": parameters}])


def shaped(*shape: Any) -> bytes:
    return body({**SENT, "shape": list(shape)})


FEW = body(SENT)[:-1]  # to be gone on with
BODIES = [
    ("inputs twice, the last counts", FEW + b',"inputs":[]}', 400, "got 0 inputs"),
    ("inputs twice, the last is good", b'{"inputs":[],' + FEW[1:] + b"}", 200, ""),
    ("larger as a tensor", shaped(1, LIMIT // 4 + 1), 400, "exceeds the maximum allowed"),
    ("shape overflows", shaped(2**4, 2**60 + 2), 400, "exceed maximum size of"),
    ("size overflows", shaped(2**2, 2**60 + 2), 400, "byte size overflow"),
    ("shape beyond 64 bits", shaped(2**64, 1), 500, "unsigned-integer"),
    ("a negative dimension", shaped(-1, 8), 500, "unsigned-integer"),
    ("no rows", body({**TENSOR, "shape": [0, 8], "data": []}), 400, "must be >= 1"),
    ("a zero dimension", body({**TENSOR, "shape": [1, 0], "data": []}), 400, "unexpected shape"),
    ("many dimensions", shaped(*[1] * 100_000), 400, "dimensions"),
    ("many inputs", body(*[{**SENT, "name": str(i)} for i in range(1025)]), 400, "1025 inputs"),
    ("many outputs", body(SENT, outputs=[{"name": str(i)} for i in range(1025)]), 400, "1025 out"),
    ("an input twice", body(SENT, SENT), 400, "already exists in request"),
    ("an output twice", body(SENT, outputs=[{"name": "OUTPUT__0"}] * 2), 400, "already exists"),
    ("too large a number", FEW + b',"x":1e400}', 500, "failed to parse"),
    ("a negative size", body(binary(-1)), 500, "unsigned-integer"),
    ("a size beyond the body", body(binary(33)), 400, "unexpected size for input"),
    ("a giant size", body(binary(2**63)), 400, "unexpected size for input"),
    ("negative classes", outputs(classification=-1), 400, "classification"),
    ("more classes than there are", outputs(classification=2**40), 200, ""),
    ("a negative priority", body(SENT, parameters={"priority": -1}), 500, "unsigned-integer"),
    ("a giant priority", body(SENT, parameters={"priority": 2**63}), 501, "not supported"),
    ("a timeout beyond 64 bits", body(SENT, parameters={"timeout": 2**64}), 500, ""),
    ("a reserved parameter", body(SENT, parameters={"triton_x": 1}), 400, "reserved"),
    ("many parameters", body(SENT, parameters={str(i): i for i in range(50_000)}), 200, ""),
    ("a long parameter", body(SENT, parameters={"x": "x" * (8 * MIB)}), 200, ""),
    ("a long id", body(SENT, id="x" * 15_000), 200, ""),
    ("no UTF-8", b'{"inputs":[{"name":"\xff"}]}', 500, "failed to parse"),
    ("NUL in a name", body({**SENT, "name": "INPUT__0\0"}), 400, "unexpected inference input"),
    ("NUL itself", b"\0" * 1000, 500, "failed to parse"),
]


@pytest.mark.parametrize("case", BODIES, ids=[case[0] for case in BODIES])
def test_bodies_of_json(server: Server, case: Any) -> None:
    _, content, wanted, text = case
    status, error = post(server, "/v2/models/mlp/infer", content)
    assert status == wanted and text in error, (status, error)


FLAT = body(binary(32), parameters={"binary_data_output": True})


@pytest.mark.parametrize(
    ("length", "more", "status"),
    [
        (str(len(FLAT)), 32, 200),
        (str(len(FLAT)), 31, 400),
        (str(len(FLAT)), 33, 400),
        ("-1", 32, 400),
        ("x", 32, 400),
        ("", 32, 400),
        ("99999999999", 32, 400),
        ("9" * 40, 32, 400),
        (str(len(FLAT) + 33), 32, 400),
        (str(len(FLAT) - 1), 32, 500),  # what is left is no JSON
        ("0", 32, 400),  # a raw request of another size
    ],
)
def test_the_length_of_the_json_part(server: Server, length: str, more: int, status: int) -> None:
    reply = httpx.post(
        f"http://{server.http}/v2/models/mlp/infer",
        content=FLAT + bytes(more),
        headers={LENGTH: length},
        timeout=ANSWER_S,
    )
    assert reply.status_code == status, reply.text
    assert status == 200 or list(reply.json()) == ["error"]


def test_numbers_that_are_hardly_any(server: Server) -> None:
    """They come back as they are, or are refused."""
    url = f"http://{server.http}/v2/models/big/infer"
    form = '{"inputs":[{"name":"x","datatype":"FP32","shape":[1,%d],"data":[%s]}]}'
    odd = form % (5, "-0.0,NaN,-Infinity,1e-400,18446744073709551616")
    reply = httpx.post(url, content=odd, timeout=ANSWER_S)
    data = json.loads(reply.text)["outputs"][0]["data"]
    wanted = np.array([-0.0, np.nan, -np.inf, 0, 2.0**64], np.float32)
    assert np.array(data, np.float32).tobytes() == wanted.tobytes()
    for number in ("1e400", "0x1", "01", "+1", "1_0", "nan", "--1"):
        reply = httpx.post(url, content=form % (1, number), timeout=ANSWER_S)
        assert reply.status_code == 500 and "failed to parse" in reply.json()["error"], number


STRINGS = [
    ("a length beyond the rest", struct.pack("<I", 2**32 - 1) + b"abc", 400),
    ("a length of nothing", struct.pack("<I", 1), 400),
    ("a piece of a length", b"\1\0", 400),
    ("one more than the shape says", struct.pack("<I", 0) * 2, 400),
    ("no UTF-8", struct.pack("<I", 2) + b"\xff\xfe", 400),
    ("NUL", struct.pack("<I", 3) + b"a\0b", 200),
]


@pytest.mark.parametrize("case", STRINGS, ids=[case[0] for case in STRINGS])
def test_strings_over_both_protocols(server: Server, grpc_stub: Any, case: Any) -> None:
    _, raw, status = case
    entry: dict[str, Any] = {"name": "words", "datatype": "BYTES", "shape": [1, 1]}
    text = body({**entry, "parameters": {"binary_data_size": len(raw)}})
    told, error = post(
        server,
        "/v2/models/strings/infer",
        text + raw,
        Inference_Header_Content_Length=str(len(text)),
    )
    assert told == status, error
    message = service_pb2.ModelInferRequest(model_name="strings", raw_input_contents=[raw])
    message.inputs.add(**entry)
    code, details = outcome(grpc_stub, message)
    assert (code, details) == (("OK", "") if status == 200 else ("INVALID_ARGUMENT", error))


# --- gRPC ----------------------------------------------------------------------------------------


@pytest.fixture
def grpc_stub(server: Server) -> Iterator[Any]:
    with grpcio.insecure_channel(server.grpc) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def outcome(stub: Any, message: Any) -> tuple[str, str]:
    """Code and details of an infer call."""
    try:
        stub.ModelInfer(message, timeout=ANSWER_S)
    except grpcio.RpcError as error:
        return error.code().name, error.details()
    return "OK", ""


def message(shape: Any = (1, 8), copies: int = 1, raw: int = 1, **more: Any) -> Any:
    made = service_pb2.ModelInferRequest(model_name="mlp", **more)
    for _ in range(copies):
        made.inputs.add(name="INPUT__0", datatype="FP32", shape=shape)
    made.raw_input_contents.extend([X.tobytes()] * raw)
    return made


def typed() -> Any:
    made = message(raw=0)
    made.inputs[0].contents.fp32_contents.extend(X.ravel().tolist())
    return made


def both() -> Any:
    made = typed()
    made.raw_input_contents.append(X.tobytes())
    return made


def with_output(**parameters: Any) -> Any:
    made = message()
    output = made.outputs.add(name="OUTPUT__0")
    for key, value in parameters.items():
        output.parameters[key].int64_param = value
    return made


def with_parameter(key: str, **value: Any) -> Any:
    made = message()
    made.parameters[key].CopyFrom(service_pb2.InferParameter(**value))
    return made


CALLS = [
    ("control: good", message(), "OK", ""),
    ("control: typed", typed(), "OK", ""),
    ("too many raw contents", message(raw=2), "INVALID_ARGUMENT", "got 2"),
    ("too few raw contents", message(copies=2), "INVALID_ARGUMENT", "got 1"),
    ("typed and raw", both(), "INVALID_ARGUMENT", "contents field must not be specified"),
    ("no contents", message(raw=0), "INVALID_ARGUMENT", "unable to find data"),
    ("an input twice", message(copies=2, raw=2), "INVALID_ARGUMENT", "already exists"),
    ("many inputs", message(copies=1025, raw=0), "INVALID_ARGUMENT", "at most 1024"),
    ("a negative dimension", message((-1, 8)), "INVALID_ARGUMENT", "negative"),
    ("no rows", message((0, 8)), "INVALID_ARGUMENT", ""),
    ("shape overflows", message((2**4, 2**60 + 2)), "INVALID_ARGUMENT", "exceed maximum size of"),
    ("size overflows", message((2**2, 2**60 + 2)), "INVALID_ARGUMENT", "byte size overflow"),
    ("many dimensions", message([1] * 100_000), "INVALID_ARGUMENT", "dimensions"),
    ("no version", message(model_version="1x"), "INVALID_ARGUMENT", "integer > 0"),
    ("a negative version", message(model_version="-1"), "INVALID_ARGUMENT", "integer > 0"),
    ("a giant version", message(model_version="9" * 400), "INVALID_ARGUMENT", ""),
    ("negative classes", with_output(classification=-1), "INVALID_ARGUMENT", "classification"),
    ("more classes than there are", with_output(classification=2**40), "OK", ""),
    ("a priority", with_parameter("priority", uint64_param=2**63), "UNIMPLEMENTED", "'priority'"),
    ("a reserved parameter", with_parameter("triton_x", bool_param=True), "INVALID_ARGUMENT", ""),
    ("an empty parameter", with_parameter("x"), "INVALID_ARGUMENT", "no value"),
    ("a long parameter", with_parameter("x", string_param="x" * (8 * MIB)), "OK", ""),
]


@pytest.mark.parametrize("case", CALLS, ids=[case[0] for case in CALLS])
def test_calls(grpc_stub: Any, case: Any) -> None:
    _, sent, wanted, text = case
    for _ in range(2):  # what is remembered of the first must not matter
        code, details = outcome(grpc_stub, sent)
        assert code == wanted and text in details, details
        assert "Traceback" not in details


def test_what_is_no_message_and_no_method(server: Server) -> None:
    service = "/inference.GRPCInferenceService/"
    with grpcio.insecure_channel(server.grpc) as channel:

        def code(method: str, sent: bytes, **more: Any) -> str:
            call = channel.unary_unary(service + method)
            with pytest.raises(grpcio.RpcError) as caught:
                call(sent, timeout=ANSWER_S, **more)
            assert "Traceback" not in caught.value.details()
            return str(caught.value.code().name)

        for sent in (b"\xff" * 100, b"\x0a\xff\xff\xff\xff\x0f", b"\x0a\x05mlp"):
            for method in ("ModelInfer", "ModelMetadata", "RepositoryModelLoad"):
                assert code(method, sent) in ("UNKNOWN", "INTERNAL")
        assert code("Nothing", b"") == "UNIMPLEMENTED"
        assert code("ModelInfer", b"", metadata=(("x", "a" * 17_000),)) == "RESOURCE_EXHAUSTED"


def test_many_streams_at_once(server: Server, grpc: Any) -> None:
    """Some are answered, some say nothing and some are left."""
    with contextlib.ExitStack() as stack:
        told: list[list[Any]] = []
        channel = stack.enter_context(grpcio.insecure_channel(server.grpc))
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        calls = [stub.ModelStreamInfer(iter([message(id=str(n))] * 3)) for n in range(100)]
        for call in calls[::2]:
            told.append([answer.infer_response.id for answer in call])
        for call in calls[1::2]:
            call.cancel()
        assert told == [[str(n)] * 3 for n in range(0, 100, 2)]
    answers: list[Any] = []
    grpc.start_stream(callback=lambda result, error: answers.append((result, error)))
    one = grpcclient.InferInput("INPUT__0", [1, 8], "FP32")
    one.set_data_from_numpy(X)
    grpc.async_stream_infer("mlp", [one])
    grpc.stop_stream()
    assert [error for _, error in answers] == [None]
