"""Traces as OpenTelemetry's spans, sent to a collector by OTLP over HTTP.

The one room that knows the SDK. Spans are made of the stamps of a finished trace, for every member
of a batch; a collector that does not answer costs spans, never a request, and is told of once.
Made by `tracers`, and only in mode `opentelemetry`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from urllib.parse import urlsplit

from opentelemetry import trace as api
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from configs.tracing import EXPORTER, TraceConfig

from .tracing import Batched, Carrier, Finished, Ids, Parent

logger = logging.getLogger("manta.trace")

MAX_PARENT_BYTES, MAX_STATE_BYTES = 512, 8192
MAX_LINKS = 16  # of one span: those of a batch grow with its square
EXPORT_TIMEOUT_S = 10.0
SERVICE = "triton-inference-server"
REQUEST, COMPUTE = "InferRequest", "compute"
_SCOPE = InstrumentationScope("manta")
_SAMPLED = api.TraceFlags(api.TraceFlags.SAMPLED)
_PROPAGATOR = TraceContextTextMapPropagator()
# They speak of each batch that is lost, and of each attribute that cannot be sent.
_LOUD = (
    "opentelemetry.sdk._shared_internal",
    "opentelemetry.exporter.otlp.proto.common._internal",
    f"{EXPORTER}.trace_exporter",
)


class Spans:
    """`processor` takes what is to be exported."""

    def __init__(self, processor: SpanProcessor, resource: Resource) -> None:
        self._processor = processor
        self._resource = resource
        # Of the batch that ended last: its first executions, and the links to them.
        self._linked: tuple[Batched | None, list[tuple[Ids, api.Link]]] = (None, [])

    def parent(self, carrier: Carrier) -> Parent | None:
        """What is malformed counts as absent, as the W3C wants it."""
        parent, state = carrier
        if len(parent) > MAX_PARENT_BYTES:
            return None
        fields = {"traceparent": parent.decode("latin-1")}
        if state and len(state) <= MAX_STATE_BYTES:
            fields["tracestate"] = state.decode("latin-1")
        found = api.get_current_span(_PROPAGATOR.extract(fields)).get_span_context()
        if not found.is_valid:
            return None
        return Parent(found.trace_id, found.span_id, found.trace_flags.sampled, found.trace_state)

    def take(self, trace: Finished) -> None:
        for span in self.spans(trace):
            self._processor.on_end(span)

    def close(self, limit_s: float) -> None:
        """Sends what waits, within the limit. For a thread: it blocks."""
        batches = getattr(self._processor, "_batch_processor", None)
        if batches is None:
            self._processor.shutdown()
        else:  # the processor itself hands no limit on
            batches.shutdown(timeout_millis=int(limit_s * 1000))

    # --- spans -----------------------------------------------------------------------------------

    def spans(self, trace: Finished) -> Iterator[ReadableSpan]:
        """Of the request, of the model's part and, if it was executed, of that."""
        at, ids = dict(trace.stamps), trace.ids
        if not at:
            return
        first, last = trace.stamps[0][1], max(at.values())
        split = _split(trace.stamps)
        parent = trace.parent
        above = None
        if parent is not None:
            above = api.SpanContext(parent.trace_id, parent.span_id, True, _SAMPLED, parent.state)
        request = self._context(trace, ids.request)
        model = self._context(trace, ids.model)
        yield self._span(trace, REQUEST, request, above, (first, last), split[0])
        begin, end = at["REQUEST_START"], at["REQUEST_END"]
        yield self._span(trace, trace.model, model, request, (begin, end), split[1])
        if "COMPUTE_START" in at:
            times = (at["COMPUTE_START"], at["COMPUTE_END"])
            compute = self._context(trace, ids.compute)
            yield self._span(trace, COMPUTE, compute, model, times, split[2], self._links(trace))

    def _context(self, trace: Finished, span_id: int) -> api.SpanContext:
        state = None if trace.parent is None else trace.parent.state
        return api.SpanContext(trace.ids.trace_id, span_id, False, _SAMPLED, state)

    def _span(
        self,
        trace: Finished,
        name: str,
        context: api.SpanContext,
        parent: api.SpanContext | None,
        times: tuple[int, int],
        events: list[Event],
        links: Sequence[api.Link] = (),
    ) -> ReadableSpan:
        status = api.Status(api.StatusCode.UNSET)
        if trace.error:
            status = api.Status(api.StatusCode.ERROR, trace.error)
        return ReadableSpan(
            name,
            context,
            parent,
            self._resource,
            _attributes(trace),
            events,
            links,
            api.SpanKind.SERVER if name == REQUEST else api.SpanKind.INTERNAL,
            None,
            status,
            *times,
            _SCOPE,
        )

    def _links(self, trace: Finished) -> list[api.Link]:
        """To the executions of the batch's other traced members, as far as that many go."""
        batch = trace.batch
        if batch is None:
            return []
        if self._linked[0] is not batch:
            first = batch.members[: MAX_LINKS + 1]
            self._linked = (batch, [(ids, api.Link(_compute(ids))) for ids in first])
        return [link for ids, link in self._linked[1] if ids is not trace.ids][:MAX_LINKS]


def _attributes(trace: Finished) -> dict[str, str | int]:
    found: dict[str, str | int] = {
        "triton.model_name": trace.model,
        "triton.model_version": int(trace.version) if trace.version.isdigit() else -1,
        "triton.trace_id": trace.ids.number,
        "triton.trace_parent_id": 0,
    }
    if trace.request_id:
        found["triton.request_id"] = trace.request_id
    if trace.batch is not None:
        found["triton.batch_rows"] = trace.batch.rows
        found["triton.batch_requests"] = trace.batch.requests
    return found


def _split(stamps: Sequence[tuple[str, int]]) -> tuple[list[Event], list[Event], list[Event]]:
    """The stamps as events of the span that they are in."""
    found: tuple[list[Event], list[Event], list[Event]] = ([], [], [])
    for name, at_ns in stamps:
        place = (
            0 if name.startswith(("HTTP_", "GRPC_")) else 2 if name.startswith("COMPUTE_") else 1
        )
        found[place].append(Event(name, timestamp=at_ns))
    return found


def _compute(ids: Ids) -> api.SpanContext:
    return api.SpanContext(ids.trace_id, ids.compute, False, _SAMPLED)


# --- the way to the collector --------------------------------------------------------------------


class Watched(SpanExporter):
    """An exporter whose failures are told of once, until it succeeds again."""

    def __init__(self, exporter: SpanExporter, tell: Callable[[], None]) -> None:
        self._exporter, self._tell = exporter, tell
        self._failed = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        try:
            result = self._exporter.export(spans)
        except Exception:
            result = SpanExportResult.FAILURE
        failed = result is not SpanExportResult.SUCCESS
        if failed and not self._failed:
            self._tell()
        self._failed = failed
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return self._exporter.force_flush(timeout_millis)


class _Hush(logging.Filter):
    """Tells once of a full queue; what else the SDK says of lost spans is said by Watched."""

    def __init__(self) -> None:
        super().__init__()
        self._told = False

    def filter(self, record: logging.LogRecord) -> bool:
        if "full" in str(record.msg).lower() and not self._told:
            self._told = True
            logger.warning("more spans than the collector takes: some are left out")
        return False


def otlp(config: TraceConfig) -> Spans:
    """To the collector at `config.url`."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    for name in _LOUD:
        told = logging.getLogger(name)
        if not any(isinstance(each, _Hush) for each in told.filters):
            told.addFilter(_Hush())
    place = urlsplit(config.url)
    exporter = Watched(
        OTLPSpanExporter(endpoint=config.url, timeout=EXPORT_TIMEOUT_S),
        lambda: logger.warning(
            "spans are lost: the collector at %s:%s does not take them",
            place.hostname,
            place.port or place.scheme,
        ),
    )
    bsp = config.bsp
    processor = BatchSpanProcessor(
        exporter,
        max_queue_size=bsp.get("bsp_max_queue_size"),
        schedule_delay_millis=bsp.get("bsp_schedule_delay"),
        max_export_batch_size=bsp.get("bsp_max_export_batch_size"),
    )
    return Spans(processor, Resource.create({"service.name": SERVICE, **config.resource}))
