"""ModelStreamInfer: the requests of a stream run side by side and are answered in their order.

Owns what a stream has in work and has read ahead, both bounded, errors in the band, and the end:
what nobody waits for any more is withdrawn. Knows no carrier: `grpc_services` brings requests and
takes answers away.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from typing import Any, NamedTuple

from . import grpc
from .answers import copy
from .errors import Internal, MantaError, ShuttingDown
from .grpc_stubs import service_pb2 as pb
from .inference import Inference, Ticket

logger = logging.getLogger("manta.grpc")

# Of inputs in work, and of requests read ahead; the last request of each may go beyond.
MAX_BYTES = 64 << 20
# What a request takes beside its own bytes.
OVERHEAD_BYTES = 2048
FINAL = "triton_final_response"


class _Turn(NamedTuple):
    """A request in its place. `size` is that of its inputs."""

    id: str
    what: Ticket | MantaError
    size: int = 0


class Ahead:
    """What all streams of a Router have read ahead, in bytes."""

    __slots__ = ("bytes",)

    def __init__(self) -> None:
        self.bytes = 0


class Stream:
    """One call. `most`: requests in work at a time. `errors_end`: the first error ends the call
    with its status, instead of being an answer. `parameters` are added to each request; `metadata`
    are the call's, and may have a trace for all of them.

    Reading ahead keeps other calls on the client's connection going: HAProxy, once a stream's
    buffer is full, reads nothing more from it. It also reads no more of the client's word that
    there is room for answers. So while an answer does not get away, more is read than otherwise, as
    long as all streams together hold no more than one request may.
    """

    def __init__(
        self,
        inference: Inference,
        most: int,
        errors_end: bool = False,
        parameters: Mapping[str, str] | None = None,
        ahead: Ahead | None = None,
        metadata: Sequence[tuple[Any, Any]] = (),
    ) -> None:
        self._inference = inference
        self._of_all = ahead or Ahead()
        self._most = most
        self._errors_end = errors_end
        self._parameters = parameters or {}
        self._metadata = metadata
        self._ahead: deque[tuple[Any, int]] = deque()
        self._ahead_bytes = 0
        self._turns: deque[_Turn] = deque()  # with the one whose answer is being written
        self._work_bytes = 0
        self._writing = False
        self._read_to_end = False
        self._leaving = False
        self._reader: asyncio.Task[None] | None = None
        self._more = asyncio.Event()  # for `answers`: another turn, or the end
        self._room = asyncio.Event()  # for `_read`

    @property
    def in_work(self) -> int:
        return len(self._turns)

    def leave(self) -> None:
        """Takes no more requests; those that are in work are answered, and then it ends."""
        self._leaving = True
        if self._reader is not None:
            self._reader.cancel()

    async def answers(self, requests: AsyncIterator[Any]) -> AsyncGenerator[Any, None]:
        """One for each request. To be closed whatever happens: that withdraws what is in work.

        Raises ShuttingDown after `leave`, other MantaErrors with `errors_end`, and what reading
        raises.
        """
        if self._leaving:
            raise ShuttingDown()
        reader = self._reader = asyncio.get_running_loop().create_task(self._read(requests))
        try:
            while await self._another():
                answer = await self._answer(self._turns[0])
                self._writing = True
                self._room.set()
                yield answer
                self._writing = False
                self._work_bytes -= self._turns.popleft().size
                self._start()
                self._room.set()
            if self._leaving and (self._ahead or reader.cancelled()):
                raise ShuttingDown()
            await reader
        finally:
            reader.cancel()
            self._withdraw()
            await asyncio.wait([reader])
            if not reader.cancelled():
                reader.exception()  # it was told, or something else was

    async def _another(self) -> bool:
        """Whether there is one to answer; False at the end."""
        while not self._turns:
            if self._read_to_end:
                return False
            self._more.clear()
            await self._more.wait()
        return True

    # --- requests --------------------------------------------------------------------------------

    async def _read(self, requests: AsyncIterator[Any]) -> None:
        try:
            async for message in requests:
                self._ahead.append((message, 0))
                del message  # the client may let us wait long for the next
                self._start()
                if self._ahead:
                    await self._hold()
        finally:
            self._read_to_end = True
            self._more.set()

    async def _hold(self) -> None:
        """The message that has just come waits for others; with too many, so does the client."""
        message, _ = self._ahead.pop()
        size = message.ByteSize() + OVERHEAD_BYTES
        self._ahead.append((message, size))
        self._count(size)
        del message
        while self._ahead_bytes >= self._limit:
            self._room.clear()
            await self._room.wait()

    @property
    def _limit(self) -> int:
        whole = self._inference.settings.max_body_bytes
        more = self._writing and self._of_all.bytes < whole
        return whole if more else min(whole, MAX_BYTES)

    def _count(self, size: int) -> None:
        self._ahead_bytes += size
        self._of_all.bytes += size

    def _start(self) -> None:
        """As many as may be in work."""
        while self._ahead and len(self._turns) < self._most and self._work_bytes < MAX_BYTES:
            if self._leaving:
                return
            message, size = self._ahead.popleft()
            self._count(-size)
            turn = self._submit(message)
            self._work_bytes += turn.size
            self._turns.append(turn)
            self._more.set()

    def _submit(self, message: Any) -> _Turn:
        inference = self._inference
        try:
            served = inference.find(message.model_name, message.model_version)
            tracer = served.gate.tracer
            arrival = None if tracer is None else grpc.arrived(tracer, self._metadata)
            grpc.add_parameters(message, self._parameters)
            request = grpc.decode(message, inference.settings)
            size = sum(tensor.data.nbytes for tensor in request.inputs)
            return _Turn(message.id, inference.submit(request, arrival=arrival), size)
        except MantaError as error:
            return _Turn(message.id, copy(error))  # its traceback would keep the message
        except Exception:
            logger.exception("a request of a stream failed unexpectedly")
            return _Turn(message.id, Internal("internal error"))

    def _withdraw(self) -> None:
        self._ahead.clear()
        self._count(-self._ahead_bytes)
        for turn in self._turns:
            if isinstance(turn.what, MantaError):
                continue
            future = turn.what.future
            if not future.cancel() and not future.cancelled():
                future.exception()  # nobody asks for it any more
        self._turns.clear()

    # --- answers ---------------------------------------------------------------------------------

    async def _answer(self, turn: _Turn) -> Any:
        answer = pb.ModelStreamInferResponse()
        try:
            if isinstance(turn.what, MantaError):
                raise turn.what
            grpc.encode(await self._inference.result(turn.what), answer.infer_response)
            return _final(answer)
        except MantaError as error:
            failure: MantaError = error
        except Exception:
            logger.exception("an answer of a stream failed unexpectedly")
            failure = Internal("internal error")
        if self._errors_end:
            raise failure
        answer = pb.ModelStreamInferResponse(error_message=grpc.status(failure)[1])
        answer.infer_response.id = turn.id
        return _final(answer)


def _final(answer: Any) -> Any:
    """Models that answer once are all there are: each answer is its request's last."""
    answer.infer_response.parameters[FINAL].bool_param = True
    return answer
