"""Pages of other sites may not change the server, whatever name they come under."""

from __future__ import annotations

import re

import pytest

from deployments.errors import ForeignOrigin
from deployments.http_guard import OPEN, check_origin
from deployments.http_routes import MODEL, MODEL_ROUTES, ROUTES, UNSUPPORTED

from .serving import Server

HERE = "127.0.0.1:8000"
EVIL = "http://evil.example"

# Host, Origin, whether the one may ask the other. None: not sent.
RULE = [
    (HERE, None, True),
    (None, None, True),
    ("manta.svc.cluster.local:8000", None, True),
    (HERE, f"http://{HERE}", True),
    ("localhost:8000", "http://localhost:8000", True),
    ("LocalHost:8000", "HTTP://localhost:8000", True),
    ("[::1]:8000", "http://[::1]:8000", True),
    ("10.0.0.7", "https://10.0.0.7", True),
    ("models.example", "https://models.example", True),
    ("models.example:8443", "https://models.example:8443", True),
    (HERE, EVIL, False),
    (HERE, "http://127.0.0.1:3000", False),
    (HERE, "http://localhost:8000", False),
    ("models.example", "https://www.models.example", False),
    # DNS rebinding: the browser takes the page for ours.
    ("evil.example:8000", "http://evil.example:8000", False),
    ("localhost.evil.example", "http://localhost.evil.example", False),
    ("127.0.0.1.evil.example", "http://127.0.0.1.evil.example", False),
    ("models.example.evil.example", "http://models.example.evil.example", False),
    ("localhost.", "http://localhost.", False),
    # What is no origin of a page, or one that is not told.
    (HERE, "null", False),
    (HERE, "", False),
    (HERE, HERE, False),
    (HERE, "://", False),
    (None, f"http://{HERE}", False),
    ("", "http://", False),
    ("[::1", "http://[::1", False),
    ("\xff", "http://\xff", False),
]


@pytest.mark.parametrize(("host", "origin", "allowed"), RULE)
def test_the_rule(host, origin, allowed):
    sent = {b"host": host, b"origin": origin}
    headers = {name: text.encode("latin-1") for name, text in sent.items() if text is not None}
    names = {"models.example"}
    if allowed:
        check_origin(headers, names)
    else:
        with pytest.raises(ForeignOrigin):
            check_origin(headers, names)


def test_a_long_origin_is_cut():
    with pytest.raises(ForeignOrigin) as caught:
        check_origin({b"host": b"h", b"origin": b"http://" + b"x" * 9999}, ())
    assert len(str(caught.value)) < 300


def posts():
    """Path and endpoint of every POST of the table; those that are refused have no endpoint."""
    table = [*ROUTES, *((methods, path, "") for methods, path, _ in UNSUPPORTED)]
    for methods, path, name in MODEL_ROUTES:
        table += [(methods, model + path, name) for model in MODEL]
    return sorted((path, name) for methods, path, name in table if "POST" in methods.split())


def filled(path):
    values = {"model": "linear", "version": "1", "rest": "status"}
    return re.sub(r"{(\w+)(:\w+)?}", lambda found: values.get(found[1], "r"), path)


@pytest.mark.parametrize(("path", "name"), posts())
def test_every_post_that_may_change_something_is_guarded(path, name):
    server = Server(model_control_mode="explicit")
    reply = server.ask("POST", filled(path), headers={"origin": EVIL})
    assert (reply.status_code == 403) == (name not in OPEN)
    if name not in OPEN:
        assert "evil.example" in reply.json()["error"]
        assert server.controller.calls == []
    assert "access-control-allow-origin" not in reply.headers
    for headers in ({}, {"host": HERE, "origin": f"http://{HERE}"}):
        assert server.ask("POST", filled(path), headers=headers).status_code != 403


def test_the_repository_is_among_them():
    """The control of the test above."""
    guarded = {name for _, name in posts() if name not in OPEN}
    assert {"load", "unload"} <= guarded
    assert {name for _, name in posts() if name in OPEN} >= {"infer_elsewhere", "index"}


def test_names_come_from_the_settings():
    own = {"host": "Models.Example", "origin": "https://models.example"}
    path = "/v2/repository/models/linear/unload"
    for names, status in (((), 403), (("MODELS.example",), 200)):
        server = Server(model_control_mode="explicit", http_control_host=names)
        assert server.ask("POST", path, headers=own).status_code == status


def test_reading_is_open_to_all_pages_and_shown_to_none():
    """Without Access-Control-Allow-Origin a browser keeps the answer from a foreign page."""
    server = Server()
    reply = server.ask("GET", "/v2/models/linear/config", headers={"origin": EVIL})
    assert reply.status_code == 200
    assert not [name for name in reply.headers if name.startswith("access-control")]
