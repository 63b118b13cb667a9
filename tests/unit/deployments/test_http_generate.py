"""/generate and /generate_stream: flat JSON in and out, by what the model's configuration says."""

from __future__ import annotations

import asyncio
import gzip
import json

import numpy as np
import pytest

from deployments.http_generate import MAX_CHECKED_BYTES

from .serving import Server, linear

X = [1.0, -2.0, 3.0, 0.5]
Y = linear(np.array([X], np.float32))[0][0]
VERBS = ("generate", "generate_stream")
EVENTS = "text/event-stream; charset=utf-8"


@pytest.fixture(scope="module")
def server():
    return Server()


def path(model, verb="generate"):
    return f"/v2/models/{model}/{verb}"


def document(reply):
    """What it says, in whichever form."""
    text = reply.content
    if reply.headers["content-type"] == EVENTS:
        assert text.startswith(b"data: ") and text.endswith(b"\n\n") and text.count(b"\n") == 2
        text = text[len(b"data: ") : -2]
    else:
        assert reply.headers["content-type"] == "application/json"
    return json.loads(text)


# --- what a model is given, and what it answers ----------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_members_are_tensors_and_outputs_are_members(server, verb):
    body = {"id": "a7", "INPUT__0": X, "temperature": 0.5, "stream": False, "stop": "", "top_k": 3}
    reply = server.ask("POST", path("linear", verb), json=body)
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"] == (EVENTS if verb != "generate" else "application/json")
    answer = document(reply)
    y = answer.pop("OUTPUT__0")
    assert list(answer.items()) == [
        ("id", "a7"),
        ("model_name", "linear"),
        ("model_version", "1"),
    ]
    np.testing.assert_allclose(y, Y, rtol=1e-6)
    reply = server.ask("POST", path("linear/versions/1", verb), json={"INPUT__0": X})
    assert "id" not in document(reply)


@pytest.mark.parametrize(
    ("model", "value", "shape", "answer"),
    [
        ("linear", X + X, (2, 4), [*Y, *Y]),
        ("echo_FP32", 7, (1, 1), 7.0),
        ("echo_FP32", [7], (1, 1), 7.0),
        ("echo_FP32", [1, 2.5, -3], (1, 3), [1.0, 2.5, -3.0]),
        ("echo_BOOL", True, (1, 1), True),
        ("echo_BOOL", [True, False], (1, 2), [True, False]),
        ("echo_UINT64", 2**64 - 1, (1, 1), 2**64 - 1),
        ("echo_INT64", [-(2**63), 0], (1, 2), [-(2**63), 0]),
        ("echo_BYTES", "hello world", (11 + 4,), "hello world"),
        ("echo_BYTES", ["é", ""], (2 + 4 + 4,), ["é", ""]),
        ("strings", "a", (1 + 4,), "a"),
        ("strings", ["a", "b", "c"], (3 * 5,), ["a", "b", "c"]),
        ("strings", [], (0,), []),
        ("unbatched", [1, 2, 3, 4], (2, 2), [1.0, 2.0, 3.0, 4.0]),
        ("unbatched", [], (0, 2), []),
    ],
)
def test_the_shape_follows_from_the_configuration(server, model, value, shape, answer):
    """Fixed dimensions stay, the innermost variable one takes what is left, others are 1. Strings
    are one flat array of lengths and bytes inside."""
    name = "INPUT__0" if model == "linear" else "X"
    for body in ({name: value}, {"parameters": {name: value}}):
        reply = server.ask("POST", path(model), json=body)
        assert reply.status_code == 200, reply.text
        (array,) = server.gates[model].submitted[-1].inputs
        assert array.shape == shape
        found = document(reply)["OUTPUT__0" if model == "linear" else "Y"]
        if model == "linear":
            np.testing.assert_allclose(found, answer, rtol=1e-6)
        else:
            assert found == answer and type(found) is type(answer)


def test_several_inputs_and_outputs(server):
    body = {"INPUT1": [1, 1, 1, 1], "parameters": {"INPUT0": [4, 3, 2, 1], "depth": 1}}
    answer = document(server.ask("POST", path("add_sub"), json=body))
    assert answer["OUTPUT0"] == [5, 4, 3, 2]
    assert answer["OUTPUT1"] == [3, 2, 1, 0]


def test_what_is_no_input_reaches_the_model_as_a_parameter(server):
    body = {"X": 1.5, "id": "r", "a": 1, "b": True, "parameters": {"c": "x", "d": 0.25, "a": 2}}
    assert document(server.ask("POST", path("told"), json=body))["Y"] == 1.5
    facts = server.gates["told"].submitted[-1].facts
    assert facts.id == "r"
    assert json.loads(facts.parameters) == {"a": 2, "b": True, "c": "x", "d": 0.25}


@pytest.mark.parametrize("verb", VERBS)
def test_what_is_not_finite_is_not_lost(server, verb):
    for text, wanted in ((b"NaN", b'"Y": NaN'), (b"[-Infinity, 1]", b'"Y": [-Infinity, 1.0]')):
        reply = server.ask("POST", path("echo_FP32", verb), content=b'{"X": %b}' % text)
        assert wanted in reply.content


def test_floats_are_as_short_as_in_infer(server):
    for value in (0.1, [0.1, 0.2]):
        reply = server.ask("POST", path("echo_FP32"), json={"X": value})
        assert document(reply)["Y"] == value


# --- bad input ----------------------------------------

NO_SHAPE = "The schema can not convert input '{}' to tensor with proper shape"
BAD = [
    ("linear", b"", 500, "failed to parse the request JSON buffer"),
    ("linear", b"{", 500, "failed to parse the request JSON buffer"),
    ("linear", b"[]", 500, "failed to parse the request JSON buffer: not an object"),
    ("linear", b'"a"', 500, "not an object"),
    ("linear", b'{"a":' * 120 + b"1" + b"}" * 120, 400, "JSON nesting depth exceeds"),
    ("linear", {}, 400, "expected 1 inputs but got 0 inputs for model 'linear'"),
    ("linear", {"abc": 123}, 400, "expected 1 inputs but got 0 inputs"),
    ("add_sub", {"INPUT0": [1] * 4, "o": 1}, 400, "expected 2 inputs but got 1 inputs"),
    ("linear", {"INPUT__0": X[1:]}, 400, NO_SHAPE.format("INPUT__0")),
    ("linear", {"INPUT__0": 1}, 400, NO_SHAPE.format("INPUT__0")),
    ("linear", {"INPUT__0": [X]}, 400, NO_SHAPE.format("INPUT__0")),
    ("echo_FP32", {"X": [1, [2]]}, 400, NO_SHAPE.format("X")),
    ("linear", {"INPUT__0": []}, 400, "batch-size must be >= 1"),
    ("linear", {"INPUT__0": X * 9}, 400, "batch-size must be <= 8"),
    ("echo_BYTES", {"X": 123}, 500, "attempt to access JSON non-string as string"),
    ("echo_BYTES", {"X": {"USER": "a"}}, 500, "attempt to access JSON non-string as string"),
    ("echo_BOOL", {"X": "false"}, 500, "attempt to access JSON non-boolean as boolean"),
    ("echo_FP32", {"X": "1"}, 500, "attempt to access JSON non-number as number"),
    ("echo_FP32", {"X": None}, 500, "attempt to access JSON non-number as number"),
    ("echo_FP32", {"X": True}, 500, "attempt to access JSON non-number as number"),
    ("echo_INT8", {"X": 128}, 400, "out of range for INT8"),
    ("echo_INT8", {"X": 1.0}, 500, "attempt to access JSON non-signed-integer"),
    ("echo_FP16", {"X": 1}, 400, "receiving FP16 data via JSON is not supported"),
    ("told", {"X": 1, "PARAMS": {"a": 1}}, 400, "parameter 'PARAMS' has invalid type"),
    ("told", {"X": 1, "a": None}, 400, "parameter 'a' has invalid type"),
    ("told", {"X": 1, "a": [1]}, 400, "It should be either 'int', 'bool', or 'string'."),
    (
        "told",
        {"X": 1, "parameters": {"a": {}}},
        400,
        "Converting keyword: 'parameters': parameter 'a' has invalid type",
    ),
    ("told", {"parameters": {"X": "a"}}, 500, "Converting keyword: 'parameters': Unable to"),
    ("told", {"X": 1, "parameters": 3}, 500, "Expected JSON object for keyword: 'parameters'"),
    ("told", {"X": 1, "id": 7}, 500, "Unable to parse 'id'"),
    ("told", {"X": 1, "triton_x": 1}, 400, "parameter 'triton_x' is reserved for Triton usage"),
    ("told", {"X": 1, "timeout": 10}, 501, "'timeout' is not supported"),
    ("told", {"X": 1, "sequence_start": 1}, 500, "'sequence_start'"),
    ("told", {"X": 1, "parameters": {"X": 2}}, 400, "input 'X' already exists in request"),
    ("told", b'{"X": 1, "a": 1, "X": 2}', 400, "input 'X' already exists in request"),
    ("told", b'{"parameters": {"X": 1, "X": 2}}', 400, "input 'X' already exists in request"),
    (
        "add_sub",
        b'{"INPUT0": [1], "INPUT1": [1], "INPUT1": [1], "INPUT0": [1]}',
        400,
        "input 'INPUT1' already exists in request",
    ),
    ("full", {"X": 1}, 503, "Exceeds maximum queue size"),
]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(("model", "content", "status", "text"), BAD)
def test_what_is_refused_is_refused_in_json(server, verb, model, content, status, text):
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    reply = server.ask("POST", path(model, verb), content=content)
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/json"
    assert list(reply.json()) == ["error"]
    assert text in reply.json()["error"]
    server.check_alive()


def test_a_name_may_stand_where_it_is_no_member(server):
    """The control of those that come twice."""
    body = {"a": "X", "b": "X", "X": 1}
    assert document(server.ask("POST", path("told"), json=body))["Y"] == 1.0
    long = {"pad": "x" * MAX_CHECKED_BYTES, **body}
    assert server.ask("POST", path("told"), json=long).is_success


def test_an_input_named_parameters_can_have_nothing_below(server):
    config = server.gates["told"].config
    (entry,) = config.input
    odd = Server()
    odd.gates["told"].config = config.model_copy(
        update={"input": (entry.model_copy(update={"name": "parameters"}),)}
    )
    odd.versions = [odd.version("told")]
    odd.publish()
    reply = odd.ask("POST", path("told"), json={"parameters": {}})
    assert reply.status_code == 400
    wanted = "Keyword 'parameters' for nested schema also given as input tensor name"
    assert reply.json() == {"error": wanted}


def test_an_input_named_id_is_both(server):
    config = server.gates["strings"].config
    (entry,) = config.input
    odd = Server()
    odd.gates["strings"].config = config.model_copy(
        update={"input": (entry.model_copy(update={"name": "id"}),)}
    )
    odd.versions = [odd.version("strings")]
    odd.publish()
    answer = document(odd.ask("POST", path("strings"), json={"id": "seven"}))
    assert (answer["id"], answer["Y"]) == ("seven", "seven")


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "gzip, gzip"])
def test_compressed_bodies_are_refused(server, verb, encoding):
    body = gzip.compress(json.dumps({"INPUT__0": X}).encode())
    headers = {"content-encoding": encoding}
    reply = server.ask("POST", path("linear", verb), content=body, headers=headers)
    assert (reply.status_code, reply.headers["connection"]) == (400, "close")
    wanted = "Unsupported content-encoding, only 'identity' is supported."
    assert reply.json() == {"error": wanted}
    headers = {"content-encoding": "identity"}
    reply = server.ask("POST", path("linear", verb), json={"INPUT__0": X}, headers=headers)
    assert reply.is_success


@pytest.mark.parametrize("verb", VERBS)
def test_replies_are_not_compressed(server, verb):
    headers = {"accept-encoding": "gzip"}
    reply = server.ask("POST", path("linear", verb), json={"INPUT__0": X}, headers=headers)
    assert "content-encoding" not in reply.headers


@pytest.mark.parametrize("verb", VERBS)
def test_bodies_are_limited_also_as_tensors(verb):
    server = Server(http_max_input_size_bytes=100)
    for content in (b'{"X": 1, "a": "%b"}' % (b"x" * 100), b'{"X": [%b]}' % b",".join([b"1"] * 40)):
        reply = server.ask("POST", path("echo_FP64", verb), content=content)
        assert reply.status_code == 400
        assert "exceeds the maximum allowed value of 100 bytes" in reply.json()["error"]
        assert "Use --http-max-input-size to increase the limit" in reply.json()["error"]


# --- failures and the end ----------------------------------------


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("model", "status", "text"),
    [
        ("failing", 500, "[request id: r] PyTorch execute failure: shapes do not agree"),
        ("echo_FP16", 400, "receiving FP16 data"),
    ],
)
def test_a_models_error_is_the_only_event(server, verb, model, status, text):
    reply = server.ask("POST", path(model, verb), json={"X": 1, "id": "r"})
    assert reply.status_code == status
    assert text in document(reply)["error"]
    in_events = verb == "generate_stream" and model == "failing"
    assert (reply.headers["content-type"] == EVENTS) == in_events


def test_a_crash_tells_nothing(server):
    """Not even the form of an answer: it is no answer of the model."""
    for verb in VERBS:
        reply = server.ask("POST", path("crashing", verb), json={"X": 1})
        assert (reply.status_code, reply.json()) == (500, {"error": "internal error"})


@pytest.mark.parametrize("verb", VERBS)
def test_a_client_that_leaves_takes_its_request_along(verb):
    server = Server()
    gate = server.gates["linear"]
    gate.hold = []
    body = json.dumps({"INPUT__0": X}).encode()
    messages = [
        {"type": "http.request", "body": body, "more_body": False},
        {"type": "http.disconnect"},
    ]

    async def receive():
        return messages.pop(0)

    async def send(message):
        assert message.get("status", 400) == 400  # it goes nowhere

    scope = {
        "type": "http",
        "method": "POST",
        "path": path("linear", verb),
        "query_string": b"",
        "headers": [],
    }
    asyncio.run(server.http(scope, receive, send))
    assert gate.cancelled == 1


def test_while_closing_new_work_is_refused():
    server = Server()
    server.publish(closing=True)
    reply = server.ask("POST", path("linear"), json={"INPUT__0": X})
    assert (reply.status_code, reply.json()) == (503, {"error": "Server exiting"})
