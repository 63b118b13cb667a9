"""One traced request: whether it is one, when what happened to it, and what it carried.

A `Trace` stands at the gate in its waiter's place; one that is not sampled costs nothing more. The
stamps are those that statistics have. Made by the roads, where a gate has a `tracer`; where traces
go is the business of a Sink: `trace_file` or `spans`. Lives on the Router's event loop.
"""

from __future__ import annotations

import itertools
import logging
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias

from configs.model import ModelConfig

from .batcher import Executor, MemberResult, Outcome
from .contract import Contract
from .errors import Cancelled, MantaError
from .scheduler import Entry, Group
from .traced_tensors import TracedTensor, inputs_of, outputs_of
from .types import TraceSettings

logger = logging.getLogger("manta.trace")

# The W3C's two headers, as they came: traceparent and tracestate.
Carrier: TypeAlias = tuple[bytes, bytes]
Stamps: TypeAlias = tuple[tuple[str, int], ...]
TIMESTAMPS, TENSORS = "TIMESTAMPS", "TENSORS"
MAX_ERROR_CHARS, MAX_ID_CHARS = 1024, 256
LEFT = "the client is gone"


class Edge(NamedTuple):
    """What Triton calls the stamps of a protocol."""

    read_start: str
    read_end: str
    send_start: str
    send_end: str


HTTP = Edge("HTTP_RECV_START", "HTTP_RECV_END", "HTTP_SEND_START", "HTTP_SEND_END")
GRPC = Edge("GRPC_WAITREAD_START", "GRPC_WAITREAD_END", "GRPC_SEND_START", "GRPC_SEND_END")


class Parent(NamedTuple):
    """The client's span. `sampled`: the client records it; `state` is its tracestate."""

    trace_id: int
    span_id: int
    sampled: bool
    state: Any = None


class Ids(NamedTuple):
    """`number` counts a Router's traces; the others are OpenTelemetry's, of the trace and of the
    spans of the request, the model's part and the execution."""

    number: int
    trace_id: int
    request: int
    model: int
    compute: int


class Batched(NamedTuple):
    """The batch that a traced request ran in: rows and requests in all, and which were traced."""

    rows: int
    requests: int
    members: tuple[Ids, ...]


class Finished(NamedTuple):
    """A trace that is over. `stamps` are ns since 1970, in order; `error` is "" for success."""

    model: str
    version: str
    request_id: str
    ids: Ids
    parent: Parent | None
    stamps: Stamps
    settings: TraceSettings
    batch: Batched | None
    tensors: tuple[TracedTensor, ...]
    error: str


class Sink(Protocol):
    """Where traces go. `parent` reads what a client sent along, None if it is nothing."""

    def parent(self, carrier: Carrier) -> Parent | None: ...

    def take(self, trace: Finished) -> None: ...


class Waiter(Protocol):
    """Who waits at a gate for the answer to one request."""

    def deliver(self, result: MemberResult | MantaError) -> None:
        """Called once, on the loop, never before `enqueue` has returned. Must not raise."""
        ...


class Sampler:
    """One of `rate` requests, `count` of them at most, or all for -1. One that is forced is traced
    in any case, and is none of the `count`."""

    def __init__(self, settings: TraceSettings) -> None:
        self._rate, self._left = settings.rate, settings.count
        self._seen = 0

    def take(self, forced: bool = False) -> bool:
        self._seen += 1
        if self._rate == 0 or self._seen % self._rate or self._left == 0:
            return forced
        if self._left > 0:
            self._left -= 1
        return True


class Tracer:
    """Of one model version. `numbers` and `sampler` are shared with others."""

    def __init__(
        self,
        model: str,
        version: str,
        config: ModelConfig,
        settings: TraceSettings,
        sampler: Sampler,
        sink: Sink,
        numbers: itertools.count[int] | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.model, self.version, self.config = model, version, config
        self.settings, self.sampler, self.sink = settings, sampler, sink
        self.numbers = itertools.count(1) if numbers is None else numbers
        self.clock = clock
        self.contract = Contract(model, config)
        self.stamped, self.tensors = (name in settings.level for name in (TIMESTAMPS, TENSORS))

    def arrive(self, edge: Edge, carrier: Carrier | None, came_s: float = 0.0) -> Arrival:
        """A request has been read, of which the first byte came then, if not all at once."""
        return Arrival(self, edge, carrier, came_s)

    def execute(
        self, run: Callable[[Group, Executor], Awaitable[Outcome]], group: Group, place: Executor
    ) -> Awaitable[Outcome]:
        """In the place of `run`: those of the group that are traced hear of each other."""
        try:
            traced = [e for e in group.members if isinstance(e.waiter, Trace)]
            if traced:
                rows = sum(entry.rows for entry in group.members)
                members = tuple(entry.waiter.ids for entry in traced)
                batch = Batched(rows, len(group.members), members)
                for entry in traced:
                    entry.waiter.sent(entry, batch)
        except Exception:  # nobody's request fails for it
            logger.exception("a batch of model '%s' could not be traced", self.model)
        return run(group, place)


class Arrival:
    """A request that may be traced, once it is found valid."""

    __slots__ = ("_tracer", "came_ns", "carrier", "edge", "read_ns")

    def __init__(self, tracer: Tracer, edge: Edge, carrier: Carrier | None, came_s: float) -> None:
        self._tracer, self.edge, self.carrier = tracer, edge, carrier
        self.read_ns = tracer.clock()
        self.came_ns = min(int(came_s * 1e9) or self.read_ns, self.read_ns)

    def at(self, waiter: Waiter, request_id: str | bytes, direct: bool = True) -> Waiter:
        """Who waits at the gate: a trace, or `waiter` itself. `direct`: it writes the answer when
        it hears of it, and not later."""
        tracer = self._tracer
        try:
            parent = None if self.carrier is None else tracer.sink.parent(self.carrier)
            if not tracer.sampler.take(parent is not None and parent.sampled):
                return waiter
            return Trace(tracer, self, waiter, request_id, direct, parent)
        except Exception:
            logger.exception("a request to model '%s' could not be traced", tracer.model)
            return waiter


class Trace:
    """A waiter that notes what happens, and tells the one behind it."""

    __slots__ = (
        "_arrival",
        "_batch",
        "_begun_ns",
        "_direct",
        "_entry",
        "_parent",
        "_request_id",
        "_tensors",
        "_tracer",
        "_waiter",
        "ids",
    )

    def __init__(
        self,
        tracer: Tracer,
        arrival: Arrival,
        waiter: Waiter,
        request_id: str | bytes,
        direct: bool,
        parent: Parent | None,
    ) -> None:
        self._tracer, self._arrival, self._waiter = tracer, arrival, waiter
        self._request_id, self._direct, self._parent = request_id, direct, parent
        self._begun_ns = tracer.clock()
        self._entry: Entry | None = None
        self._batch: Batched | None = None
        self._tensors: tuple[TracedTensor, ...] = ()
        bits = random.getrandbits
        trace_id = bits(128) | 1 if parent is None else parent.trace_id  # zero is none
        self.ids = Ids(next(tracer.numbers), trace_id, *(bits(64) | 1 for _ in range(3)))

    def sent(self, entry: Entry, batch: Batched) -> None:
        """It is part of a batch from now on."""
        self._entry, self._batch = entry, batch
        if self._tracer.tensors:
            self._tensors = inputs_of(self._tracer.config, entry.rows, entry.inputs)

    def deliver(self, result: MemberResult | MantaError) -> None:
        done_ns = self._tracer.clock()
        if self._tracer.tensors and isinstance(result, MemberResult) and self._entry is not None:
            self._keep(self._entry, result)
        self._waiter.deliver(result)
        self._end(result, done_ns, self._tracer.clock())

    def left(self) -> None:
        """Its client is gone."""
        now_ns = self._tracer.clock()
        self._end(Cancelled(LEFT), now_ns, now_ns)

    def refused(self, error: MantaError) -> None:
        """It does not even wait."""
        now_ns = self._tracer.clock()
        self._end(error, now_ns, now_ns)

    def _keep(self, entry: Entry, result: MemberResult) -> None:
        """Before the answer is written: its bytes are others' again after that."""
        try:
            outputs = self._tracer.contract.answer(entry.outputs, result.outputs)
            self._tensors += outputs_of(outputs)
        except Exception as error:
            logger.debug("outputs of a trace are not kept: %s", error)

    def _end(self, result: MemberResult | MantaError, done_ns: int, sent_ns: int) -> None:
        """Nothing of it may reach the client."""
        tracer = self._tracer
        try:
            error = _text(str(result), MAX_ERROR_CHARS) if isinstance(result, MantaError) else ""
            stamps: Stamps = ()
            if tracer.stamped:
                since_1970_ns = time.time_ns() - time.monotonic_ns()
                found = self._stamps(result, done_ns, sent_ns)
                stamps = tuple((name, since_1970_ns + at_ns) for name, at_ns in found)
            trace = Finished(
                tracer.model,
                tracer.version,
                _text(self._request_id, MAX_ID_CHARS),
                self.ids,
                self._parent,
                stamps,
                tracer.settings,
                self._batch,
                self._tensors,
                error,
            )
            tracer.sink.take(trace)
        except Exception:
            logger.exception("a trace of model '%s' is lost", tracer.model)

    def _stamps(
        self, result: MemberResult | MantaError, done_ns: int, sent_ns: int
    ) -> list[tuple[str, int]]:
        edge, arrival, entry = self._arrival.edge, self._arrival, self._entry
        stamps = [
            (edge.read_start, arrival.came_ns),
            (edge.read_end, arrival.read_ns),
            ("REQUEST_START", self._begun_ns),
        ]
        if entry is not None:
            stamps.append(("QUEUE_START", entry.queued_ns))
        if entry is not None and isinstance(result, MemberResult):
            # What the replica has measured, from when the batch got its instance.
            at_ns = entry.queued_ns
            for name, took_ns in (
                ("COMPUTE_START", result.queue_ns),
                ("COMPUTE_INPUT_END", result.input_ns),
                ("COMPUTE_OUTPUT_START", result.infer_ns),
                ("COMPUTE_END", result.output_ns),
            ):
                at_ns = min(at_ns + took_ns, done_ns)
                stamps.append((name, at_ns))
            stamps.append(("INFER_RESPONSE_COMPLETE", done_ns))
        stamps.append(("REQUEST_END", done_ns))
        if self._direct and sent_ns > done_ns:
            stamps += [(edge.send_start, done_ns), (edge.send_end, sent_ns)]
        return stamps


def _text(raw: str | bytes, most: int) -> str:
    """So many characters of it, since many traces may wait; a lone surrogate, which JSON can bring
    and no protobuf can carry, is a question mark."""
    if isinstance(raw, bytes):  # no character has more than four
        raw = raw[: 4 * most].decode(errors="replace")
    return raw[:most].encode("utf-8", "replace").decode()


# --- what clients send along ---------------------------------------------------------------------


def carrier(fields: Mapping[bytes, bytes]) -> Carrier | None:
    """Of fields by lower-case name; read no further, since few servers ask for it."""
    parent = fields.get(b"traceparent")
    return None if parent is None else (parent, fields.get(b"tracestate", b""))


def carrier_of(metadata: Iterable[tuple[Any, Any]]) -> Carrier | None:
    """The same of a call's metadata, as grpc.aio has them."""
    return carrier({_bytes(name).lower(): _bytes(value) for name, value in metadata})


def _bytes(value: Any) -> bytes:
    return value.encode("utf-8", "replace") if isinstance(value, str) else bytes(value)
