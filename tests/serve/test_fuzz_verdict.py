"""Controls of the fuzz: what is planted is found at fault, and nothing else is. No server of
ours."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from deployments.openapi import routes
from tests.serve.fuzz import TWISTS, Target, fuzz, fuzz_methods
from tests.serve.protocol_rules import NO_RIGHT_BODY, right_bodies
from tests.serve.verdict import MAX_ERROR_BYTES, Asked

# What is planted at a path: status, content type, body.
JSON = "application/json"
ERROR = b'{"error":"%s"}'
PLANTED = {
    "/right": (200, JSON, b"{}"),
    "/refused": (400, JSON, ERROR % b"no such thing"),
    "/crash": (500, JSON, ERROR % b"list index out of range"),
    "/traceback": (400, JSON, ERROR % b"Traceback (most recent call last):"),
    "/secret": (400, JSON, ERROR % b"cannot open /somewhere/model.pt"),
    "/no_text": (400, JSON, b'{"detail":"no"}'),
    "/long_text": (400, JSON, ERROR % (b"x" * MAX_ERROR_BYTES)),
    "/list": (200, JSON, b"[]"),
    "/teapot": (418, JSON, ERROR % b"teapot"),
    "/page": (500, "text/html", b"<h1>Internal Server Error</h1>"),
    "/lost": (400, JSON, ERROR % b"is described, and is not what the protocol has"),
    "/hang": (200, JSON, b"{}"),
    "/trickle": (200, JSON, b"{" + b" " * 200 + b"}"),
    "/slow_head": (200, JSON, b"{}"),
}
FAULTLESS = {"GET /right, positive", "GET /refused, positive"}
SLOW = ("/hang", "/trickle", "/slow_head")
# Takes whatever comes as its body.
AGREES = "/agrees"


class Planted(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/hang":
            self._wait(30)
        status, kind, body = PLANTED.get(self.path, (404, JSON, ERROR % b"Not Found"))
        with contextlib.suppress(OSError):  # nobody waited
            self._answer(status, kind, body)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        known = self.path == AGREES
        self._answer(200 if known else 404, JSON, b"{}" if known else ERROR % b"Not Found")

    def do_PUT(self) -> None:
        """As if it were described."""
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self._answer(200, JSON, b"{}")

    def _wait(self, seconds: float) -> None:
        self.server.let_go.wait(seconds)  # type: ignore[attr-defined]

    def _answer(self, status: int, kind: str, body: bytes) -> None:
        """Never more than a tenth of a second between two bytes of what trickles."""
        self.send_response(status)
        for _ in range(200 if self.path == "/slow_head" else 0):
            self.send_header("x-more", "x")
            self.flush_headers()
            self._wait(0.1)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        pieces = [body[i : i + 1] for i in range(len(body))]
        for piece in pieces if self.path == "/trickle" else [body]:
            self.wfile.write(piece)
            self._wait(0.1 if self.path == "/trickle" else 0)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def document() -> dict[str, Any]:
    json_body = {"content": {JSON: {"schema": {"type": "object"}}}}
    responses = {str(s): {"description": "", **json_body} for s in (200, 400, 500)}
    body = {"required": True, **json_body}
    return {
        "openapi": "3.1.0",
        "info": {"title": "planted", "version": "1"},
        "paths": {
            **{path: {"get": {"responses": responses}} for path in PLANTED},
            AGREES: {"post": {"responses": responses, "requestBody": body}},
        },
    }


def expected(asked: Asked) -> tuple[int, ...] | None:
    return (200,) if asked.path == "/lost" else None


def quiet() -> None:
    """It is there."""


@pytest.fixture
def planted() -> Iterator[Target]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Planted) as one:
        one.let_go = threading.Event()  # type: ignore[attr-defined]
        thread = threading.Thread(target=one.serve_forever)
        thread.start()
        address = f"http://127.0.0.1:{one.server_address[1]}"
        right: dict[str, tuple[Any, Sequence[int]]] = {AGREES: ({}, (200,))}
        yield Target(address, document(), {}, right, expected, secrets=["/somewhere"])
        one.let_go.set()  # type: ignore[attr-defined]
        one.shutdown()
        thread.join()


def test_control_what_is_wrong_is_found(planted: Target) -> None:
    found = fuzz(replace(planted, chosen=lambda path: path not in SLOW), 20, quiet, fixed=True)
    wanted = {f"GET {path}, positive" for path in PLANTED if path not in SLOW} - FAULTLESS
    wanted |= {f"POST {AGREES}, positive", f"POST {AGREES}, negative"}
    assert set(found.faults) == wanted, found.faults
    assert "an error of " in found.faults["GET /long_text, positive"]
    assert "400, not (200,)" in found.faults["GET /lost, positive"]


def test_control_an_answer_that_is_not_there_in_time_is_found(planted: Target) -> None:
    """Also where some of it comes all the while."""
    found = fuzz(replace(planted, chosen=SLOW.__contains__, limit_s=1), 1, quiet, fixed=True)
    assert len(found.faults) == len(SLOW)
    for path in SLOW:
        assert "no whole answer within 1 s" in found.faults[f"GET {path}, positive"]


def test_control_a_body_that_is_wrong_and_taken_is_found(planted: Target) -> None:
    """By the twist where the request fits, by the document where it does not."""
    found = fuzz(replace(planted, chosen=AGREES.__eq__), 20, quiet, fixed=True)
    assert "200, not (" in found.faults[f"POST {AGREES}, positive"]
    assert "200 to what does not fit" in found.faults[f"POST {AGREES}, negative"]


@pytest.mark.parametrize("twist", sorted({*TWISTS} - {"example"}))
def test_control_each_twist_finds_who_takes_all(
    planted: Target, twist: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.serve.fuzz.TWISTS", (twist,))
    refusing = replace(planted, right={AGREES: ({}, (400,))}, chosen=AGREES.__eq__)
    found = fuzz(refusing, 3, quiet, fixed=True)
    assert f"{twist}: 200, not (" in found.faults[f"POST {AGREES}, positive"]


def test_control_a_method_that_is_not_described_and_taken_is_found(planted: Target) -> None:
    found = fuzz_methods(replace(planted, chosen="/right".__eq__))
    assert "200, not (405,)" in found.faults["PUT /right, not described"]


def test_control_a_server_that_is_gone_is_found(planted: Target) -> None:
    def gone() -> None:
        raise ConnectionError("nobody there")

    found = fuzz(replace(planted, chosen="/right".__eq__), 1, gone, fixed=True)
    assert "nobody there" in found.faults["GET /right, positive"]


def test_every_operation_with_a_body_has_one_that_is_right() -> None:
    """Or could only ever be refused. Infer calls by model have theirs in the document."""
    with_body = {path for method, path, one in routes() if method == "POST" and one.body}
    right = right_bodies("/any")
    assert with_body == right.keys() | NO_RIGHT_BODY.keys()
    assert not right.keys() & NO_RIGHT_BODY.keys()
