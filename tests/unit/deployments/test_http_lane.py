"""The lane answers every infer call as the ordinary road does, byte for byte."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.dtypes import DATATYPES
from deployments.errors import Unavailable
from deployments.http_head import MAX_HEADS, Heads, read_head
from deployments.plans import MAX_KEY_BYTES, Plan, PlanCache
from deployments.tensors import encode_bytes

from .lanes import LINEAR, LaneServer, binary, planned, request, run, tensor
from .serving import json_input
from .test_http import ABUSE, X, good

ROW = np.array(X, np.float32).tobytes()
ALL = {"parameters": {"binary_data_output": True}}
GOOD = json.dumps(good(id="a7")).encode()
UNKNOWN = "/v2/models/nobody/infer"
STRING = encode_bytes([b"abc"]).tobytes()
TWO = {
    "inputs": [tensor("INPUT1", "INT32"), tensor("INPUT0", "INT32")],
    "outputs": [{"name": "OUTPUT1"}, {"name": "OUTPUT0", "parameters": {"binary_data": True}}],
}


def named(name, path="/v2/models/{}/infer"):
    return {"path": path.format(name)}


def one(model, **more):
    return binary({"inputs": [tensor("X", shape=(1, 1), size=4)], **more}, b"abcd", **named(model))


REQUESTS = {
    "json": request(GOOD),
    "json, version": request(GOOD, **named("linear/versions/1")),
    "json, leading zeros": request(GOOD, **named("linear/versions/01")),
    "json with its length": request(GOOD, inference_header_content_length=len(GOOD)),
    "planned": planned(ROW),
    "planned with an id": planned(ROW, id="é\u0001"),
    "planned, output by name": binary(
        {
            "inputs": [tensor()],
            "outputs": [{"name": "OUTPUT__0", "parameters": {"binary_data": True}}],
        },
        ROW,
    ),
    "planned, parameters": planned(ROW, parameters={"binary_data_output": True, "x": 1}),
    "percent-encoded": request(GOOD, **named("line%61r")),
    "another path": request(GOOD, **named("linear%2f..")),
    "query": request(GOOD, path=LINEAR + "?a=b%20c"),
    "binary in, json out": binary({"inputs": [tensor()]}, ROW),
    "json in, binary out": request(json.dumps({**good(), **ALL}).encode()),
    "json in, binary out, length": request(
        text := json.dumps({**good(), **ALL}).encode(), inference_header_content_length=len(text)
    ),
    "two in, one out each way": binary(TWO, b"1234" * 8, **named("add_sub")),
    "two in, two out": binary(
        {"inputs": TWO["inputs"], **ALL}, bytes(range(32)), **named("add_sub")
    ),
    "one json, one binary": binary(
        {
            "inputs": [
                tensor("INPUT0", "INT32"),
                json_input("INPUT1", "INT32", [1, 4], [1, 2, 3, 4]),
            ],
            **ALL,
        },
        b"1234" * 4,
        **named("add_sub"),
    ),
    "an output without bytes": binary(
        {"inputs": [tensor("X", shape=(0, 2), size=0)], **ALL}, **named("unbatched")
    ),
    "reshape": binary(
        {"inputs": [tensor("X", shape=(2, 3, 2), size=48)], **ALL},
        np.arange(12, dtype=np.float32).tobytes(),
        **named("reshaped"),
    ),
    "raw": request(ROW, inference_header_content_length=0),
    "strings": binary(
        {"inputs": [tensor("X", "BYTES", (1,), 7)], **ALL}, STRING, **named("strings")
    ),
    "too short": planned(ROW[1:]),
    "too long": planned(ROW + b"1"),
    "length too large": request(GOOD, inference_header_content_length=len(GOOD) + 1),
    "length not a number": request(GOOD, inference_header_content_length="x"),
    "length with a space": request(GOOD, content_length=f"{len(GOOD)} "),
    "no such model": request(GOOD, path=UNKNOWN),
    "no such version": request(GOOD, **named("linear/versions/7")),
    "version 0": request(GOOD, **named("linear/versions/0")),
    "version no number": request(GOOD, **named("linear/versions/x")),
    "no body": request(),
    "no length": request(content_length=None),
    "encoding": request(b"abc", content_encoding="gzip"),
    "identity": request(GOOD, content_encoding="identity"),
    "failing": one("failing", id="r", **ALL),
    "failing, no id": one("failing"),
    "full": one("full", id="r", **ALL),
    "crashing": one("crashing", id="r", **ALL),
    "http/1.0": planned(ROW).replace(b"HTTP/1.1", b"HTTP/1.0"),
    "http/1.0, keep-alive": request(GOOD, version="1.0", connection="keep-alive"),
    "close": binary({"inputs": [tensor()], **ALL}, ROW, connection="close"),
    "keep-alive": binary({"inputs": [tensor()], **ALL}, ROW, connection="keep-alive"),
    "failing, close": request(b"{", connection="close"),
    "head": request(method="HEAD", content_length=None),
    "get": request(method="GET", content_length=None),
    "chunked": request(content_length=None, transfer_encoding="chunked")
    + b"%x\r\n%b\r\n0\r\n\r\n" % (len(GOOD), GOOD),
    "upgrade": request(GOOD, connection="upgrade", upgrade="h2c"),
    "header too long": request(GOOD, x="y" * 2048),
    "url too long": request(GOOD, path=LINEAR + "?" + "y" * 2048),
    "line feeds": request(GOOD).replace(b"\r\n", b"\n"),
    "folded": request(GOOD, x="a\r\n b"),
    "two lengths": request(GOOD, Content_Length=1),
    "no http": b"POST /v2/models/x y\r\n\r\n",
    "too large": request(bytes(5000), content_length=5000),
    "length of a giant": request(content_length=2**40),
}


async def answers(server, road, data, times=3):
    """What comes back for `data`, sent again and again while the connection lives."""
    client, found = await server.connect(road), []
    for _ in range(times):
        client.send(data)
        try:
            found.append(await client.reply(not data.startswith(b"HEAD")))
        except asyncio.IncompleteReadError as error:
            found.append((b"", error.partial))
            break
        if b"connection: close" in found[-1][0]:
            assert await client.ended()
            break
    client.leave()
    return found


def test_every_request_has_the_same_answer_on_both_roads():
    async def use(server: LaneServer):
        for name, data in REQUESTS.items():
            lane, ordinary = [await answers(server, road, data) for road in ("lane", "ordinary")]
            assert lane == ordinary, name
            assert len(lane[0][0]) > 0, name

    run(use, http_max_header_bytes=1024, http_max_input_size_bytes=4000, max_body_bytes=8000)


def test_every_bad_body_has_the_same_answer_on_both_roads():
    async def use(server: LaneServer):
        for content, status, text in ABUSE:
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            for data in (request(content), request(content, content_encoding="identity")):
                lane, ordinary = [
                    await answers(server, road, data, 2) for road in ("lane", "ordinary")
                ]
                assert lane == ordinary
                assert lane[0][0].startswith(b"HTTP/1.1 %d " % status)
                assert text in json.loads(lane[0][1])["error"]

    run(use)


async def road_of(server, data):
    """Whether uvicorn has seen this request, on a connection of its own."""
    before = {id(each) for each in server.connections()}
    client = await server.connect()
    await client.ask(data)
    (connection,) = [each for each in server.connections() if id(each) not in before]
    client.leave()
    return "lane" if connection.cycle is None else "ordinary"


def test_control_which_requests_take_the_lane():
    async def use(server: LaneServer):
        for name in ("json", "planned", "raw", "too short", "reshape", "failing", "full", "query"):
            assert await road_of(server, REQUESTS[name]) == "lane", name
        for name in ("no such model", "chunked", "identity", "get", "no length", "another path"):
            assert await road_of(server, REQUESTS[name]) == "ordinary", name

    run(use, max_body_bytes=4500, http_max_input_size_bytes=4000)


# --- plans ----------------------------------------


def plans_of(server, name="linear"):
    """The plans that a model has now."""
    known = server.directory.find(name, "").http_plans._known
    return [each for each in (*known._new.values(), *known._old.values()) if type(each) is Plan]


@pytest.mark.parametrize(
    ("name", "model", "count"),
    [
        ("planned", "linear", 1),
        ("two in, two out", "add_sub", 1),
        ("reshape", "reshaped", 1),
        ("failing", "failing", 1),
        ("json", "linear", 0),
        ("json in, binary out, length", "linear", 0),
        ("one json, one binary", "add_sub", 0),
        ("binary in, json out", "linear", 0),
        ("two in, one out each way", "add_sub", 0),
        ("an output without bytes", "unbatched", 0),
        ("raw", "linear", 0),
        ("strings", "strings", 0),
        ("too short", "linear", 0),
    ],
)
def test_what_is_planned(name, model, count):
    async def use(server: LaneServer):
        client = await server.connect()
        for expected in (0, count, count, count):
            await client.ask(REQUESTS[name])
            assert len(plans_of(server, model)) == expected

    run(use)


KINDS = [each for each in DATATYPES if each.wire != "BYTES"]


@st.composite
def calls(draw):
    """A call to an echo model that differs from others only in its values."""
    kind = draw(st.sampled_from(KINDS))
    shape = (draw(st.integers(1, 8)), draw(st.integers(1, 9)))
    size = kind.size_bytes * shape[0] * shape[1]
    document = {"inputs": [tensor("X", kind.wire, shape, size)], **ALL, "id": draw(st.text("ab7"))}
    return [
        binary(
            document, draw(st.binary(min_size=size, max_size=size)), **named(f"echo_{kind.wire}")
        )
        for _ in range(4)
    ]


def test_an_answer_from_a_plan_is_the_answer_without():
    async def use(server: LaneServer):
        @settings(max_examples=60, suppress_health_check=list(HealthCheck), deadline=None)
        @given(calls())
        def check(requests):
            drawn.append(requests)

        drawn: list = []
        check()
        for requests in drawn:
            lane, ordinary = await server.connect("lane"), await server.connect("ordinary")
            for each in requests:
                assert await lane.ask(each) == await ordinary.ask(each)
            lane.leave()
            ordinary.leave()
        assert sum(len(plans_of(server, f"echo_{kind.wire}")) for kind in KINDS) > 20

    run(use)


def test_a_plan_does_not_fit_a_body_of_another_size():
    async def use(server: LaneServer):
        client = await server.connect()
        for _ in range(3):
            assert (await client.ask(planned(ROW)))[0].startswith(b"HTTP/1.1 200")
        assert len(plans_of(server)) == 1
        for wrong in (ROW[1:], ROW + b"1", b""):
            ordinary = await server.connect("ordinary")
            reply = await client.ask(planned(wrong))
            assert reply[0].startswith(b"HTTP/1.1 400")
            assert reply == await ordinary.ask(planned(wrong))
        assert (await client.ask(planned(ROW)))[0].startswith(b"HTTP/1.1 200")

    run(use)


def test_headers_that_always_change_leave_nothing_behind():
    async def use(server: LaneServer):
        client = await server.connect()
        for number in range(600):
            data = binary({"inputs": [tensor()], **ALL, "id": f"{number}"}, ROW, x_trace=number)
            assert b'"id":"%d"' % number in (await client.ask(data))[1]
        assert plans_of(server) == []
        assert len(server.directory.find("linear", "").http_plans) <= 256

    run(use)


def test_a_long_description_is_neither_looked_up_nor_learned(monkeypatch):
    asked = []

    def noting(method):
        def note(self, key, *more):
            asked.append(len(key))
            return method(self, key, *more)

        return note

    for name in ("find", "seen", "learn"):
        monkeypatch.setattr(PlanCache, name, noting(getattr(PlanCache, name)))

    async def use(server: LaneServer):
        client = await server.connect()
        for pad in ("x" * MAX_KEY_BYTES, "x"):
            for _ in range(3):
                reply = await client.ask(
                    planned(ROW, parameters={"binary_data_output": True, pad: 1})
                )
                assert reply[0].startswith(b"HTTP/1.1 200")
            assert bool(asked) == (len(pad) == 1)  # the short one is the control
        assert max(asked) <= MAX_KEY_BYTES

    run(use)


def test_a_changed_configuration_is_not_answered_from_old_plans():
    """Two versions, and a reload that takes another shape: the same bytes, other answers."""

    async def use(server: LaneServer):
        client = await server.connect()
        for _ in range(3):
            assert (await client.ask(planned(ROW)))[0].startswith(b"HTTP/1.1 200")
        old = server.versions[0]
        config = server.models["linear"].config
        wider = config.model_copy(
            update={"input": (config.input[0].model_copy(update={"dims": (5,)}),)}
        )
        new = replace(old, version=2, application="new", config=wider)
        server.gates["new"] = server.gates["linear"]
        server.versions.append(new)
        server.publish()
        reply = await client.ask(planned(ROW))  # the newest now
        assert b"unexpected shape for input 'INPUT__0'" in reply[1]
        first = planned(ROW).replace(LINEAR.encode(), b"/v2/models/linear/versions/1/infer")
        assert (await client.ask(first))[0].startswith(b"HTTP/1.1 200")
        server.versions[0] = replace(new, version=1)
        server.publish()
        assert b"unexpected shape" in (await client.ask(first))[1]

    run(use)


def test_a_model_that_goes_is_gone_on_the_next_request():
    async def use(server: LaneServer):
        client = await server.connect()
        for _ in range(3):
            await client.ask(planned(ROW))
        server.gates["linear"].close(Unavailable("model 'linear' was unloaded"))
        reply = await client.ask(planned(ROW, id="7"))
        assert reply[0].startswith(b"HTTP/1.1 503") and b"retry-after: 1" in reply[0]
        assert json.loads(reply[1])["error"] == "[request id: 7] model 'linear' was unloaded"
        del server.versions[0]
        server.publish()
        assert (await client.ask(planned(ROW)))[0].startswith(b"HTTP/1.1 404")

    run(use)


def test_arrays_are_views_of_the_request_at_whatever_offset():
    async def use(server: LaneServer):
        client = await server.connect()
        for pad in range(8):
            data = planned(ROW, id="x" * pad)
            for _ in range(3):
                await client.ask(data)
                (array,) = server.models["linear"].ran[-1]
                assert array.tobytes() == ROW and not array.flags.owndata

    run(use)


# --- heads ----------------------------------------


def head(data, **facts):
    server = LaneServer(**facts)
    return read_head(data.partition(b"\r\n\r\n")[0] + b"\r\n\r\n", server.settings)


def test_a_head_is_read_as_uvicorn_reads_it():
    found = head(planned(ROW))
    assert (found.model, found.version, found.keep_alive) == ("linear", "", True)
    assert found.body_bytes - (found.json_bytes or 0) == 16
    assert not head(planned(ROW).replace(b"1.1", b"1.0")).keep_alive
    assert not head(request(GOOD, Connection="Close")).keep_alive
    assert head(request(GOOD, **named("a%20b/versions/3")))[:2] == ("a b", "3")
    assert head(request(GOOD, EXPECT="100-continue")).body_bytes == -1
    assert head(b"").body_bytes == -1


def test_what_is_not_exactly_one_head_is_not_ours():
    limits = LaneServer().settings
    one = request(GOOD).removesuffix(GOOD)
    assert read_head(one, limits).body_bytes == len(GOOD)
    for data in (one + GOOD[:1], one[:-1], request() + request(), b"\r\n", one.replace(b"P", b"p")):
        assert read_head(data, limits).body_bytes == -1


def test_heads_are_bounded():
    heads = Heads(LaneServer().settings)
    for number in range(2 * MAX_HEADS):
        data = request(GOOD, x=number)
        found, end = heads.find(data)
        assert data[end:] == GOOD and heads.find(data)[0] is found
    assert len(heads) <= MAX_HEADS
    data = request(GOOD, x="y" * 5000)
    assert heads.find(data)[0] is not heads.find(data)[0]
    assert heads.find(data) == heads.find(data)


def test_bodies_of_the_form_of_a_head_are_bodies():
    async def use(server: LaneServer):
        client = await server.connect()
        inner = request(GOOD)
        reply = await client.ask(request(inner))
        assert reply[0].startswith(b"HTTP/1.1 500")
        assert (await client.ask(planned(b"\r\n\r\n" * 4)))[0].startswith(b"HTTP/1.1 200")
        assert len(server.models["linear"].ran) == 1

    run(use)
