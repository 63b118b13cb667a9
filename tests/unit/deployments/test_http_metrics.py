from __future__ import annotations

import pytest

from deployments.errors import Unavailable
from deployments.http_metrics import MetricsApp

from .serving import Server


def served(render):
    server = Server()
    server.http = MetricsApp(render)
    return server


async def page():
    return "nv_inference_count 1\n"


@pytest.mark.parametrize("path", ["/metrics", "/metrics/", "/metrics?name=x"])
def test_the_page(path):
    reply = served(page).ask("GET", path)
    assert (reply.status_code, reply.text) == (200, "nv_inference_count 1\n")
    assert reply.headers["content-type"] == "text/plain; charset=utf-8"
    assert reply.headers["content-length"] == "21"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"])
def test_it_is_there_to_get_and_for_nothing_else(method):
    reply = served(page).ask(method, "/metrics")
    assert reply.status_code == 405
    if method != "HEAD":
        assert reply.json() == {"error": "Method Not Allowed"}
    else:
        assert reply.content == b""


@pytest.mark.parametrize("path", ["/", "/metrics2", "/metrics/nv_inference_count", "/v2"])
def test_there_is_nothing_else(path):
    reply = served(page).ask("GET", path)
    assert (reply.status_code, reply.json()) == (404, {"error": "Not Found"})


def test_errors_are_told_as_on_the_other_port():
    async def starting():
        raise Unavailable("the server's controller is starting; try again")

    reply = served(starting).ask("GET", "/metrics")
    assert reply.status_code == 503
    assert reply.json() == {"error": "the server's controller is starting; try again"}


def test_what_goes_wrong_is_told_without_detail():
    async def broken():
        raise ZeroDivisionError("/secret/path")

    reply = served(broken).ask("GET", "/metrics")
    assert (reply.status_code, reply.json()) == (500, {"error": "internal error"})
