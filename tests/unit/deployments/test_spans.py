"""Spans of finished traces, with the SDK's own exporters, and a collector that is not there."""

from __future__ import annotations

import logging
import socket
import threading
import time

import pytest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace.export import (
    SimpleSpanProcessor,
    SpanExporter,
    SpanExportResult,
)
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from configs import tracing as configured
from deployments.errors import InvalidArgument
from deployments.spans import Spans, Watched, otlp
from deployments.tracing import HTTP, Batched, Finished, Ids, Sampler, Trace, Tracer
from deployments.types import TraceSettings
from tests.collector import Collector

from .test_tracing import MODEL, Client

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{SPAN}-01".encode()
STAMPS = (
    ("HTTP_RECV_START", 100),
    ("HTTP_RECV_END", 110),
    ("REQUEST_START", 120),
    ("QUEUE_START", 130),
    ("COMPUTE_START", 140),
    ("COMPUTE_INPUT_END", 150),
    ("COMPUTE_OUTPUT_START", 160),
    ("COMPUTE_END", 170),
    ("INFER_RESPONSE_COMPLETE", 180),
    ("REQUEST_END", 180),
    ("HTTP_SEND_START", 180),
    ("HTTP_SEND_END", 190),
)
IDS = Ids(7, 1 << 100, 21, 22, 23)
SETTINGS = TraceSettings(("TIMESTAMPS",), rate=1)


def finished(parent=None, ids=IDS, batch=None, stamps=STAMPS, error="", request_id="id"):
    return Finished("mlp", "3", request_id, ids, parent, stamps, SETTINGS, batch, (), error)


@pytest.fixture
def memory():
    return InMemorySpanExporter()


@pytest.fixture
def spans(memory):
    return Spans(SimpleSpanProcessor(memory), Resource.create({"service.name": "s"}))


def test_three_spans_one_within_the_other(spans, memory):
    spans.take(finished())
    request, model, compute = memory.get_finished_spans()
    assert [each.name for each in (request, model, compute)] == ["InferRequest", "mlp", "compute"]
    assert request.parent is None and request.kind is SpanKind.SERVER
    assert model.parent == request.context and compute.parent == model.context
    assert {each.context.trace_id for each in (request, model, compute)} == {1 << 100}
    assert [each.context.span_id for each in (request, model, compute)] == [21, 22, 23]
    times = [(each.start_time, each.end_time) for each in (request, model, compute)]
    assert times == [(100, 190), (120, 180), (140, 170)]
    assert all(each.status.status_code is StatusCode.UNSET for each in (request, model, compute))
    assert request.resource.attributes["service.name"] == "s"


def test_stamps_are_events_of_the_span_that_they_are_in(spans, memory):
    spans.take(finished())
    found = [[(e.name, e.timestamp) for e in span.events] for span in memory.get_finished_spans()]
    assert found[0] == [each for each in STAMPS if each[0].startswith("HTTP_")]
    assert found[2] == [each for each in STAMPS if each[0].startswith("COMPUTE_")]
    assert sorted(sum(found, [])) == sorted(STAMPS)


def test_attributes_say_whose_it_is(spans, memory):
    spans.take(finished(batch=Batched(8, 3, (IDS,))))
    for span in memory.get_finished_spans():
        assert dict(span.attributes) == {
            "triton.model_name": "mlp",
            "triton.model_version": 3,
            "triton.request_id": "id",
            "triton.trace_id": 7,
            "triton.trace_parent_id": 0,
            "triton.batch_rows": 8,
            "triton.batch_requests": 3,
        }
    memory.clear()
    spans.take(finished(request_id=""))
    assert all("triton.request_id" not in each.attributes for each in memory.get_finished_spans())


def test_executions_of_one_batch_link_to_one_another(spans, memory):
    others = tuple(Ids(number, number << 64, 1, 2, number) for number in range(50, 300))
    for mates, most in ((others[:3], 3), (others, 16)):
        batch = Batched(len(mates) + 1, len(mates) + 1, (*mates, IDS))
        for ids in (IDS, *mates):
            memory.clear()
            spans.take(finished(ids=ids, batch=batch))
            request, model, compute = memory.get_finished_spans()
            linked = [(link.context.trace_id, link.context.span_id) for link in compute.links]
            wanted = [mate for mate in batch.members if mate is not ids][:most]
            assert linked == [(mate.trace_id, mate.compute) for mate in wanted]
            assert not request.links and not model.links


def test_a_clients_span_is_the_parent(spans, memory):
    parent = spans.parent((PARENT, b"vendor=1"))
    assert f"{parent.trace_id:032x}-{parent.span_id:016x}" == f"{TRACE}-{SPAN}"
    assert parent.sampled and parent.state.get("vendor") == "1"
    spans.take(finished(parent, IDS._replace(trace_id=parent.trace_id)))
    request, model, _ = memory.get_finished_spans()
    assert request.parent.span_id == parent.span_id and request.parent.is_remote
    assert request.context.trace_id == parent.trace_id == model.context.trace_id
    assert model.context.trace_state.get("vendor") == "1"


def test_a_client_that_records_nothing_says_so(spans):
    assert not spans.parent((PARENT[:-1] + b"0", b"")).sampled


@pytest.mark.parametrize(
    "malformed",
    [
        b"",
        b"x",
        b"00",
        PARENT[:-1],
        PARENT + b"0",
        PARENT + b"-more",  # version 00 has four parts
        b"ff" + PARENT[2:],
        f"00-{'0' * 32}-{SPAN}-01".encode(),
        f"00-{TRACE}-{'0' * 16}-01".encode(),
        PARENT.replace(b"a", b"g"),
        PARENT.replace(b"-", b"_"),
        PARENT + b", " + PARENT,  # sent twice
        b"\xff" * 55,
        PARENT + b"-" + b"x" * 60_000,
        b"0" * 65_536,
    ],
)
def test_what_is_malformed_counts_as_absent(spans, malformed):
    assert spans.parent((malformed, b"")) is None
    assert spans.parent((PARENT, b"")) is not None  # control


@pytest.mark.parametrize("state", [b"x" * 100_000, b"\xff\xfe", b",,,", b"a=" * 5000, b"="])
def test_a_bad_tracestate_costs_only_itself(spans, state):
    assert spans.parent((PARENT, state)).sampled


def test_failures_are_errors(spans, memory):
    stamps = tuple(each for each in STAMPS if not each[0].startswith("COMPUTE_"))
    spans.take(finished(stamps=stamps, error="boom"))
    found = memory.get_finished_spans()
    assert [span.name for span in found] == ["InferRequest", "mlp"]
    assert {span.status.status_code for span in found} == {StatusCode.ERROR}
    assert {span.status.description for span in found} == {"boom"}


class Flaky(SpanExporter):
    def __init__(self):
        self.good, self.raises = True, False

    def export(self, spans):
        if self.raises:
            raise OSError("no such host")
        return SpanExportResult.SUCCESS if self.good else SpanExportResult.FAILURE

    def shutdown(self):
        pass


def test_lost_spans_are_told_of_once_until_they_go_again():
    told, flaky = [], Flaky()
    watched = Watched(flaky, lambda: told.append("lost"))
    states = [(1, 0), (0, 0), (0, 0), (0, 1), (1, 0), (0, 1), (0, 0)]
    counts = []
    for good, raises in states:
        flaky.good, flaky.raises = bool(good), bool(raises)
        watched.export([])
        counts.append(len(told))
    assert counts == [0, 1, 1, 1, 1, 2, 2]


def test_a_collector_that_is_not_there_costs_spans_and_one_line(caplog):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]  # nobody listens
        entries = ["mode=opentelemetry", f"opentelemetry,url=http://user:secret@127.0.0.1:{port}/"]
        entries += ["opentelemetry,bsp_schedule_delay=1", "opentelemetry,bsp_max_queue_size=4"]
        sink = otlp(configured.parse([*entries, "opentelemetry,bsp_max_export_batch_size=2"]))
        with caplog.at_level(logging.DEBUG):
            for _ in range(50):
                sink.take(finished())
            sink.close(0.2)
            end_s = time.monotonic() + 10
            while "spans are lost" not in caplog.text and time.monotonic() < end_s:
                time.sleep(0.01)  # its thread hears of the end by itself
    ours = [record for record in caplog.records if record.name == "manta.trace"]
    lines = [record.getMessage() for record in ours]
    assert f"spans are lost: the collector at 127.0.0.1:{port} does not take them" in lines
    assert len(lines) == len(set(lines)) <= 2 and "secret" not in caplog.text
    assert not [each for each in caplog.records if each.name.startswith("opentelemetry.")]


def sink_of(url, *entries):
    given = ["mode=opentelemetry", f"opentelemetry,url={url}", *entries]
    return otlp(configured.parse([*given, "opentelemetry,bsp_schedule_delay=600000"]))


def test_what_waits_is_sent_when_the_router_ends():
    collector = Collector()
    try:
        sink = sink_of(collector.url, "opentelemetry,resource=zone=a")
        sink.take(finished(request_id="last"))
        assert collector.spans == []  # it is not time yet
        sink.close(10)
        assert {span.name for span in collector.spans} == {"InferRequest", "mlp", "compute"}
        (resource,) = collector.resources
        assert (resource["service.name"], resource["zone"]) == ("triton-inference-server", "a")
    finally:
        collector.close()


def test_lone_surrogates_cost_no_span_and_no_line(caplog):
    """JSON may bring them; protobuf takes none."""
    collector = Collector()
    try:
        sink = sink_of(collector.url)
        arrival = Tracer("mlp", "3", MODEL, SETTINGS, Sampler(SETTINGS), sink).arrive(HTTP, None)
        traced = arrival.at(Client(), "a\ud800b")
        assert isinstance(traced, Trace)
        traced.refused(InvalidArgument("c\udfffd"))
        with caplog.at_level(logging.DEBUG):
            sink.take(finished(request_id="\ud800"))  # control: a raw one is lost
            sink.close(10)
        found = [
            (told(span).get("triton.request_id"), span.status.message) for span in collector.spans
        ]
        assert found == [("a?b", "c?d")] * 2 + [(None, "")] * 3
        assert not [each for each in caplog.records if each.name.startswith("opentelemetry.")]
    finally:
        collector.close()


def told(span):
    return {pair.key: pair.value.string_value for pair in span.attributes}


def test_a_collector_that_does_not_answer_holds_up_no_end():
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        sink = sink_of(f"http://127.0.0.1:{mute.getsockname()[1]}/")
        sink.take(finished())
        thread = threading.Thread(target=sink.close, args=(0.2,), daemon=True)
        thread.start()
        thread.join(8)  # the exporter itself would wait for 10 s
        assert not thread.is_alive()
