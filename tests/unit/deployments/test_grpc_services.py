"""The gRPC port as clients see it: streams, health and reflection, by HAProxy and without it."""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing, asynccontextmanager, suppress

import grpc
import numpy as np
import pytest
import tritonclient.grpc.aio as client
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from deployments import grpc_stream
from deployments.grpc_lane import PATH
from deployments.grpc_services import PROXY_METHODS, GrpcServicer
from deployments.grpc_stream import FINAL
from deployments.grpc_stubs import service_pb2 as pb
from deployments.grpc_stubs import service_pb2_grpc

from .grpc_lanes import ROADS, needs_haproxy, run
from .serving import Server, linear
from .test_grpc import X, entry, good, request, triton_input
from .test_grpc_lane import floats
from .test_grpc_stream import Client, ask, told, until

pytestmark = needs_haproxy
OPEN_ENDED = (("triton_grpc_error", "true"),)


def stub(channel):
    return service_pb2_grpc.GRPCInferenceServiceStub(channel)


async def answers(call):
    return [answer async for answer in call]


def on_both_roads(use, **settings):
    """`await use(server, channel)`, each with a server of its own."""
    for road in ROADS:

        async def one(server, road=road):
            await use(server, server.channels[road])

        run(one, **settings)


# --- streams ----------------------------------------


def test_a_stream_answers_in_order_and_ends_when_its_client_has_no_more():
    async def use(server, channel):
        slow, fast = server.models["linear"], server.models["add_sub"]
        slow.held = asyncio.Event()
        sent = Client()
        sent.send(ask(1), ask(2, "add_sub"), ask(3, "nobody"), ask(4))
        sent.close()
        call = stub(channel).ModelStreamInfer(sent.requests())
        task = asyncio.ensure_future(answers(call))
        await until(lambda: fast.ran)
        slow.held.set()
        got = await task
        assert [answer.infer_response.id for answer in got] == ["1", "2", "3", "4"]
        assert "unknown model: 'nobody'" in got[2].error_message
        assert all(answer.infer_response.parameters[FINAL].bool_param for answer in got)
        assert await call.code() is grpc.StatusCode.OK

    on_both_roads(use)


def test_the_stock_client_streams():
    async def use(server):
        for road in ROADS:

            async def requests():
                for number in range(5):
                    x = X + number
                    yield {
                        "model_name": "linear" if number != 3 else "nobody",
                        "inputs": [triton_input("INPUT__0", x, "FP32")],
                        "request_id": str(number),
                    }

            async with client.InferenceServerClient(server.address(road)) as triton:
                got = [pair async for pair in triton.stream_infer(requests())]
            assert len(got) == 5 and "is not found" in got[3][1].message()
            for number in (0, 1, 2, 4):
                result, error = got[number]
                assert error is None
                np.testing.assert_array_equal(result.as_numpy("OUTPUT__0"), linear(X + number)[0])
                assert result.get_response().id == str(number)

    run(use)


def test_the_first_error_ends_a_stream_that_asks_for_it():
    async def use(server, channel):
        sent = Client()
        sent.send(ask(1), ask(2, "nobody"), ask(3))
        call = stub(channel).ModelStreamInfer(sent.requests(), metadata=OPEN_ENDED)
        assert told(await call.read())[0] == "1"
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call.read()
        assert error.value.code() is grpc.StatusCode.NOT_FOUND
        assert "is not found" in error.value.details()

    on_both_roads(use)


@pytest.mark.parametrize("how", ["cancel", "deadline", "lost"])
def test_what_waits_is_not_run_when_the_stream_is_gone(how):
    async def use(server, channel):
        model, gate = server.models["linear"], server.gates["linear"]
        model.held = asyncio.Event()
        sent = Client()
        sent.send(*map(ask, range(5)))
        road = next(road for road, one in server.channels.items() if one is channel)
        own = server.channel(road)
        more = {"timeout": 3.0} if how == "deadline" else {}
        call = stub(own).ModelStreamInfer(sent.requests(), **more)
        reading = asyncio.ensure_future(call.read())
        await until(lambda: gate.pending == 4)
        if how == "cancel":
            call.cancel()
        elif how == "lost":
            await own.close()
        await until(lambda: gate.pending == 0)
        with suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
            await reading
        model.held.set()
        assert await channel.unary_unary(PATH)(good().SerializeToString())
        assert len(model.ran) == 2  # one had begun, and the last
        await until(lambda: not server.servicer._streams)
        await own.close()

    on_both_roads(use)


@pytest.mark.parametrize(("count", "size"), [(120, 1 << 16), (8, 5 << 20)])
def test_a_client_may_send_much_before_it_reads_and_large_answers_get_away(
    monkeypatch, count, size
):
    """On one connection: what lets answers away is behind the requests."""
    monkeypatch.setattr(grpc_stream, "MAX_BYTES", 1 << 20)

    async def use(server, channel):
        async def requests():
            for number in range(count):
                yield floats(size, id=str(number))

        got = []
        async for answer in stub(channel).ModelStreamInfer(requests()):
            got.append(answer.infer_response.id)
            assert len(answer.infer_response.raw_output_contents[0]) == 4 * size
        assert got == [str(number) for number in range(count)]

    on_both_roads(use, grpc_max_response_pool_size=4)


def test_other_calls_go_on_beside_a_stream_that_is_not_read_from():
    async def use(server, channel):
        sent = Client()
        sent.send(*(floats(1 << 16, id=str(number)) for number in range(40)))
        call = stub(channel).ModelStreamInfer(sent.requests())
        await until(lambda: len(server.models["echo_FP32"].ran) > 8)
        for _ in range(3):
            assert (await stub(channel).ServerLive(pb.ServerLiveRequest(), timeout=20)).live
            assert await channel.unary_unary(PATH)(good().SerializeToString(), timeout=20)
        second = Client()
        second.send(ask(1))
        second.close()
        other = stub(channel).ModelStreamInfer(second.requests(), timeout=20)
        assert [told(answer) for answer in await answers(other)] == [("1", "")]
        sent.close()
        assert len(await answers(call)) == 40

    on_both_roads(use)


def test_while_its_server_leaves_a_stream_is_answered_and_ended():
    async def use(server, channel):
        model = server.models["linear"]
        model.held = asyncio.Event()
        busy, idle = Client(), Client()
        busy.send(ask(1))
        calls = [stub(channel).ModelStreamInfer(one.requests()) for one in (busy, idle)]
        first = asyncio.ensure_future(calls[0].read())
        idle.send(ask(2, "add_sub"))
        assert told(await calls[1].read()) == ("2", "")  # from here on it has nothing to do
        await until(lambda: model.groups and len(server.servicer._streams) == 2)
        server.servicer.leave()
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await calls[1].read()
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        assert error.value.details().startswith("GRPC server is shutting down")
        assert not first.done()
        model.held.set()
        assert told(await first) == ("1", "")
        for call in (calls[0], stub(channel).ModelStreamInfer(Client().requests())):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await call.read()
            assert error.value.code() is grpc.StatusCode.UNAVAILABLE

    on_both_roads(use)


def test_metadata_of_a_stream_are_forwarded_or_refused_as_those_of_a_call():
    """A parameter that the server would answer with a refusal shows that it has come."""

    async def use(server, channel):
        good_one = ask(1)
        for metadata, text in (
            ((("x-a", "1"),), ""),
            ((("timeout", "1"),), "'timeout' is reserved for Triton usage"),
        ):
            call = stub(channel).ModelStreamInfer(iter([good_one]), metadata=metadata)
            try:
                assert told(await call.read()) == ("1", "") and not text
            except grpc.aio.AioRpcError as error:
                assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
                assert text and text in error.details()

    on_both_roads(use, grpc_header_forward_pattern="^x-|^timeout$")


def test_a_message_that_is_none_ends_its_stream_as_it_ends_a_call():
    async def use(server, channel):
        path = "/inference.GRPCInferenceService/ModelStreamInfer"
        call = channel.stream_stream(path)()
        await call.write(good().SerializeToString())
        assert await call.read()
        await call.write(b"\xff\xff")
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call.read()
        assert error.value.code() is grpc.StatusCode.UNKNOWN
        assert "DecodeError" in error.value.details()

    on_both_roads(use)


# --- compression of answers ----------------------------------------


@asynccontextmanager
async def counted(port):
    """A port that leads there, and the bytes that have come from there."""
    count, tasks, loop = [0], [], asyncio.get_running_loop()

    async def pipe(source, sink, add):
        with suppress(ConnectionError):
            while data := await source.read(1 << 16):
                add(len(data))
                sink.write(data)
        sink.close()

    async def connected(reader, writer):
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)

        def add(size):
            count[0] += size

        tasks.append(loop.create_task(pipe(reader, far_writer, lambda size: None)))
        tasks.append(loop.create_task(pipe(far_reader, writer, add)))

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], count
    finally:
        server.close()
        for task in tasks:
            task.cancel()


@pytest.mark.parametrize("level", ["none", "low", "medium", "high"])
def test_answers_are_compressed_as_much_as_wanted_on_both_roads(level):
    sizes = (100_000, 2_000)
    zeros = {
        n: request(entry("X", shape=(1, n)), raw=[bytes(4 * n)], model="echo_FP32") for n in sizes
    }

    async def use(server):
        for road in ROADS:
            for streamed in (False, True):
                async with counted(server.ports[road]) as (port, count):
                    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                        for n in sizes * 2:
                            before = count[0]
                            if streamed:
                                call = stub(channel).ModelStreamInfer(iter([zeros[n]]))
                                answer = (await call.read()).infer_response
                                assert await call.read() is grpc.aio.EOF
                            else:
                                answer = await stub(channel).ModelInfer(zeros[n])
                            assert answer.raw_output_contents[0] == bytes(4 * n)
                            came = count[0] - before
                            assert (came < 4 * n) == (level != "none"), (road, streamed, came)
        message = good().SerializeToString()  # too small to become smaller
        assert (await server.same(message, times=3))[0] == "OK"
        noisy = floats(50_000).SerializeToString()
        assert (await server.same(noisy, times=3))[0] == "OK"

    run(use, grpc_infer_response_compression_level=level)


# --- health and reflection ----------------------------------------


def test_health_follows_readiness_whatever_service_is_asked_for():
    async def use(server, channel):
        health = health_pb2_grpc.HealthStub(channel)
        serving = health_pb2.HealthCheckResponse.SERVING
        for service in ("", "inference.GRPCInferenceService", "nothing"):
            reply = await health.Check(health_pb2.HealthCheckRequest(service=service))
            assert reply.status == serving
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await health.Watch(health_pb2.HealthCheckRequest()).read()
        assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED
        server.publish(ready=False)
        reply = await health.Check(health_pb2.HealthCheckRequest())
        assert reply.status == health_pb2.HealthCheckResponse.NOT_SERVING
        server.publish()
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == serving
        server.inference.leave()
        reply = await health.Check(health_pb2.HealthCheckRequest())
        assert reply.status == health_pb2.HealthCheckResponse.NOT_SERVING

    on_both_roads(use)


def test_reflection_tells_the_services_and_their_messages():
    ask_for = reflection_pb2.ServerReflectionRequest

    async def use(server, channel):
        reflect = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
        questions = [ask_for(list_services="")]
        questions.append(ask_for(file_containing_symbol="inference.GRPCInferenceService"))
        questions.append(ask_for(file_containing_symbol="inference.ModelConfig"))
        questions.append(ask_for(file_containing_symbol="grpc.health.v1.Health"))
        listed, inference, config, health = await answers(reflect(iter(questions)))
        names = {service.name for service in listed.list_services_response.service}
        assert names == {
            "inference.GRPCInferenceService",
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
        }
        files = {}
        for reply in (inference, config, health):
            for data in reply.file_descriptor_response.file_descriptor_proto:
                file = descriptor_pb2.FileDescriptorProto.FromString(data)
                files[file.name] = file
        methods = [
            method.name
            for file in files.values()
            for service in file.service
            for method in service.method
        ]
        assert {"ModelInfer", "ModelStreamInfer", "Check"} <= set(methods)
        assert all(set(file.dependency) <= set(files) for file in files.values())

    on_both_roads(use)


# --- Serve's proxy ----------------------------------------


class Ingress:
    """As the Router is, for Serve's proxy."""

    def __init__(self, inference):
        self.grpc_verbs = GrpcServicer(inference)


class ProxyContext:
    """What the proxy gives, and reads back."""

    def __init__(self, *metadata):
        self.metadata, self.code, self.details = metadata, None, ""

    def invocation_metadata(self):
        return list(self.metadata)

    def set_code(self, code):
        self.code = code

    def set_details(self, details):
        self.details = details


async def through_proxy(server, context, *messages):
    sent = Client()
    sent.send(*messages)
    sent.close()
    stream = PROXY_METHODS["ModelStreamInfer"](Ingress(server.inference), sent.requests(), context)
    async with aclosing(stream) as stream:
        return [told(answer) async for answer in stream]


def test_a_stream_through_serves_proxy():
    async def use():
        server, context = Server(), ProxyContext()
        got = await through_proxy(server, context, ask(1), ask(2, "nobody"), ask(3))
        assert [id for id, _ in got] == ["1", "2", "3"] and "is not found" in got[1][1]
        assert context.code is None
        context = ProxyContext(*OPEN_ENDED)
        with pytest.raises(Exception, match="is not found"):
            await through_proxy(server, context, ask(1), ask(2, "nobody"), ask(3))
        assert context.code is grpc.StatusCode.NOT_FOUND and "is not found" in context.details

    asyncio.run(use())


def test_restrictions_hold_for_serves_proxy(caplog):
    name = "triton-grpc-protocol-k"
    server = Server(grpc_restricted_protocol=["inference,health:k=v"])
    refused = "This API is restricted, expecting header 'triton-grpc-protocol-k'"

    async def use():
        for context, text in ((ProxyContext(), refused), (ProxyContext((name, "v")), "")):
            method = PROXY_METHODS["ModelInfer"]
            reply = await method(Ingress(server.inference), good(), grpc_context=context)
            assert context.details == text and bool(reply.raw_output_contents) == (not text)
        context = ProxyContext((name, "w"))
        check = PROXY_METHODS["Check"]
        reply = await check(Ingress(server.inference), health_pb2.HealthCheckRequest(), context)
        assert (context.code, reply.status) == (grpc.StatusCode.UNAVAILABLE, 0)
        with pytest.raises(Exception, match="This API is restricted"):
            await through_proxy(server, context, ask(1))
        assert await through_proxy(server, ProxyContext((name, "v")), ask(1)) == [("1", "")]
        context = ProxyContext()
        live = PROXY_METHODS["ServerLive"]
        await live(Ingress(server.inference), pb.ServerLiveRequest(), context)
        assert context.code is grpc.StatusCode.UNAVAILABLE
        metadata = PROXY_METHODS["ServerMetadata"]
        open_one = ProxyContext()
        await metadata(Ingress(server.inference), pb.ServerMetadataRequest(), open_one)
        assert open_one.code is None

    with caplog.at_level(logging.WARNING):
        asyncio.run(use())
    assert caplog.text == ""
