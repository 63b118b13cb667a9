"""The lane: infer calls from uvicorn's connections straight to the gate, without ASGI or a task.

Takes a call whose head comes in one piece while nothing else is in progress on its connection;
everything else goes uvicorn's way, and so do calls that are refused before their body. Owns the
order, limits and time-outs of such calls; what they say is the business of `http_head` and
`http_call`. Given to uvicorn by the listener.
"""

from __future__ import annotations

import asyncio
from asyncio import Future
from functools import partial
from typing import Protocol

from configs.server import ServerSettings

from . import http_body, http_call, http_coding, http_replies
from .batcher import MemberResult
from .directory import Served
from .errors import MantaError
from .http_body import BodyRefused, Pieces
from .http_call import Answer, Aside, Call, Ending
from .http_head import NOT_OURS, Head, Heads
from .http_limits import LimitedProtocol, keep_names
from .http_replies import Field
from .inference import Inference
from .scheduler import Entry
from .tracing import HTTP, Arrival
from .types import InferRequest

# What a connection is doing. ORDINARY: uvicorn has it. HELD: it writes, or has more to read.
_FREE, _BODY, _GATE, _ORDINARY, _HELD, _GONE = range(6)


class Edge(Protocol):
    """The HTTP application, as the lane sees it."""

    @property
    def inference(self) -> Inference: ...

    @property
    def leaving(self) -> bool: ...


class Lane:
    """What the connections of one port share."""

    def __init__(self, edge: Edge, settings: ServerSettings) -> None:
        self.edge = edge
        self.settings = settings
        self.heads = Heads(settings)

    def find(self, head: Head) -> Served:
        return self.edge.inference.find(head.model, head.version)


class LaneProtocol(LimitedProtocol):
    """One connection; also the waiter at the gate of the one call that it has in progress."""

    lane: Lane

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._state = _FREE
        self._parsed = True  # uvicorn's parser stands between two messages
        self._head = NOT_OURS
        self._call: Call | None = None
        self._aside: asyncio.Task[None] | None = None
        self._entry: Entry | None = None
        self._last = False  # uvicorn shuts down: close after this answer
        self._pieces: Pieces | None = None
        self._missing = 0
        self._held = b""
        self._came_s = self._read_s = 0.0
        self._body_timer: asyncio.TimerHandle | None = None
        self._idle_s = 0.0
        self._idle_timer: asyncio.TimerHandle | None = None

    def connection_lost(self, exc: Exception | None) -> None:
        if self._call is not None and self._entry is not None:
            self._call.withdraw(self._entry)
        if self._aside is not None:
            self._aside.cancel()
        self._call = self._entry = None
        self._state = _GONE
        self._body_over()
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        super().connection_lost(exc)

    # --- what comes ------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        state = self._state
        if state == _FREE:
            self._serve(data)
        elif state == _BODY:
            self._more(data)
        elif state != _ORDINARY:
            self._hold(data)
        elif not self._at_rest():
            super().data_received(data)
        else:
            self._free()
            self.data_received(data)

    def _at_rest(self) -> bool:
        """Nothing of uvicorn's is in progress: all parsed, all answered."""
        answered = self.cycle is None or self.cycle.response_complete
        return self._parsed and answered and not self.pipeline

    def on_message_begin(self) -> None:
        self._parsed = False
        super().on_message_begin()

    def on_message_complete(self) -> None:
        self._parsed = True
        super().on_message_complete()

    def _serve(self, data: bytes) -> None:
        """The requests in `data`, one after the other: the next when the one before is answered."""
        while data:
            if self._state != _FREE:
                self._hold(data)
                return
            data = self._begin(data)

    def _begin(self, data: bytes) -> bytes:
        """One request; returns what comes after it."""
        head, end = self.lane.heads.find(data)
        if head.body_bytes < 0:
            return self._give_up(data)
        try:
            served = self.lane.find(head)
        except MantaError:
            return self._give_up(data)
        if self._in_headers:
            self._headers_over()
        if self.timeout_keep_alive_task is not None:
            self._unset_keepalive_if_required()
        self._head = head
        missing = end + head.body_bytes - len(data)
        if missing > 0:
            self._await_body(data[end:], missing)
            return b""
        self._submit(served, data, end)
        return data[missing:] if missing else b""

    def _give_up(self, data: bytes) -> bytes:
        self._state, self._parsed = _ORDINARY, False
        super().data_received(data)
        return b""

    def _hold(self, data: bytes) -> None:
        """It came before its turn; nothing more is read until then."""
        if not self.transport.is_closing():
            self._held += data
            self.flow.pause_reading()

    # --- bodies that come in pieces --------------------------------------------------------------

    def _await_body(self, first: bytes, missing: int) -> None:
        self._state = _BODY
        self._pieces, self._missing = Pieces(first), missing
        self._came_s = self._read_s = self.loop.time()
        self._body_timer = self.loop.call_later(self.read_timeout_s, self._body_late)

    def _more(self, data: bytes) -> None:
        pieces = self._pieces
        assert pieces is not None
        missing = self._missing - len(data)
        pieces.add(data if missing >= 0 else data[: self._missing])
        self._missing, self._read_s = missing, self.loop.time()
        if missing <= 0:
            body = pieces.whole()
            self._body_over()
            try:
                served = self.lane.find(self._head)
            except MantaError as error:
                self._fail(error)
            else:
                self._submit(served, body, 0, self._came_s)
            self._serve(data[missing:] if missing else b"")

    def _body_late(self) -> None:
        rest_s = self._read_s + self.read_timeout_s - self.loop.time()
        if rest_s > 0:
            self._body_timer = self.loop.call_later(rest_s, self._body_late)
        else:
            self._refuse(http_body.too_slow(self.read_timeout_s))

    def _refuse(self, error: MantaError) -> None:
        self._body_over()
        self._fail(BodyRefused(error))

    def _body_over(self) -> None:
        self._pieces = None
        if self._body_timer is not None:
            self._body_timer.cancel()
            self._body_timer = None

    # --- to the gate and back --------------------------------------------------------------------

    def _submit(self, served: Served, data: bytes, start: int, came_s: float = 0.0) -> None:
        """The call whose body is `data` from `start` on. Answers at once what is wrong with it."""
        self._state = _GATE
        tracer = served.gate.tracer
        arrival = None if tracer is None else tracer.arrive(HTTP, self._head.carrier, came_s)
        try:
            call = http_call.read_call(served, self._head, data, start, self.lane.settings)
            waiter = self if arrival is None else arrival.at(self, call.id)
            self._entry, self._call = call.enqueue(waiter), call
        except Aside as aside:
            self._aside = self.loop.create_task(self._infer(aside.request, arrival))
        except Exception as error:
            self._fail(error)

    async def _infer(self, request: InferRequest, arrival: Arrival | None) -> None:
        """What takes its time; it ends with the connection."""
        try:
            response = await self.lane.edge.inference.infer(request, arrival=arrival)
            fields, body = await http_replies.whole(request, response, self._head.coding)
            answer = http_call.response(200, fields, body, self._ending())
        except Exception as error:
            answer = http_call.refusal(error, self._ending())
        self._aside = None
        self._write(answer)

    def deliver(self, result: MemberResult | MantaError) -> None:
        """The gate's answer, written in the same tick."""
        call = self._call
        if call is None:
            return
        if call.coding:
            self._deliver_coded(call, result)
            return
        try:
            answer = call.answer(result, self._ending())
        except Exception as error:
            answer = http_call.refusal(error, self._ending())
        self._write(answer)

    def _deliver_coded(self, call: Call, result: MemberResult | MantaError) -> None:
        """The same for a client that wants a coding: a large body gets it on a thread."""
        self._entry = None  # it has run: who leaves now withdraws nothing
        try:
            fields, body = call.plain(result)
            fields = http_replies.coded(fields, call.coding)
            if http_coding.is_large(body):
                packing = self.loop.run_in_executor(None, http_coding.packed, body, call.coding)
                packing.add_done_callback(partial(self._packed, call, fields))
                return
            answer = http_call.response(
                200, fields, [http_coding.packed(body, call.coding)], self._ending()
            )
        except Exception as error:
            answer = http_call.refusal(error, self._ending())
        self._write(answer)

    def _packed(self, call: Call, fields: list[Field], packing: Future[bytes]) -> None:
        if self._call is not call or packing.cancelled():
            return  # its client has left, or the loop ends
        try:
            answer = http_call.response(200, fields, [packing.result()], self._ending())
        except Exception as error:
            answer = http_call.refusal(error, self._ending())
        self._write(answer)

    def _fail(self, error: Exception) -> None:
        self._write(http_call.refusal(error, self._ending()))

    def _ending(self) -> Ending:
        if self.lane.edge.leaving:
            return http_call.LEAVING
        return http_call.LAST if self._last or not self._head.keep_alive else http_call.KEPT

    def _write(self, answer: Answer) -> None:
        self.transport.write(b"".join(answer.pieces))
        self._answered(answer.last)

    def _answered(self, last: bool) -> None:
        self.server_state.total_requests += 1
        self._call = self._entry = None
        if last:
            self._state = _GONE
            self.transport.close()
            self._watch_flush()
            return
        self._idle_s = self.loop.time()
        if self._idle_timer is None:
            self._idle_timer = self.loop.call_later(self.timeout_keep_alive, self._idle)
        self._free()

    def _free(self) -> None:
        """Ready for the next request, once what was written has left and in its turn."""
        if self._held:
            self._state = _HELD
            self.loop.call_soon(self._resume)
        else:
            self._state = _HELD if self.flow.write_paused else _FREE

    def resume_writing(self) -> None:
        super().resume_writing()
        self._resume()

    def _resume(self) -> None:
        if self._state != _HELD or self.flow.write_paused or self.transport.is_closing():
            return
        self._state = _FREE
        held, self._held = self._held, b""
        self.flow.resume_reading()  # before others may have reason to pause it again
        self._serve(held)

    # --- idle connections and the end ------------------------------------------------------------

    def _idle(self) -> None:
        """One timer for many requests: it looks again later if there was one meanwhile."""
        self._idle_timer = None
        if self._state in (_ORDINARY, _GONE):
            return  # uvicorn has a timer of its own
        busy = self._state in (_BODY, _GATE)
        since_s = self.loop.time() if busy else self._idle_s
        rest_s = since_s + self.timeout_keep_alive - self.loop.time()
        if rest_s > 0:
            self._idle_timer = self.loop.call_later(rest_s, self._idle)
        else:
            self.timeout_keep_alive_handler()

    def shutdown(self) -> None:
        if self._state in (_BODY, _GATE):
            self._last = True
        else:
            super().shutdown()


def lane_protocol(edge: Edge, settings: ServerSettings) -> type[LaneProtocol]:
    """uvicorn makes one of these per connection and gives it nothing of ours."""

    class Connection(LaneProtocol):
        pass

    Connection.lane = Lane(edge, settings)
    Connection.max_header_bytes = settings.http_max_header_bytes
    Connection.read_timeout_s = settings.http_read_timeout_s
    if settings.http_header_forward_pattern:
        Connection.on_header = keep_names
    return Connection
