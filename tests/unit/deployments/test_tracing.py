"""Traces at a real gate in virtual time: who is sampled, and what is noted of whom."""

from __future__ import annotations

import asyncio

import pytest

from deployments.errors import ExecutionFailed, QueueFull, Unavailable
from deployments.tracing import GRPC, HTTP, Parent, Sampler, Tracer, carrier, carrier_of
from deployments.types import TraceSettings

from . import gates
from .serving import config, tensor

MODEL = config("m", [tensor("x", "TYPE_FP32", (1,))], [tensor("y", "TYPE_FP32", (1,))])
SETTINGS = TraceSettings(("TIMESTAMPS",), rate=1)


class Kept:
    """A sink that keeps what it gets, and finds any client's trace to be sampled."""

    def __init__(self):
        self.traces = []

    def parent(self, carrier):
        return Parent(int(carrier[0]), 5, carrier[1] != b"no")

    def take(self, trace):
        self.traces.append(trace)


class Client:
    def __init__(self):
        self.heard = []

    def deliver(self, result):
        self.heard.append(result)


def tracer(clock, settings=SETTINGS, sink=None):
    sampler = Sampler(settings)
    return Tracer("m", "3", MODEL, settings, sampler, sink or Kept(), clock=clock)


def names(trace):
    return [name for name, _ in trace.stamps]


def taken(requests, **settings):
    sampler = Sampler(TraceSettings(**settings))
    return [number for number in range(1, requests + 1) if sampler.take()]


async def turns():
    """All that can happen now has happened."""
    for _ in range(10):
        await asyncio.sleep(0)


def test_one_of_so_many_is_sampled_and_no_more_than_the_count():
    assert taken(7, rate=1) == [1, 2, 3, 4, 5, 6, 7]
    assert taken(10, rate=3) == [3, 6, 9]
    assert taken(10, rate=3, count=2) == [3, 6]
    assert taken(3000, rate=1000) == [1000, 2000, 3000]
    assert taken(10, rate=1, count=0) == [] == taken(10, rate=0)
    assert taken(5, rate=2**32 - 1) == []


def test_who_is_forced_is_traced_and_is_none_of_the_count():
    sampler = Sampler(TraceSettings(rate=2, count=1))
    assert [sampler.take(True) for _ in range(5)] == [True] * 5
    sampler = Sampler(TraceSettings(rate=3, count=1))
    assert [sampler.take(forced) for forced in (True, True, False, False)] == [1, 1, 1, 0]
    assert Sampler(TraceSettings(rate=0)).take(True)


@gates.drive
async def test_stamps_are_those_of_the_statistics(clock):
    gate, model, counters = gates.make(clock, slots=0)
    sink, client = Kept(), Client()
    gate.trace(tracer(clock, sink=sink))
    await asyncio.sleep(1)
    arrival = gate.tracer.arrive(HTTP, None, came_s=0.5)
    entry = gate.enqueue(arrival.at(client, "id"), 1, "k", (1,), ("y",))
    await asyncio.sleep(2)
    gate.resize(1)
    await asyncio.sleep(0.5)
    model.finish()
    await turns()
    (trace,), (result,) = sink.traces, client.heard
    at = dict(trace.stamps)
    start = at["QUEUE_START"]
    since = {name: at_ns - start for name, at_ns in trace.stamps}
    assert entry.queued_ns == 1_000_000_000
    assert since == {
        "HTTP_RECV_START": -500_000_000,
        "HTTP_RECV_END": 0,
        "REQUEST_START": 0,
        "QUEUE_START": 0,
        "COMPUTE_START": result.queue_ns,
        "COMPUTE_INPUT_END": result.queue_ns + 1,
        "COMPUTE_OUTPUT_START": result.queue_ns + 3,
        "COMPUTE_END": result.queue_ns + 6,
        "INFER_RESPONSE_COMPLETE": 2_500_000_000,
        "REQUEST_END": 2_500_000_000,
    }
    assert result.queue_ns == 2_000_000_000
    assert (trace.model, trace.version, trace.request_id, trace.error) == ("m", "3", "id", "")
    assert list(since.values()) == sorted(since.values())


@gates.drive
async def test_every_member_of_a_batch_has_its_own_and_knows_its_mates(clock):
    gate, model, _ = gates.make(clock, slots=0)
    sink = Kept()
    gate.trace(tracer(clock, TraceSettings(("TIMESTAMPS",), rate=2), sink))
    clients = [Client() for _ in range(4)]
    for number, client in enumerate(clients):
        arrival = gate.tracer.arrive(GRPC, None)
        waiter = arrival.at(client, b"id%d" % number)
        assert (waiter is client) == (number % 2 == 0)  # who is not sampled waits as ever
        gate.enqueue(waiter, number + 1, "k", (number,), ("y",))
    gate.resize(1)
    await turns()
    model.finish()
    await turns()
    model.finish()
    await turns()
    assert [len(client.heard) for client in clients] == [1, 1, 1, 1]
    assert [trace.request_id for trace in sink.traces] == ["id1", "id3"]
    first, second = sink.traces
    assert model.calls == [[0, 1, 2], [3]]  # rows 1 + 2 + 3, and then no room for 4 more
    assert (first.batch.rows, first.batch.requests) == (6, 3)
    assert first.batch.members == (first.ids,) and second.batch.members == (second.ids,)
    assert first.ids.number + 1 == second.ids.number
    numbers = [*first.ids[1:], *second.ids[1:]]
    assert len(set(numbers)) == 8 and all(numbers)


@gates.drive
async def test_mates_in_one_batch_have_each_others_ids(clock):
    gate, model, _ = gates.make(clock, slots=0)
    sink = Kept()
    gate.trace(tracer(clock, sink=sink))
    for number in range(3):
        gate.enqueue(gate.tracer.arrive(HTTP, None).at(Client(), ""), 1, "k", (number,), ("y",))
    gate.resize(1)
    await turns()
    model.finish()
    await turns()
    ids = tuple(trace.ids for trace in sink.traces)
    assert len(set(ids)) == 3 and {trace.batch.members for trace in sink.traces} == {ids}


@gates.drive
async def test_a_clients_trace_is_its_own(clock):
    sink = Kept()
    one = tracer(clock, TraceSettings(("TIMESTAMPS",), rate=100), sink)
    client = Client()
    forced = one.arrive(HTTP, (b"99", b"")).at(client, "")
    assert forced is not client and forced.ids.trace_id == 99
    assert one.arrive(HTTP, (b"99", b"no")).at(client, "") is client  # it records nothing itself
    assert one.arrive(HTTP, None).at(client, "") is client


@gates.drive
async def test_failures_refusals_and_clients_that_leave_are_traced(clock):
    gate, model, _ = gates.make(clock, slots=1, max_requests=1)
    sink = Kept()
    gate.trace(tracer(clock, sink=sink))

    def come(name):
        return gate.enqueue(gate.tracer.arrive(HTTP, None).at(Client(), name), 1, "k", (0,), ())

    come("fails")
    waits = come("leaves")
    with pytest.raises(QueueFull):
        come("too many")
    gate.withdraw(waits)
    await turns()
    model.finish(error=ExecutionFailed("shapes do not agree"))
    await turns()
    gate.close(Unavailable("gone"))
    with pytest.raises(Unavailable):
        come("too late")
    told = {trace.request_id: trace for trace in sink.traces}
    assert told.keys() == {"fails", "leaves", "too many", "too late"}
    assert "shapes do not agree" in told["fails"].error and told["too late"].error == "gone"
    assert all(trace.error for trace in sink.traces)
    assert names(told["fails"]) == [
        "HTTP_RECV_START",
        "HTTP_RECV_END",
        "REQUEST_START",
        "QUEUE_START",
        "REQUEST_END",
    ]
    assert names(told["too many"]) == names(told["leaves"])
    assert "QUEUE_START" not in names(told["leaves"])


@gates.drive
async def test_a_future_is_waited_on_by_way_of_a_trace(clock):
    gate, model, _ = gates.make(clock)
    sink = Kept()
    gate.trace(tracer(clock, sink=sink))
    arrival = gate.tracer.arrive(GRPC, None)
    kept = gate.submit(
        1, "k", (0,), (), wrap=lambda waiter: arrival.at(waiter, "kept", direct=False)
    )
    gone = gate.submit(
        1, "k", (0,), (), wrap=lambda waiter: arrival.at(waiter, "gone", direct=False)
    )
    gone.cancel()
    await turns()
    model.finish()
    await kept
    assert [(trace.request_id, bool(trace.error)) for trace in sink.traces] == [
        ("gone", True),
        ("kept", False),
    ]
    assert "GRPC_SEND_START" not in names(sink.traces[1])  # nobody knows when, from here


@gates.drive
async def test_no_trouble_of_a_trace_is_its_requests(clock):
    class Broken(Kept):
        def take(self, trace):
            raise RuntimeError("no room")

        def parent(self, carrier):
            raise RuntimeError("cannot read")

    gate, model, counters = gates.make(clock)
    gate.trace(tracer(clock, sink=Broken()))
    client, other = Client(), Client()
    gate.enqueue(gate.tracer.arrive(HTTP, None).at(client, ""), 1, "k", (0,), ())
    assert gate.tracer.arrive(HTTP, (b"1", b"")).at(other, "") is other
    await turns()
    model.finish()
    await turns()
    assert len(client.heard) == 1 and counters.totals().success == 1


@gates.drive
async def test_what_a_trace_keeps_of_a_request_is_bounded_and_can_be_encoded(clock):
    sink = Kept()
    arrival = tracer(clock, sink=sink).arrive(HTTP, None)
    for given in (
        "i" * 70_000,
        b"i" * 70_000,
        "\u20ac" * 300,
        ("\u20ac" * 300).encode(),
        b"\xff" * 300,
    ):
        arrival.at(Client(), given).refused(Unavailable("e" * 70_000))
    assert [(len(t.request_id), len(t.error)) for t in sink.traces] == [(256, 1024)] * 5
    assert [t.request_id[0] for t in sink.traces] == ["i", "i", "\u20ac", "\u20ac", "\ufffd"]
    arrival.at(Client(), "a\ud800b").refused(Unavailable("c\udfffd"))
    assert (sink.traces[-1].request_id, sink.traces[-1].error) == ("a?b", "c?d")
    arrival.at(Client(), "\u20ac" * 256).refused(Unavailable("\u20ac"))
    assert (sink.traces[-1].request_id, sink.traces[-1].error) == ("\u20ac" * 256, "\u20ac")


@gates.drive
async def test_off_again_is_as_before(clock):
    gate, model, _ = gates.make(clock)
    execute = gate._execute
    assert gate.tracer is None
    gate.trace(tracer(clock))
    assert gate._execute != execute
    gate.trace(None)
    assert gate.tracer is None and gate._execute == execute


def test_what_clients_send_is_found_and_left_as_it_is():
    assert carrier({b"traceparent": b"x", b"tracestate": b"y"}) == (b"x", b"y")
    assert carrier({b"tracestate": b"y"}) is None
    assert carrier_of([("TraceParent", "x"), ("k-bin", b"\xff")]) == (b"x", b"")
    assert carrier_of([(b"traceparent", b"x"), ("tracestate", "ü")]) == (b"x", "ü".encode())
    assert carrier_of(()) is None
