"""Restricted APIs: by operation, however it is spelled and on whichever road it comes."""

from __future__ import annotations

import asyncio
import re
from contextlib import suppress
from typing import Any
from urllib.parse import unquote

import grpc
import pytest

from configs.restricted import APIS, RestrictedGroup
from deployments.errors import Restricted
from deployments.grpc_services import CHECK, GrpcServicer, add_services
from deployments.grpc_stubs import HEALTH, INFERENCE
from deployments.http_head import NOT_OURS, Heads
from deployments.http_routes import MODEL, MODEL_ROUTES, ROUTES
from deployments.restricted import API_OF, Guard, Guards, fields_of

from . import grpc_lanes, lanes
from .grpc_lanes import ROADS, needs_haproxy
from .lanes import binary, tensor
from .serving import Server
from .test_grpc import good as good_call
from .test_http import INFER, good

REFLECTION = "grpc.reflection.v1alpha.ServerReflection"
ALL = ",".join(APIS)
HTTP = {"http_restricted_api": [f"{ALL}:X-Key=open"]}
HTTP_TEXT = "This API is restricted, expecting header 'X-Key'"
GRPC = {"grpc_restricted_protocol": [f"{ALL}:my-Key=open"]}
NAME = "triton-grpc-protocol-my-key"
GRPC_TEXT = "This API is restricted, expecting header 'triton-grpc-protocol-my-Key'"
WRONG = ["", "opem", "ope", "openn", "OPEN", "open, open", "*" * 3000]


def every_route():
    """Method, path and endpoint of all that HTTP serves."""
    table = [(*one,) for one in ROUTES]
    table += [(method, of + path, name) for method, path, name in MODEL_ROUTES for of in MODEL]
    for methods, path, name in table:
        path = re.sub(r"\{model[^}]*\}", "linear", path)
        for method in methods.split():
            yield method, re.sub(r"\{[^}]*\}", "1", path), name
    yield "POST", INFER, "infer"
    yield "POST", "/v2/models/linear/versions/1/infer", "infer"


@pytest.fixture(scope="module")
def closed():
    return Server(**HTTP, model_control_mode="explicit")


# --- the table ----------------------------------------


class Recorder:
    """Takes what a server of grpc's is given."""

    def __init__(self):
        self.methods: set[str] = set()

    def add_generic_rpc_handlers(self, handlers):
        self.methods |= {path for handler in handlers for path in handler._method_handlers}

    def add_registered_method_handlers(self, service, methods):
        pass


def test_every_operation_belongs_to_an_api():
    assert {name for _, _, name in every_route()} <= set(API_OF)
    port = Recorder()
    add_services(GrpcServicer(Server().inference), port)
    assert len(port.methods) == len(INFERENCE.methods) + 2
    assert {path.rpartition("/")[2] for path in port.methods} <= set(API_OF)
    assert set(API_OF.values()) == set(APIS)


def test_what_is_not_in_the_table_cannot_be_served():
    for guards in (Guards(()), Guards([RestrictedGroup(apis=("trace",), key="k", value="v")])):
        with pytest.raises(KeyError):
            guards.of("news")


def test_no_group_no_guard():
    assert not Guards(())
    assert {Guards(()).of(operation) for operation in API_OF} == {None}


def test_a_guard():
    guard = Guard("p-K", "v")
    guard.check({b"p-k": b"v"})
    for fields in ({}, {b"p-k": b""}, {b"p-k": b"V"}, {b"p-k": b"v\xff"}, {b"p-K": b"v"}):
        with pytest.raises(Restricted, match="expecting header 'p-K'"):
            guard.check(fields)
    guard.check(fields_of([("other-bin", b"\0"), ("p-k", "v")]))


# --- HTTP ----------------------------------------


def spellings(path):
    yield path
    yield path + "?X-Key=open"
    yield path + "/"
    yield path + "//"
    yield "/" + path
    yield path.replace("/", "//")
    yield path.upper()
    yield path.replace("/v2", "/%76%32").replace("linear", "%6cinear")
    yield path.replace("/", "%2f")
    yield path.replace("/v2", "/v2/%2e").replace("/-", "/%2e/-")
    yield path.replace("/v2", "/v2/../v2")
    yield path.replace("/v2", "/v2/%2e%2e/v2")
    yield path + ";a=b"
    yield path + "%00"


VERBS = ("GET", "HEAD", "POST", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE", "get")


async def answer(app, verb, target):
    """The status that a request gets, with its path as it stands on the wire."""
    path, _, query = target.partition("?")
    scope: dict[str, Any] = {"type": "http", "http_version": "1.1", "scheme": "http"}
    scope["asgi"] = {"version": "3.0"}
    scope |= {"method": verb, "path": unquote(path), "raw_path": path.encode(), "root_path": ""}
    scope |= {"query_string": query.encode(), "headers": [], "client": ("a", 1), "server": ("b", 2)}
    sent = []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    await app(scope, receive, send)
    return sent[0]["status"]


def test_no_spelling_and_no_verb_opens_a_restricted_operation(closed):
    async def use():
        for _, path, _ in every_route():
            for spelling in spellings(path):
                for verb in VERBS:
                    status = await answer(closed.http, verb, spelling)
                    assert status in (403, 404, 405), (verb, spelling, status)

    asyncio.run(use())
    assert closed.controller.calls == []


def test_control_without_restrictions_these_answer():
    async def use(server):
        return [await answer(server.http, method, path) for method, path, _ in every_route()]

    assert 403 not in asyncio.run(use(Server())) and 200 in asyncio.run(use(Server()))


@pytest.mark.parametrize(("method", "path", "name"), list(every_route()))
def test_the_header_opens_it(closed, method, path, name):
    reply = closed.ask(method, path)
    assert reply.status_code == 403 and reply.json() == {"error": HTTP_TEXT}
    assert "retry-after" not in reply.headers
    for value in WRONG:
        assert closed.ask(method, path, headers={"X-Key": value}).status_code == 403
    body = good() if name == "infer" else None
    reply = closed.ask(method, path, headers={"x-KEY": "open"}, json=body)
    assert reply.status_code != 403
    if name == "infer":
        assert reply.status_code == 200
    closed.controller.calls.clear()


def test_the_refusal_comes_before_anything_is_told_of_models(closed):
    for path in ("/v2/models/nobody/infer", "/v2/models/linear/versions/99/infer"):
        assert closed.ask("POST", path, content=b"{").status_code == 403
    assert closed.ask("GET", "/v2/models/nobody/config").status_code == 403


def test_groups_have_keys_of_their_own_and_what_is_not_named_is_open():
    server = Server(http_restricted_api=["model-config,statistics:a=1", "inference:b=2"])
    config, stats = "/v2/models/linear/config", "/v2/models/stats"
    assert server.ask("GET", "/v2/models/linear").status_code == 200
    for path in (config, stats):
        assert server.ask("GET", path).status_code == 403
        assert server.ask("GET", path, headers={"b": "2"}).status_code == 403
        assert server.ask("GET", path, headers={"a": "1"}).status_code == 200
    assert server.ask("POST", INFER, json=good(), headers={"a": "1"}).status_code == 403
    assert server.ask("POST", INFER, json=good(), headers={"b": "2"}).status_code == 200


def test_both_roads_of_http():
    document = {"inputs": [tensor()], "parameters": {"binary_data_output": True}}

    def call(**fields):
        return binary(document, b"\0" * 16, **fields)

    async def use(server):
        for road in ("lane", "ordinary"):
            client = await server.connect(road)
            for _ in range(3):
                for fields in ({}, {"x_key": "opem"}):
                    head, body = await client.ask(call(**fields))
                    assert head.startswith(b"HTTP/1.1 403 ") and HTTP_TEXT.encode() in body
                head, _ = await client.ask(call(x_key="open"))
                assert head.startswith(b"HTTP/1.1 200 ")
        heads = Heads(server.settings)
        assert heads.find(call())[0] == NOT_OURS
        assert heads.find(call(x_key="open"))[0] != NOT_OURS

    lanes.run(use, **HTTP)


# --- gRPC ----------------------------------------


def every_rpc():
    for method in INFERENCE.methods:
        yield f"/{INFERENCE.full_name}/{method.name}", method.name == "ModelStreamInfer"
    yield f"/{HEALTH.full_name}/{CHECK}", False
    yield f"/{REFLECTION}/ServerReflectionInfo", True


async def status(channel, path, streams, metadata=()):
    """Of a call that sends one empty message, or as a stream nothing at all."""
    try:
        if streams:
            call = channel.stream_stream(path)(metadata=metadata, timeout=30)
            with suppress(asyncio.InvalidStateError):  # it has been refused by now
                await call.done_writing()
            await call.read()
            return await call.code(), await call.details()
        await channel.unary_unary(path)(b"", metadata=metadata, timeout=30)
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details()
    return grpc.StatusCode.OK, ""


@needs_haproxy
def test_every_rpc_is_closed_on_both_roads_and_opened_by_its_metadata():
    refused = (grpc.StatusCode.UNAVAILABLE, GRPC_TEXT)

    async def use(server):
        for road in ROADS:
            channel = server.channels[road]
            for path, streams in every_rpc():
                assert await status(channel, path, streams) == refused, path
                for value in WRONG[1:]:
                    assert await status(channel, path, streams, ((NAME, value),)) == refused
        assert server.controller.calls == []
        for road in ROADS:
            channel = server.channels[road]
            for path, streams in every_rpc():
                opened = await status(channel, path, streams, ((NAME, "open"),))
                assert opened != refused, path
            for unknown in (f"/{INFERENCE.full_name}/No", f"/{HEALTH.full_name}/Watch"):
                code, _ = await status(channel, unknown, False)
                assert code is grpc.StatusCode.UNIMPLEMENTED

    grpc_lanes.run(use, **GRPC)


@needs_haproxy
def test_infer_calls_on_both_roads():
    """Again and again, since heads are remembered."""
    message = good_call().SerializeToString()

    async def use(server):
        for _ in range(3):
            assert (await server.same(message))[:2] == ("UNAVAILABLE", GRPC_TEXT)
            assert (await server.same(message, metadata=((NAME, "w"),)))[0] == "UNAVAILABLE"
            assert (await server.same(message, metadata=((NAME, "open"),)))[0] == "OK"

    grpc_lanes.run(use, **GRPC)


@needs_haproxy
def test_a_stream_is_refused_before_it_sends_anything():
    async def use(server):
        path = f"/{INFERENCE.full_name}/ModelStreamInfer"
        for road in ROADS:
            call = server.channels[road].stream_stream(path)(timeout=30)
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await call.read()
            assert (error.value.code(), error.value.details()) == (
                grpc.StatusCode.UNAVAILABLE,
                GRPC_TEXT,
            )

    grpc_lanes.run(use, **GRPC)


@needs_haproxy
def test_one_group_of_grpcs_leaves_the_others_open():
    async def use(server):
        for road in ROADS:
            channel = server.channels[road]
            service = f"/{INFERENCE.full_name}"
            assert (await status(channel, f"{service}/ModelConfig", False))[1].startswith(
                "This API"
            )
            assert await status(channel, f"{service}/ServerLive", False) == (
                grpc.StatusCode.OK,
                "",
            )
        assert (await server.same(good_call().SerializeToString()))[0] == "OK"

    grpc_lanes.run(use, grpc_restricted_protocol=["model-config,trace:k=v"])
