from __future__ import annotations

import asyncio
import subprocess
import sys

import numpy as np
import pytest

from deployments.batcher import Batcher, Call, Collector, Execution, MemberResult, Outcome
from deployments.batcher import build as build_batch
from deployments.errors import ExecutionFailed, Internal, ReplicaLost, Unsupported
from deployments.runtimes.strings import encode
from deployments.scheduler import BatchPolicy, Entry, Group
from deployments.tensors import decode_bytes
from deployments.types import BatchReply, OutputArray, Part, RequestFacts

from .gates import SlotGate
from .virtual_time import run, settle


def member(rows=1, inputs=None, outputs=("y",), queued_ns=0):
    if inputs is None:
        inputs = (np.full((rows, 2), rows, np.float32),)
    return Entry(rows, "k", queued_ns, inputs, outputs)


def group_of(*members):
    return Group(tuple(members), 100)


class Client:
    """Doubles its first input; `reply` replaces that, `error` is raised."""

    def __init__(self, reply=None, error=None, wait=None):
        self.batches = []
        self._reply, self._error, self._wait = reply, error, wait

    async def execute(self, batch):
        self.batches.append(batch)
        if self._wait is not None:
            await self._wait
        if self._error is not None:
            raise self._error
        if self._reply is not None:
            return self._reply
        data = np.concatenate(batch.inputs[0]) * 2
        members = tuple(range(len(batch.rows)))
        return BatchReply((Part(members, {"y": OutputArray(data)}, None, 1, 2, 3),))

    async def aclose(self):
        pass


def outcome_of(group, reply, batched=True):
    return asyncio.run(outcome_at(Batcher("m", batched), group, Client(reply)))


async def outcome_at(batcher, group, place):
    return await batcher.run(group, place)


def answers(outcome) -> list[MemberResult]:
    return [result for result in outcome.results if isinstance(result, MemberResult)]


# --- the batch --------------------------------------------------------------


def test_facts_go_along_where_members_have_them():
    first, second = member(), member()
    assert build_batch(group_of(first, second)).facts == ()
    first.facts, second.facts = RequestFacts("a"), RequestFacts("b")
    assert build_batch(group_of(first, second)).facts == (first.facts, second.facts)


def test_answers_of_their_own_are_whole_and_counted_as_one_execution():
    wide = OutputArray(np.zeros((7, 4)))
    parts = (
        Part((0,), {"y": wide}, None, 1, 2, 3, run_rows=4),
        Part((1,), {}, ExecutionFailed("no"), 1, 2, 3, run_rows=0),
        Part((2,), {"y": wide}, None, 1, 2, 3, run_rows=0),
        Part((3,), {}, None, 1, 2, 3, run_rows=0),
    )
    outcome = outcome_of(group_of(*[member() for _ in parts]), BatchReply(parts))
    first, failed, third, lacking = outcome.results
    assert isinstance(first, MemberResult) and first.outputs["y"] is wide
    assert isinstance(third, MemberResult) and third.infer_ns == 2
    assert isinstance(failed, ExecutionFailed) and isinstance(lacking, Internal)
    assert outcome.executions == [Execution(4, 1, 2, 3)]


def test_build_orders_by_input_and_then_by_member():
    one, two = np.zeros((1, 2)), np.zeros((3, 2))
    first = member(1, (one, None))
    second = member(3, (two, one))
    batch = build_batch(group_of(first, second))
    assert batch.rows == (1, 3)
    assert batch.inputs[0][0] is one and batch.inputs[0][1] is two  # views travel, no copies
    assert batch.inputs[1] == (None, one)
    assert batch.outputs == ("y",)


def test_build_names_every_output_that_somebody_wants_once():
    batch = build_batch(group_of(member(outputs=("b", "a")), member(outputs=("a", "c"))))
    assert batch.outputs == ("b", "a", "c")


# --- the cutting ------------------------------------------------------------


def test_each_member_gets_its_rows_as_views():
    group = group_of(member(1), member(3), member(2))
    whole = np.arange(12, dtype=np.float32).reshape(6, 2)
    outcome = outcome_of(group, BatchReply((Part((0, 1, 2), {"y": OutputArray(whole)}),)))
    parts = [result.outputs["y"].data for result in outcome.results]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert [len(part) for part in parts] == [1, 3, 2]
    assert all(np.shares_memory(part, whole) for part in parts)


def test_times_are_those_of_the_execution_and_the_members_own_wait():
    group = group_of(member(queued_ns=10), member(queued_ns=40))
    outcome = asyncio.run(outcome_at(Batcher("m", True), group, Client()))
    assert [result.queue_ns for result in answers(outcome)] == [90, 60]
    assert [(r.input_ns, r.infer_ns, r.output_ns) for r in answers(outcome)] == [(1, 2, 3)] * 2
    assert outcome.executions == [Execution(2, 1, 2, 3)]


def test_a_member_gets_only_what_it_asked_for():
    group = group_of(member(outputs=("a",)), member(outputs=("b", "a")))
    outputs = {"a": OutputArray(np.zeros((2, 1))), "b": OutputArray(np.ones((2, 1)))}
    outcome = outcome_of(group, BatchReply((Part((0, 1), outputs),)))
    assert [list(result.outputs) for result in outcome.results] == [["a"], ["b", "a"]]


def test_bytes_are_cut_by_their_offsets():
    words = [b"a", b"", b"ccc", b"d\0d"]
    wire = b"".join(len(word).to_bytes(4, "little") + word for word in words)
    offsets = np.cumsum([0] + [4 + len(word) for word in words]).astype(np.int64)
    whole = OutputArray(np.frombuffer(wire, np.uint8), offsets)
    group = group_of(member(1), member(2), member(1))
    outcome = outcome_of(group, BatchReply((Part((0, 1, 2), {"y": whole}),)))
    middle = outcome.results[1].outputs["y"]
    assert middle.data.tobytes() == b"\0\0\0\0" + b"\3\0\0\0ccc"
    assert middle.offsets.tolist() == [0, 4, 11]
    assert b"".join(r.outputs["y"].data.tobytes() for r in outcome.results) == wire


def test_bytes_of_a_shape_are_cut_by_rows():
    texts = [b"a", b"", b"ccc", b"dd", b"e", b"ff"]
    whole = encode("y", np.array(texts, object).reshape(3, 2, 1))
    reply = BatchReply((Part((0, 1), {"y": whole}),))
    first, second = outcome_of(group_of(member(1), member(2)), reply).results
    for result, shape, wanted in ((first, (1, 2, 1), texts[:2]), (second, (2, 2, 1), texts[2:])):
        assert isinstance(result, MemberResult)
        one = result.outputs["y"]
        assert one.shape == shape and decode_bytes("y", one.data) == wanted
        assert one.offsets is not None and len(one.offsets) == len(wanted) + 1
    first, second = outcome_of(group_of(member(2), member(2)), reply).results
    assert isinstance(first, MemberResult) and isinstance(second, Unsupported)


def test_too_few_rows_fail_only_those_that_got_none():
    group = group_of(member(1), member(2), member(1))
    reply = BatchReply((Part((0, 1, 2), {"y": OutputArray(np.zeros((2, 2)))}),))
    first, second, third = outcome_of(group, reply).results
    assert isinstance(first, MemberResult)
    assert isinstance(second, Unsupported) and isinstance(third, Unsupported)
    assert str(second) == (
        "failed to split the output tensor 'y' into responses: "
        "expected batch size of at least 3, got 2"
    )
    assert "at least 4, got 2" in str(third)


@pytest.mark.parametrize(
    "output",
    [
        OutputArray(np.zeros(())),
        OutputArray(np.zeros(0, np.uint8), np.zeros(1, np.int64)),
    ],
)
def test_no_rows_at_all_fail_everybody(output):
    results = outcome_of(group_of(member()), BatchReply((Part((0,), {"y": output}),))).results
    assert isinstance(results[0], Unsupported)


def test_surplus_rows_are_dropped():
    group = group_of(member(1), member(2))
    reply = BatchReply((Part((0, 1), {"y": OutputArray(np.zeros((9, 2)))}),))
    assert [len(r.outputs["y"].data) for r in outcome_of(group, reply).results] == [1, 2]


@pytest.mark.parametrize("shape", [(), (5, 2)])
def test_without_a_batch_dimension_outputs_are_whole(shape):
    whole = OutputArray(np.zeros(shape))
    outcome = outcome_of(group_of(member()), BatchReply((Part((0,), {"y": whole}),)), batched=False)
    assert outcome.results[0].outputs["y"] is whole


def test_parts_of_a_batch_that_was_run_again_singly():
    group = group_of(member(1), member(2), member(1))
    bad = ExecutionFailed("bad row")
    reply = BatchReply(
        (
            Part((0,), {"y": OutputArray(np.zeros((1, 2)))}, None, 1, 1, 1),
            Part((1,), {}, bad),
            Part((2,), {"y": OutputArray(np.ones((1, 2)))}, None, 2, 2, 2),
        )
    )
    outcome = outcome_of(group, reply)
    assert outcome.results[1] is bad
    assert outcome.results[2].outputs["y"].data.tolist() == [[1, 1]]
    assert outcome.executions == [Execution(1, 1, 1, 1), Execution(1, 2, 2, 2)]


@pytest.mark.parametrize(
    "parts", [(), (Part((0,), {}),)], ids=["a member is left out", "an output is left out"]
)
def test_a_reply_with_holes_is_an_error_and_not_a_wrong_answer(parts):
    results = outcome_of(group_of(member()), BatchReply(parts)).results
    assert type(results[0]) is Internal


def test_a_refusal_says_so():
    assert outcome_of(group_of(member()), BatchReply((), refused=True)).refused


def test_what_the_client_raises_reaches_every_member_through_the_gate():
    async def main(clock):
        batcher, lost = Batcher("m", True), Client(error=ReplicaLost("m"))
        gate = SlotGate(
            "m",
            BatchPolicy(8, True, (8,), 0, 9, 0),
            lambda g, _: batcher.run(g, lost),
            0,
            None,
            clock,
        )
        futures = [gate.submit(1, "k", (np.zeros((1, 2)),), ("y",)) for _ in range(3)]
        gate.resize(1)
        await settle()
        assert [type(future.exception()) for future in futures] == [ReplicaLost] * 3

    run(main)


# --- `batching: serve` ------------------------------------------------------


class Desk:
    """Stands where @serve.batch stands: collects in one tick, hands over as told."""

    def __init__(self, handfuls):
        self.collector = Collector()
        self.handfuls = handfuls  # how many calls go together, in order; then all that is left
        self.taken = 0
        self._waiting = []

    async def collect(self, call):
        self.taken += 1
        reply = asyncio.get_running_loop().create_future()
        self._waiting.append((call, reply))
        if len(self._waiting) == 1:
            asyncio.get_running_loop().call_soon(self._hand_over)
        return await reply

    def _hand_over(self):
        count = self.handfuls.pop(0) if self.handfuls else len(self._waiting)
        now, self._waiting = self._waiting[:count], self._waiting[count:]
        shares = self.collector.sort([call for call, _ in now])
        assert len(shares) == len(now)
        for (_, reply), share in zip(now, shares, strict=True):
            reply.set_result(share)
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._hand_over)


@pytest.mark.parametrize("handfuls", [[], [1, 1, 1], [2], [4, 1]])
def test_groups_of_several_models_are_sorted_out(handfuls):
    async def main():
        desk = Desk(handfuls)
        one, two = Client(), Client()
        outcomes = await asyncio.gather(
            Batcher("one", True, desk.collect).run(group_of(member(1), member(2), member(3)), one),
            Batcher("two", True, desk.collect).run(group_of(member(4), member(5)), two),
        )
        assert [batch.rows for batch in one.batches] == [(1, 2, 3)]  # one call per group
        assert [batch.rows for batch in two.batches] == [(4, 5)]
        for outcome, sizes in zip(outcomes, ((1, 2, 3), (4, 5)), strict=True):
            for result, rows in zip(answers(outcome), sizes, strict=True):
                np.testing.assert_array_equal(
                    result.outputs["y"].data, np.full((rows, 2), 2 * rows, np.float32)
                )
        await settle()
        assert not desk.collector._running

    asyncio.run(main())


def test_a_slow_group_does_not_hold_up_another():
    async def main():
        desk = Desk([])
        gone = asyncio.get_running_loop().create_future()
        slow = Batcher("slow", True, desk.collect)
        fast = Batcher("fast", True, desk.collect)
        waiting = asyncio.ensure_future(slow.run(group_of(member(), member()), Client(wait=gone)))
        assert (
            await fast.run(group_of(member(), member()), Client())
        ).results  # of the same handful
        assert not waiting.done()
        gone.set_result(None)
        assert (await waiting).results

    asyncio.run(main())


def test_a_single_request_needs_no_collecting():
    async def main():
        desk = Desk([])
        outcome = await Batcher("m", True, desk.collect).run(group_of(member()), Client())
        assert isinstance(outcome.results[0], MemberResult)
        assert desk.taken == 0

    asyncio.run(main())


@pytest.mark.parametrize("error", [ReplicaLost("m"), KeyError("x"), asyncio.CancelledError()])
def test_a_failing_group_fails_alone(error):
    async def main():
        desk = Desk([])
        bad = Batcher("bad", True, desk.collect)
        good = Batcher("good", True, desk.collect)
        failed, fine = await asyncio.gather(
            bad.run(group_of(member(), member()), Client(error=error)),
            good.run(group_of(member(), member()), Client()),
            return_exceptions=True,
        )
        assert type(failed) is type(error)
        assert isinstance(fine, Outcome) and len(fine.results) == 2

    asyncio.run(main())


def test_an_incomplete_group_does_not_start():
    async def main():
        started = []

        async def execute(group, place):
            started.append(group)
            return Outcome(())

        call = Call(group_of(member(), member()), Client(), execute, asyncio.Future())
        collector = Collector()
        assert collector.sort([call]) == [None]
        await settle()
        assert started == []
        collector.sort([call])
        await settle()
        assert len(started) == 1
        assert call.outcome.done()

    asyncio.run(main())


def test_the_batcher_imports_neither_ray_nor_torch():
    code = "import sys, deployments.gate; print([m for m in ('ray', 'torch') if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
