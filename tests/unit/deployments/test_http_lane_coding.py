"""Compressed answers on both roads: the same bytes, in order, wherever they are packed."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import threading
import zlib
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from deployments import http_body, http_coding

from .lanes import LINEAR, LaneServer, binary, planned, request, run, tensor
from .test_http_lane import GOOD, REQUESTS, ROW, answers, road_of
from .test_http_lane_connections import number_of, numbered, soon

UNPACK: dict[bytes, Any] = {b"gzip": gzip.decompress, b"deflate": zlib.decompress}
ACCEPTED = {
    "gzip": b"gzip",
    "deflate": b"deflate",
    "gzip, deflate": b"gzip",
    "gzip;q=0.1, deflate": b"deflate",
    "identity;q=0, *": b"gzip",
    "identity, gzip": None,
    "br": None,
    "*": None,
    "gzip;q=0": None,
}
ALL = {"parameters": {"binary_data_output": True}}
# JSON alone, and with tensors behind it: each has a limit of its own.
FORMS: tuple[dict[str, Any], ...] = ({}, {"inference_header_content_length": 2})


def field(head, name):
    """The value of a field; None without."""
    found = head.partition(b"\r\n" + name + b": ")[2]
    return found.split(b"\r\n")[0] if found else None


def plain(reply):
    """The body as it was before any coding."""
    head, body = reply
    coding = field(head, b"content-encoding")
    return body if coding is None else UNPACK[coding](body)


@pytest.mark.parametrize("accepted", ACCEPTED)
def test_both_roads_answer_in_the_same_coding(accepted):
    async def use(server: LaneServer):
        for name in ("json", "planned", "two in, one out each way", "strings", "an output without"):
            data = next(value for key, value in REQUESTS.items() if key.startswith(name))
            bare = await answers(server, "ordinary", data, 3)
            asking = data.replace(b"host: x", b"host: x\r\naccept-encoding: " + accepted.encode())
            lane, ordinary = [
                await answers(server, road, asking, 3) for road in ("lane", "ordinary")
            ]
            assert lane == ordinary, name
            for (head, body), (bare_head, bare_body) in zip(lane, bare, strict=True):
                assert field(head, b"content-encoding") == ACCEPTED[accepted]
                assert plain((head, body)) == bare_body
                length = b"inference-header-content-length"
                assert field(head, length) == field(bare_head, length)
                assert field(head, b"content-length") == b"%d" % len(body)

    run(use)


def test_control_such_requests_take_the_lane():
    async def use(server: LaneServer):
        for accepted in (b"gzip", b"gzip, deflate", b"br"):
            data = planned(ROW).replace(b"host: x", b"host: x\r\naccept-encoding: " + accepted)
            assert await road_of(server, data) == "lane", accepted
        packed = request(gzip.compress(GOOD), content_encoding="gzip")
        assert await road_of(server, packed) == "ordinary"

    run(use)


@pytest.mark.parametrize("name", ["failing", "full", "crashing", "too short"])
def test_errors_are_never_packed(name):
    async def use(server: LaneServer):
        data = REQUESTS[name].replace(b"host: x", b"host: x\r\naccept-encoding: gzip")
        bare = await answers(server, "ordinary", REQUESTS[name], 2)
        for road in ("lane", "ordinary"):
            assert await answers(server, road, data, 2) == bare

    run(use)


@pytest.mark.parametrize("road", ["lane", "ordinary"])
def test_large_answers_are_packed_on_a_thread(monkeypatch, road):
    threads = []
    packed = http_coding.packed

    def noting(pieces, coding):
        threads.append(threading.current_thread() is threading.main_thread())
        return packed(pieces, coding)

    monkeypatch.setattr(http_coding, "packed", noting)

    async def use(server: LaneServer):
        client = await server.connect(road)
        for count, inline in ((100, True), (200_000, False)):
            x = np.random.default_rng(0).standard_normal((1, count)).astype(np.float32)
            document = {"inputs": [tensor("X", shape=x.shape, size=x.nbytes)], **ALL}
            data = binary(
                document, x.tobytes(), path="/v2/models/echo_FP32/infer", accept_encoding="gzip"
            )
            for _ in range(3):
                reply = await client.ask(data)
                assert plain(reply).endswith(x.tobytes())
                assert threads.pop() == inline
        assert threads == []

    run(use)


def test_answers_leave_in_order_while_one_is_packed(monkeypatch):
    monkeypatch.setattr(http_coding, "INLINE_BYTES", 0)

    async def use(server: LaneServer):
        client = await server.connect()
        for _ in range(2):  # the second time from plans
            client.send(
                *(
                    numbered(number).replace(b"host: x", b"host: x\r\naccept-encoding: gzip")
                    for number in range(20)
                ),
                numbered(20),
            )
            for number in range(21):
                head, body = await client.reply()
                body = plain((head, body))
                assert number_of((head, body)) == str(number)
        assert server.connections()[0].cycle is None

    run(use)


@pytest.mark.parametrize("leaves", [True, False])
def test_a_client_that_leaves_while_its_answer_is_packed(monkeypatch, caplog, leaves):
    """The control stays, and gets it."""
    monkeypatch.setattr(http_coding, "INLINE_BYTES", 0)
    packed, begun, go = http_coding.packed, threading.Event(), threading.Event()

    def slow(pieces, coding):
        begun.set()
        go.wait(10)
        return packed(pieces, coding)

    monkeypatch.setattr(http_coding, "packed", slow)
    data = numbered(1).replace(b"host: x", b"host: x\r\naccept-encoding: gzip")

    async def use(server: LaneServer):
        client, other = await server.connect(), await server.connect()
        client.send(data)
        await soon(begun.is_set)
        assert number_of(await other.ask(numbered(2))) == "2"  # the loop is free meanwhile
        if leaves:
            client.leave()
            await soon(lambda: len(server.connections()) == 1)
        go.set()
        if not leaves:
            reply = await client.reply()
            assert number_of((b"", plain(reply))) == "1"
        assert number_of(await other.ask(numbered(3))) == "3"
        assert server.counters["linear"].totals().success == 3

    with caplog.at_level(logging.WARNING):
        run(use)
    assert caplog.text == ""


def test_a_failure_to_pack_is_told_without_detail(monkeypatch):
    def broken(pieces, coding):
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(http_coding, "packed", broken)

    async def use(server: LaneServer):
        for size in (0, 1 << 20):
            monkeypatch.setattr(http_coding, "INLINE_BYTES", size)
            for road in ("lane", "ordinary"):
                client = await server.connect(road)
                head, body = await client.ask(
                    planned(ROW).replace(b"host: x", b"host: x\r\naccept-encoding: gzip")
                )
                assert head.startswith(b"HTTP/1.1 500")
                assert json.loads(body) == {"error": "internal error"}
                assert (await client.ask(planned(ROW)))[0].startswith(b"HTTP/1.1 200")

    run(use)


# --- what comes in ----------------------------------------


def chunked(body, size, **more):
    """A body in chunks of that size."""
    head = request(content_length=None, transfer_encoding="chunked", **more)
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    return head + b"".join(b"%x\r\n%b\r\n" % (len(one), one) for one in (*pieces, b""))


@pytest.mark.parametrize(("coding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_compressed_bodies_are_the_bodies_inside(coding, pack):
    async def use(server: LaneServer):
        x = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
        text = json.dumps({"inputs": [tensor(shape=x.shape, size=x.nbytes)], **ALL}).encode()
        length = {"inference_header_content_length": len(text)}
        raw = {"inference_header_content_length": 0}
        bodies: list[tuple[bytes, dict[str, Any]]] = [
            (GOOD, {}),
            (text + x.tobytes(), length),
            (x[:1].tobytes(), raw),
        ]
        for inner, more in bodies:
            bare = await answers(server, "ordinary", request(inner, **more), 1)
            assert bare[0][0].startswith(b"HTTP/1.1 200")
            for data in (
                request(pack(inner), content_encoding=coding, **more),
                chunked(pack(inner), 7, content_encoding=coding, **more),
            ):
                for road in ("lane", "ordinary"):
                    assert await answers(server, road, data, 2) == bare * 2

    run(use)


BAD = {
    "no such data": (b"abc", 400, "is no valid gzip data"),
    "nothing": (b"", 400, "ends before the end"),
    "cut off": (gzip.compress(GOOD)[:-1], 400, "ends before the end"),
    "goes on": (gzip.compress(GOOD) + b"x", 400, "goes on after the end"),
    "malformed inside": (gzip.compress(b"{ "), 500, "failed to parse the request JSON buffer"),
    "too large inside": (gzip.compress(b" " * 4001), 400, "exceeds the maximum allowed"),
    "a bomb": (gzip.compress(bytes(3_000_000)), 400, "exceeds the maximum allowed value of 4000"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_compressed_bodies(name):
    """The body was read: the connection goes on."""
    content, status, text = BAD[name]

    async def use(server: LaneServer):
        for more in FORMS:
            data = request(content, content_encoding="gzip", **more)
            for road in ("lane", "ordinary"):
                client = await server.connect(road)
                for _ in range(2):
                    head, body = await client.ask(data)
                    assert head.startswith(b"HTTP/1.1 %d" % status), body
                    assert b"connection: close" not in head
                    assert text in json.loads(body)["error"]
                assert (await client.ask(planned(ROW)))[0].startswith(b"HTTP/1.1 200")

    run(use, http_max_input_size_bytes=4000, max_body_bytes=8000)


def test_a_compressed_body_that_is_too_large_itself_is_not_read():
    async def use(server: LaneServer):
        noise = gzip.compress(np.random.default_rng(0).bytes(5000))
        for more in FORMS:
            for data in (
                request(noise, content_encoding="gzip", **more),
                chunked(noise, 1000, content_encoding="gzip", **more),
            ):
                for road in ("lane", "ordinary"):
                    client = await server.connect(road)
                    head, body = await client.ask(data)
                    assert head.startswith(b"HTTP/1.1 400") and b"connection: close" in head
                    assert "exceeds the maximum allowed" in json.loads(body)["error"]

    run(use, http_max_input_size_bytes=4000, max_body_bytes=8000)


def test_a_coding_in_several_fields_is_several_codings():
    async def use(server: LaneServer):
        twice = gzip.compress(gzip.compress(GOOD))
        data = request(twice, content_encoding="gzip", Content_Encoding="gzip")
        for road in ("lane", "ordinary"):
            client = await server.connect(road)
            head, body = await client.ask(data)
            assert head.startswith(b"HTTP/1.1 501")
            assert field(head, b"accept-encoding") == b"gzip, deflate"
            assert b"'gzip, gzip'" in body
        accepting = request(GOOD, accept_encoding="identity;q=0.1", Accept_Encoding="gzip")
        for road in ("lane", "ordinary"):
            ((head, _),) = await answers(server, road, accepting, 1)
            assert field(head, b"content-encoding") == b"gzip"

    run(use)


# --- chunks ----------------------------------------


async def gone(client):
    """Whether the server closes, without another byte, and whatever it has not read."""
    with suppress(ConnectionError):
        return await client.ended()
    return True


def flood(count, path=LINEAR):
    head = request(path=path, content_length=None, transfer_encoding="chunked")
    return head + b"1\r\nx\r\n" * count + b"0\r\n\r\n"


@pytest.mark.parametrize("road", ["lane", "ordinary"])
def test_chunks_are_counted_however_they_come(road):
    async def use(server: LaneServer):
        client = await server.connect(road)
        head, body = await client.ask(flood(65536))
        assert head.startswith(b"HTTP/1.1 500") and b"failed to parse" in body
        assert (await client.ask(planned(ROW)))[0].startswith(b"HTTP/1.1 200")
        head, body = await client.ask(flood(65537))
        assert head.startswith(b"HTTP/1.1 400") and b"connection: close" in head
        assert json.loads(body) == {"error": "request body has more than 65536 chunks"}
        assert await gone(client)
        other = await server.connect(road)
        assert (await other.ask(planned(ROW)))[0].startswith(b"HTTP/1.1 200")

    run(use)


@pytest.mark.parametrize("road", ["lane", "ordinary"])
def test_chunks_that_nobody_reads_are_counted_too(road):
    async def use(server: LaneServer):
        client = await server.connect(road)
        head, _ = await client.ask(flood(70_000, "/v2/models/nobody/infer"))
        assert head.startswith(b"HTTP/1.1 404")
        assert await gone(client)

    run(use)


def test_chunks_behind_another_request_are_counted_too(monkeypatch):
    """What was asked first is not answered with what is said to the flood."""
    monkeypatch.setattr(http_body, "MAX_CHUNKS", 100)

    async def use(server: LaneServer):
        model = server.models["linear"]
        model.held = asyncio.Event()
        client = await server.connect("ordinary")
        client.send(request(GOOD))
        await soon(lambda: model.groups)
        client.send(flood(1000))
        assert await gone(client)
        model.held.set()
        other = await server.connect("ordinary")
        assert (await other.ask(planned(ROW)))[0].startswith(b"HTTP/1.1 200")

    run(use)
