"""A call's metadata as parameters of its request, by the lane and by grpc.aio."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from deployments.forwarding import forwarding
from deployments.grpc_services import GrpcServicer
from deployments.grpc_wire import Terms, read_head

from .grpc_lanes import ROADS, needs_haproxy, run
from .serving import Server
from .test_grpc import Ingress, ProxyContext, entry, good, over_grpc, parameter, request
from .test_grpc import triton_input as tensor

ROW = np.array([[1.5]], np.float32)
PATTERN = "^x-|^my|timeout"


def asked(**more):
    return request(entry("X", shape=(1, 1)), raw=[ROW.tobytes()], model="told", **more)


def told(server):
    return json.loads(server.gates["told"].submitted[-1].facts.parameters)


def test_the_stock_client_sends_headers_that_reach_the_model():
    async def use(server, triton, stub):
        inputs = [tensor("X", ROW, "FP32")]
        headers = {"my_header_1": 'a "quoted" \\ value', "x-tenant": "b", "other": "c"}
        await triton.infer("told", inputs, headers=headers, parameters={"depth": 3})
        assert told(server) == {
            "depth": 3,
            "my_header_1": 'a "quoted" \\ value',
            "x-tenant": "b",
        }
        with pytest.raises(InferenceServerException) as caught:
            await triton.infer("told", inputs, headers={"timeout": "1"})
        assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
        text = "parameter 'timeout' is reserved for Triton usage and cannot be forwarded"
        assert caught.value.message() == text
        assert await triton.is_server_live({"timeout": "1"})  # only requests have parameters

    over_grpc(use, Server(grpc_header_forward_pattern=PATTERN))


def test_control_without_a_pattern_nothing_is_forwarded():
    async def use(server, triton, stub):
        await triton.infer("told", [tensor("X", ROW, "FP32")], headers={"timeout": "1"})
        assert told(server) == {}

    over_grpc(use, Server(http_header_forward_pattern=PATTERN))


def test_through_serves_proxy():
    server = Server(grpc_header_forward_pattern=PATTERN)

    class Context(ProxyContext):
        def invocation_metadata(self):
            return [("x-tenant", "a"), ("other", "b")]

    asyncio.run(Ingress(server.inference).ModelInfer(asked(), grpc_context=Context()))
    assert told(server) == {"x-tenant": "a"}


def test_metadata_counts_more_than_the_message():
    server = Server(grpc_header_forward_pattern="(?-i)^x")
    message = asked(parameters={"x-tenant": parameter(int64_param=7)})
    context = SimpleNamespace(invocation_metadata=lambda: (("x-tenant", "a"), ("X-b", "b")))
    GrpcServicer(server.inference).forward("ModelInfer", message, context)
    assert {key: one.string_param for key, one in message.parameters.items()} == {
        "x-tenant": "a",
        "x-b": "b",  # names are lower case there
    }


def test_a_head_says_what_is_forwarded():
    fields = [(b"x-tenant", b"a"), (b"content-type", b"application/grpc"), (b"other", b"b")]
    path = (b"/p", "/p")
    assert read_head(*path, fields).forwarded is None
    rules = Terms(forwarding=forwarding("x-"))
    assert read_head(*path, fields, rules).forwarded == {"x-tenant": "a"}
    assert read_head(*path, fields[1:], rules).forwarded is None
    refused = read_head(*path, [(b"priority", b"1")], Terms(forwarding=forwarding("priority")))
    assert refused.error is not None and refused.error.args[0] == 3


METADATA = {
    "one": (("x-tenant", "a"),),
    "several": (("x-b", "1"), ("my_header", "2 3"), ("x-b", "4"), ("other", "5")),
    "binary": (("x-data-bin", b"\0\1"), ("x-a", "b")),
    "none": (("other", "a"),),
    "empty": (("x-empty", ""),),
    "reserved": (("x-a", "1"), ("timeout", "2")),
}


@needs_haproxy
@pytest.mark.parametrize("pattern", [PATTERN, ".*"])
def test_both_roads_forward_alike(pattern):
    async def use(server):
        model = server.models["told"]
        for name, metadata in METADATA.items():
            for message in (asked(), asked(id="7", parameters={"depth": parameter(int64_param=3)})):
                found = []
                for road in ROADS:
                    before = len(model.told)
                    replies = [
                        await server.call(road, message.SerializeToString(), metadata=metadata)
                        for _ in range(3)
                    ]
                    parameters = [json.loads(facts.parameters) for facts in model.told[before:]]
                    found.append((replies, parameters))
                assert found[0] == found[1], name
                replies, parameters = found[0]
                if name == "reserved":
                    assert replies[0][0] == "INVALID_ARGUMENT" and not parameters
                    assert "'timeout' is reserved for Triton usage" in replies[0][1]
                else:
                    assert replies[0][0] == "OK"
                    assert len(parameters) == 3
                    assert ("other" in parameters[0]) == (
                        pattern == ".*" and name in ("several", "none")
                    )
            # Models that are told nothing are asked as ever, and from plans.
            answer = await server.same(good().SerializeToString(), times=3, metadata=metadata)
            assert answer[0] == ("INVALID_ARGUMENT" if name == "reserved" else "OK")

    run(use, grpc_header_forward_pattern=pattern)
