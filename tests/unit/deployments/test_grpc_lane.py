"""ModelInfer by HAProxy and the lane, and by grpc.aio alone: clients must not see which."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import grpc
import numpy as np
import pytest
import tritonclient.grpc.aio as client

from deployments.grpc_lane import PATH
from deployments.grpc_stubs import service_pb2 as pb
from deployments.grpc_stubs import service_pb2_grpc
from deployments.tensors import encode_bytes

from .grpc_lanes import ROADS, needs_haproxy, run
from .serving import linear
from .test_grpc import ABUSE, RAW, entry, good, parameter, request, triton_input, typed

pytestmark = needs_haproxy

OUTPUT = pb.ModelInferRequest.InferRequestedOutputTensor


def floats(count, model="echo_FP32", seed=0, **more):
    data = np.random.default_rng(seed).random(count, np.float32).tobytes()
    return request(entry("X", shape=(1, count)), raw=[data], model=model, **more)


def ints(*values):
    return np.array([values], np.int32).tobytes()


TWO = [entry("INPUT0", "INT32"), entry("INPUT1", "INT32")]
STRINGS = encode_bytes([b"a\0", b""]).tobytes()
GOOD = {
    "plain": good(),
    "id": request(entry(), raw=[RAW], id="é7"),
    "long id": request(entry(), raw=[RAW], id="7" * 300),
    "version": request(entry(), raw=[RAW], model_version="1"),
    "rows": request(entry(shape=(3, 4)), raw=[RAW * 3]),
    "parameters": request(entry(), raw=[RAW], parameters={"x": parameter(string_param="y")}),
    "two inputs": request(*TWO, raw=[ints(1, 2, 3, 4), ints(5, 6, 7, 8)], model="add_sub"),
    "turned": request(*TWO[::-1], raw=[ints(1, 2, 3, 4), ints(5, 6, 7, 8)], model="add_sub"),
    "one output": request(
        *TWO,
        raw=[ints(1, 2, 3, 4), ints(5, 6, 7, 8)],
        model="add_sub",
        outputs=[OUTPUT(name="OUTPUT1")],
    ),
    "typed": request(entry(contents=typed(fp32_contents=[1.0, 2.0, 3.0, 4.0]))),
    "strings": request(entry("X", "BYTES", (2, 1)), raw=[STRINGS], model="echo_BYTES"),
    "reshaped": request(entry("X", shape=(1, 3, 2)), raw=[RAW + RAW[:8]], model="reshaped"),
    "no batch": request(entry("X", shape=(2, 2)), raw=[RAW], model="unbatched"),
    "nothing": request(entry("X", shape=(0, 2)), raw=[b""], model="unbatched"),
    "above a frame": floats(20_000),
    "above a window": floats(300_000),
}
MALFORMED = {
    "no message": b"",
    "no protobuf": b"\xff\xff\xff",
    "cut off": good().SerializeToString()[:-3],
    "no UTF-8": b"\x0a\x01\xff",
    "no UTF-8 in the id": good().SerializeToString() + b"\x1a\x01\xff",
    "a length without an end": b"\x0a" + b"\xff" * 11,
}
ODD = {
    "raw first": b"\x3a\x10" + RAW + request(entry()).SerializeToString(),
    "two names": request(entry(), model="nobody").SerializeToString() + good().SerializeToString(),
    "two ids": good().SerializeToString() + b"\x1a\x01a\x1a\x01b",
    "an id at the end": good().SerializeToString() + b"\x1a\x01a",
    "a field of tomorrow": good().SerializeToString() + b"\x78\x01",
    "a long field of tomorrow": good().SerializeToString() + b"\x82\x01\x01a",
    "a padded length": b"\x0a\x86\x00linear" + good().SerializeToString()[8:],
}


# --- answers ----------------------------------------


def test_good_answers_are_the_same_to_the_byte():
    """Again and again: new, seen once, and from a plan."""

    async def use(server):
        for name, message in GOOD.items():
            answer = await server.same(message.SerializeToString(), times=4)
            assert answer[0] == "OK", (name, answer)
        plans = server.inference.find("linear", "").grpc_plans
        assert len(plans)
        answer = pb.ModelInferResponse.FromString(
            (await server.same(GOOD["plain"].SerializeToString()))[2]
        )
        assert (
            answer.raw_output_contents[0]
            == linear(np.frombuffer(RAW, np.float32)[None])[0].tobytes()
        )

    run(use)


def test_a_plan_takes_calls_that_differ_in_their_ids_and_bytes():
    async def use(server):
        for number in range(6):
            row = np.full((1, 4), number, np.float32)
            message = request(entry(), raw=[row.tobytes()], id=f"call {number}")
            answer = await server.same(message.SerializeToString())
            reply = pb.ModelInferResponse.FromString(answer[2])
            assert (reply.id, reply.raw_output_contents[0]) == (
                f"call {number}",
                linear(row)[0].tobytes(),
            )
        assert len(server.inference.find("linear", "").grpc_plans) == 1

    run(use)


def test_a_planned_call_with_other_sizes_goes_the_ordinary_road():
    async def use(server):
        for _ in range(3):
            await server.same(good().SerializeToString())
        for raw in ([RAW[:-1]], [RAW + b"\0"], [], [RAW, RAW], [b""]):
            code, details, _, _ = await server.same(request(entry(), raw=raw).SerializeToString())
            assert code == "INVALID_ARGUMENT" and details

    run(use)


@pytest.mark.parametrize("messages", [MALFORMED, ODD], ids=["malformed", "odd"])
def test_messages_that_no_client_of_ours_writes(messages):
    async def use(server):
        for message in messages.values():
            await server.same(message, times=3)

    run(use)


def test_errors_are_the_same_to_the_letter():
    async def use(server):
        for message, code, text in ABUSE:
            if len(message.model_name) < 100:
                for named in ("", "7"):
                    message.id = named
                    answer = await server.same(message.SerializeToString(), times=3)
                    if message.model_name not in ("full", "crashing"):
                        assert answer[0] == code and text in answer[1], answer
            message.id = ""
            answer = await server.same(good().SerializeToString())
            assert answer[0] == "OK"

    run(use)


@pytest.mark.parametrize("name", ["é" * 9000, "50% of {x}\r\n\t\0", " spaces ", "", "%41"])
def test_texts_arrive_as_they_were_meant(name):
    async def use(server):
        answer = await server.same(request(entry(name), raw=[RAW]).SerializeToString())
        assert answer[0] == "INVALID_ARGUMENT"

    run(use)


def test_a_full_queue_and_a_closing_server():
    async def use(server):
        model = server.models["linear"]
        model.held = asyncio.Event()
        calls = [
            asyncio.ensure_future(server.call(road, good().SerializeToString())) for road in ROADS
        ]
        while server.gates["linear"].pending < 1:
            await asyncio.sleep(0.001)
        refused = await server.same(good().SerializeToString(), times=3)
        assert refused[0] == "UNAVAILABLE" and "Exceeds maximum queue size" in refused[1]
        model.held.set()
        assert [(await call)[0] for call in calls] == ["OK", "OK"]
        server.publish(closing=True)
        assert (await server.same(good().SerializeToString()))[0] == "UNAVAILABLE"

    run(use, max_queue_requests=1)


# --- compression and sizes ----------------------------------------


def test_compressed_messages():
    async def use(server):
        for way in (grpc.Compression.Gzip, grpc.Compression.Deflate):
            for message in (good(), floats(100_000), GOOD["strings"]):
                plain = await server.same(message.SerializeToString())
                packed = await server.same(message.SerializeToString(), 3, compression=way)
                assert packed == plain and plain[0] == "OK"

    run(use)


def test_messages_over_the_limit():
    async def use(server):
        at = 65536 - 64
        for size, code in ((65536, "UNKNOWN"), (65537, "RESOURCE_EXHAUSTED"), (10**7, None)):
            answer = await server.same(b"\xff" * size, times=2)
            assert answer[0] == (code or "RESOURCE_EXHAUSTED"), answer[1]
        for way in (grpc.Compression.Gzip, grpc.Compression.Deflate):
            for size in (
                at,
                65537,
                66559,
                66560,
                10**7,
            ):
                await server.same(b"\0" * size, times=2, compression=way)
        assert (await server.same(good().SerializeToString()))[0] == "OK"

    run(use, max_body_bytes=65536, http_max_input_size_bytes=65536)


def test_twenty_megabytes_there_and_back():
    async def use(server):
        message = floats(5_000_000)
        for road in ROADS:
            for _ in range(2):
                code, _, reply, _ = await server.call(road, message.SerializeToString())
                assert code == "OK"
                answer = pb.ModelInferResponse.FromString(reply)
                assert answer.raw_output_contents[0] == message.raw_input_contents[0]

    run(use)


def test_metadata_that_says_nothing_to_us_and_too_much_of_it():
    async def use(server):
        message = good().SerializeToString()
        many = tuple((f"x-{number}", "a" * 20) for number in range(60))
        for metadata in ((("x", "1"), ("y-bin", b"\0\xff")), (("x", "a" * 4000),), many):
            assert (await server.same(message, metadata=metadata))[0] == "OK"
        answer = await server.same(message, metadata=(("x", "a" * 17000),))
        assert answer[0] == "RESOURCE_EXHAUSTED"

    run(use)


# --- deadlines and cancellation ----------------------------------------


async def queued(server, road, **more):
    """A call that waits behind one that runs."""
    model = server.models["linear"]
    model.held = asyncio.Event()
    first = asyncio.ensure_future(server.call(road, good().SerializeToString()))
    while not model.groups:
        await asyncio.sleep(0.001)
    call = server.channels[road].unary_unary(PATH)(good().SerializeToString(), **more)
    while not server.gates["linear"].pending:
        await asyncio.sleep(0.001)
    return model, first, call


@pytest.mark.parametrize("road", ROADS)
def test_a_cancelled_call_is_not_run(road):
    async def use(server):
        model, first, call = await queued(server, road)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        while server.gates["linear"].pending:
            await asyncio.sleep(0.001)
        model.held.set()
        assert (await first)[0] == "OK"
        assert (await server.call(road, good().SerializeToString()))[0] == "OK"
        assert len(model.ran) == 2

    run(use)


@pytest.mark.parametrize("road", ROADS)
def test_control_a_call_that_is_not_cancelled_is_run(road):
    async def use(server):
        model, first, call = await queued(server, road)
        model.held.set()
        assert (await first)[0] == "OK" and await call
        assert len(model.ran) == 2

    run(use)


@pytest.mark.parametrize("road", ROADS)
def test_a_call_past_its_deadline_is_not_run(road):
    async def use(server):
        model, first, call = await queued(server, road, timeout=0.3)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call
        assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        while server.gates["linear"].pending:
            await asyncio.sleep(0.001)
        model.held.set()
        assert (await first)[0] == "OK"
        assert (await server.call(road, good().SerializeToString(), timeout=30))[0] == "OK"
        assert len(model.ran) == 2

    run(use)


def test_a_client_that_leaves_fails_nobody_else():
    async def use(server):
        model = server.models["linear"]
        model.held = asyncio.Event()
        leaver = server.channel(use_local_subchannel_pool=1)
        lost = [leaver.unary_unary(PATH)(good().SerializeToString()) for _ in range(8)]
        while server.gates["linear"].pending + server.gates["linear"].in_flight < 8:
            await asyncio.sleep(0.001)
        calls = [
            asyncio.ensure_future(server.call("lane", good().SerializeToString())) for _ in range(8)
        ]
        while server.gates["linear"].pending < 15:
            await asyncio.sleep(0.001)
        await leaver.close()
        while server.gates["linear"].pending > 8:
            await asyncio.sleep(0.001)
        model.held.set()
        assert {(await call)[0] for call in calls} == {"OK"}
        assert len(model.ran) == 9  # one of the leaver's had begun
        del lost

    run(use)


# --- connections ----------------------------------------


def test_many_calls_at_once_on_one_connection():
    async def use(server):
        async def one(number):
            message = request(
                entry(), raw=[np.full(4, number, np.float32).tobytes()], id=str(number)
            )
            reply = pb.ModelInferResponse.FromString(
                (await server.call("lane", message.SerializeToString()))[2]
            )
            assert reply.id == str(number)
            assert (
                reply.raw_output_contents[0]
                == linear(np.full((1, 4), number, np.float32))[0].tobytes()
            )

        for _ in range(2):
            await asyncio.gather(*(one(number) for number in range(300)))

    run(use)


def test_keepalive_pings():
    options = {
        "keepalive_time_ms": 50,
        "keepalive_timeout_ms": 5000,
        "keepalive_permit_without_calls": 1,
        "http2.max_pings_without_data": 0,
    }

    async def use(server):
        async with server.channel(**options) as channel:
            call = channel.unary_unary(PATH)
            assert await call(good().SerializeToString())
            model = server.models["linear"]
            model.held = asyncio.Event()
            slow = asyncio.ensure_future(_reply(call(good().SerializeToString())))
            await asyncio.sleep(0.5)
            model.held.set()
            assert await slow and await call(good().SerializeToString())

    run(use)


async def _reply(call):
    return await call


def test_the_stock_client_and_all_other_calls():
    async def use(server):
        async with client.InferenceServerClient(server.address()) as triton:
            x = np.array([[1.0, -2.0, 3.0, 0.5]], np.float32)
            for _ in range(3):
                result = await triton.infer("linear", [triton_input("INPUT__0", x, "FP32")])
                np.testing.assert_array_equal(result.as_numpy("OUTPUT__0"), linear(x)[0])
            assert await triton.is_server_live() and await triton.is_model_ready("linear")
            assert (await triton.get_model_config("linear")).config.max_batch_size == 8
        stub = service_pb2_grpc.GRPCInferenceServiceStub(server.channels["lane"])
        answer = await stub.ModelStreamInfer(iter([good()])).read()
        assert answer.infer_response.raw_output_contents[0] == linear(x)[0].tobytes()
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await server.channels["lane"].unary_unary("/inference.GRPCInferenceService/No")(b"")
        assert error.value.details() == "Method not found!"

    run(use)


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nhost: x\r\n\r\n",
        b"\0" * 4096,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff",
        b"",
    ],
)
def test_who_speaks_no_grpc_is_let_go_and_harms_nobody(garbage):
    async def use(server):
        for half in (False, True):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.ports["lane"])
            writer.write(garbage)
            if half or not garbage:
                writer.write_eof()
            with suppress(ConnectionError):
                await asyncio.wait_for(reader.read(), 10)
            writer.close()
            assert (await server.same(good().SerializeToString()))[0] == "OK"

    run(use, http_read_timeout_s=0.5)
