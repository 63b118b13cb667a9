"""Connections with the lane: order, limits, time-outs, clients that leave, the end."""

from __future__ import annotations

import asyncio
import json
import logging
import socket

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deployments import http_body, listener

from .lanes import LaneServer, binary, planned, request, run, tensor
from .test_http_lane import GOOD, ROW

GET = request(method="GET", path="/v2/health/live", content_length=None)
CHUNKED = request(content_length=None, transfer_encoding="chunked") + b"%x\r\n%b\r\n0\r\n\r\n" % (
    len(GOOD),
    GOOD,
)
ALL = {"parameters": {"binary_data_output": True}}


def numbered(number, **more):
    return planned(ROW, id=str(number), **more)


def number_of(reply):
    head, body = reply
    return json.loads(body[: body.index(b"}]}") + 3]).get("id")


async def soon(condition):
    """Waits for what must come true."""
    for _ in range(6000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not come true")


async def settled():
    """Long enough for whatever is on its way within this process."""
    for _ in range(50):
        await asyncio.sleep(0.001)


# --- order ----------------------------------------


def test_one_connection_carries_both_kinds_of_requests():
    async def use(server: LaneServer):
        client = await server.connect()
        for data in (planned(ROW), GET, CHUNKED, planned(ROW), planned(ROW), GET, request(GOOD)):
            assert (await client.ask(data))[0].startswith(b"HTTP/1.1 200")
        assert len(server.connections()) == 1

    run(use)


def test_pipelined_requests_are_answered_in_order():
    async def use(server: LaneServer):
        client = await server.connect()
        client.send(*(numbered(number) for number in range(20)), GET, CHUNKED, numbered(20))
        for number in range(20):
            assert number_of(await client.reply()) == str(number)
        assert (await client.reply())[1] == b""
        assert b'"id":"a7"' in (await client.reply())[1]
        assert number_of(await client.reply()) == "20"

    run(use)


def test_many_bad_requests_at_once_are_answered_one_by_one():
    async def use(server: LaneServer):
        client = await server.connect()
        client.send(request(b"{") * 3000, GET)
        for _ in range(3000):
            assert (await client.reply())[0].startswith(b"HTTP/1.1 500")
        assert (await client.reply())[0].startswith(b"HTTP/1.1 200")

    run(use)


def test_the_next_request_waits_for_the_answer_before_it():
    async def use(server: LaneServer):
        model = server.models["linear"]
        model.held = asyncio.Event()
        client = await server.connect()
        client.send(numbered(1))
        await soon(lambda: model.groups)
        client.send(numbered(2), numbered(3))
        await settled()
        assert server.gates["linear"].pending == 0
        model.held.set()
        for number in (1, 2, 3):
            assert number_of(await client.reply()) == str(number)

    run(use)


PIECES = (numbered(1), GET, CHUNKED, request(b"{"), b"\r\n" + request(GOOD), planned(ROW[1:]))


def test_the_lane_does_not_overtake_the_ordinary_road():
    async def use(server: LaneServer):
        model = server.models["linear"]
        model.held = asyncio.Event()
        client = await server.connect()
        client.send(CHUNKED)
        await soon(lambda: model.groups)
        document = {"inputs": [tensor("X")], "id": "late", **ALL}
        client.send(binary(document, ROW, path="/v2/models/echo_FP32/infer"))
        await settled()
        model.held.set()
        assert b'"id":"a7"' in (await client.reply())[1]
        assert number_of(await client.reply()) == "late"

    run(use)


def test_a_body_that_nobody_waited_for_is_still_a_body():
    """Answered before its body came, which then looks like another request."""

    async def use(server: LaneServer):
        inner = planned(ROW)
        for road in ("lane", "ordinary"):
            client = await server.connect(road)
            data = request(inner, path="/v2/models/nobody/infer")
            reply = await client.ask(data.removesuffix(inner))
            assert reply[0].startswith(b"HTTP/1.1 404")
            client.send(inner)
            await settled()
            assert (await client.ask(GET))[1] == b""
        assert not server.models["linear"].ran

    run(use)


def test_however_a_stream_is_cut_its_answers_are_the_same():
    async def answers(server, road, stream, cuts, count):
        client = await server.connect(road)
        for start, end in zip((0, *cuts), (*cuts, len(stream)), strict=True):
            client.send(stream[start:end])
            for _ in range(4):
                await asyncio.sleep(0)
        found = [await client.reply() for _ in range(count)]
        client.leave()
        return found

    async def use(server: LaneServer):
        drawn: list = []

        @settings(max_examples=40, suppress_health_check=list(HealthCheck), deadline=None)
        @given(st.data())
        def draw(data):
            pieces = data.draw(st.lists(st.sampled_from(PIECES), min_size=1, max_size=5))
            stream = b"".join(pieces)
            cuts = data.draw(st.lists(st.integers(1, len(stream) - 1), max_size=6, unique=True))
            drawn.append((stream, sorted(cuts), len(pieces)))

        draw()
        for stream, cuts, count in drawn:
            lane, ordinary = [
                await answers(server, road, stream, cuts, count) for road in ("lane", "ordinary")
            ]
            assert lane == ordinary, (stream, cuts)

    run(use)


def test_expect_is_left_to_uvicorn():
    async def use(server: LaneServer):
        client = await server.connect()
        for _ in range(2):
            head, _, body = request(GOOD, expect="100-continue").partition(b"\r\n\r\n")
            client.send(head, b"\r\n\r\n")
            assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            assert (await client.ask(body))[0].startswith(b"HTTP/1.1 200")
            assert (await client.ask(planned(ROW)))[0].startswith(b"HTTP/1.1 200")

    run(use)


# --- bodies in pieces ----------------------------------------


@pytest.mark.parametrize("connection", ["keep-alive", "close"])
def test_a_body_that_stops_is_not_waited_for(connection):
    async def use(server: LaneServer):
        replies = []
        for road in ("lane", "ordinary"):
            client = await server.connect(road)
            client.send(request(GOOD, connection=connection)[:-1])
            replies.append(await client.reply())
            assert await client.ended()
        (head, body), ordinary = replies
        assert (head, body) == ordinary
        assert head.startswith(b"HTTP/1.1 400") and b"connection: close" in head
        assert json.loads(body)["error"] == "no byte of the request's body came for 0.2 s"
        assert not server.models["linear"].ran

    run(use, http_read_timeout_s=0.2)


def test_control_a_body_that_goes_on_is_waited_for():
    async def use(server: LaneServer):
        client = await server.connect()
        data = request(GOOD)
        at = data.index(b"\r\n\r\n") + 4
        client.send(data[:at])
        for each in range(at, at + 8):
            await asyncio.sleep(0.15)
            client.send(data[each : each + 1])
        client.send(data[at + 8 :])
        assert (await client.reply())[0].startswith(b"HTTP/1.1 200")

    run(use, http_read_timeout_s=1.0)


def test_a_head_that_stops_is_not_waited_for_on_a_kept_connection():
    async def use(server: LaneServer):
        client = await server.connect()
        await client.ask(planned(ROW))
        client.send(planned(ROW)[:30])
        assert await client.ended()

    run(use, http_read_timeout_s=0.2)


@pytest.mark.parametrize("in_chunks", [False, True])
def test_what_the_network_cuts_are_no_chunks(monkeypatch, in_chunks):
    monkeypatch.setattr(http_body, "MAX_CHUNKS", 5)
    monkeypatch.setattr(http_body, "MAX_PIECES", 3)
    more = {"content_length": None, "transfer_encoding": "chunked"} if in_chunks else {}

    async def use(server: LaneServer):
        for road in ("lane", "ordinary"):
            client = await server.connect(road)
            client.send(request(GOOD, **more).removesuffix(GOOD))
            for at in range(0, 48 if in_chunks else len(GOOD), 8):
                await settled()
                piece = GOOD[at : at + 8]
                client.send(b"%x\r\n%b\r\n" % (len(piece), piece) if in_chunks else piece)
            head, body = await client.reply()
            assert (b"connection: close" in head) == in_chunks
            if in_chunks:
                assert json.loads(body)["error"] == "request body has more than 5 chunks"
            else:
                assert head.startswith(b"HTTP/1.1 200"), body

    run(use)


@pytest.mark.parametrize("count", [1, 1023, 1024, 1025, 5000])
def test_pieces_are_whole_and_few(count):
    pieces = http_body.Pieces(b"%05d" % 0)
    for number in range(1, count):
        pieces.add(b"%05d" % number)
    assert pieces.whole() == b"".join(b"%05d" % number for number in range(count))
    assert len(pieces._joined) + len(pieces._last) < http_body.MAX_PIECES + 5


def test_a_large_body_is_whole():
    async def use(server: LaneServer):
        x = np.random.default_rng(0).standard_normal((8, 200_000)).astype(np.float32)
        document = {"inputs": [tensor("X", shape=x.shape, size=x.nbytes)], **ALL}
        data = binary(document, x.tobytes(), path="/v2/models/echo_FP32/infer")
        client = await server.connect()
        for _ in range(3):
            _, body = await client.ask(data)
            assert body.endswith(x.tobytes())
        assert server.connections()[0].cycle is None

    run(use)


def test_a_model_that_goes_while_a_body_comes():
    async def use(server: LaneServer):
        client = await server.connect()
        client.send(request(GOOD)[:-1])
        await settled()
        server.versions.clear()
        server.publish()
        head, body = await client.ask(request(GOOD)[-1:])
        assert head.startswith(b"HTTP/1.1 404") and b"connection: close" not in head
        assert "'linear' is not found" in json.loads(body)["error"]

    run(use)


async def one_by_one(client, data, count, model):
    """Each request when the one before it has run, if it does before long."""
    for number in range(count):
        client.send(data)
        for _ in range(20):
            if len(model.ran) > number:
                break
            await asyncio.sleep(0.005)


# --- clients that leave or do not read ----------------------------------------


@pytest.mark.parametrize("leaves", [True, False])
def test_the_request_of_a_client_that_left_is_not_run(leaves):
    """The control stays, and its request runs."""

    async def use(server: LaneServer):
        model, gate = server.models["linear"], server.gates["linear"]
        model.held = asyncio.Event()
        first, second = await server.connect(), await server.connect()
        first.send(numbered(1))
        await soon(lambda: gate.in_flight)
        second.send(numbered(2))
        await soon(lambda: gate.pending)
        if leaves:
            second.leave()
            await soon(lambda: not gate.pending)
        model.held.set()
        assert number_of(await first.reply()) == "1"
        if not leaves:
            assert number_of(await second.reply()) == "2"
        await gate.drain()
        assert len(model.ran) == (1 if leaves else 2)

    run(use)


def test_the_answer_of_a_client_that_left_goes_nowhere(caplog):
    async def use(server: LaneServer):
        model, gate = server.models["linear"], server.gates["linear"]
        model.held = asyncio.Event()
        client, other = await server.connect(), await server.connect()
        client.send(numbered(1))
        await soon(lambda: gate.in_flight)
        client.leave()
        await soon(lambda: len(server.connections()) == 1)
        model.held.set()
        assert number_of(await other.ask(numbered(2))) == "2"

    with caplog.at_level(logging.WARNING):
        run(use)
    assert caplog.text == ""


def test_a_client_that_leaves_within_its_body_is_forgotten():
    async def use(server: LaneServer):
        client = await server.connect()
        client.send(request(GOOD)[:-1])
        await soon(lambda: server.connections())
        client.leave()
        await soon(lambda: not server.connections())
        assert (await (await server.connect()).ask(planned(ROW)))[0].startswith(b"HTTP/1.1 200")

    run(use)


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("reads", [True, False])
def test_a_client_that_does_not_read_is_not_answered_without_end(reads, at_once):
    """The control reads, and all its requests run."""
    count, rows = 40, 2**18

    async def use(server: LaneServer):
        model = server.models["echo_FP32"]
        document = {"inputs": [tensor("X", shape=(1, rows), size=4 * rows)], **ALL}
        data = binary(document, bytes(4 * rows), path="/v2/models/echo_FP32/infer")
        client = await server.connect()
        if at_once:
            client.send(data * count)
        else:
            sending = asyncio.ensure_future(one_by_one(client, data, count, model))
        if not reads:
            await soon(lambda: model.ran)
            ran = -1
            while ran != len(model.ran):
                ran = len(model.ran)
                await asyncio.sleep(0.2)
            assert 0 < ran < count
            # Of what it wrote, this process holds no more than the last answer.
            assert server.connections()[0].transport.get_write_buffer_size() <= 4 * rows + 1000
        for _ in range(count):
            assert len((await client.reply())[1]) > 4 * rows
        assert len(model.ran) == count
        if not at_once:
            await sending

    run(use)


# --- idle connections and the end ----------------------------------------


def test_idle_connections_are_closed(monkeypatch):
    monkeypatch.setattr(listener, "KEEP_ALIVE_S", 0.1)

    async def use(server: LaneServer):
        client = await server.connect()
        await client.ask(planned(ROW))
        assert await client.ended()

    run(use)


def test_control_connections_in_use_are_not_closed(monkeypatch):
    monkeypatch.setattr(listener, "KEEP_ALIVE_S", 1.0)

    async def use(server: LaneServer):
        client = await server.connect()
        for data in (planned(ROW), planned(ROW), GET, planned(ROW), GET):
            await client.ask(data)
            await asyncio.sleep(0.3)
        model = server.models["linear"]
        await client.ask(planned(ROW))
        model.held = asyncio.Event()
        client.send(numbered(1))
        await asyncio.sleep(1.3)
        model.held.set()
        assert number_of(await client.reply()) == "1"

    run(use)


@pytest.mark.parametrize("road", ["lane", "ordinary"])
@pytest.mark.parametrize("sent", [b"\r\n", b"\r"])
def test_line_feeds_are_no_request(monkeypatch, road, sent):
    monkeypatch.setattr(listener, "KEEP_ALIVE_S", 0.3)

    async def use(server: LaneServer):
        client = await server.connect(road)
        await client.ask(planned(ROW))
        client.send(sent)
        assert await client.ended()
        control = await server.connect(road)
        for _ in range(3):
            reply = await control.ask(planned(ROW), b"\r\n")
            assert reply[0].startswith(b"HTTP/1.1 200")

    run(use)


@pytest.mark.parametrize("road", ["lane", "ordinary"])
def test_a_body_that_nobody_waits_for_may_not_stop(road):
    async def use(server: LaneServer):
        client = await server.connect(road)
        data = request(bytes(1000), path="/v2/models/nobody/infer")
        head, _, body = data.partition(b"\r\n\r\n")
        assert (await client.ask(head + b"\r\n\r\n"))[0].startswith(b"HTTP/1.1 404")
        for _ in range(5):
            client.send(body[:1])
            await asyncio.sleep(0.25)
        assert server.connections(road)  # while it comes
        assert await client.ended()

    run(use, http_read_timeout_s=1.0)


@pytest.mark.parametrize("road", ["lane", "ordinary"])
def test_headers_of_a_kept_connection_have_the_same_cap(road):
    async def use(server: LaneServer):
        for before, cap in ((b"", 1024), (GET, 1024), (planned(ROW), 1024)):
            for size, fits in ((cap - 4, True), (cap + 1, False)):
                client = await server.connect(road)
                if before:
                    await client.ask(before)
                client.send(b"GET /v2/health/live HTTP/1.1\r\nhost: x\r\ny: ".ljust(500, b"z"))
                await settled()
                client.send(b"z" * (size - 500))
                await settled()
                client.send(b"" if not fits else b"\r\n\r\n")
                head, _ = await client.reply()
                assert head.startswith(b"HTTP/1.1 200" if fits else b"HTTP/1.1 431")

    run(use, http_max_header_bytes=1024)


# --- clients that never read ----------------------------------------


ROWS = 2**23  # an answer that no socket holds
HUGE = binary(
    {"inputs": [tensor("X", "UINT8", (1, 4 * ROWS), 4 * ROWS)], **ALL},
    bytes(4 * ROWS),
    path="/v2/models/echo_UINT8/infer",
)


@pytest.mark.parametrize("road", ["lane", "ordinary"])
@pytest.mark.parametrize("last", [False, True])
def test_who_never_reads_is_let_go(monkeypatch, road, last):
    monkeypatch.setattr(listener, "KEEP_ALIVE_S", 0.3)
    data = HUGE.replace(b"host: x", b"host: x\r\nconnection: close", 1) if last else HUGE

    async def use(server: LaneServer):
        client = await server.connect(road)
        client.send(data)
        await soon(lambda: server.models["echo_UINT8"].ran)
        await soon(lambda: not server.connections(road))

    run(use)


@pytest.mark.parametrize("road", ["lane", "ordinary"])
def test_control_who_reads_slowly_is_answered(monkeypatch, road):
    monkeypatch.setattr(listener, "KEEP_ALIVE_S", 1.0)

    async def use(server: LaneServer):
        client = await server.connect(road)
        client.send(HUGE)
        got = 0
        while got < 4 * ROWS:
            got += len(await client.reader.readexactly(2**20))
            await asyncio.sleep(0.06)

    run(use)


def test_while_leaving_every_answer_ends_its_connection():
    async def use(server: LaneServer):
        clients = [(await server.connect(road)) for road in ("lane", "ordinary") * 2]
        for client in clients:
            await client.ask(planned(ROW))
        server.http.leave()
        for client, data in zip(clients, [planned(ROW)] * 2 + [request(b"{")] * 2, strict=True):
            head, _ = await client.ask(data)
            assert head.endswith(b"\r\nconnection: close\r\n\r\n")
            assert await client.ended()

    run(use)


def test_while_the_server_closes_work_is_refused():
    async def use(server: LaneServer):
        lane, ordinary = await server.connect(), await server.connect("ordinary")
        for client in (lane, ordinary):
            await client.ask(planned(ROW))
        server.publish(closing=True)
        reply = await lane.ask(planned(ROW))
        assert reply == await ordinary.ask(planned(ROW))
        assert reply[0].startswith(b"HTTP/1.1 503") and b"Server exiting" in reply[1]
        assert await lane.ended()

    run(use)


def test_a_drain_answers_what_is_in_flight_and_closes_the_rest():
    async def use(server: LaneServer):
        model, gate = server.models["linear"], server.gates["linear"]
        idle, busy, sending = [await server.connect() for _ in range(3)]
        await idle.ask(planned(ROW))
        model.held = asyncio.Event()
        busy.send(numbered(1))
        sending.send(numbered(2)[:-1])
        await soon(lambda: gate.in_flight)
        await settled()
        drained = asyncio.ensure_future(server.listeners["lane"].drain())
        assert await idle.ended()
        sending.send(numbered(2)[-1:])
        await soon(lambda: gate.pending)
        assert not drained.done()
        model.held.set()
        for client, number in ((busy, "1"), (sending, "2")):
            reply = await client.reply()
            assert b"\r\nconnection: close\r\n" in reply[0] and number_of(reply) == number
            assert await client.ended()
        await asyncio.wait_for(drained, 10)
        assert not server.connections() and not server.listeners["lane"].alive()

    run(use, drains=True)


def test_answers_are_not_left_to_nagle():
    async def use(server: LaneServer):
        for road in ("lane", "ordinary"):
            await (await server.connect(road)).ask(GET)
            (connection,) = server.connections(road)
            found = connection.transport.get_extra_info("socket")
            assert found.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

    run(use)


def test_requests_are_counted_by_uvicorn_and_by_the_gate():
    async def use(server: LaneServer):
        client = await server.connect()
        for data in (planned(ROW), request(b"{"), GET, planned(ROW)):
            await client.ask(data)
        assert server.listeners["lane"]._server.server_state.total_requests == 4
        assert server.counters["linear"].totals().success == 2

    run(use)
