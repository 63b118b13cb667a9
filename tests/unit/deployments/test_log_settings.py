"""/v2/logging and the RPC LogSettings: the same settings, and each protocol's own words."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from tritonclient.grpc import service_pb2 as pb

from configs.server import ServerSettings
from deployments.directory import Directory
from deployments.errors import Internal, InvalidArgument, MantaError, Unavailable, Unsupported
from deployments.grpc import handle
from deployments.http import HttpApp
from deployments.inference import Inference
from deployments.log_settings import MAX_LEVEL, NO_FILE, changed, initial, shown
from deployments.types import LogSettings

INITIAL = {
    "log_file": "",
    "log_info": True,
    "log_warning": True,
    "log_error": True,
    "log_verbose_level": 0,
    "log_format": "default",
}


class Control:
    """As the Controller does it, and a page of metrics."""

    def __init__(self, file=""):
        self.log, self.file = LogSettings(), file

    async def call(self, verb, *args):
        if verb == "metrics":
            return "nv_inference_count 1\n"
        assert verb == "log_settings"
        self.log = changed(self.log, *args)
        return shown(self.log, self.file)


class Edges:
    def __init__(self, file="", **settings):
        self.control = Control(file)
        given = ServerSettings(model_repository=("m",), **settings)
        self.inference = Inference(Directory(), self.control, given)
        self.app = HttpApp(self.inference, given)

    def http(self, method, path="/v2/logging", **request):
        async def one():
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://manta") as client:
                return await client.request(method, path, **request)

        return asyncio.run(one())

    def grpc(self, **settings):
        """`settings` by name: (field of SettingValue, value)."""
        request = pb.LogSettingsRequest()
        for name, (field, value) in settings.items():
            setattr(request.settings[name], field, value)
        return asyncio.run(handle("LogSettings", request, self.inference))


@pytest.fixture
def edges():
    return Edges()


def plain(reply):
    """A LogSettingsResponse as HTTP would have it."""
    return {
        name: getattr(value, value.WhichOneof("parameter_choice"))
        for name, value in reply.settings.items()
    }


def test_both_protocols_show_them_all(edges):
    reply = edges.http("GET")
    assert (reply.status_code, reply.headers["content-type"]) == (200, "application/json")
    assert reply.json() == INITIAL == plain(edges.grpc())
    kinds = {name: v.WhichOneof("parameter_choice") for name, v in edges.grpc().settings.items()}
    assert kinds == {
        "log_file": "string_param",
        "log_info": "bool_param",
        "log_warning": "bool_param",
        "log_error": "bool_param",
        "log_verbose_level": "uint32_param",
        "log_format": "string_param",
    }


def test_what_is_changed_is_shown_and_the_rest_stays(edges):
    reply = edges.http("POST", json={"log_info": False, "log_verbose_level": 2})
    assert reply.json() == {**INITIAL, "log_info": False, "log_verbose_level": 2}
    reply = edges.grpc(log_format=("string_param", "ISO8601"), log_info=("bool_param", True))
    wanted = {**INITIAL, "log_verbose_level": 2, "log_format": "ISO8601"}
    assert plain(reply) == wanted == edges.http("GET").json()


@pytest.mark.parametrize("body", [b"", b"{}", b'{"log_info": null, "log_file": null}'])
def test_what_says_nothing_changes_nothing(edges, body):
    assert edges.http("POST", content=body).json() == INITIAL
    assert edges.control.log.changed_ns == 0


def test_json_is_a_format_too(edges):
    assert edges.http("POST", json={"log_format": "json"}).json()["log_format"] == "json"


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        ({"log_file": "/etc/cron.d/x"}, 501, NO_FILE),
        ({"log_file": ""}, 501, NO_FILE),
        ({"log_file": "x", "log_info": False}, 501, NO_FILE),
        ({"log_format": "xml"}, 503, "invalid argument for --log_format, got: xml"),
        ({"log_info": False, "log_format": "xml"}, 503, "got: xml"),
        ({"log_info": "false"}, 500, "'log_info': attempt to access JSON non-boolean as boolean"),
        ({"log_error": 1}, 500, "'log_error'"),
        ({"log_verbose_level": -1}, 500, "non-unsigned-integer as unsigned-integer"),
        ({"log_verbose_level": True}, 500, "'log_verbose_level'"),
        ({"log_verbose_level": MAX_LEVEL + 1}, 500, "'log_verbose_level'"),
        ({"log_format": 1}, 500, "non-string as string"),
        ({"log_level": 1}, 400, "unknown log setting 'log_level'"),
        ([], 500, "not an object"),
    ],
)
def test_http_refuses_all_of_a_request_or_nothing(edges, body, status, text):
    reply = edges.http("POST", json=body)
    assert (reply.status_code, list(reply.json())) == (status, ["error"])
    assert text in reply.json()["error"]
    assert edges.http("GET").json() == INITIAL


def test_http_reads_json_as_everywhere(edges):
    assert edges.http("POST", content=b"{").status_code == 500
    assert edges.http("DELETE").status_code == 405


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"log_file": ("string_param", "/x")}, Unsupported, NO_FILE),
        ({"log_info": ("string_param", "x")}, InvalidArgument, "expect boolean for 'log_info'"),
        ({"log_error": ("uint32_param", 1)}, InvalidArgument, "expect boolean for 'log_error'"),
        (
            {"log_verbose_level": ("bool_param", True)},
            InvalidArgument,
            "expect int32 for 'log_verbose_level'",
        ),
        (
            {"log_verbose_level": ("uint32_param", MAX_LEVEL + 1)},
            InvalidArgument,
            "expect int32 for 'log_verbose_level'",
        ),
        ({"log_format": ("bool_param", True)}, InvalidArgument, "expect string for 'log_format'"),
        (
            {"log_info": ("bool_param", False), "log_format": ("string_param", "xml")},
            InvalidArgument,
            "invalid argument for log_format, got: xml",
        ),
        ({"log_level": ("uint32_param", 1)}, InvalidArgument, "unknown log setting 'log_level'"),
    ],
)
def test_grpc_refuses_all_of_a_request_or_nothing(edges, settings, error, text):
    with pytest.raises(MantaError) as caught:
        edges.grpc(**settings)
    assert (type(caught.value), str(caught.value)) == (error, text)
    assert plain(edges.grpc()) == INITIAL


def test_an_invalid_format_is_unavailable_over_http_only():
    from deployments.log_settings import from_json, from_proto

    with pytest.raises(Unavailable):
        from_json({"log_format": "xml"})
    request = pb.LogSettingsRequest()
    request.settings["log_format"].string_param = "xml"
    with pytest.raises(InvalidArgument):
        from_proto(request.settings)
    with pytest.raises(Internal):
        from_json({"log_format": []})


def test_of_the_file_only_the_name_is_shown():
    assert Edges("/srv/secret/manta.log").http("GET").json()["log_file"] == "manta.log"


def test_settings_begin_as_the_command_line_says():
    given = ServerSettings(
        model_repository=("m",), log_info=False, log_verbose=3, log_format="ISO8601"
    )
    assert initial(given) == LogSettings(info=False, verbose=3, format="ISO8601")


def test_a_change_is_later_than_what_was_whatever_the_clock_says():
    first = changed(LogSettings(), {"info": False}, now_ns=100)
    second = changed(first, {"verbose": 1}, now_ns=50)
    assert (first.changed_ns, second.changed_ns) == (100, 101)
    assert (second.info, second.verbose) == (False, 1)
    assert changed(second, {}) is second


# --- metrics beside them -------------------------------------------------------------------------


def test_metrics_are_on_the_http_port_too(edges):
    reply = edges.http("GET", "/metrics")
    assert (reply.status_code, reply.text) == (200, "nv_inference_count 1\n")
    assert reply.headers["content-type"] == "text/plain; charset=utf-8"


@pytest.mark.parametrize("method", ["HEAD", "POST", "PUT"])
def test_metrics_are_there_to_get_and_for_nothing_else(edges, method):
    assert edges.http(method, "/metrics").status_code == 405


def test_without_metrics_there_is_no_such_path():
    reply = Edges(allow_metrics=False).http("GET", "/metrics")
    assert (reply.status_code, reply.json()) == (404, {"error": "Not Found"})
