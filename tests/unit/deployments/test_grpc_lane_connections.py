"""The lane's own connections, byte by byte: what HAProxy may send, and what nobody should."""

from __future__ import annotations

import asyncio
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest

from deployments import grpc_wire
from deployments.grpc_lane import PATH, Lane
from deployments.grpc_stubs import service_pb2 as pb

from . import lanes
from .lanes import LINEAR, LaneServer, planned
from .serving import linear
from .test_grpc import RAW, X, entry, good, request

MESSAGE = good().SerializeToString()


def framed(message=MESSAGE, flag=0, size=None):
    return bytes([flag]) + (len(message) if size is None else size).to_bytes(4, "big") + message


def call(*chunks, path=PATH, end=b"0\r\n\r\n", **fields):
    """The bytes of one call, as HAProxy writes them."""
    fields = {"content_type": "application/grpc", "te": "trailers", "host": "x", **fields}
    if "content_length" not in fields:
        fields["transfer_encoding"] = "chunked"
        body = b"".join(b"%X\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + end
    else:
        body = b"".join(chunks)
    lines = [f"POST {path} HTTP/1.1", *(f"{k.replace('_', '-')}: {v}" for k, v in fields.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class Client:
    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer

    def send(self, data):
        self.writer.write(data)

    async def reply(self):
        """Status, details and message of the next answer."""
        head = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 10)
        if b"\r\ncontent-length: 0\r\n" in head:
            fields = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
            return int(fields[b"grpc-status"]), fields[b"grpc-message"].decode(), b""
        size = int(await asyncio.wait_for(self.reader.readline(), 10), 16)
        body = await asyncio.wait_for(self.reader.readexactly(size), 10)
        assert await self.reader.readuntil(b"\r\n\r\n") == b"\r\n0\r\ngrpc-status: 0\r\n\r\n"
        return 0, "", body[5:]

    async def ask(self, data):
        self.send(data)
        return await self.reply()

    async def good(self):
        status, details, message = await self.ask(call(framed()))
        assert (status, details) == (0, "")
        reply = pb.ModelInferResponse.FromString(message)
        assert reply.raw_output_contents[0] == linear(X)[0].tobytes()

    async def ended(self):
        with suppress(ConnectionError):
            return await asyncio.wait_for(self.reader.read(), 10) == b""
        return True


def run(use, **settings):
    async def main():
        server = LaneServer(**settings)
        lane = Lane(server.inference, server.settings)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "lane.sock"
            await lane.open(path)

            async def connect():
                return Client(*await asyncio.open_unix_connection(path))

            try:
                await asyncio.wait_for(use(server, lane, connect), 60)
            finally:
                await lane.drain(5)

    asyncio.run(main())


def test_one_connection_carries_many_calls():
    async def use(server, lane, connect):
        client = await connect()
        for _ in range(5):
            await client.good()
        assert (await client.ask(call(framed(b"\xff"))))[0] == 2
        await client.good()
        size = len(framed())
        for _ in range(3):
            assert (await client.ask(call(framed(), content_length=size)))[0] == 0

    run(use)


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_calls_in_pieces(size):
    async def use(server, lane, connect):
        client = await connect()
        await client.good()
        for data in (call(framed()), call(framed()[:3], framed()[3:9], framed()[9:])):
            for at in range(0, len(data), size):
                client.send(data[at : at + size])
                await client.writer.drain()
                await asyncio.sleep(0)
            assert (await client.reply())[0] == 0
        await client.good()

    run(use)


@pytest.mark.parametrize(
    ("data", "status", "text"),
    [
        (call(framed(size=len(MESSAGE) + 1)), 13, "ended before its message"),
        (call(b"\0\0"), 13, "ended before its message"),
        (call(), 13, "ended before its message"),
        (call(framed(), grpc_timeout="soon"), 13, "Error parsing 'grpc-timeout' metadata"),
        (call(framed(), grpc_timeout="0m"), 4, "Deadline Exceeded"),
        (call(framed(), grpc_encoding="snappy"), 13, "Error parsing 'grpc-encoding' metadata"),
        (call(framed(flag=1)), 13, "Compression bit set but no encoding configured"),
        (call(framed(flag=1), grpc_encoding="gzip"), 13, "due to zlib error"),
        (call(framed(size=2**31)), 8, "larger than max (2147483648 vs. 1073741824)"),
        (call(framed(), path="/inference.GRPCInferenceService/Other"), 12, "Method not found!"),
        (call(framed(), x="a" * 20000), 8, "received metadata size exceeds hard limit"),
    ],
)
def test_what_is_refused_leaves_the_connection_as_it_was(data, status, text):
    async def use(server, lane, connect):
        client = await connect()
        for _ in range(3):
            got, details, _ = await client.ask(data)
            assert got == status and text in details
            await client.good()
        assert not any(
            name for name in server.models if name != "linear" and server.models[name].ran
        )

    run(use)


def test_what_comes_after_the_message_is_nobodys():
    async def use(server, lane, connect):
        client = await connect()
        for data in (
            call(framed() + framed()),
            call(framed() + b"\0\0"),
            call(framed(), b"\0" * 99),
        ):
            for _ in range(3):
                assert (await client.ask(data))[0] == 0
        await client.good()

    run(use)


def test_a_message_is_answered_before_its_call_ends():
    async def use(server, lane, connect):
        client = await connect()
        assert (await client.ask(call(framed(), end=b"")))[0] == 0
        client.send(b"0\r\n\r\n")
        await client.good()

    run(use)


def test_a_refused_call_is_read_to_its_end():
    async def use(server, lane, connect):
        client = await connect()
        status, _, _ = await client.ask(call(framed(b"", size=10**6), end=b""))
        assert status == 8
        for _ in range(100):
            client.send(b"2710\r\n" + b"\0" * 10**4 + b"\r\n")
        client.send(b"0\r\n\r\n")
        await client.good()

    run(use, max_body_bytes=10**5, http_max_input_size_bytes=10**5)


@pytest.mark.parametrize(
    "data", [b"\0" * 99, b"GET\r\n\r\n", call(framed()) * 2, call(framed()[:3], end=b"zz\r\n")]
)
def test_what_haproxy_never_sends_ends_the_connection(data):
    async def use(server, lane, connect):
        model = server.models["linear"]
        model.held = asyncio.Event()
        client = await connect()
        client.send(data)
        assert await client.ended()
        model.held.set()
        await (await connect()).good()

    run(use)


def test_a_connection_that_ends_takes_its_call_along():
    async def use(server, lane, connect):
        model, gate = server.models["linear"], server.gates["linear"]
        model.held = asyncio.Event()
        first, second, third = [await connect() for _ in range(3)]
        first.send(call(framed()))
        while not model.groups:
            await asyncio.sleep(0.001)
        second.send(call(framed()))
        third.send(call(framed(), end=b""))  # by the parser
        while gate.pending < 2:
            await asyncio.sleep(0.001)
        second.writer.transport.abort()
        third.writer.transport.abort()
        while gate.pending:
            await asyncio.sleep(0.001)
        model.held.set()
        assert (await first.reply())[0] == 0
        assert len(model.ran) == 1

    run(use)


def test_deadlines_on_both_ways_into_the_lane():
    async def use(server, lane, connect):
        model, gate = server.models["linear"], server.gates["linear"]
        timed = call(framed(), grpc_timeout="500m")
        client = await connect()
        for _ in range(3):  # the same head again: known from the second time on
            assert (await client.ask(timed))[0] == 0
        model.held = asyncio.Event()
        first = await connect()
        first.send(call(framed()))
        while not gate.in_flight:
            await asyncio.sleep(0.001)
        ran = len(model.groups)
        assert await client.ask(timed) == (4, "Deadline Exceeded", b"")
        fresh = await connect()
        assert (await fresh.ask(call(framed(), grpc_timeout="90001u")))[0] == 4
        assert (await fresh.ask(call(framed()[:9], end=b"", grpc_timeout="9m")))[0] == 4
        assert not gate.pending
        model.held.set()
        assert (await first.reply())[0] == 0
        assert len(model.groups) == ran
        await client.good()

    run(use)


def test_a_message_that_does_not_come():
    async def use(server, lane, connect):
        client = await connect()
        status, details, _ = await client.ask(call(framed()[:9], end=b""))
        assert (status, details) == (3, "no byte of the call's message came for 0.1 s")

    run(use, http_read_timeout_s=0.1)


def test_control_a_slow_model_is_no_slow_client():
    async def use(server, lane, connect):
        server.models["linear"].held = asyncio.Event()
        client = await connect()
        client.send(call(framed()[:9], framed()[9:], end=b""))
        await asyncio.sleep(0.4)
        server.models["linear"].held.set()
        assert (await client.reply())[0] == 0

    run(use, http_read_timeout_s=0.1)


def test_drained_it_answers_what_it_has():
    async def use(server, lane, connect):
        server.models["linear"].held = asyncio.Event()
        busy, idle = await connect(), await connect()
        await asyncio.sleep(0)
        busy.send(call(framed()))
        while not server.gates["linear"].in_flight:
            await asyncio.sleep(0.001)
        draining = asyncio.ensure_future(lane.drain(10))
        await asyncio.sleep(0.05)
        assert not draining.done()
        server.models["linear"].held.set()
        assert (await busy.reply())[0] == 0
        await draining
        assert await busy.ended() and await idle.ended()

    run(use)


def test_a_message_in_no_order_is_one_all_the_same():
    async def use(server, lane, connect):
        raw = b"\x3a\x10" + RAW + request(entry()).SerializeToString()
        client = await connect()
        for _ in range(4):
            assert (await client.ask(call(framed(raw))))[0] == 0

    run(use)


# --- what one call may do to others ----------------------------------------


def test_what_http_calls_json_is_no_description_of_grpcs():
    async def use(server, lane, connect):
        parts = grpc_wire.scan(MESSAGE, 0, len(MESSAGE))
        assert parts is not None
        client = await connect()
        async with server:
            http = await server.connect()
            for _ in range(3):
                await client.good()
                for key in (parts.key, b"\0" + parts.key):
                    size = {"inference_header_content_length": len(key)}
                    head, _ = await http.ask(lanes.request(key + RAW, LINEAR, **size))
                    assert head.startswith(b"HTTP/1.1 500")  # it is no JSON
            await client.good()
            await (await connect()).good()

    run(use)


def test_grpc_is_not_answered_from_https_plans():
    async def use(server, lane, connect):
        parts = grpc_wire.scan(MESSAGE, 0, len(MESSAGE))
        assert parts is not None
        served = server.directory.find("linear", "")
        async with server:
            http = await server.connect()
            text = planned(RAW).partition(b"\r\n\r\n")[2].removesuffix(RAW)
            for _ in range(3):
                assert (await http.ask(planned(RAW)))[0].startswith(b"HTTP/1.1 200")
            plan = served.http_plans.find(text)
            assert plan is not None and plan.heads
            assert len(served.grpc_plans) == 0
            served.http_plans.learn(parts.key, plan)
            for _ in range(3):
                await (await connect()).good()
            assert served.grpc_plans.find(parts.key) is not plan
            assert served.grpc_plans.find(text) is None

    run(use)


@pytest.mark.parametrize("in_pieces", [False, True])
def test_an_unexpected_error_ends_the_connection(in_pieces):
    """The gate may still know the call, and would answer the next one with its outputs."""

    async def use(server, lane, connect):
        gate, model = server.gates["linear"], server.models["linear"]
        enqueue, model.held = gate.enqueue, asyncio.Event()

        def broken(*args):
            enqueue(*args)
            raise RuntimeError("after the entry was made")

        client = await connect()
        gate.enqueue = broken
        data = call(framed(), end=b"" if in_pieces else b"0\r\n\r\n")
        assert await client.ask(data) == (13, "internal error", b"")
        if in_pieces:
            assert lane.connections  # the rest is read, so that the answer is not lost
            client.send(b"0\r\n\r\n")
        assert await client.ended()
        gate.enqueue = enqueue
        model.held.set()
        await (await connect()).good()

    run(use)
