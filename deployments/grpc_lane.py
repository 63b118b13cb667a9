"""The gRPC lane: ModelInfer calls as HTTP/1.1 from HAProxy straight to the gate, without a task.

Owns these connections, their calls' deadlines and cancellation. The bytes of a call are the
business of `grpc_wire`, what they mean that of `grpc`, `plans` and `grpc_replies`; to the client,
an answer is what grpc.aio would give. Called by the gRPC listener, which runs HAProxy in front.
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from pathlib import Path
from typing import Any

import httptools
from google.protobuf.message import DecodeError

from configs import grpc_options
from configs.server import ServerSettings

from . import grpc, grpc_replies, grpc_wire
from .batcher import MemberResult
from .directory import Served
from .errors import Internal, InvalidArgument, MantaError
from .forwarding import forwarding
from .grpc_stubs import service_pb2 as pb
from .grpc_wire import MAX_MESSAGE_BYTES, PREFIX_BYTES, Head, Parts, Refused, Terms
from .inference import Inference, told
from .plans import Plan, Recent, plan_of
from .restricted import METADATA_PREFIX, Guards, headers
from .tracing import GRPC, Arrival, Tracer
from .types import InferRequest
from .unread import Unread

logger = logging.getLogger("manta.grpc")

PATH = "/inference.GRPCInferenceService/ModelInfer"
BACKLOG = 4096
MAX_HEADS = 1024
MAX_HEAD_BYTES = 4096
# A rest of a call that is answered already may take this long to come.
LINGER_S = 5.0
DRAIN_POLL_S = 0.02
# Up to here an answer is compressed at once; a larger one by a thread.
PACKED_AT_ONCE_BYTES = 1 << 16

_END = b"\r\n\r\n"
_LAST_CHUNK = b"\r\n0\r\n\r\n"
_TICK_S = 1e-3  # grpc rounds deadlines up to milliseconds
_COPIED_BYTES = 16384  # up to here a copy is cheaper than a view
_UNKNOWN = 2
_NO_HEAD = Head(None, b"")


class Lane:
    """All connections from one HAProxy."""

    def __init__(self, inference: Inference, settings: ServerSettings) -> None:
        self.inference = inference
        self.settings = settings
        self.limit = min(settings.max_body_bytes, MAX_MESSAGE_BYTES)
        self.terms = Terms(
            grpc_options.level(settings),
            Guards(settings.grpc_restricted_protocol, METADATA_PREFIX).of("ModelInfer"),
            forwarding(
                settings.grpc_header_forward_pattern,
                headers(settings.grpc_restricted_protocol, METADATA_PREFIX),
            ),
        )
        self.heads: Recent[bytes, Head] = Recent(MAX_HEADS)
        self.connections: set[Connection] = set()
        self._server: asyncio.AbstractServer | None = None

    async def open(self, path: Path) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(
            lambda: Connection(self), str(path), backlog=BACKLOG
        )

    async def drain(self, grace_s: float) -> None:
        """Accepts no more, and answers what is in flight."""
        if self._server is None:
            return
        self._server.close()
        loop = asyncio.get_running_loop()
        end_s = loop.time() + grace_s
        while any(each.busy for each in self.connections) and loop.time() < end_s:
            await asyncio.sleep(DRAIN_POLL_S)
        for connection in tuple(self.connections):
            connection.close()


class Connection(asyncio.Protocol):
    """One connection, and the waiter at the gate of the one call that it has in progress."""

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        self._loop = asyncio.get_running_loop()
        self._reading = False  # the parser is between the ends of a request
        self._open = False  # a call is not answered
        self._last = False  # close after this call
        self._parser: Any = None
        self._begin()
        self._forget()

    def _begin(self) -> None:
        """A call that comes in pieces."""
        self._head = _NO_HEAD
        self._url = b""
        self._fields: list[tuple[bytes, bytes]] = []
        self._body = bytearray()
        self._taken = False  # its message is whole
        self._came_s = self._read_s = 0.0

    def _forget(self) -> None:
        """Of the call that was in progress."""
        self._head_bytes = b""
        self._served: Served | None = None
        self._entry: Any = None
        self._aside: asyncio.Task[None] | None = None
        self._plan: Plan | None = None
        self._outputs: tuple[str, ...] | None = None
        self._id = b""
        self._deadline: asyncio.TimerHandle | None = None
        self._late: asyncio.TimerHandle | None = None

    @property
    def busy(self) -> bool:
        return self._open or self._reading

    def close(self) -> None:
        self._transport.close()

    # --- asyncio ---------------------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._unread = Unread(transport)
        self._lane.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Also how HAProxy says that the client has cancelled: nobody waits for the answer."""
        self._lane.connections.discard(self)
        self._withdraw()
        self._unread.rest()
        self._open = self._reading = False
        self._over()

    def data_received(self, data: bytes) -> None:
        if self._reading:
            self._feed(data)
        elif self._open:  # HAProxy sends one call at a time
            self._transport.abort()
        elif not self._whole(data):
            self._reading = True
            self._feed(data)

    def _whole(self, data: bytes) -> bool:
        """A call with a known head that came in one piece: what nearly all calls are."""
        end = data.find(_END) + len(_END)
        if end < len(_END):
            return False
        key = data[:end]
        head = self._lane.heads.get(key)
        if head is None or head.error is not None:
            if end <= MAX_HEAD_BYTES:
                self._head_bytes = key
            return False
        start, stop = end, len(data)
        if head.length is None:
            stop -= len(_LAST_CHUNK)
            start = data.find(b"\r\n", end, end + 16) + 2
            if start < 2 or not data.endswith(_LAST_CHUNK):
                return False
            if start + int(data[end : start - 2], 16) != stop:
                return False
        if stop - start != (head.length or stop - start) or stop - start < PREFIX_BYTES:
            return False
        self._head, self._open = head, True
        self._take(data, start, stop)
        if self._open:
            self._watch_deadline(head)
        return True

    def pause_writing(self) -> None:
        self._unread.watch()

    def resume_writing(self) -> None:
        self._unread.rest()

    # --- calls that come in pieces ---------------------------------------------------------------

    def _feed(self, data: bytes) -> None:
        if self._parser is None:
            self._parser = httptools.HttpRequestParser(self)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._transport.abort()
            return
        if self._reading and self._open and self._late is None:
            self._late = self._loop.call_later(self._patience_s, self._look)
        self._read_s = self._loop.time()

    @property
    def _patience_s(self) -> float:
        return self._lane.settings.http_read_timeout_s

    def _look(self) -> None:
        """Whether the client still sends."""
        rest_s = self._read_s + self._patience_s - self._loop.time()
        if rest_s > 0:
            self._late = self._loop.call_later(rest_s, self._look)
        elif not self._taken:
            limit_s = self._patience_s
            self._fail(InvalidArgument(f"no byte of the call's message came for {limit_s:g} s"))

    def on_message_begin(self) -> None:
        if self._open or self._last:
            self._transport.abort()
        self._begin()
        self._open, self._came_s = True, self._loop.time()

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._fields.append((name, value))

    def on_headers_complete(self) -> None:
        self._head = grpc_wire.read_head(self._url, PATH, self._fields, self._lane.terms)
        if self._head_bytes:
            self._lane.heads.put(self._head_bytes, self._head)
        if self._head.error is not None:
            self._fail(self._head.error)
        else:
            self._watch_deadline(self._head)

    def on_body(self, piece: bytes) -> None:
        if not self._open or self._taken:
            return  # what comes after a message is nobody's
        body = self._body
        body += piece
        if len(body) < PREFIX_BYTES:
            return
        try:
            stop = PREFIX_BYTES + grpc_wire.announced(body, 0, self._lane.limit)
        except Refused as error:
            self._fail(error)
            return
        if len(body) >= stop:
            self._take(body, 0, stop)

    def on_message_complete(self) -> None:
        self._reading = False
        if not self._open:
            self._over()
        elif not self._taken:
            self._fail(grpc_wire.incomplete())

    # --- to the gate and back --------------------------------------------------------------------

    def _take(self, body: bytes | bytearray, start: int, stop: int) -> None:
        """A prefix and its message. Answers at once what is wrong with it."""
        self._taken = True
        at = start + PREFIX_BYTES
        try:
            size = grpc_wire.announced(body, start, self._lane.limit)
            if at + size > stop:
                raise grpc_wire.incomplete()
            data: Any = body
            if size > _COPIED_BYTES or type(body) is not bytes:
                data = memoryview(body)
            if body[start] & 1:
                encoding = self._head.encoding
                data = grpc_wire.inflate(data[at : at + size], encoding, self._lane.limit)
                at, size = 0, len(data)
            self._submit(data, at, at + size)
        except Exception as error:
            self._fail(error)

    def _submit(self, data: bytes | memoryview, at: int, end: int) -> None:
        parts = grpc_wire.scan(data, at, end)
        if parts is None:
            self._submit_new(data[at:end], None)
            return
        served = self._lane.inference.find(parts.model, parts.version)
        plan = served.grpc_plans.find(parts.key)
        inputs = None if plan is None else plan.from_parts(parts.raw)
        if plan is None or inputs is None:
            self._submit_new(data[at:end], parts)
            return
        self._served, self._plan, self._id = served, plan, parts.id
        tracer = served.gate.tracer
        waiter = self if tracer is None else self._arrived(tracer).at(self, parts.id)
        try:
            self._entry = served.gate.enqueue(waiter, plan.rows, plan.key, inputs, plan.outputs)
        except MantaError as error:
            raise told(parts.id.decode(), error) from error

    def _submit_new(self, message: bytes | memoryview, parts: Parts | None) -> None:
        """The ordinary road, which owns what is said about a bad message."""
        parsed = pb.ModelInferRequest.FromString(message)
        if self._head.forwarded is not None:
            grpc.add_parameters(parsed, self._head.forwarded)
        served = self._lane.inference.find(parsed.model_name, parsed.model_version)
        tracer = served.gate.tracer
        arrival = None if tracer is None else self._arrived(tracer)
        request = grpc.decode(parsed, self._lane.settings)
        if request.extra:
            self._aside = self._loop.create_task(self._infer(request, arrival))
            return
        self._served, self._id = served, request.id.encode()
        try:
            work = served.contract.admit(request)
            self._outputs = work.outputs
            waiter = self if arrival is None else arrival.at(self, request.id)
            self._entry = served.gate.enqueue(
                waiter, work.rows, work.key, work.inputs, work.outputs, work.facts
            )
        except MantaError as error:
            raise told(request.id, error) from error
        if parts is not None and parts.raw and served.grpc_plans.seen(parts.key):
            served.grpc_plans.learn(parts.key, plan_of(served.config, request, work))

    def _arrived(self, tracer: Tracer) -> Arrival:
        in_pieces = self._reading
        return tracer.arrive(GRPC, self._head.carrier, self._came_s if in_pieces else 0.0)

    async def _infer(self, request: InferRequest, arrival: Arrival | None) -> None:
        """What takes its time; it ends with the call."""
        try:
            response = await self._lane.inference.infer(request, arrival=arrival)
            reply = grpc_replies.whole(response)
            if packing := self._head.packing:
                pack = partial(grpc_wire.packed, reply, packing)
                reply = await self._loop.run_in_executor(None, pack)
        except Exception as error:
            self._fail(error)
        else:
            self._write(reply)

    def deliver(self, result: MemberResult | MantaError) -> None:
        """The gate's answer, written in the same tick."""
        served = self._served
        if not self._open or served is None:
            return
        try:
            if isinstance(result, MantaError):
                raise told(self._id.decode(), result)
            if self._plan is not None:
                reply = grpc_replies.planned(served, self._plan, self._id, result)
            else:
                assert self._outputs is not None
                reply = grpc_replies.anew(served, self._outputs, self._id, result)
        except Exception as error:
            self._fail(error)
        else:
            if self._head.packing:
                self._pack(reply)
            else:
                self._write(reply)

    def _pack(self, reply: bytes) -> None:
        """Writes it compressed. A thread does that to a large one; meanwhile the call may be over,
        and another one have begun."""
        entry = self._entry

        def done(future: asyncio.Future[bytes]) -> None:
            if self._open and self._entry is entry:
                try:
                    self._write(future.result())
                except Exception as error:
                    self._fail(error)

        pack = partial(grpc_wire.packed, reply, self._head.packing)
        if len(reply) <= PACKED_AT_ONCE_BYTES:
            self._write(pack())
        else:
            self._loop.run_in_executor(None, pack).add_done_callback(done)

    # --- deadlines -------------------------------------------------------------------------------

    def _watch_deadline(self, head: Head) -> None:
        if head.timeout_s is not None:
            wait_s = max(_TICK_S, head.timeout_s)
            self._deadline = self._loop.call_later(wait_s, self._expired)

    def _expired(self) -> None:
        self._withdraw()
        self._fail(grpc_wire.expired())

    def _withdraw(self) -> None:
        if self._aside is not None:
            self._aside.cancel()
        entry, self._entry = self._entry, None
        if entry is not None and self._served is not None:
            self._served.gate.withdraw(entry)

    # --- what goes -------------------------------------------------------------------------------

    def _fail(self, error: Exception) -> None:
        if isinstance(error, Refused):
            code, text = error.args
        elif isinstance(error, MantaError):
            status, text = grpc.status(error)
            code = status.value[0]
        elif isinstance(error, DecodeError):
            code, text = _UNKNOWN, f"Unexpected {type(error)}: {error}"
        else:
            logger.error("ModelInfer failed unexpectedly", exc_info=error)
            # The call may still be known to the gate, and HAProxy's next one is another client's.
            self._last = True
            status, text = grpc.status(Internal("internal error"))
            code = status.value[0]
        self._write(grpc_wire.refusal(code, text, self._last))

    def _write(self, reply: bytes) -> None:
        if not self._open:
            return
        self._transport.write(reply)
        self._open = False
        self._entry = None
        self._stop_timers()
        if self._reading:
            self._late = self._loop.call_later(LINGER_S, self.close)
        else:
            self._over()

    def _over(self) -> None:
        """Answered, and read to its end."""
        self._stop_timers()
        self._forget()
        if self._last:
            self.close()

    def _stop_timers(self) -> None:
        for timer in (self._deadline, self._late):
            if timer is not None:
                timer.cancel()
        self._deadline = self._late = None
