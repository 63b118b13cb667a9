"""What is no HTTP, on connections of their own and behind requests that are: one error or none."""

from __future__ import annotations

import asyncio
import json

import pytest

from .lanes import LINEAR, planned, request, run
from .test_http_lane import GOOD, ROW
from .test_http_lane_connections import CHUNKED, GET, soon

TEXT = "Invalid HTTP request received."
BAD = {
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\r\n\r\n",
    "two lengths": request(GOOD, content_length="2\r\ncontent-length: 3"),
    "length and chunks": request(GOOD, transfer_encoding="chunked"),
    "no chunk": request(content_length=None, transfer_encoding="chunked") + b"zz\r\n",
    "no path": request(GOOD, path=LINEAR + "\xe9"),
}
LONG = request(method="GET", path="/" + "a" * 70_000, content_length=None)


@pytest.mark.parametrize("road", ["lane", "ordinary"])
@pytest.mark.parametrize("name", BAD)
def test_it_is_told_as_every_error_is_and_ends_its_connection(road: str, name: str) -> None:
    async def use(server):
        for before in (b"", GET, planned(ROW), CHUNKED):
            client = await server.connect(road)
            if before:
                assert (await client.ask(before))[0].startswith(b"HTTP/1.1 200")
            head, body = await client.ask(BAD[name] + GET)
            assert head.startswith(b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json")
            assert b"\r\nconnection: close\r\n" in head and json.loads(body) == {"error": TEXT}
            assert await client.ended()
        await soon(lambda: not server.connections(road))

    run(use)


@pytest.mark.parametrize("road", ["lane", "ordinary"])
def test_a_path_that_is_too_long_in_one_piece(road: str) -> None:
    async def use(server):
        for before in (b"", GET, planned(ROW)):
            client = await server.connect(road)
            if before:
                await client.ask(before)
            head, body = await client.ask(LONG)
            assert head.startswith(b"HTTP/1.1 431 ") and list(json.loads(body)) == ["error"]
            assert await client.ended()

    run(use)


@pytest.mark.parametrize("bad", [*BAD.values(), LONG], ids=[*BAD, "long path"])
def test_it_is_not_taken_for_the_answer_to_the_request_before(bad: bytes) -> None:
    async def use(server):
        model = server.models["linear"]
        client = await server.connect("ordinary")
        model.held = asyncio.Event()
        client.send(CHUNKED)
        await soon(lambda: model.groups)
        client.send(bad)
        assert await client.ended()
        model.held.set()

    run(use)


def test_behind_a_request_of_the_lane_it_waits_its_turn() -> None:
    async def use(server):
        model = server.models["linear"]
        client = await server.connect("lane")
        model.held = asyncio.Event()
        client.send(planned(ROW))
        await soon(lambda: model.groups)
        client.send(BAD["no HTTP"])
        model.held.set()
        assert (await client.reply())[0].startswith(b"HTTP/1.1 200")
        assert (await client.reply())[0].startswith(b"HTTP/1.1 400")
        assert await client.ended()

    run(use)
