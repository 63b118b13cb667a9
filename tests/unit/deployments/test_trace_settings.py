"""/v2/trace/setting and the RPC TraceSetting: the same settings, and the same words."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from configs import tracing
from configs.server import ServerSettings
from deployments.directory import Directory
from deployments.errors import InvalidArgument, MantaError, Unsupported
from deployments.grpc import handle
from deployments.grpc_stubs import service_pb2 as pb
from deployments.http import HttpApp
from deployments.inference import Inference
from deployments.trace_settings import NO_FILE, NO_MODE, changed, from_json, of, shown
from deployments.types import TraceChanges, TraceSettings

from .serving import Server

FILE = "triton,file=/srv/secret/trace.json"
INITIAL = {
    "trace_level": ["OFF"],
    "trace_rate": "1000",
    "trace_count": "-1",
    "log_frequency": "0",
    "trace_file": "trace.json",
    "trace_mode": "triton",
}


class Control:
    """As the Controller does it."""

    def __init__(self, config):
        self.config, self.changes = config, TraceChanges()

    async def call(self, verb, *args):
        assert verb == "trace_settings"
        self.changes = changed(self.config, self.changes, *args)
        return shown(self.config, self.changes, args[0])


class Edges:
    def __init__(self, *entries):
        given = ServerSettings(model_repository=("m",), trace_config=entries or (FILE,))
        self.control = Control(tracing.parse(given.trace_config))
        models = Server()  # of which only the directory is used
        self.inference = Inference(models.directory, self.control, given)
        self.app = HttpApp(self.inference, given)

    def http(self, changes=None, model=""):
        async def one():
            transport = httpx.ASGITransport(self.app)
            path = f"/v2/models/{model}/trace/setting" if model else "/v2/trace/setting"
            async with httpx.AsyncClient(transport=transport, base_url="http://manta") as client:
                if changes is None:
                    return await client.get(path)
                body = {"content": changes} if isinstance(changes, bytes) else {"json": changes}
                return await client.post(path, **body)

        return asyncio.run(one())

    def grpc(self, model="", **settings):
        """`settings` by name: a list of values."""
        request = pb.TraceSettingRequest(model_name=model)
        for name, values in settings.items():
            request.settings[name].value.extend(values)
        reply = asyncio.run(handle("TraceSetting", request, self.inference))
        found = {name: list(value.value) for name, value in reply.settings.items()}
        return {n: v if n == "trace_level" else v[0] for n, v in found.items()}


@pytest.fixture
def edges():
    return Edges()


def test_both_protocols_show_them_all(edges):
    assert edges.http().json() == INITIAL == edges.grpc()
    assert edges.http(model="linear").json() == INITIAL == edges.grpc("linear")
    assert edges.http({}).json() == edges.http(b"").json() == INITIAL


def test_what_is_set_is_in_force_for_all_and_for_one(edges):
    wanted = {**INITIAL, "trace_level": ["TIMESTAMPS", "TENSORS"], "trace_rate": "2"}
    given = {"trace_level": ["TENSORS", "TIMESTAMPS"], "trace_rate": "2"}
    assert edges.http(given).json() == wanted == edges.grpc("linear")
    own = {**wanted, "trace_rate": "7", "trace_count": "5"}
    assert edges.grpc("linear", trace_rate=["7"], trace_count=["5"]) == own
    assert edges.http().json() == wanted == edges.http(model="add_sub").json()
    # The model goes by those of all where it has none of its own.
    wanted["log_frequency"] = own["log_frequency"] = "50"
    assert edges.http({"log_frequency": "50", "trace_rate": "3"}).json()["trace_rate"] == "3"
    assert edges.http(model="linear").json() == own


def test_null_and_no_value_clear(edges):
    edges.http({"trace_level": ["TIMESTAMPS"], "trace_rate": "2"})
    edges.http({"trace_level": ["OFF"], "trace_rate": "3"}, "linear")
    assert edges.grpc("linear", trace_level=[])["trace_level"] == ["TIMESTAMPS"]
    assert edges.http({"trace_rate": None}, "linear").json()["trace_rate"] == "2"
    assert edges.control.changes.scopes.keys() == {""}
    assert edges.http({"trace_rate": None}).json()["trace_rate"] == "1000"
    assert edges.grpc(trace_level=[]) == INITIAL
    assert edges.control.changes.scopes == {}


def test_cleared_is_what_the_command_line_said():
    edges = Edges(FILE, "rate=9", "level=TIMESTAMPS", "count=3", "triton,log-frequency=2")
    first = edges.http().json()
    assert (first["trace_rate"], first["trace_count"], first["log_frequency"]) == ("9", "3", "2")
    edges.http({"trace_rate": "1", "trace_level": ["OFF"]})
    assert edges.http({"trace_rate": None, "trace_level": None}).json() == first


RATE = "Unable to parse 'trace_rate', got: "
UINT32 = "value is out of range [ 0, 4294967295 ], got: "
BAD = [
    ("trace_rate", "x", RATE + "x"),
    ("trace_rate", "", RATE),
    ("trace_rate", "1.5", RATE + "1.5"),
    ("trace_rate", " 1", RATE),
    ("trace_rate", "٣", RATE),
    ("trace_rate", "-1", f"Unable to parse 'trace_rate', {UINT32}-1"),
    ("trace_rate", "4294967296", f"Unable to parse 'trace_rate', {UINT32}4294967296"),
    ("trace_rate", "9" * 100_000, f"Unable to parse 'trace_rate', {UINT32}" + "9" * 64),
    ("log_frequency", "x", "Unable to parse 'log_frequency', got: x"),
    ("log_frequency", "-1", f"Unable to parse 'log_frequency', {UINT32}-1"),
    ("trace_count", "many", "Unable to parse 'trace_count', got: many"),
    ("trace_count", "-2", "Unable to parse 'trace_count'. Expecting value >= -1, got: -2"),
    ("trace_count", "2147483648", "value is out of range [ -1, 2147483647 ], got: 2147483648"),
    ("speed", "1", "unknown trace setting 'speed'"),
    ("x" * 1000, "1", f"unknown trace setting '{'x' * 64}'"),
]


@pytest.mark.parametrize(("name", "value", "text"), BAD)
def test_bad_values_are_told_alike_in_both_protocols(edges, name, value, text):
    reply = edges.http(
        {name: value, "trace_count": "1"} if name != "trace_count" else {name: value}
    )
    assert reply.status_code == 400 and text in reply.json()["error"]
    with pytest.raises(InvalidArgument) as caught:
        edges.grpc(**{name: [value]})
    assert str(caught.value) == reply.json()["error"] and len(str(caught.value)) < 300
    assert edges.http().json() == INITIAL  # all of a request or nothing


@pytest.mark.parametrize(
    ("levels", "text"),
    [
        (["OFF", "TIMESTAMPS"], "Expect only one trace level 'OFF' is specified"),
        (["LOUD"], "unknown trace level 'LOUD'"),
        (["timestamps"], "unknown trace level 'timestamps'"),
    ],
)
def test_levels_are_names_and_off_stands_alone(edges, levels, text):
    assert edges.http({"trace_level": levels}).json() == {"error": text}
    with pytest.raises(InvalidArgument) as caught:
        edges.grpc(trace_level=levels)
    assert str(caught.value) == text


def test_one_value_is_all_that_a_number_has(edges):
    with pytest.raises(InvalidArgument, match="^expect only 1 value for 'trace_rate'$"):
        edges.grpc(trace_rate=["1", "2"])


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"trace_rate": 1}, "Unable to parse 'trace_rate': attempt to access JSON non-string"),
        ({"trace_count": True}, "'trace_count': attempt to access JSON non-string as string"),
        ({"log_frequency": ["1"]}, "attempt to access JSON non-string as string"),
        ({"trace_level": "TIMESTAMPS"}, "attempt to access JSON non-array as array"),
        ({"trace_level": [1]}, "attempt to access JSON non-string as string"),
        ({"trace_level": {}}, "attempt to access JSON non-array as array"),
        (b"[]", "not an object"),
        (b"{", "failed to parse the request JSON buffer"),
    ],
)
def test_wrong_types_are_told_as_wherever_json_is_read(edges, changes, text):
    reply = edges.http(changes)
    assert reply.status_code == 500 and text in reply.json()["error"]
    assert edges.http().json() == INITIAL


@pytest.mark.parametrize("value", ["/etc/cron.d/x", "trace.json", "", None])
@pytest.mark.parametrize(("name", "text"), [("trace_file", NO_FILE), ("trace_mode", NO_MODE)])
def test_no_client_sets_a_file_or_a_mode(edges, name, text, value):
    reply = edges.http({name: value, "trace_rate": "1"})
    assert (reply.status_code, reply.json()) == (501, {"error": text})
    with pytest.raises(Unsupported) as caught:
        edges.grpc(**{name: [] if value is None else [value]})
    assert str(caught.value) == text
    assert edges.http().json() == INITIAL


@pytest.mark.parametrize(
    ("entries", "changes", "text"),
    [
        ((FILE,), {"trace_level": ["TIMESTAMPS"], "trace_rate": "0"}, "rate must be non-zero"),
        (("rate=1",), {"trace_level": ["TIMESTAMPS"]}, "trace file name is not given"),
        (
            ("mode=opentelemetry",),
            {"trace_level": ["TENSORS"]},
            "level TENSORS is not supported by mode opentelemetry",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(entries, changes, text):
    edges = Edges(*entries)
    before = edges.http().json()
    reply = edges.http(changes, "linear")
    assert reply.status_code == 400
    assert reply.json()["error"].startswith("Attempting to set invalid trace setting :")
    assert text in reply.json()["error"] and edges.http(model="linear").json() == before


def test_off_is_always_allowed():
    assert Edges("rate=1").http({"trace_level": ["OFF"], "trace_rate": "0"}).status_code == 200


@pytest.mark.parametrize("model", ["nobody", "x" * 5000, "%2e%2e"])
def test_a_model_must_be_there(edges, model):
    for changes in (None, {"trace_rate": "2"}):
        reply = edges.http(changes, model)
        assert reply.status_code == 400
        assert reply.json()["error"].startswith("Request for unknown model : ")
    with pytest.raises(InvalidArgument, match="^Request for unknown model : nobody$"):
        edges.grpc("nobody", trace_rate=["2"])
    assert edges.control.changes == TraceChanges()


def test_where_the_file_lies_is_not_told(edges):
    assert "secret" not in edges.http().text


def test_later_changes_have_a_later_time_whatever_the_clock_says():
    config = tracing.parse([FILE])
    first = changed(config, TraceChanges(), "", {"rate": 1}, now_ns=100)
    second = changed(config, first, "m", {"rate": 2}, now_ns=50)
    assert (first.changed_ns, second.changed_ns) == (100, 101)
    assert second.scopes["m"].changed_ns == 101 and second.scopes[""].changed_ns == 100
    assert of(config, second, "m") == TraceSettings(rate=2)
    assert changed(config, second, "m", {}) is second


def test_an_empty_server_answers_too():
    given = ServerSettings(model_repository=("m",))
    inference = Inference(Directory(), Control(tracing.parse(())), given)
    reply = asyncio.run(handle("TraceSetting", pb.TraceSettingRequest(), inference))
    assert list(reply.settings["trace_level"].value) == ["OFF"]
    assert list(reply.settings["trace_file"].value) == [""]


def test_what_is_read_is_what_is_stored():
    given = {"trace_level": ["OFF"], "trace_rate": "+4", "trace_count": None}
    assert from_json(given) == {"level": (), "rate": 4, "count": None}
    with pytest.raises(MantaError):
        from_json({"trace_level": []})
