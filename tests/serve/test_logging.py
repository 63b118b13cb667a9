"""Log settings over both protocols, and what they do: lines of all processes, in one file."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
from tritonclient.utils import InferenceServerException

from tests import models
from tests.serve import repository
from tests.serve.clients import infer, loading
from tests.serve.server import START_S, Server, wait_for

TALKER = """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        return [self.one(request) for request in requests]

    def one(self, request):
        said = pb_utils.get_input_tensor_by_name(request, "said").as_numpy()
        word = said.ravel()[0].decode()
        pb_utils.Logger.log_verbose(word + " in detail")
        pb_utils.Logger.log_info(word + " as information")
        pb_utils.Logger.log_warn(word + " as a warning")
        pb_utils.Logger.log_error(word + " as an error")
        return pb_utils.InferenceResponse([pb_utils.Tensor("heard", said)])
"""

INITIAL = {
    "log_file": "manta.log",
    "log_info": True,
    "log_warning": True,
    "log_error": True,
    "log_verbose_level": 0,
    "log_format": "default",
}
LINES_S = 60.0
CHANGEABLE = {name: value for name, value in INITIAL.items() if name != "log_file"}


class Logged:
    def __init__(self, server: Server, path: Path) -> None:
        self.server, self.path = server, path

    def lines(self) -> list[str]:
        return self.path.read_text(errors="strict").split("\n")[:-1]

    def wait(self, told: Callable[[str], Any], describe: str) -> str:
        """The first line that is so; replicas and Routers send theirs every second."""
        found: str = wait_for(
            lambda: next((line for line in self.lines() if told(line)), None), LINES_S, describe
        )
        return found


@pytest.fixture(scope="module")
def logged(pair: Server, log_path: Path) -> Iterator[Logged]:
    (models.version_folder(pair.repository, "talker") / "model.py").write_text(TALKER)
    said = repository.tensor("said", "1", "TYPE_STRING")
    heard = repository.tensor("heard", "1", "TYPE_STRING")
    more = "instance_group [ { kind: KIND_CPU } ]"
    text = repository.config([said], [heard], engine='backend: "python"', more=more)
    repository.write_config(pair.repository, "talker", text)
    with loading(pair, ["talker"]):
        yield Logged(pair, log_path)


@pytest.fixture
def http(logged: Logged) -> Iterator[Any]:
    client = httpclient.InferenceServerClient(logged.server.http)
    yield client
    client.update_log_settings(CHANGEABLE)
    client.close()


@pytest.fixture
def grpc(logged: Logged) -> Iterator[Any]:
    client = grpcclient.InferenceServerClient(logged.server.grpc)
    yield client
    client.close()


def say(client: Any, word: str) -> None:
    said = np.array([[word.encode()]], np.object_)
    reply = infer(client, "talker", {"said": said})
    assert reply.as_numpy("heard").tolist() == said.tolist()


def as_dict(reply: Any) -> dict[str, Any]:
    """Of a LogSettingsResponse."""
    return {
        name: getattr(value, value.WhichOneof("parameter_choice"))
        for name, value in reply.settings.items()
    }


# --- the protocols -------------------------------------------------------------------------------


def test_both_clients_get_the_same(http: Any, grpc: Any) -> None:
    assert http.get_log_settings() == INITIAL == as_dict(grpc.get_log_settings())
    assert "logging" in http.get_server_metadata()["extensions"]


def test_each_change_is_answered_and_there_for_every_router(
    logged: Logged, http: Any, grpc: Any
) -> None:
    """As Triton's own test does it, one setting after another."""
    wanted = dict(INITIAL)
    steps: list[tuple[str, Any]] = [
        ("log_info", False),
        ("log_warning", False),
        ("log_error", False),
        ("log_verbose_level", 1),
        ("log_format", "ISO8601"),
    ]
    for k, (name, value) in enumerate(steps):
        wanted[name] = value
        if k % 2:
            assert as_dict(grpc.update_log_settings({name: value})) == wanted
        else:
            assert http.update_log_settings({name: value}) == wanted
        assert as_dict(grpc.get_log_settings()) == wanted
        for _ in range(6):  # connections of their own: some at each Router
            assert logged.server.get("/v2/logging").json() == wanted


HTTP_ERRORS = [
    ({"log_file": "/tmp/x"}, 501, "log file location can not be updated through network protocol"),
    ({"log_format": "xml"}, 503, "invalid argument for --log_format, got: xml"),
    ({"log_info": "no"}, 500, "'log_info'"),
    ({"log_verbose_level": -1}, 500, "'log_verbose_level'"),
    ({"log_level": 3}, 400, "unknown log setting 'log_level'"),
]


@pytest.mark.parametrize(("settings", "status", "text"), HTTP_ERRORS)
def test_http_errors(http: Any, settings: dict[str, Any], status: int, text: str) -> None:
    with pytest.raises(InferenceServerException) as caught:
        http.update_log_settings({**settings, "log_warning": False})
    assert (caught.value.status(), text in caught.value.message()) == (str(status), True)
    assert http.get_log_settings() == INITIAL


def setting(name: str, field: str, value: Any) -> Any:
    request = grpcclient.service_pb2.LogSettingsRequest()
    setattr(request.settings[name], field, value)
    return request


GRPC_ERRORS = [
    (setting("log_file", "string_param", "/x"), "UNIMPLEMENTED", "can not be updated"),
    (setting("log_format", "string_param", "xml"), "INVALID_ARGUMENT", "log_format, got: xml"),
    (setting("log_info", "string_param", "no"), "INVALID_ARGUMENT", "expect boolean"),
    (setting("log_verbose_level", "bool_param", True), "INVALID_ARGUMENT", "expect int32"),
    (setting("log_level", "uint32_param", 3), "INVALID_ARGUMENT", "unknown log setting"),
]


@pytest.mark.parametrize(("request_", "code", "text"), GRPC_ERRORS)
def test_grpc_errors(logged: Logged, grpc: Any, request_: Any, code: str, text: str) -> None:
    import grpc as grpclib
    from tritonclient.grpc import service_pb2_grpc

    with grpclib.insecure_channel(logged.server.grpc) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        with pytest.raises(grpclib.RpcError) as caught:
            stub.LogSettings(request_)
    assert (caught.value.code().name, text in caught.value.details()) == (code, True)
    assert as_dict(grpc.get_log_settings()) == INITIAL


# --- what they do --------------------------------------------------------------------------------


def test_what_a_model_says_is_in_the_log_with_its_place(logged: Logged, http: Any) -> None:
    words = (f"first{number}" for number in range(20))

    def told_of(word: str) -> list[str]:
        """Three lines, once the replica has heard that all is logged again."""
        say(http, word)
        with contextlib.suppress(TimeoutError):
            wait_for(
                lambda: any(f"{word} as an error" in line for line in logged.lines()), 10, word
            )
        return [line for line in logged.lines() if f"{word} " in line]

    told: list[str] = wait_for(
        lambda: [] if len(found := told_of(next(words))) < 3 else found, 120, "all lines"
    )
    start = r"[IWE]\d{4} \d\d:\d\d:\d\d\.\d{6} \d+ model\.py:\d+\] "
    form = start + r"model 'talker' version 1: first\d+ as.*"
    assert all(re.fullmatch(form, line) for line in told)
    assert [line[0] for line in told] == ["I", "W", "E"]
    assert not any("in detail" in line for line in told)


def test_each_switch_reaches_the_replica(logged: Logged, http: Any) -> None:
    http.update_log_settings({"log_info": False, "log_error": False, "log_verbose_level": 1})

    def heard(word: str) -> list[str]:
        say(http, word)
        logged.wait(lambda line: f"{word} as a warning" in line, "the model's warning")
        return [line.partition(f"{word} ")[2] for line in logged.lines() if f"{word} " in line]

    tries = (f"try{number}" for number in range(20))
    wait_for(lambda: heard(next(tries)) == ["in detail", "as a warning"], 90, "it has heard of it")
    http.update_log_settings({"log_info": True, "log_error": True, "log_verbose_level": 0})
    wanted = ["as information", "as a warning", "as an error"]
    wait_for(lambda: heard(next(tries)) == wanted, 90, "and of the way back")


def test_the_other_formats(logged: Logged, http: Any) -> None:
    http.update_log_settings({"log_format": "ISO8601", "log_verbose_level": 1})
    assert logged.server.get("/v2/models/iso_nobody").status_code == 404
    line = logged.wait(lambda line: "iso_nobody" in line, "the refusal")
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ I \d+ http_replies\.py:\d+\] ", line)
    http.update_log_settings({"log_format": "json"})
    assert logged.server.get("/v2/models/json_nobody").status_code == 404
    line = logged.wait(lambda line: "json_nobody" in line, "the refusal, as JSON")
    record = json.loads(line)
    assert (record["level"], "json_nobody" in record["message"]) == ("INFO", True)


HOSTILE = "a\r\nE0101 00:00:00.000000 1 x.py:1] FAKE\x1b[31m \x00"


@pytest.mark.parametrize("form", ["default", "ISO8601", "json"])
def test_no_client_writes_a_second_line(logged: Logged, http: Any, form: str) -> None:
    http.update_log_settings({"log_format": form, "log_verbose_level": 1})
    before = len(logged.lines())
    url = f"http://{logged.server.http}/v2/logging"
    assert httpx.post(url, json={"log_format": form + HOSTILE}, timeout=60).status_code == 503
    logged.server.get("/v2/models/a%0d%0aE0101 FAKE%1b[31m%00")
    line = logged.wait(lambda line: f"{form}a" in line and "FAKE" in line, "the refusal")
    assert not [each for each in logged.lines()[before:] if each.startswith("E0101")]
    assert "\x1b" not in line and "\r" not in line
    raw = logged.path.read_bytes()
    assert not re.search(rb"[\x00-\x09\x0b-\x1f\x7f]", raw)


def test_payloads_are_not_logged(logged: Logged, http: Any) -> None:
    http.update_log_settings({"log_verbose_level": 1})
    secret = "correct-horse-battery"
    body = {"inputs": [{"name": "said", "datatype": "FP32", "shape": [1], "data": [secret]}]}
    url = f"http://{logged.server.http}/v2/models/talker/infer"
    assert httpx.post(url, json=body, timeout=60).status_code in (400, 500)
    assert logged.server.get("/v2/models/after_it").status_code == 404
    logged.wait(lambda line: "after_it" in line, "a later line")
    assert not any(secret in line for line in logged.lines())


def test_what_is_announced_is_in_the_file_and_on_the_terminal(logged: Logged) -> None:
    ready = "model 'talker' version 1 is READY"
    assert any(ready in line for line in logged.lines())
    # The terminal asks for it now and then.
    wait_for(lambda: f"manta: {ready}" in logged.server.output(), 60, "the terminal has it")
    assert "as a warning" not in logged.server.output()  # the file is instead of the terminal


def test_settings_outlive_the_controller(logged: Logged, http: Any) -> None:
    """Also the first change that a new one makes leaves the others as they were."""
    logs = http.update_log_settings({"log_info": False, "log_verbose_level": 1})
    traces = http.update_trace_settings(None, {"trace_rate": "5"})
    (controller,) = logged.server.replica_pids("manta:Controller")
    os.kill(controller, signal.SIGKILL)
    address = f"http://{logged.server.http}/v2"

    def first(path: str, change: dict[str, Any]) -> Any:
        """What the new Controller says as soon as it says anything."""

        def answer() -> Any:
            if logged.server.replica_pids("manta:Controller") in ([], [controller]):
                return None
            reply = httpx.post(f"{address}/{path}", json=change, timeout=60)
            assert reply.status_code in (200, 503)
            return reply.json() if reply.status_code == 200 else None

        return wait_for(answer, START_S, "the new Controller answers")

    assert first("trace/setting", {"trace_count": "7"}) == {**traces, "trace_count": "7"}
    assert first("logging", {"log_warning": False}) == {**logs, "log_warning": False}
    http.update_trace_settings(None, {"trace_rate": None, "trace_count": None})
    http.update_log_settings({"log_warning": True})
    wait_for(logged.server.ready, 60, "the server is ready")

    def who_said_so() -> set[str]:
        """Processes: whichever Router a request meets."""
        assert logged.server.get("/v2/models/later_nobody").status_code == 404
        return {line.split()[2] for line in logged.lines() if "later_nobody" in line}

    wait_for(lambda: len(who_said_so()) == 2, 60, "lines of both Routers are in the same file")
