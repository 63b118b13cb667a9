"""The batch call: a released group in, one result or error per member out.

Owns the shape of a Batch, the cutting of a reply into rows, and the `@serve.batch` method that
collects members. Decides nothing about when: that is the Gate, which calls `Batcher.run`. What the
client raises passes through; the Gate answers all members with it.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol, TypeAlias

from .errors import Internal, MantaError, Unsupported
from .scatter import Pieces, Scatter
from .scatter import cut as scatter_out
from .scheduler import Group
from .types import Array, Batch, BatchReply, OutputArray, Part

# The Gate is the only limiter: @serve.batch must never close or hold back what was released.
_UNLIMITED = 1 << 20


class ModelClient(Protocol):
    """The seam to where a model's batches run. `execute` sends at once, and may be awaited."""

    def execute(self, batch: Batch) -> Awaitable[BatchReply]: ...

    async def aclose(self) -> None: ...


class Executor(Protocol):
    """The first half of that seam, which is all that a batch needs."""

    def execute(self, batch: Batch) -> Awaitable[BatchReply]: ...


@dataclass(frozen=True, slots=True)
class MemberResult:
    """One request's share of an execution, in the model's view; `queue_ns` is its own time."""

    outputs: Mapping[str, OutputArray]
    queue_ns: int
    input_ns: int
    infer_ns: int
    output_ns: int


class Execution(NamedTuple):
    """One run of the model that did not fail as a whole."""

    rows: int
    input_ns: int
    infer_ns: int
    output_ns: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """`results[k]` belongs to member k. `refused`: nothing ran, the group may be sent again."""

    results: Sequence[MemberResult | MantaError]
    executions: Sequence[Execution] = ()
    refused: bool = False


class Batcher:
    """The batch call of one model version. Without `collect` it is made directly."""

    def __init__(
        self,
        model_name: str,
        batched: bool,
        collect: Collect | None = None,
        scatter: Scatter | None = None,
    ) -> None:
        self._model_name = model_name
        self._batched = batched
        self._collect = collect
        self._scatter = scatter or None

    def run(self, group: Group, place: Executor) -> Awaitable[Outcome]:
        """A single request needs no batch and goes straight on, in both modes."""
        if self._collect is None or len(group.members) == 1:
            return self.run_group(group, place)
        return self._collected(self._collect, group, place)

    async def _collected(self, collect: Collect, group: Group, place: Executor) -> Outcome:
        outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        call = Call(group, place, self.run_group, outcome)
        # All in one tick, so that @serve.batch finds them together.
        await asyncio.gather(*[collect(call) for _ in group.members])
        return await outcome

    def run_group(self, group: Group, place: Executor) -> Awaitable[Outcome]:
        """Sends at once where the place can: then no task is needed to wait for the reply."""
        reply = place.execute(build(group))
        if not isinstance(reply, asyncio.Future):
            return self._awaited(group, reply)
        outcome: asyncio.Future[Outcome] = reply.get_loop().create_future()
        reply.add_done_callback(partial(self._replied, group, outcome))
        return outcome

    async def _awaited(self, group: Group, reply: Awaitable[BatchReply]) -> Outcome:
        return self._outcome(group, await reply)

    def _replied(
        self, group: Group, outcome: asyncio.Future[Outcome], reply: asyncio.Future[BatchReply]
    ) -> None:
        if outcome.done():
            return
        try:
            outcome.set_result(self._outcome(group, reply.result()))
        except asyncio.CancelledError:
            outcome.cancel()
        except Exception as error:
            outcome.set_exception(error)

    def _outcome(self, group: Group, reply: BatchReply) -> Outcome:
        if reply.refused:
            return Outcome((), refused=True)
        return self._split(group, reply.parts, reply.waited_ns)

    def _split(self, group: Group, parts: Sequence[Part], waited_ns: int) -> Outcome:
        lost = Internal(f"the reply of model '{self._model_name}' leaves out this request")
        results: list[MemberResult | MantaError] = [lost] * len(group.members)
        executions: list[Execution] = []
        for part in parts:
            if part.run_rows >= 0:
                self._take_alone(group, part, waited_ns, results, executions)
                continue
            start = 0
            pieces = self._scatter.pieces(group, part) if self._scatter is not None else None
            for index in part.members:
                rows = group.members[index].rows
                results[index] = self._result(
                    group, index, part, start, start + rows, waited_ns, pieces
                )
                start += rows  # also past members that failed: rows are positional
            if part.error is None:
                executions.append(Execution(start, part.input_ns, part.infer_ns, part.output_ns))
        return Outcome(results, executions)

    def _take_alone(
        self,
        group: Group,
        part: Part,
        waited_ns: int,
        results: list[MemberResult | MantaError],
        executions: list[Execution],
    ) -> None:
        """One member's own answer, of a run that may have had others."""
        for index in part.members[:1]:
            entry = group.members[index]
            missing = [name for name in entry.outputs if name not in part.outputs]
            if part.error is not None:
                results[index] = part.error
            elif missing:
                results[index] = self._lacks(missing[0])
            else:
                results[index] = MemberResult(
                    {name: part.outputs[name] for name in entry.outputs},
                    group.released_ns - entry.queued_ns + waited_ns,
                    part.input_ns,
                    part.infer_ns,
                    part.output_ns,
                )
        if part.error is None and part.run_rows:
            executions.append(
                Execution(part.run_rows, part.input_ns, part.infer_ns, part.output_ns)
            )

    def _lacks(self, name: str) -> MantaError:
        return Internal(f"the reply of model '{self._model_name}' lacks output '{name}'")

    def _result(
        self,
        group: Group,
        index: int,
        part: Part,
        start: int,
        end: int,
        waited_ns: int,
        pieces: Pieces | None,
    ) -> MemberResult | MantaError:
        if part.error is not None:
            return part.error
        entry = group.members[index]
        outputs = {}
        for name in entry.outputs:
            whole = part.outputs.get(name)
            if whole is None:
                return self._lacks(name)
            if pieces is not None and (name, index) in pieces:
                scattered = scatter_out(name, whole, pieces[name, index])
                if isinstance(scattered, MantaError):
                    return scattered
                outputs[name] = scattered
                continue
            available = _rows(whole)
            if self._batched and available < end:
                return Unsupported(
                    f"failed to split the output tensor '{name}' into responses: "
                    f"expected batch size of at least {end}, got {available}"
                )
            exact = start == 0 and available == end
            outputs[name] = whole if exact or not self._batched else cut(whole, start, end)
        queue_ns = group.released_ns - entry.queued_ns + waited_ns
        return MemberResult(outputs, queue_ns, part.input_ns, part.infer_ns, part.output_ns)


def build(group: Group) -> Batch:
    """The group as the replica wants it: by input, then by member; None where one was left out."""
    members = group.members
    outputs = members[0].outputs
    if any(entry.outputs != outputs for entry in members):
        outputs = tuple(dict.fromkeys(name for entry in members for name in entry.outputs))
    inputs: tuple[tuple[Array | None, ...], ...] = tuple(
        zip(*[entry.inputs for entry in members], strict=True)
    )
    rows = tuple(entry.rows for entry in members)
    if members[0].facts is None:
        return Batch(rows, inputs, outputs)
    facts = tuple(entry.facts for entry in members if entry.facts is not None)
    return Batch(rows, inputs, outputs, facts=facts)


def cut(output: OutputArray, start: int, end: int) -> OutputArray:
    """Rows start to end as views. A batched BYTES tensor has one element per row, or a shape."""
    if output.offsets is None:
        return OutputArray(output.data[start:end])
    shape = None
    if output.shape is not None:
        width = math.prod(output.shape[1:])
        shape = (end - start, *output.shape[1:])
        start, end = start * width, end * width
    offsets = output.offsets[start : end + 1]
    return OutputArray(output.data[offsets[0] : offsets[-1]], offsets - offsets[0], shape)


def _rows(output: OutputArray) -> int:
    if output.shape is not None:
        return output.shape[0]
    if output.offsets is not None:
        return len(output.offsets) - 1
    return output.data.shape[0] if output.data.ndim else 0


# --- `batching: serve` -----------------------------------------


@dataclass(slots=True, eq=False)
class Call:
    """One group on its way through @serve.batch, once per member."""

    group: Group
    place: Executor
    run: Callable[[Group, Executor], Awaitable[Outcome]]
    outcome: asyncio.Future[Outcome]
    arrived: int = 0


Collect: TypeAlias = Callable[[Call], Awaitable[None]]


class Collector:
    """What happens to the members that one @serve.batch call holds; one object per Router process.

    The call may hold members of several groups of several models, and of a group only some. Each
    group starts when its last member is there, and the call returns at once: a slow group never
    holds up another.
    """

    def __init__(self) -> None:
        self._running: set[asyncio.Future[Outcome]] = set()

    def sort(self, calls: list[Call]) -> list[None]:
        for call in calls:
            call.arrived += 1
            if call.arrived == len(call.group.members):
                self._start(call)
        return [None] * len(calls)

    def _start(self, call: Call) -> None:
        # An empty context: what belongs to one client must not reach its batch-mates.
        context = contextvars.Context()
        try:
            outcome = context.run(asyncio.ensure_future, call.run(call.group, call.place))
        except Exception as error:
            if not call.outcome.done():
                call.outcome.set_exception(error)
            return
        self._running.add(outcome)
        outcome.add_done_callback(partial(self._finish, call), context=context)

    def _finish(self, call: Call, outcome: asyncio.Future[Outcome]) -> None:
        self._running.discard(outcome)
        if call.outcome.done():
            return
        if outcome.cancelled():
            call.outcome.cancel()
        elif (error := outcome.exception()) is not None:
            call.outcome.set_exception(error)
        else:
            call.outcome.set_result(outcome.result())


def serve_collect() -> Collect:
    """The @serve.batch method of this Router process; works only inside a Serve replica.

    It serves all versions: its queue task outlives its owner and its limits cannot be resized, so
    one per version would leak and throttle.
    """
    from ray import serve  # here, so that a test of the rest needs no Ray

    collector = Collector()

    async def collect(calls: list[Call]) -> list[None]:
        return collector.sort(calls)

    # Serve asks for the signature at every call; what is found here need not be worked out anew.
    collect.__signature__ = inspect.signature(collect)  # type: ignore[attr-defined]
    decorate = serve.batch(
        max_batch_size=_UNLIMITED, batch_wait_timeout_s=0.0, max_concurrent_batches=_UNLIMITED
    )
    collected: Collect = decorate(collect)
    return collected
