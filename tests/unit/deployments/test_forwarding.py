"""Headers that become parameters: which may, and what is said about the others."""

from __future__ import annotations

import json
from typing import Any

import pytest

from configs.server import ServerSettings
from deployments.errors import InvalidArgument
from deployments.forwarding import AS_SENT, Forwarding, add, as_sent, forwarding
from deployments.restricted import METADATA_PREFIX, headers
from deployments.types import InferRequest

from .lanes import LaneServer, binary, request, run, tensor
from .serving import Server, json_input
from .test_http_lane import answers

TOLD = "/v2/models/told/infer"
BODY = json.dumps(
    {"inputs": [json_input("X", "FP32", [1, 1], [1.0])], "parameters": {"x": 1}}
).encode()


def rules(pattern: str) -> Forwarding:
    found = forwarding(pattern)
    assert found is not None
    return found


def test_without_a_pattern_there_is_nothing_to_ask():
    assert forwarding("") is None


def test_names_are_those_that_were_sent_and_values_are_text():
    fields = [
        (b"X-Tenant", b"a b"),
        (b"x-utf8", "é".encode()),
        (b"x-latin", b"\xe9"),
        (b"accept", b"x-tenant"),
        (b"X-Tenant", b"last"),
        (b"x-empty", b""),
    ]
    wanted = {"X-Tenant": "last", "x-utf8": "é", "x-latin": "é", "x-empty": ""}
    assert rules("^x-").of_http(fields) == wanted


def test_of_grpc_only_what_its_client_has_set():
    metadata: list[tuple[Any, Any]] = [
        ("x-tenant", "a"),
        ("x-data-bin", b"\0"),
        ("grpc-timeout", "1S"),
        (b"content-type", b"application/grpc"),
        (b"te", b"trailers"),
        (b"host", b"x"),
        (b"X-Bytes", b"b"),
    ]
    assert rules(".*").of_grpc(metadata) == {"x-tenant": "a", "x-bytes": "b"}


def test_what_opens_a_restricted_api_is_for_no_model():
    groups = ServerSettings(http_restricted_api=["inference:X-Key=secret"]).http_restricted_api
    fields = [(b"X-Key", b"secret"), (b"x-tenant", b"a")]
    found = forwarding("^[Xx]-", headers(groups))
    assert found is not None and found.of_http(fields) == {"x-tenant": "a"}
    named = forwarding(".*", headers(groups, METADATA_PREFIX))
    metadata = [("triton-grpc-protocol-x-key", "secret"), ("x-key", "b")]
    assert named is not None and named.of_grpc(metadata) == {"x-key": "b"}
    assert rules("^[Xx]-").of_http(fields)["X-Key"] == "secret"  # the control


@pytest.mark.parametrize(
    "name",
    ["sequence_id", "Sequence_Start", "sequence_end", "priority", "TIMEOUT", "headers"]
    + ["binary_data_output", "triton_x", "Triton_"],
)
def test_reserved_names_are_refused(name):
    text = f"parameter '{name}' is reserved for Triton usage and cannot be forwarded"
    with pytest.raises(InvalidArgument, match=text):
        rules(".*").of_http([(name.encode(), b"1")])
    with pytest.raises(InvalidArgument, match="is reserved for Triton usage"):
        rules(".*").of_grpc([(name.lower(), "1")])
    assert rules("x-").of_http([(name.encode(), b"1")]) == {}  # the control: it is not chosen


def test_headers_count_more_than_the_body():
    asked = InferRequest("m", "", "", (), parameters={"x-tenant": "mine", "depth": 3})
    assert add(asked, {"x-tenant": "a"}).parameters == {"x-tenant": "a", "depth": 3}
    assert add(asked, {}) is asked


def test_of_a_scope_the_names_as_sent_where_they_are_known():
    lower = [(b"x-a", b"1")]
    assert as_sent({"headers": lower}) is lower
    assert as_sent({"headers": lower, "extensions": None}) is lower
    assert as_sent({"headers": lower, "extensions": {AS_SENT: [(b"X-A", b"1")]}}) == [
        (b"X-A", b"1")
    ]


# --- over HTTP ----------------------------------------


def told(server):
    return json.loads(server.gates["told"].submitted[-1].facts.parameters)


def test_infer_and_generate_forward_alike():
    server = Server(http_header_forward_pattern="^x-")
    headers = {"x-tenant": "a", "y-other": "b"}
    assert server.ask("POST", TOLD, content=BODY, headers=headers).is_success
    assert told(server) == {"x": 1, "x-tenant": "a"}
    path = TOLD.replace("infer", "generate")
    assert server.ask("POST", path, json={"X": 1, "depth": 3}, headers=headers).is_success
    assert told(server) == {"depth": 3, "x-tenant": "a"}


def test_control_without_a_pattern_nothing_is_forwarded():
    server = Server()
    assert server.ask("POST", TOLD, content=BODY, headers={"x-tenant": "a"}).is_success
    assert told(server) == {"x": 1}


CASES: dict[str, bytes] = {
    "as sent": request(BODY, path=TOLD, X_Tenant="a", x_other="é"),
    "twice": request(BODY, path=TOLD, X_Tenant="a", x_tenant="b"),
    "none": request(BODY, path=TOLD, y="a"),
    "not told": request(
        json.dumps({"inputs": [json_input("INPUT__0", "FP32", [1, 4], [1.0] * 4)]}).encode(),
        X_Tenant="a",
    ),
    "binary": binary(
        {"inputs": [tensor("X", shape=(1, 1), size=4)]}, b"abcd", path=TOLD, X_Tenant="a"
    ),
    "reserved": request(BODY, path=TOLD, X_a="b", Timeout="1"),
    "reserved, bad body": request(b"{", path=TOLD, Timeout="1"),
    "reserved, not told": request(b"{}", Timeout="1"),
}


def test_both_roads_forward_alike():
    async def use(server: LaneServer):
        model = server.models["told"]
        for name, data in CASES.items():
            found = []
            for road in ("lane", "ordinary"):
                before = len(model.told)
                replies = await answers(server, road, data, 2)
                found.append((replies, [facts.parameters for facts in model.told[before:]]))
            assert found[0] == found[1], name
            if name == "as sent":
                assert json.loads(found[0][1][0]) == {"x": 1, "X-Tenant": "a", "x-other": "é"}
            if name == "reserved":
                head, body = found[0][0][0]
                assert head.startswith(b"HTTP/1.1 400")
                assert b"'Timeout' is reserved for Triton usage and cannot be forwarded" in body

    run(use, http_header_forward_pattern="^x-|timeout")


def test_patterns_may_tell_cases_apart():
    async def use(server: LaneServer):
        model = server.models["told"]
        for road in ("lane", "ordinary"):
            await answers(server, road, request(BODY, path=TOLD, X_Tenant="a", x_other="b"), 1)
            assert json.loads(model.told[-1].parameters) == {"x": 1, "X-Tenant": "a"}

    run(use, http_header_forward_pattern="(?-i)^X-")
