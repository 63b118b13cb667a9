"""One infer call of the lane: from the bytes of its body to the gate, and from there to bytes.

Asks `plans` first, and goes the way of the ordinary road (`http_infer`, `contract`) where there is
no plan. Owns how answers are written as HTTP/1.1, as uvicorn writes them. Called by `http_lane`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from configs.server import ServerSettings

from . import forwarding, http_infer, http_replies
from .batcher import MemberResult
from .contract import Work
from .directory import Served
from .errors import MantaError
from .http_head import Head
from .http_replies import CLOSE, Field
from .inference import told
from .plans import MAX_KEY_BYTES, Plan, plan_of
from .scheduler import Entry
from .tracing import Waiter
from .types import Array, InferRequest, InferResponse


class Ending(NamedTuple):
    """`last`: the connection ends with this answer. `leaving`: because the server goes away."""

    last: bool
    leaving: bool


KEPT, LAST, LEAVING = Ending(False, False), Ending(True, False), Ending(True, True)


class Answer(NamedTuple):
    """The pieces to write, and whether the connection ends with them."""

    pieces: list[Any]
    last: bool


class Aside(Exception):
    """Facts: the request. It asks for more than a waiter at the gate can give: see `extras`."""

    @property
    def request(self) -> InferRequest:
        request: InferRequest = self.args[0]
        return request


class _Opening(NamedTuple):
    """All of an answer that stands before its binary parts: of a kept connection, and of a last."""

    kept: bytes
    last: bytes


class Call:
    """`coding` is that of its answer's body, "" for none."""

    __slots__ = ("_inputs", "_request", "_served", "_what", "coding")

    def __init__(
        self,
        served: Served,
        request: InferRequest,
        what: Plan | Work,
        inputs: tuple[Array | None, ...],
        coding: str,
    ) -> None:
        self._served = served
        self._request = request
        self._what = what
        self._inputs = inputs
        self.coding = coding

    @property
    def id(self) -> str:
        """The request's, as its client has chosen it."""
        return self._request.id

    def enqueue(self, waiter: Waiter) -> Entry:
        """Raises what the gate raises, with the request's id."""
        what = self._what
        try:
            return self._served.gate.enqueue(
                waiter, what.rows, what.key, self._inputs, what.outputs, what.facts
            )
        except MantaError as error:
            raise told(self._request.id, error) from error

    def withdraw(self, entry: Entry) -> None:
        self._served.gate.withdraw(entry)

    def plain(self, result: MemberResult | MantaError) -> tuple[list[Field], list[Any]]:
        """Fields and body of the answer, before any coding. Raises as `answer` does."""
        if isinstance(result, MantaError):
            raise told(self._request.id, result)
        fields, body = http_replies.answer(*self._encode(result))
        return fields, list(body)

    def answer(self, result: MemberResult | MantaError, ending: Ending) -> Answer:
        """Where there is no coding. Raises what there is to tell instead."""
        if isinstance(result, MantaError):
            raise told(self._request.id, result)
        plan = self._what
        if type(plan) is not Plan:
            fields, body = http_replies.answer(*self._encode(result))
            return response(200, fields, body, ending)
        outputs = [result.outputs[name] for name in plan.outputs]
        opening = plan.head(outputs, lambda: self._opening(result))
        arrays = [np.ascontiguousarray(output.data) for output in outputs]
        return Answer([opening.last if ending.last else opening.kept, *arrays], ending.last)

    def _opening(self, result: MemberResult) -> _Opening:
        text, parts = self._encode(result)
        fields, body = http_replies.answer(text, parts)
        fields = _with_length(fields, body)
        kept, last = (_head_bytes(200, each) + text for each in (fields, [*fields, CLOSE]))
        return _Opening(kept, last)

    def _encode(self, result: MemberResult) -> tuple[bytes, list[memoryview]]:
        request, served = self._request, self._served
        try:
            tensors = served.contract.answer(self._what.outputs, result.outputs)
        except MantaError as error:
            raise told(request.id, error) from error
        snapshot = served.snapshot
        return http_infer.encode(
            request,
            InferResponse(snapshot.model_name, str(snapshot.version), request.id, tensors),
        )


def read_call(
    served: Served, head: Head, data: bytes, start: int, settings: ServerSettings
) -> Call:
    """The call whose body is `data` from `start` on. Raises what is wrong with it, or Aside."""
    json_bytes = head.json_bytes
    text = b""  # a description that may have a plan
    if json_bytes and json_bytes <= MAX_KEY_BYTES:
        text = data[start : start + json_bytes]
        plan = served.http_plans.find(text)
        if plan is not None and plan.data_bytes == head.body_bytes - json_bytes:
            inputs = plan.from_body(data, start + json_bytes)
            return Call(served, plan.request, plan, inputs, head.coding)
    body = data[start : start + head.body_bytes]
    request = http_infer.decode(served.config, head.version, body, json_bytes, settings)
    told_of = request if head.forwarded is None else forwarding.add(request, head.forwarded)
    if request.extra:
        raise Aside(told_of)
    try:
        work = served.contract.admit(told_of)
    except MantaError as error:
        raise told(request.id, error) from error
    if text and http_infer.all_binary(request):
        _learn(served, request, work, text, len(body) - len(text))
    return Call(served, request, work, work.inputs, head.coding)


def _learn(served: Served, request: InferRequest, work: Work, text: bytes, data_bytes: int) -> None:
    if not served.http_plans.seen(text):
        return
    plan = plan_of(served.config, request, work)
    # More than came as bytes: an input was JSON data, which is no part of a plan.
    if plan is not None and plan.data_bytes != data_bytes:
        plan = None
    served.http_plans.learn(text, plan)


# --- HTTP/1.1 ------------------------------------------------------------------------------------


def refusal(error: Exception, ending: Ending) -> Answer:
    status, fields, body = http_replies.error_reply(error, {})
    return response(status, fields, [body], ending)


def response(status: int, fields: list[Field], body: Sequence[Any], ending: Ending) -> Answer:
    fields = _with_length(fields, body)
    if ending.leaving or (ending.last and CLOSE not in fields):
        fields = [*(field for field in fields if field != CLOSE), CLOSE]
    return Answer([_head_bytes(status, fields), *body], CLOSE in fields)


def _with_length(fields: list[Field], body: Sequence[Any]) -> list[Field]:
    return [*fields, (b"content-length", b"%d" % sum(len(part) for part in body))]


def _head_bytes(status: int, fields: list[Field]) -> bytes:
    lines = [b"%b: %b\r\n" % field for field in fields]
    return b"".join([STATUS_LINE[status], *lines, b"\r\n"])
