"""The batch call: a released group in, one result or error per member out (spec/backend.md §8).

Owns the shape of a Batch, the cutting of a reply into rows, and the `@serve.batch` method that
collects members. Decides nothing about when: that is the Gate, which calls `Batcher.run`. What the
client raises passes through; the Gate answers all members with it.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias

from .errors import Internal, MantaError, Unsupported
from .scheduler import Group
from .types import Array, Batch, BatchReply, OutputArray, Part

# The Gate is the only limiter: @serve.batch must never close or hold back what was released.
_UNLIMITED = 1 << 20


class ModelClient(Protocol):
    """The seam to a model's replicas."""

    async def execute(self, batch: Batch) -> BatchReply: ...

    async def aclose(self) -> None: ...


@dataclass(frozen=True, slots=True)
class MemberResult:
    """One request's share of an execution, in the model's view. Durations: spec/backend.md §8."""

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
        client: ModelClient,
        collect: Collect | None = None,
    ) -> None:
        self._model_name = model_name
        self._batched = batched
        self._client = client
        self._collect = collect

    async def run(self, group: Group) -> Outcome:
        """A single request needs no batch and goes straight on, in both modes."""
        if self._collect is None or len(group.members) == 1:
            return await self.run_group(group)
        call = Call(group, self.run_group, asyncio.get_running_loop().create_future())
        # All in one tick, so that @serve.batch finds them together.
        shares = await asyncio.gather(*[self._collect(call) for _ in group.members])
        return await shares[0]

    async def run_group(self, group: Group) -> Outcome:
        reply = await self._client.execute(build(group))
        if reply.refused:
            return Outcome((), refused=True)
        return self._split(group, reply.parts, reply.waited_ns)

    def _split(self, group: Group, parts: Sequence[Part], waited_ns: int) -> Outcome:
        lost = Internal(f"the reply of model '{self._model_name}' leaves out this request")
        results: list[MemberResult | MantaError] = [lost] * len(group.members)
        executions = []
        for part in parts:
            start = 0
            for index in part.members:
                rows = group.members[index].rows
                results[index] = self._result(group, index, part, start, start + rows, waited_ns)
                start += rows  # also past members that failed: rows are positional
            if part.error is None:
                executions.append(Execution(start, part.input_ns, part.infer_ns, part.output_ns))
        return Outcome(results, executions)

    def _result(
        self, group: Group, index: int, part: Part, start: int, end: int, waited_ns: int
    ) -> MemberResult | MantaError:
        if part.error is not None:
            return part.error
        entry = group.members[index]
        outputs = {}
        for name in entry.outputs:
            whole = part.outputs.get(name)
            if whole is None:
                return Internal(f"the reply of model '{self._model_name}' lacks output '{name}'")
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
    """The group as the replica wants it: by input, then by member."""
    members = group.members
    outputs = members[0].outputs
    if any(entry.outputs != outputs for entry in members):
        outputs = tuple(dict.fromkeys(name for entry in members for name in entry.outputs))
    inputs: tuple[tuple[Array | None, ...], ...] = tuple(
        zip(*[entry.inputs for entry in members], strict=True)
    )
    return Batch(tuple(entry.rows for entry in members), inputs, outputs)


def cut(output: OutputArray, start: int, end: int) -> OutputArray:
    """Rows start to end as views. A batched BYTES tensor has one element per row (§7)."""
    if output.offsets is None:
        return OutputArray(output.data[start:end])
    offsets = output.offsets[start : end + 1]
    return OutputArray(output.data[offsets[0] : offsets[-1]], offsets - offsets[0])


def _rows(output: OutputArray) -> int:
    if output.offsets is not None:
        return len(output.offsets) - 1
    return output.data.shape[0] if output.data.ndim else 0


# --- `batching: serve` -----------------------------------------


@dataclass(slots=True, eq=False)
class Call:
    """One group on its way through @serve.batch, once per member."""

    group: Group
    run: Callable[[Group], Awaitable[Outcome]]
    outcome: asyncio.Future[Outcome]
    arrived: int = 0


Collect: TypeAlias = Callable[[Call], Awaitable["asyncio.Future[Outcome]"]]


class Collector:
    """What happens to the members that one @serve.batch call holds; one object per Router process.

    The call may hold members of several groups of several models, and of a group only some. Each
    group starts when its last member is there, as a task of its own, and the call returns at once:
    a slow group never holds up another.
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def sort(self, calls: list[Call]) -> list[asyncio.Future[Outcome]]:
        for call in calls:
            call.arrived += 1
            if call.arrived == len(call.group.members):
                self._start(call)
        return [call.outcome for call in calls]

    def _start(self, call: Call) -> None:
        loop = asyncio.get_running_loop()
        # An empty context: what belongs to one client must not reach its batch-mates.
        task: asyncio.Task[None] = contextvars.Context().run(loop.create_task, _complete(call))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _complete(call: Call) -> None:
    try:
        outcome = await call.run(call.group)
    except asyncio.CancelledError:
        call.outcome.cancel()
        raise
    except Exception as error:
        if not call.outcome.done():
            call.outcome.set_exception(error)
    else:
        if not call.outcome.done():
            call.outcome.set_result(outcome)


def serve_collect() -> Collect:
    """The @serve.batch method of this Router process; works only inside a Serve replica.

    It serves all versions: its queue task outlives its owner and its limits cannot be resized, so
    one per version would leak and throttle.
    """
    from ray import serve  # here, so that a test of the rest needs no Ray

    collector = Collector()

    @serve.batch(  # type: ignore[untyped-decorator]
        max_batch_size=_UNLIMITED, batch_wait_timeout_s=0.0, max_concurrent_batches=_UNLIMITED
    )
    async def collect(calls: list[Call]) -> list[asyncio.Future[Outcome]]:
        return collector.sort(calls)

    collected: Collect = collect
    return collected
