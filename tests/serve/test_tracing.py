"""Trace settings with stock clients, and what is written in Triton's own form."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from tests.serve.clients import infer
from tests.serve.server import Server, wait_for
from tests.serve.traces import events

INITIAL = {
    "trace_level": ["OFF"],
    "trace_rate": "1000",
    "trace_count": "-1",
    "log_frequency": "0",
    "trace_file": "server.json",
    "trace_mode": "triton",
}
CLEAR = {name: None for name in ("trace_level", "trace_rate", "trace_count", "log_frequency")}
ROW = {"INPUT__0": np.arange(8, dtype=np.float32).reshape(1, 8)}


@pytest.fixture(autouse=True)
def cleared(http: Any) -> Iterator[None]:
    yield
    for model in ("mlp", "eager_mlp", None):
        http.update_trace_settings(model, CLEAR)
    assert http.get_trace_settings() == INITIAL


def as_dict(reply: Any) -> dict[str, Any]:
    """Of a TraceSettingResponse."""
    found = {name: list(value.value) for name, value in reply.settings.items()}
    return {n: values if n == "trace_level" else values[0] for n, values in found.items()}


def test_both_clients_get_the_same(http: Any, grpc: Any) -> None:
    assert http.get_trace_settings() == INITIAL == as_dict(grpc.get_trace_settings())
    assert http.get_trace_settings("mlp") == INITIAL == as_dict(grpc.get_trace_settings("mlp"))
    assert "trace" in http.get_server_metadata()["extensions"]


def test_a_models_settings_stand_over_those_of_all(http: Any, grpc: Any) -> None:
    """As Triton's own test does it: a model, all, and back."""
    wanted = {**INITIAL, "trace_level": ["TIMESTAMPS"], "trace_rate": "100"}
    own = {"trace_level": ["TIMESTAMPS"], "trace_rate": "100"}
    assert http.update_trace_settings("mlp", own) == wanted
    assert as_dict(grpc.get_trace_settings("mlp")) == wanted
    assert http.get_trace_settings() == INITIAL == as_dict(grpc.get_trace_settings("eager_mlp"))
    all_of_them = {"trace_level": ["TIMESTAMPS", "TENSORS"], "trace_rate": "7", "trace_count": "5"}
    assert as_dict(grpc.update_trace_settings(None, all_of_them)) == {**INITIAL, **all_of_them}
    wanted["trace_count"] = "5"  # which it has no own of
    assert as_dict(grpc.get_trace_settings("mlp")) == wanted == http.get_trace_settings("mlp")
    assert http.update_trace_settings("mlp", {"trace_rate": None})["trace_rate"] == "7"
    assert as_dict(grpc.update_trace_settings("mlp", {"trace_level": None})) == {
        **INITIAL,
        **all_of_them,
    }


@pytest.mark.parametrize(
    ("name", "value", "status", "text"),
    [
        ("trace_rate", "x", "400", "Unable to parse 'trace_rate', got: x"),
        ("trace_rate", "-1", "400", "value is out of range [ 0, 4294967295 ], got: -1"),
        ("trace_rate", "9" * 5000, "400", "value is out of range [ 0, 4294967295 ], got: 999"),
        ("trace_count", "-2", "400", "Expecting value >= -1, got: -2"),
        ("log_frequency", "-5", "400", "Unable to parse 'log_frequency', value is out of range"),
        ("trace_file", "/tmp/other", "501", "trace file location can not be updated"),
        ("trace_mode", "opentelemetry", "501", "trace mode can not be updated"),
        ("nonsense", "1", "400", "unknown trace setting 'nonsense'"),
    ],
)
def test_bad_settings_are_refused_alike(
    http: Any, grpc: Any, name: str, value: str, status: str, text: str
) -> None:
    codes = {"400": "StatusCode.INVALID_ARGUMENT", "501": "StatusCode.UNIMPLEMENTED"}
    for client, expected in ((http, status), (grpc, codes[status])):
        with pytest.raises(InferenceServerException) as caught:
            client.update_trace_settings("mlp", {name: value})
        assert text in caught.value.message() and caught.value.status() == expected
    off_and_more = {"trace_level": ["OFF", "TENSORS"]}
    for client in (http, grpc):
        with pytest.raises(InferenceServerException, match="Expect only one trace level 'OFF'"):
            client.update_trace_settings(None, off_and_more)
        with pytest.raises(InferenceServerException, match="sample rate must be non-zero"):
            rate = {"trace_level": ["TENSORS"], "trace_rate": "0"}
            client.update_trace_settings(None, rate)
        with pytest.raises(InferenceServerException, match="Request for unknown model : nobody"):
            client.get_trace_settings("nobody")
    assert http.get_trace_settings("mlp") == INITIAL


def traced(path: Path) -> dict[int, dict[str, Any]]:
    """What a file says of each trace, by its number."""
    found: dict[int, dict[str, Any]] = {}
    for event in events(path):
        one = found.setdefault(event["id"], {"stamps": {}, "tensors": []})
        if "model_name" in event:
            one |= {k: event[k] for k in ("model_name", "model_version")}
            one["request_id"] = event.get("request_id", "")
        for stamp in event.get("timestamps", ()):
            one["stamps"][stamp["name"]] = stamp["ns"]
        if "tensor" in event:
            one["tensors"].append((event["activity"], event["tensor"]))
    return found


def of_request(traces: Path, request_id: str) -> dict[str, Any]:
    path = traces / "server.json"

    def find() -> dict[str, Any] | None:
        return next((t for t in traced(path).values() if t["request_id"] == request_id), None)

    found: dict[str, Any] = wait_for(find, 60, f"{request_id} is in the trace file")
    return found


COMPUTE = ["COMPUTE_START", "COMPUTE_INPUT_END", "COMPUTE_OUTPUT_START", "COMPUTE_END"]


@pytest.mark.parametrize(
    ("protocol", "edge"),
    [("http", ("HTTP_RECV", "HTTP_SEND")), ("grpc", ("GRPC_WAITREAD", "GRPC_SEND"))],
)
def test_stamps_of_a_request_are_in_their_order(
    http: Any, grpc: Any, traces: Path, protocol: str, edge: tuple[str, str]
) -> None:
    client = http if protocol == "http" else grpc
    client.update_trace_settings("mlp", {"trace_level": ["TIMESTAMPS"], "trace_rate": "1"})
    infer(client, "mlp", ROW, request_id=f"stamps {protocol}")
    infer(client, "eager_mlp", {"x": ROW["INPUT__0"]}, request_id=f"none {protocol}")
    found = of_request(traces, f"stamps {protocol}")
    assert (found["model_name"], found["model_version"]) == ("mlp", 1)
    read, sent = edge
    assert list(found["stamps"]) == [
        *(f"{read}_START", f"{read}_END", "REQUEST_START", "QUEUE_START"),
        *COMPUTE,
        *("INFER_RESPONSE_COMPLETE", "REQUEST_END", f"{sent}_START", f"{sent}_END"),
    ]
    times = list(found["stamps"].values())
    assert times == sorted(times) and not found["tensors"]
    ids = {one["request_id"] for one in traced(traces / "server.json").values()}
    assert f"none {protocol}" not in ids


def test_tensors_are_the_requests_and_its_answers(http: Any, traces: Path) -> None:
    http.update_trace_settings("mlp", {"trace_level": ["TENSORS"], "trace_rate": "1"})
    reply = infer(http, "mlp", ROW, request_id="tensors")
    found = of_request(traces, "tensors")
    assert found["stamps"] == {}
    given = {"name": "INPUT__0", "data": "0.0,1.0,2.0,3.0,4.0,5.0,6.0,7.0"}
    given |= {"shape": "1,8", "dtype": "FP32"}
    assert found["tensors"][:2] == [
        ("TENSOR_QUEUE_INPUT", given),
        ("TENSOR_BACKEND_INPUT", given),
    ]
    ((activity, answered),) = found["tensors"][2:]
    assert (activity, answered["name"]) == ("TENSOR_BACKEND_OUTPUT", "OUTPUT__0")
    numbers = [np.float32(each) for each in answered["data"].split(",")]
    assert np.array_equal(numbers, reply.as_numpy("OUTPUT__0").reshape(-1))


def test_one_of_so_many_and_no_more_than_the_count(server: Server, http: Any, traces: Path) -> None:
    settings = {"trace_level": ["TIMESTAMPS"], "trace_rate": "3", "trace_count": "2"}
    http.update_trace_settings("mlp", {**settings, "log_frequency": "1"})
    for number in range(12):
        infer(http, "mlp", ROW, request_id=f"counted {number}")
    http.update_trace_settings("mlp", {"trace_rate": "1", "trace_count": "1"})
    for number in range(12, 15):
        infer(http, "mlp", ROW, request_id=f"counted {number}")
    files = [traces / f"server.json.{index}" for index in range(3)]
    wait_for(lambda: all(map(events, files)), 60, "three files")
    ids = [[one["request_id"] for one in traced(path).values()] for path in files]
    assert ids == [["counted 2"], ["counted 5"], ["counted 12"]]
    assert not (traces / "server.json.3").exists()
