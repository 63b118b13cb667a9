"""Every road of a request, with and without the lanes: each one that is traced has its spans, under
the trace that its client has sent along."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import numpy as np
import pytest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from configs import tracing as configured
from deployments.grpc_stubs import service_pb2 as pb
from deployments.grpc_stubs import service_pb2_grpc
from deployments.spans import Spans, otlp
from deployments.traced_tensors import described
from deployments.tracing import Sampler, Tracer
from deployments.types import TraceSettings

from . import grpc_lanes, lanes
from .grpc_lanes import ROADS, needs_haproxy
from .lanes import X, binary
from .serving import fail, linear
from .test_grpc import RAW, entry, request
from .test_tracing import Kept

ROW = np.ones((1, 4), np.float32).tobytes()
ONE = {"inputs": [{**X, "parameters": {"binary_data_size": 16}}]}
ALL = {**ONE, "parameters": {"binary_data_output": True}}
PLAIN = {"inputs": [{**X, "data": [1, 2, 3, 4]}]}
TOP = {**ONE, "outputs": [{"name": "OUTPUT__0", "parameters": {"classification": 1}}]}


def parent(number):
    return f"00-{number:032x}-{7:016x}-01"


def traced(server, sink, model="linear", levels=("TIMESTAMPS",), rate=2**32 - 1):
    """Of all requests those that come with a trace of their own, unless a rate is given."""
    settings = TraceSettings(levels, rate=rate)
    gate = server.gates[model]
    config = server.models[model].config
    gate.trace(Tracer(model, "1", config, settings, Sampler(settings), sink))


class Memory(Spans):
    """A sink, and the traces that arrived in it: names of spans by trace."""

    def __init__(self):
        self.exporter = InMemorySpanExporter()
        super().__init__(SimpleSpanProcessor(self.exporter), Resource.create({}))

    def found(self):
        by_trace: dict[int, list] = {}
        for span in self.exporter.get_finished_spans():
            by_trace.setdefault(span.context.trace_id, []).append(span)
        return by_trace


def check(memory, numbers, ids, edge):
    """A trace for each number, whose spans are a chain under the client's."""
    found = memory.found()
    assert found.keys() == set(numbers)
    for number, given in zip(numbers, ids, strict=True):
        spans = found[number]
        assert [span.name for span in spans] == ["InferRequest", "linear", "compute"]
        assert [span.parent.span_id for span in spans] == [7, *(s.context.span_id for s in spans)][
            :3
        ]
        assert {span.attributes.get("triton.request_id", "") for span in spans} == {given}
        assert all(event.name.startswith(edge) for event in spans[0].events)


def test_http_with_and_without_the_lane():
    async def use(server):
        memory = Memory()
        traced(server, memory)
        sent, number = {}, 0
        for road in ("lane", "ordinary"):
            client = await server.connect(road)
            for document in (ALL, ALL, ALL, PLAIN, TOP):  # the third of a kind has a plan
                number += 1
                sent[number] = f"{road}{number}" if document is not ALL else ""
                text = {**document, "id": sent[number]} if sent[number] else document
                tensors = () if document is PLAIN else (ROW,)
                head, _ = await client.ask(binary(text, *tensors, traceparent=parent(number)))
                assert b" 200 " in head
                await client.ask(binary(text, *tensors))  # and one that is not traced
        check(memory, list(sent), list(sent.values()), "HTTP_")

    lanes.run(use)


def test_http_in_pieces_and_in_plain_json():
    async def use(server):
        memory = Memory()
        traced(server, memory)
        client = await server.connect()
        data = binary({**ALL, "id": "a"}, ROW, traceparent=parent(1))
        client.send(data[:-20])
        await asyncio.sleep(0.05)
        await client.ask(data[-20:])
        body = json.dumps({"INPUT__0": [1, 2, 3, 4], "id": "b"}).encode()
        for number, verb in ((2, "generate"), (3, "generate_stream")):
            path = f"/v2/models/linear/{verb}"
            await client.ask(lanes.request(body, path, traceparent=parent(number)))
        check(memory, [1, 2, 3], ["a", "b", "b"], "HTTP_")
        (first, *_) = memory.found()[1]
        at = {event.name: event.timestamp for event in first.events}
        assert at["HTTP_RECV_START"] < at["HTTP_RECV_END"] <= at["HTTP_SEND_START"]

    lanes.run(use)


@pytest.mark.parametrize("given", ["", "x", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "a" * 3000])
def test_a_malformed_traceparent_is_no_traceparent(given):
    async def use(server):
        memory = Memory()
        traced(server, memory)
        for road in ("lane", "ordinary"):
            client = await server.connect(road)
            head, _ = await client.ask(binary(ALL, ROW, traceparent=given))
            assert b" 200 " in head
        assert memory.found() == {}

    lanes.run(use)


def test_what_a_lane_remembers_of_a_head_outlives_the_settings():
    async def use(server):
        memory, client = Memory(), await server.connect()
        data = binary(ALL, ROW, traceparent=parent(5))
        for on in (False, False, True, False):
            if on:
                traced(server, memory)
            else:
                server.gates["linear"].trace(None)
            await client.ask(data)
        check(memory, [5], [""], "HTTP_")

    lanes.run(use)


def test_a_collector_that_never_answers_costs_no_request_and_no_more_than_its_queue():
    async def use(server):
        with socket.socket() as mute:
            mute.bind(("127.0.0.1", 0))
            mute.listen()  # it connects whoever comes, and reads nothing
            entries = ["mode=opentelemetry", "opentelemetry,bsp_max_queue_size=16"]
            entries += ["opentelemetry,bsp_max_export_batch_size=4"]
            entries += [f"opentelemetry,url=http://127.0.0.1:{mute.getsockname()[1]}/"]
            sink = otlp(configured.parse(entries))
            traced(server, sink, rate=1)
            client = await server.connect()
            for _ in range(200):
                head, _ = await client.ask(binary(ALL, ROW))
                assert b" 200 " in head
            assert next(server.gates["linear"].tracer.numbers) == 201  # all of them were traced
            processor: Any = sink._processor
            assert 0 < len(processor._batch_processor._queue) <= 16
            server.gates["linear"].trace(None)
            await asyncio.to_thread(sink.close, 0.2)

    lanes.run(use)


def test_who_is_refused_for_what_it_says_is_no_trace_and_who_fails_is_one():
    async def use(server):
        kept = Kept()
        traced(server, kept, rate=1)
        client = await server.connect()
        bad = {"inputs": [{**X, "shape": [1, 5], "data": [1] * 5}]}
        head, _ = await client.ask(binary(bad))
        assert b" 400 " in head and kept.traces == []
        server.models["linear"].function = fail
        head, _ = await client.ask(binary(PLAIN))
        assert b" 200 " not in head
        (trace,) = kept.traces
        assert "shapes do not agree" in trace.error

    lanes.run(use)


def test_tensors_are_those_of_the_request_and_of_its_answer():
    async def use(server):
        kept = Kept()
        traced(server, kept, levels=("TENSORS",), rate=1)
        for road in ("lane", "ordinary"):
            client = await server.connect(road)
            for _ in range(3):
                await client.ask(binary(ALL, ROW))
        (wanted,) = linear(np.ones((1, 4), np.float32))
        for trace in kept.traces:
            assert trace.stamps == ()
            given, answered = map(described, trace.tensors)
            assert given == {
                "name": "INPUT__0",
                "data": "1.0,1.0,1.0,1.0",
                "shape": "1,4",
                "dtype": "FP32",
            }
            assert (answered["name"], answered["shape"]) == ("OUTPUT__0", "1,3")
            found = [float(each) for each in answered["data"].split(",")]
            assert np.allclose(found, wanted.reshape(-1))
        assert len(kept.traces) == 6

    lanes.run(use)


@needs_haproxy
def test_grpc_with_and_without_the_lane():
    async def use(server):
        memory = Memory()
        traced(server, memory)
        sent, number = {}, 0
        top = pb.ModelInferRequest.InferRequestedOutputTensor(name="OUTPUT__0")
        top.parameters["classification"].int64_param = 1
        for road in ROADS:
            for outputs in ([], [], [], [top]):
                number += 1
                sent[number] = f"{road}{number}"
                message = request(entry(), raw=[RAW], id=sent[number], outputs=outputs)
                data = message.SerializeToString()
                for metadata in ((("traceparent", parent(number)),), ()):
                    status, text, *_ = await server.call(road, data, metadata=metadata)
                    assert status == "OK", text
        check(memory, list(sent), list(sent.values()), "GRPC_")

    grpc_lanes.run(use)


@needs_haproxy
def test_a_malformed_traceparent_of_grpc_is_none():
    async def use(server):
        memory = Memory()
        traced(server, memory)
        data = request(entry(), raw=[RAW]).SerializeToString()
        for road in ROADS:
            for given in ("x", "a" * 3000, parent(1)[:-1]):
                status, *_ = await server.call(road, data, metadata=(("traceparent", given),))
                assert status == "OK"
        assert memory.found() == {}

    grpc_lanes.run(use)


@needs_haproxy
def test_all_requests_of_a_stream_are_in_the_streams_trace():
    async def use(server):
        for road in ROADS:
            memory = Memory()
            traced(server, memory)
            stub = service_pb2_grpc.GRPCInferenceServiceStub(server.channels[road])
            messages = [request(entry(), raw=[RAW], id=f"{number}") for number in range(3)]
            call = stub.ModelStreamInfer(iter(messages), metadata=(("traceparent", parent(9)),))
            assert len([answer async for answer in call]) == 3
            requests = [span for span in memory.found()[9] if span.name == "InferRequest"]
            assert [span.attributes["triton.request_id"] for span in requests] == ["0", "1", "2"]
            assert {span.parent.span_id for span in requests} == {7}

    grpc_lanes.run(use)
