"""Requests made from /openapi.json, right ones and wrong ones: every answer is one that document
and protocol have, within a limit, and the server goes on."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis

from tests.serve.fuzz import Found, Target, fuzz
from tests.serve.server import ROOT, Server

# Those that answer at once; `slow` sleeps as long as it is told, `picky` waits for a fuller batch.
MODELS = ("mlp", "eager_mlp", "shared", "strings", "big", "seed")
FEW = ("mlp", "strings")
GOOD = {
    "inputs": [{"name": "INPUT__0", "datatype": "FP32", "shape": [1, 8], "data": [0.5] * 8}],
}
VALUES = {"model": ("mlp", "strings", "nobody"), "version": ("1", "2"), "region": ("fuzzed",)}
LOGGING = "/v2/logging"
# Of these null brings back what the server began with.
TRACES = ("/v2/trace/setting", *(f"/v2/models/{model}/trace/setting" for model in VALUES["model"]))


@pytest.fixture
def region() -> Iterator[str]:
    """The key of shared memory that is there."""
    memory = SharedMemory(create=True, size=64)
    yield f"/{memory.name}"
    memory.close()
    memory.unlink()


@pytest.fixture
def target(
    server: Server, models_root: Path, region: str, request: pytest.FixtureRequest
) -> Iterator[Target]:
    """The shared server, which is left as it was."""
    models = MODELS if request.node.get_closest_marker("long") else FEW
    with httpx.Client(base_url=f"http://{server.http}", timeout=60) as client:
        before = {path: client.get(path) for path in (LOGGING, *TRACES)}
        index = client.post("/v2/repository/index").json()
        secrets = [str(models_root), str(server.folder), str(ROOT), sys.prefix]
        yield Target(
            f"http://{server.http}",
            client.get("/openapi.json").json(),
            VALUES,
            _right(region),
            [*secrets, server._ray_address()],
            lambda path: _is_chosen(path, models),
            _sparing({entry["name"] for entry in index}, region),
        )
        for path, was in before.items():
            if was.is_success:
                settings = was.json() if path == LOGGING else dict.fromkeys(was.json())
                fixed = ("log_file", "trace_file", "trace_mode")
                changes = {key: settings[key] for key in settings if key not in fixed}
                assert client.post(path, json=changes).json() == was.json()
        assert client.post("/v2/systemsharedmemory/unregister").is_success
        assert client.post("/v2/repository/index").json() == index


def _right(region: str) -> dict[str, tuple[Any, Sequence[int]]]:
    """Of `mlp` and of the region `fuzzed`, the first values of the parameters."""
    register = {"key": region, "byte_size": 64}
    found: dict[str, tuple[Any, Sequence[int]]] = {
        "/v2/systemsharedmemory/region/{region}/register": (register, (200, 400)),  # it is there
        "/v2/repository/index": ({"ready": True}, (200,)),
        "/v2/logging": ({"log_verbose_level": 0}, (200,)),
    }
    for model in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        found[f"{model}/infer"] = (GOOD, (200,))
        for generate in ("generate", "generate_stream"):
            found[f"{model}/{generate}"] = ({"INPUT__0": [0.5] * 8}, (200,))
    return found


def _is_chosen(path: str, models: Sequence[str]) -> bool:
    name = path.removeprefix("/v2/models/").partition("/")[0]
    return not path.startswith("/v2/models/") or name in (*models, "{model}", "stats")


def _sparing(known: set[str], region: str) -> Callable[[schemathesis.Case], None]:
    """Nothing that is there is loaded anew or unloaded; some regions name memory that exists."""

    def spare(case: schemathesis.Case) -> None:
        if case.path.endswith(("/load", "/unload")) and case.path_parameters["model"] in known:
            case.path_parameters["model"] = "nobody"
        if case.path.endswith("/register") and isinstance(case.body, dict):
            if len(str(case.body.get("key", ""))) % 2:
                case.body["key"] = region

    return spare


def run(server: Server, target: Target, examples: int, *, fixed: bool) -> Found:
    with httpx.Client(base_url=f"http://{server.http}", timeout=60) as client:

        def infer() -> Any:
            return client.post("/v2/models/mlp/infer", json=GOOD).json()

        def alive() -> None:
            assert infer() == right

        right = infer()
        assert right["outputs"][0]["shape"] == [1, 4]
        found = fuzz(target, examples, alive, fixed=fixed)
    print(found.table())
    assert not found.faults, "\n\n".join(f"{name}: {text}" for name, text in found.faults.items())
    for status in (200, 400, 404, 500, 501):  # or all of it could be refusals at the door
        assert found.total(status) > 0, status
    return found


def test_a_few_requests_for_each_operation(server: Server, target: Target) -> None:
    assert run(server, target, 5, fixed=True).total() >= 280


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_thousands_of_requests(server: Server, target: Target) -> None:
    """Beside the ten thousand bodies of `tests/unit/deployments/test_http_fuzz.py`."""
    assert run(server, target, 60, fixed=False).total() >= 4000


# --- the verdict itself --------------------------------------------------------------------------

# What is planted at a path: status, content type, body.
ERROR = b'{"error":"%s"}'
PLANTED = {
    "/right": (200, "application/json", b"{}"),
    "/refused": (400, "application/json", ERROR % b"no such thing"),
    "/crash": (500, "application/json", ERROR % b"list index out of range"),
    "/traceback": (400, "application/json", ERROR % b"Traceback (most recent call last):"),
    "/secret": (400, "application/json", ERROR % b"cannot open /somewhere/model.pt"),
    "/no_text": (400, "application/json", b'{"detail":"no"}'),
    "/list": (200, "application/json", b"[]"),
    "/teapot": (418, "application/json", ERROR % b"teapot"),
    "/page": (500, "text/html", b"<h1>Internal Server Error</h1>"),
    "/hang": (200, "application/json", b"{}"),
}
FAULTLESS = {"GET /right, positive", "GET /refused, positive"}


class Planted(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/hang":
            self.server.let_go.wait(30)  # type: ignore[attr-defined]
        status, kind, body = PLANTED[self.path]
        with contextlib.suppress(OSError):  # nobody waited
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def planted() -> Iterator[Target]:
    json_body = {"content": {"application/json": {"schema": {"type": "object"}}}}
    responses = {str(s): {"description": "", **json_body} for s in (200, 400, 500)}
    document = {
        "openapi": "3.1.0",
        "info": {"title": "planted", "version": "1"},
        "paths": {path: {"get": {"responses": responses}} for path in PLANTED},
    }
    with ThreadingHTTPServer(("127.0.0.1", 0), Planted) as one:
        one.let_go = threading.Event()  # type: ignore[attr-defined]
        thread = threading.Thread(target=one.serve_forever)
        thread.start()
        address = f"http://127.0.0.1:{one.server_address[1]}"
        yield Target(address, document, secrets=["/somewhere"], limit_s=2)
        one.let_go.set()  # type: ignore[attr-defined]
        one.shutdown()
        thread.join()


def test_control_what_is_wrong_is_found(planted: Target) -> None:
    found = fuzz(planted, 1, lambda: None, fixed=True)
    wanted = {f"GET {path}, positive" for path in PLANTED} - FAULTLESS
    assert set(found.faults) == wanted, found.faults


def test_control_a_server_that_is_gone_is_found(planted: Target) -> None:
    def gone() -> None:
        raise ConnectionError("nobody there")

    found = fuzz(planted, 1, gone, fixed=True)
    assert "nobody there" in found.faults["GET /right, positive"]
