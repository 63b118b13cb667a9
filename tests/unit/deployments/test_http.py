from __future__ import annotations

import asyncio
import gzip
import json
import logging

import numpy as np
import pytest

from deployments import http_body
from deployments.http_routes import MODEL_ROUTES, ROUTES
from deployments.inference import EXTENSIONS
from deployments.openapi_operations import OPERATIONS
from deployments.tensors import encode_bytes

from .serving import Server, json_input, linear

INFER = "/v2/models/linear/infer"
X = [[1.0, -2.0, 3.0, 0.5]]
LENGTH = "Inference-Header-Content-Length"


@pytest.fixture(scope="module")
def server():
    return Server()


def body(*inputs, **more):
    return {"inputs": list(inputs), **more}


def good(**more):
    return body(json_input("INPUT__0", "FP32", [1, 4], X), **more)


def binary(document, *tensors):
    """A body in the binary tensor form, and its headers."""
    text = json.dumps(document).encode()
    return {"content": b"".join((text, *tensors)), "headers": {LENGTH: str(len(text))}}


def binary_input(name, datatype, shape, size):
    return {
        "name": name,
        "datatype": datatype,
        "shape": shape,
        "parameters": {"binary_data_size": size},
    }


def parts(reply):
    """The JSON part and the bytes after it."""
    length = int(reply.headers[LENGTH])
    return json.loads(reply.content[:length]), reply.content[length:]


# --- infer ----------------------------------------


def test_json_in_and_out(server):
    reply = server.ask("POST", INFER, json=good(id="a7"))
    document = reply.json()
    assert (reply.status_code, reply.headers["content-type"]) == (200, "application/json")
    assert LENGTH not in reply.headers
    data = document["outputs"][0].pop("data")
    assert list(document.items()) == [
        ("id", "a7"),
        ("model_name", "linear"),
        ("model_version", "1"),
        ("outputs", [{"name": "OUTPUT__0", "datatype": "FP32", "shape": [1, 3]}]),
    ]
    np.testing.assert_allclose(data, linear(np.array(X, np.float32))[0][0], rtol=1e-6)
    assert "id" not in server.ask("POST", "/v2/models/linear/versions/1/infer", json=good()).json()


@pytest.mark.parametrize("rows", [1, 5])
def test_binary_in_and_out(server, rows):
    x = np.random.default_rng(0).standard_normal((rows, 4)).astype(np.float32)
    entry = binary_input("INPUT__0", "FP32", [rows, 4], x.nbytes)
    document = {"inputs": [entry], "parameters": {"binary_data_output": True}}
    reply = server.ask("POST", INFER, **binary(document, x.tobytes()))
    assert reply.headers["content-type"] == "application/octet-stream"
    head, rest = parts(reply)
    assert head["outputs"][0]["parameters"] == {"binary_data_size": len(rest)}
    np.testing.assert_array_equal(np.frombuffer(rest, np.float32).reshape(rows, 3), linear(x)[0])


def test_each_listed_output_decides_for_itself(server):
    a, b = np.arange(4, dtype=np.int32), np.ones(4, np.int32)
    document = {
        "inputs": [
            binary_input("INPUT0", "INT32", [1, 4], 16),
            json_input("INPUT1", "INT32", [1, 4], b.tolist()),
        ],
        "outputs": [{"name": "OUTPUT1"}, {"name": "OUTPUT0", "parameters": {"binary_data": True}}],
        "parameters": {"binary_data_output": True},
    }
    head, rest = parts(
        server.ask("POST", "/v2/models/add_sub/infer", **binary(document, a.tobytes()))
    )
    assert [output["name"] for output in head["outputs"]] == ["OUTPUT0", "OUTPUT1"]
    assert np.frombuffer(rest, np.int32).tolist() == (a + b).tolist()
    assert head["outputs"][1]["data"] == (a - b).tolist()


@pytest.mark.parametrize("datatype", ["BOOL", "INT64", "UINT64", "FP16", "BF16", "FP64"])
def test_binary_values_are_exact(server, datatype):
    raw = bytes(range(16)) if datatype != "BOOL" else b"\0\1\1\0" * 4
    count = 16 // {"BOOL": 1, "FP16": 2, "BF16": 2}.get(datatype, 8)
    document = {
        "inputs": [binary_input("X", datatype, [1, count], 16)],
        "parameters": {"binary_data_output": True},
    }
    _, rest = parts(
        server.ask("POST", f"/v2/models/echo_{datatype}/infer", **binary(document, raw))
    )
    assert rest == raw


def test_strings(server):
    reply = server.ask(
        "POST",
        "/v2/models/strings/infer",
        json=body(json_input("X", "BYTES", [3], ["a\0b", "", "é"])),
    )
    assert reply.json()["outputs"][0]["data"] == ["a\0b", "", "é"]
    wire = encode_bytes([b"\xff", b""]).tobytes()
    document = body(binary_input("X", "BYTES", [2], len(wire)))
    reply = server.ask("POST", "/v2/models/strings/infer", **binary(document, wire))
    assert (reply.status_code, "UTF-8" in reply.json()["error"]) == (400, True)


def test_no_value_is_lost_that_is_not_finite(server):
    text = b'{"inputs":[{"name":"X","datatype":"FP32","shape":[1,3],"data":[NaN,-Infinity,1]}]}'
    reply = server.ask("POST", "/v2/models/echo_FP32/infer", content=text)
    assert b"[NaN, -Infinity, 1.0]" in reply.content
    assert reply.json()["outputs"][0]["data"][1:] == [float("-inf"), 1.0]


def test_raw_binary_request(server):
    x = np.array(X, np.float32)
    reply = server.ask("POST", INFER, content=x.tobytes(), headers={LENGTH: "0"})
    np.testing.assert_array_equal(np.frombuffer(parts(reply)[1], np.float32), linear(x)[0].ravel())
    reply = server.ask(
        "POST", "/v2/models/echo_FP32/infer", content=x.tobytes(), headers={LENGTH: "0"}
    )
    assert parts(reply)[0]["outputs"][0]["shape"] == [1, 4]
    reply = server.ask("POST", "/v2/models/echo_BYTES/infer", content=b"abc", headers={LENGTH: "0"})
    assert parts(reply)[1] == b"\x03\0\0\0abc"


@pytest.mark.parametrize(
    ("model", "content", "text"),
    [
        (
            "add_sub",
            b"",
            "Raw request must only have 1 input (found 1) to be deduced but got 2 inputs",
        ),
        ("linear", b"123", "input byte size mismatch"),
        ("strings", b"", "For BYTE datatype raw input 'X', the model must have input shape [1]"),
        ("echo_FP32", b"123", "input byte size mismatch"),
    ],
)
def test_raw_binary_requests_that_cannot_be_deduced(server, model, content, text):
    reply = server.ask("POST", f"/v2/models/{model}/infer", content=content, headers={LENGTH: "0"})
    assert reply.status_code == 400
    assert text in reply.json()["error"]


# --- bad input: each gets its status and text, and the next good request its answer ---------

F = "FP32"
ABUSE = [
    (b"", 500, "failed to parse the request JSON buffer"),
    (b"{", 500, "failed to parse the request JSON buffer"),
    (b"[]", 500, "failed to parse the request JSON buffer"),
    (b'"\xff"', 500, "failed to parse the request JSON buffer"),
    (b'{"inputs": NaN', 500, "failed to parse the request JSON buffer"),
    (b'{"inputs":[{"name":"X","shape":[1e400]}]}', 500, "failed to parse"),
    (b"[" * 250_000, 400, "JSON nesting depth exceeds maximum allowed limit (100)"),
    (b"[NaN," * 250_000, 400, "JSON nesting depth exceeds maximum allowed limit (100)"),
    ({"x": json.loads("[" * 120 + "]" * 120), **good()}, 400, "JSON nesting depth exceeds"),
    ({}, 500, "'inputs'"),
    ({"inputs": {}}, 500, "'inputs'"),
    ({"inputs": [1]}, 500, "'inputs'"),
    (good(id=7), 500, "'id'"),
    (good(parameters=[]), 500, "'parameters'"),
    (good(parameters={"x": [1]}), 400, "It should be either 'int', 'bool', or 'string'."),
    (good(parameters={"x": None}), 400, "invalid type"),
    (good(parameters={"triton_x": 1}), 400, "reserved for Triton usage"),
    (good(parameters={"priority": -1}), 500, "'priority'"),
    (good(parameters={"timeout": 10}), 501, "'timeout' is not supported"),
    (good(parameters={"sequence_id": "a"}), 501, "'sequence_id' is not supported"),
    (good(parameters={"binary_data_output": 1}), 500, "'binary_data_output'"),
    (good(outputs=[{"name": "z"}]), 400, "unexpected inference output 'z' for model"),
    (
        good(outputs=[{"name": "OUTPUT__0"}] * 2),
        400,
        "output 'OUTPUT__0' already exists in request",
    ),
    (good(outputs=[{}]), 500, "'name'"),
    (
        good(outputs=[{"name": "OUTPUT__0", "parameters": {"classification": "2"}}]),
        500,
        "'classification'",
    ),
    (
        good(outputs=[{"name": "OUTPUT__0", "parameters": {"classification": -1}}]),
        400,
        "classification",
    ),
    (
        good(outputs=[{"name": "OUTPUT__0", "parameters": {"shared_memory_region": "r"}}]),
        501,
        "Client shared memory is disabled. Start the server with '--allow-client-shm=true'",
    ),
    (
        body(
            {"name": "a", "datatype": F, "shape": [1], "parameters": {"shared_memory_region": "r"}}
        ),
        501,
        "Client shared memory is disabled",
    ),
    (good(outputs=[{"name": str(i)} for i in range(1025)]), 400, "1025 outputs"),
    (body(*[json_input(str(i), F, [1], [1.0]) for i in range(1025)]), 400, "1025 inputs"),
    (body(*[json_input("INPUT__0", F, [1, 4], X)] * 2), 400, "input 'INPUT__0' already exists"),
    (body(json_input("z", F, [1, 4], X)), 400, "unexpected inference input 'z' for model 'linear'"),
    (body(json_input("INPUT__0", "INT32", [1, 4], [1] * 4)), 400, "data-type is 'INT32'"),
    (body(json_input("INPUT__0", "FP8", [1, 4], X)), 400, "invalid datatype 'FP8'"),
    (body(json_input("INPUT__0", "FP16", [1, 4], X)), 400, "FP16 data via JSON is not supported"),
    (body(json_input("INPUT__0", F, [-1, 4], X)), 500, "unsigned-integer"),
    (body(json_input("INPUT__0", F, [1.0, 4], X)), 500, "unsigned-integer"),
    (body(json_input("INPUT__0", F, [True, 4], X)), 500, "unsigned-integer"),
    (body(json_input("INPUT__0", F, [2**4, 2**60 + 2], X)), 400, "exceed maximum size of"),
    (body(json_input("INPUT__0", F, [2**2, 2**60 + 2], X)), 400, "byte size overflow for input"),
    (body(json_input("INPUT__0", F, [2**64, 1], X)), 500, "unsigned-integer"),
    (body(json_input("INPUT__0", F, [1] * 100_000, X)), 400, "dimensions"),
    (body(json_input("INPUT__0", F, [2**25, 4], X)), 400, "exceeds the maximum allowed"),
    (body(json_input("INPUT__0", F, [0, 4], [])), 400, "batch-size must be >= 1"),
    (body(json_input("INPUT__0", F, [9, 4], X * 9)), 400, "batch-size must be <= 8 for 'linear'"),
    (body(json_input("INPUT__0", F, [2, 4], X)), 500, "shape does not match true shape"),
    (body(json_input("INPUT__0", F, [1, 3], X)), 500, "Shape does not match true shape"),
    (body(json_input("INPUT__0", F, [1, 4], ["a"] * 4)), 500, "non-number as number"),
    (body({"name": "INPUT__0", "datatype": F, "shape": [1, 4]}), 400, "must specify 'data'"),
    (body(binary_input("INPUT__0", F, [1, 4], 16)), 400, "expecting 16 additional bytes"),
    (body({**binary_input("INPUT__0", F, [1, 4], 16), "data": X}), 400, "only one of"),
    (body(binary_input("INPUT__0", F, [1, 4], -1)), 500, "unsigned-integer"),
    (body(binary_input("INPUT__0", F, [1, 4], 2**70)), 500, "unsigned-integer"),
    (body(binary_input("INPUT__0", F, [1, 4], 2**63)), 400, "additional bytes"),
]


@pytest.mark.parametrize(("content", "status", "text"), ABUSE)
def test_bad_bodies(server, content, status, text):
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    reply = server.ask("POST", INFER, content=content)
    assert (reply.status_code, reply.headers["content-type"]) == (status, "application/json")
    assert list(reply.json()) == ["error"]
    assert text in reply.json()["error"]
    assert len(reply.content) < 5000
    server.check_alive()


@pytest.mark.parametrize("depth", [50, 99])
def test_deep_data_within_the_limit_is_fine(server, depth):
    data: list = X[0]
    for _ in range(depth - 10):
        data = [data]
    reply = server.ask("POST", INFER, json=body(json_input("INPUT__0", F, [1, 4], data)))
    assert reply.status_code == 200


@pytest.mark.parametrize(
    ("length", "tensors", "text"),
    [
        ("-1", 16, "Unable to parse Inference-Header-Content-Length"),
        ("99999999999999999999", 16, "Unable to parse Inference-Header-Content-Length"),
        ("abc", 16, "Unable to parse Inference-Header-Content-Length"),
        ("", 16, "Unable to parse Inference-Header-Content-Length"),
        ("9999999999", 16, "inference header size should be in range"),
        (None, 15, "unexpected size for input 'INPUT__0', expecting 1 additional bytes"),
        (None, 17, "unexpected additional input data for model 'linear'"),
    ],
)
def test_bad_binary_bodies(server, length, tensors, text):
    request = binary(body(binary_input("INPUT__0", F, [1, 4], 16)), bytes(tensors))
    if length is not None:
        request["headers"] = {LENGTH: length}
    reply = server.ask("POST", INFER, **request)
    assert (reply.status_code, text in reply.json()["error"]) == (400, True), reply.text
    server.check_alive()


def test_an_empty_body_for_binary_inputs(server):
    assert server.ask("POST", INFER, headers={LENGTH: "10"}).status_code == 400


# --- limits ----------------------------------------


async def chunks(count, size=1):
    for _ in range(count):
        yield bytes(size)


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize(("form", "limit"), [("json", 2000), ("tensors", 4000)])
def test_bodies_are_limited(announced, form, limit):
    server = Server(http_max_input_size_bytes=2000, max_body_bytes=4000)
    headers = {LENGTH: "10"} if form == "tensors" else {}
    content = bytes(limit + 1) if announced else chunks(limit + 1)
    reply = server.ask("POST", INFER, content=content, headers=headers)
    assert (reply.status_code, reply.headers["connection"]) == (400, "close")
    assert "exceeds the maximum allowed" in reply.json()["error"]
    server.check_alive()


def test_the_json_part_of_a_binary_request_is_limited():
    server = Server(http_max_input_size_bytes=500, max_body_bytes=4000)
    document = body(binary_input("INPUT__0", F, [1, 4], 16), pad="x" * 1000)
    reply = server.ask("POST", INFER, **binary(document, bytes(16)))
    assert (reply.status_code, "exceeds the maximum" in reply.json()["error"]) == (400, True)


def test_chunked_bodies_are_joined_and_their_chunks_counted(server, monkeypatch):
    async def pieces():
        text = json.dumps(good()).encode()
        for at in range(0, len(text), 7):
            yield text[at : at + 7]

    assert server.ask("POST", INFER, content=pieces()).status_code == 200
    monkeypatch.setattr(http_body, "MAX_CHUNKS", 10)
    reply = server.ask("POST", INFER, content=pieces())
    assert (reply.status_code, "10 chunks" in reply.json()["error"]) == (400, True)


@pytest.mark.parametrize("announced", ["-1", "x", "2147483648", "9" * 40])
def test_odd_content_lengths(server, announced):
    reply = server.ask("POST", INFER, content=b"{}", headers={"content-length": announced})
    assert reply.status_code == 400


def test_headers_are_limited():
    server = Server(http_max_header_bytes=1024)
    assert server.ask("GET", "/v2", headers={"x": "y" * 1024}).status_code == 431
    assert server.ask("GET", "/v2?" + "y" * 1024).status_code == 431


@pytest.mark.parametrize("encoding", ["br", "zstd", "x-gzip", "gzip, deflate", "identity, gzip"])
def test_encodings_that_are_not_known_are_refused_by_name(server, encoding):
    headers = {"content-encoding": encoding, "accept-encoding": "gzip"}
    reply = server.ask("POST", INFER, content=gzip.compress(b"{}"), headers=headers)
    assert (reply.status_code, reply.headers["accept-encoding"]) == (501, "gzip, deflate")
    assert f"Unsupported compression type '{encoding}'" in reply.json()["error"]
    assert reply.headers["connection"] == "close"  # its body is unread
    for known in ("identity", ""):
        headers = {"content-encoding": known}
        assert server.ask("POST", INFER, json=good(), headers=headers).is_success


def test_a_body_that_never_comes_is_not_waited_for():
    server = Server(http_read_timeout_s=0.01)

    async def stalled():
        yield b"{"
        await asyncio.Event().wait()

    reply = server.ask("POST", INFER, content=stalled())
    assert (reply.status_code, reply.headers["connection"]) == (400, "close")
    server.check_alive()


# --- clients that leave ----------------------------------------


async def drive(server, messages, sent):
    """One infer call whose client sends `messages` and then nothing; replies go to `sent`."""

    async def receive():
        if messages:
            return messages.pop(0)
        return await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": INFER, "headers": []}
    await server.http(scope, receive, send)


def whole_body():
    return {"type": "http.request", "body": json.dumps(good()).encode(), "more_body": False}


def test_a_client_that_leaves_takes_its_request_along():
    server = Server()
    gate = server.gates["linear"]
    gate.hold = []
    sent: list = []
    asyncio.run(drive(server, [whole_body(), {"type": "http.disconnect"}], sent))
    assert (gate.cancelled, sent) == (1, [])


def test_a_client_that_leaves_within_its_body_is_forgotten(server):
    sent: list = []
    first = {"type": "http.request", "body": b"{", "more_body": True}
    asyncio.run(drive(server, [first, {"type": "http.disconnect"}], sent))
    asyncio.run(drive(server, [{"type": "http.disconnect"}], sent))
    assert sent == []


def test_a_slow_answer_leaves_no_task_behind(monkeypatch):
    monkeypatch.setattr(http_body, "WATCH_AFTER_S", 0)
    server = Server()
    sent: list = []
    gate = server.gates["linear"]
    held: list = []
    gate.hold = held

    async def slow():
        task = asyncio.ensure_future(drive(server, [whole_body()], sent))
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) == 3  # this one, the request, its watch
        held.pop()()
        await task
        await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(slow())
    assert (sent[0]["status"], gate.cancelled) == (200, 0)


# --- the other routes ----------------------------------------


def test_metadata_and_config(server):
    assert server.ask("GET", "/v2").json()["extensions"] == list(EXTENSIONS)
    metadata = server.ask("GET", "/v2/models/linear").json()
    assert (metadata["name"], metadata["versions"]) == ("linear", ["1"])
    config = server.ask("GET", "/v2/models/linear/versions/1/config").json()
    assert (config["max_batch_size"], config["input"][0]["dims"]) == (8, [4])
    assert server.ask("GET", "/v2/models/linear/stats").json()["model_stats"][0]["name"] == "linear"
    assert server.ask("GET", "/v2/models/stats").json()["model_stats"][0]["name"] == ""


def test_health(server):
    for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/linear/ready"):
        reply = server.ask("GET", path)
        assert (reply.status_code, reply.content) == (200, b"")
    for path in ("/v2/models/nobody/ready", "/v2/models/linear/versions/7/ready"):
        assert server.ask("GET", path).status_code == 400
    assert server.ask("GET", "/-/healthz").text == "success"
    assert server.ask("GET", "/-/routes").json() == {"/": "manta"}
    not_yet = Server()
    not_yet.publish(ready=False)
    assert not_yet.ask("GET", "/v2/health/ready").status_code == 400
    assert not_yet.ask("GET", "/v2/health/live").status_code == 200


NOT_FOUND, NOT_ALLOWED = (404, "Not Found"), (405, "Method Not Allowed")


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("GET", "/page.js", NOT_FOUND),
        ("GET", "/openapi.json/", NOT_FOUND),
        ("POST", "/", NOT_ALLOWED),
        ("OPTIONS", "/openapi.json", NOT_ALLOWED),
        ("GET", "/v2/", NOT_FOUND),
        ("GET", "http://manta//v2", NOT_FOUND),
        ("GET", "/V2", NOT_FOUND),
        ("GET", "/v2/models", NOT_FOUND),
        ("GET", "/v2/models/a/b", NOT_FOUND),
        ("GET", "/v2/models/linear/versions/x", NOT_FOUND),
        ("GET", "/v2/models/linear/versions/²/ready", NOT_FOUND),
        ("POST", "/v2/models/linear/versions/x/infer", NOT_FOUND),
        ("POST", "/v2/models//infer", NOT_FOUND),
        ("POST", "/v2/models/linear/infer/", NOT_FOUND),
        ("POST", "/v2/models/..%2flinear/infer", NOT_FOUND),
        ("GET", INFER, NOT_ALLOWED),
        ("HEAD", INFER, NOT_ALLOWED),
        ("DELETE", "/v2/models/linear", NOT_ALLOWED),
        ("POST", "/v2/health/live", NOT_ALLOWED),
        ("OPTIONS", "/v2", NOT_ALLOWED),
        ("GET", "/v2/repository/index", NOT_ALLOWED),
        ("POST", "/v2/models/nobody/infer", (404, "unknown model: 'nobody' is not found")),
        ("POST", "/v2/models/linear/versions/9/infer", (404, "'linear' version 9 is not found")),
        ("POST", "/v2/models/linear/versions/0/infer", (400, "should be an integer > 0")),
        ("GET", "/v2/models/nobody", (404, "is not found")),
        ("GET", "/v2/models/nobody/config", (404, "is not found")),
        ("GET", "/v2/models/nobody/stats", (400, "requested model 'nobody' is not available")),
        ("GET", "/v2/models/linear/generate", NOT_ALLOWED),
        ("HEAD", "/v2/models/linear/generate_stream", NOT_ALLOWED),
        ("POST", "/v2/models/linear/generate/", NOT_FOUND),
        ("POST", "/v2/models/linear/versions/x/generate", NOT_FOUND),
        ("POST", "/v2/models/nobody/generate", (404, "unknown model: 'nobody' is not found")),
        ("POST", "/v2/models/linear/versions/9/generate_stream", (404, "version 9 is not found")),
        ("GET", "/v2/models/a%0d%0ab", (400, "model name must consist of")),
        ("GET", "/v2/models/%2e%2e", (400, "path traversal characters")),
        ("GET", "/v2/models/%20/config", (400, "cannot be empty or blank")),
        ("POST", "/v2/models/%2e%2e/infer", (400, "path traversal characters")),
        ("GET", "/v2/models/a%2f..%2fb", (404, "Not Found")),  # no path of the table
        ("GET", "/v2/models/linear/versions/1/trace/setting", (404, "Not Found")),
        ("GET", "/v2/systemsharedmemory/status", (501, "Client shared memory is disabled")),
        ("POST", "/v2/cudasharedmemory/region/r/register", (501, "memory is disabled")),
        ("POST", "/v2/repository/r/models/m/load", (501, "'repository_name' specification")),
        ("POST", "/v2/repository/r/index", (501, "'repository_name' specification")),
    ],
)
def test_every_answer_has_tritons_form(server, method, path, expected):
    status, text = expected
    reply = server.ask(method, path)
    assert (reply.status_code, reply.headers["content-type"]) == (status, "application/json")
    if method == "HEAD":
        assert reply.content == b""
    else:
        assert list(reply.json()) == ["error"]
        assert text in reply.json()["error"]


def test_every_route_is_described():
    """A route that is added says in `openapi_operations` what it takes and answers."""
    missing = {name for _, _, name in (*ROUTES, *MODEL_ROUTES)} - set(OPERATIONS)
    assert not missing, "describe these in openapi_operations.OPERATIONS"


@pytest.mark.parametrize("path", ["/", "/openapi.json"])
def test_documents_are_sent_once(server, path):
    reply = server.ask("GET", path)
    tag = reply.headers["etag"]
    assert (reply.status_code, reply.headers["cache-control"]) == (200, "no-cache")
    assert reply.headers["x-content-type-options"] == "nosniff"
    head = server.ask("HEAD", path)
    assert (head.status_code, head.content, head.headers) == (200, b"", reply.headers)
    for known in (tag, f'"other", {tag}', tag.removeprefix("W/"), "*"):
        again = server.ask("GET", path, headers={"if-none-match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
        assert "content-type" not in again.headers
    assert server.ask("GET", path, headers={"if-none-match": '"other"'}).status_code == 200


def test_head_is_get_without_a_body(server):
    reply = server.ask("HEAD", "/v2")
    assert (reply.status_code, reply.content) == (200, b"")
    assert int(reply.headers["content-length"]) > 0


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 200),
        (b"{}", 200),
        (b'{"ready": true}', 200),
        (b'{"ready": 1}', 400),
        (b"[]", 500),
        (b"{", 500),
        (b"[" * 200 + b"]" * 200, 400),
    ],
)
def test_index(server, content, status):
    reply = server.ask("POST", "/v2/repository/index", content=content)
    assert reply.status_code == status
    if status == 200:
        assert {"name": "linear", "version": "1", "state": "READY"} in reply.json()


def test_load_and_unload():
    load, unload = (f"/v2/repository/models/linear/{verb}" for verb in ("load", "unload"))
    closed, opened = Server(), Server(model_control_mode="explicit")
    for path in (load, unload):
        reply = closed.ask("POST", path)
        assert (reply.status_code, closed.controller.calls) == (503, [])
        assert reply.json()["error"].startswith("explicit model load / unload is not allowed")
        assert opened.ask("POST", path, json={"parameters": {}}).status_code == 200
    assert [call[:2] for call in opened.controller.calls] == [
        ("load", "linear"),
        ("unload", "linear"),
    ]
    given = {"config": "{}", "file:1/m": "AAAA"}
    for parameters, status in (
        ({"config": "{}"}, 200),
        ({"config": {}}, 500),
        ({"config": "{}", "file:1/m": "?"}, 400),
        (given, 501),
        ({"x": 1}, 500),
        ({"x": "1"}, 500),
    ):
        reply = opened.ask("POST", load, json={"parameters": parameters})
        assert reply.status_code == status, parameters
    assert opened.controller.calls[2:] == [("load", "linear", {"config": "{}"})]
    enabled = Server(model_control_mode="explicit", allow_file_override=True)
    assert enabled.ask("POST", load, json={"parameters": given}).status_code == 200
    assert enabled.controller.calls == [("load", "linear", {"config": "{}", "file:1/m": b"\0\0\0"})]


@pytest.mark.parametrize(
    "name", ["..%2Fm", "a%2F..%2Fb", "/m", "%20", "m%2F", "%2e%2e", "a%0d%0ab", ""]
)
def test_names_that_lead_elsewhere_are_told_so(name):
    server = Server(model_control_mode="explicit")
    for verb in ("load", "unload"):
        reply = server.ask("POST", f"/v2/repository/models/{name}/{verb}")
        assert reply.status_code == 400 and "odel name" in reply.json()["error"], reply.text
    assert server.controller.calls == []


# --- failures and the end ----------------------------------------


def one(model):
    return f"/v2/models/{model}/infer", body(json_input("X", F, [1, 1], [1.0]), id="r")


def test_failures_keep_their_status(server):
    path, request = one("failing")
    reply = server.ask("POST", path, json=request)
    assert reply.status_code == 500
    assert reply.json()["error"] == "[request id: r] PyTorch execute failure: shapes do not agree"
    path, request = one("full")
    reply = server.ask("POST", path, json=request)
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")


def test_a_crash_tells_nothing_to_the_client_and_all_to_the_log(server, caplog):
    path, request = one("crashing")
    with caplog.at_level(logging.ERROR):
        reply = server.ask("POST", path, json=request)
    assert (reply.status_code, reply.json()) == (500, {"error": "internal error"})
    assert "/secret/path" in caplog.text
    server.check_alive()


def test_while_closing_new_work_is_refused_and_connections_end():
    server = Server()
    server.publish(closing=True)
    for method, path in (("GET", "/v2/health/ready"), ("GET", "/v2/health/live"), ("POST", INFER)):
        reply = server.ask(method, path)
        assert (reply.status_code, reply.json()) == (503, {"error": "Server exiting"})
        assert reply.headers["connection"] == "close"


def test_while_leaving_requests_are_answered_on_connections_that_end():
    server = Server()
    server.http.leave()
    assert server.ask("GET", "/v2/health/ready").status_code == 400
    reply = server.ask("POST", INFER, json=good())
    assert (reply.status_code, reply.headers["connection"]) == (200, "close")
