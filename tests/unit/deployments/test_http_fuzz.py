"""Whatever comes as the body of an infer call: a status of the table, Triton's form, and a server
that goes on."""

from __future__ import annotations

import asyncio
import copy
import json

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .serving import Server, json_input

LENGTH = "Inference-Header-Content-Length"
MODELS = ("linear", "add_sub", "echo_FP32", "echo_BOOL", "echo_BYTES", "strings", "reshaped")
# What may be answered with 500: JSON that is none, or has another type than the protocol's.
JSON_ERRORS = (
    "failed to parse the request JSON buffer",
    "Failed to parse 'data' field",
    "Unable to parse '",
)
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.integers(-2, 9),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=12),
    st.sampled_from(["FP32", "INT64", "BYTES", "BOOL", "BF16", "INPUT__0", "X", "OUTPUT__0"]),
    st.lists(st.integers(-1, 70), max_size=5),
    # Made anew each time: what one case changes in them must not reach the next.
    st.builds(list),
    st.builds(dict),
    st.builds(lambda: [[[[[1.0]]]]]),
    st.dictionaries(st.sampled_from(["data", "name", "shape", "binary_data_size"]), st.integers()),
)
KEYS = st.sampled_from(
    "id inputs outputs parameters name shape datatype data binary_data binary_data_size "
    "binary_data_output classification shared_memory_region shared_memory_byte_size priority "
    "timeout sequence_id sequence_start triton_x own".split()
)


def good(model):
    inputs = {
        "linear": [json_input("INPUT__0", "FP32", [1, 4], [1, 2, 3, 4])],
        "add_sub": [json_input(f"INPUT{i}", "INT32", [1, 4], [1, 2, 3, 4]) for i in (0, 1)],
        "echo_FP32": [json_input("X", "FP32", [2, 2], [[1.5, 2], [3, 4]])],
        "echo_BOOL": [json_input("X", "BOOL", [1, 2], [True, False])],
        "echo_BYTES": [json_input("X", "BYTES", [2, 1], ["a", "b"])],
        "strings": [json_input("X", "BYTES", [2], ["a", ""])],
        "reshaped": [json_input("X", "FP32", [1, 3, 2], [1, 2, 3, 4, 5, 6])],
    }[model]
    return {"id": "a", "inputs": inputs, "parameters": {"binary_data_output": False}}


def places(node, found=()):
    """Every container of a document, each by the way to it."""
    yield found
    children = node.items() if isinstance(node, dict) else enumerate(node)
    for key, child in children:
        if isinstance(child, (dict, list)):
            yield from places(child, (*found, key))


def spoil(draw, document):
    """One change at one place of it: another value, a member more, one twice, or one less."""
    at = document
    for key in draw(st.sampled_from(list(places(document)))):
        at = at[key]
    keys = list(at) if isinstance(at, dict) else list(range(len(at)))
    kind = draw(st.sampled_from(["replace", "add", "twice", "drop"]))
    if kind == "add" or not keys:
        if isinstance(at, dict):
            at[draw(KEYS)] = draw(ODD)
        else:
            at.append(draw(ODD))
        return
    key = draw(st.sampled_from(keys))
    if kind == "drop":
        del at[key]
    elif kind == "twice" and isinstance(at, list):
        at.append(copy.deepcopy(at[key]))
    else:
        at[key] = draw(ODD)


@st.composite
def bodies(draw):
    """A model and what is sent to it: a good body with some changes to its document, then to its
    bytes, in the JSON form or with a header's length that may be wrong."""
    model = draw(st.sampled_from(MODELS))
    document = good(model)
    for _ in range(draw(st.integers(0, 3))):
        spoil(draw, document)
    content = json.dumps(document).encode()
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(content)))
        until = draw(st.integers(at, min(len(content), at + 8)))
        content = content[:at] + draw(st.binary(max_size=6)) + content[until:]
    if draw(st.booleans()):
        return model, content, {}
    length = draw(
        st.one_of(
            st.just(len(content)), st.integers(-1, len(content) + 2), st.sampled_from(["", "x", 0])
        )
    )
    return model, content + draw(st.binary(max_size=40)), {LENGTH: str(length)}


@pytest.fixture(scope="module")
def ask():
    """A client on a loop that stays."""
    server = Server()
    loop = asyncio.new_event_loop()
    client = server.client()

    def post(model, content, headers):
        path = f"/v2/models/{model}/infer"
        return loop.run_until_complete(client.post(path, content=content, headers=headers))

    yield post
    server.check_alive()
    loop.run_until_complete(client.aclose())
    loop.close()


def check(reply: httpx.Response) -> None:
    assert reply.status_code in (200, 400, 500, 501), reply.text
    if reply.status_code == 200:
        return
    assert list(reply.json()) == ["error"]
    text = reply.json()["error"]
    assert len(reply.content) < 4096
    assert "Traceback" not in text and "internal error" not in text
    if reply.status_code == 500:
        assert text.startswith(JSON_ERRORS), text


@settings(max_examples=300, deadline=None, derandomize=True)
@given(case=bodies())
def test_any_body_gets_an_answer_of_the_table(ask, case):
    check(ask(*case))


@pytest.mark.long
@pytest.mark.timeout(900)
@settings(max_examples=10_000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=bodies())
def test_ten_thousand_bodies(ask, case):
    check(ask(*case))


def test_control_good_bodies_are_answered(ask):
    """Or all of the above could be refusals of something that has nothing to do with the body."""
    for model in MODELS:
        reply = ask(model, json.dumps(good(model)).encode(), {})
        assert reply.status_code == 200, reply.text


# What no server of ours may say: status, body.
BAD = {
    "a status that the table has not": (418, {"error": "teapot"}),
    "another form": (400, {"detail": "no"}),
    "a text that is too long": (400, {"error": "x" * 4096}),
    "a traceback": (400, {"error": "Traceback (most recent call last):"}),
    "a failure of its own": (500, {"error": "list index out of range"}),
}


@pytest.mark.parametrize(("status", "body"), BAD.values(), ids=BAD)
def test_control_what_is_wrong_is_found(status, body):
    with pytest.raises(AssertionError):
        check(httpx.Response(status, json=body))


def test_control_what_is_right_is_let_be():
    check(httpx.Response(200, json={"outputs": []}))
    check(httpx.Response(400, json={"error": "no such input"}))
    check(httpx.Response(500, json={"error": "failed to parse the request JSON buffer: x"}))
