"""Plans: a request that is answered from its plan is the request that was checked."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.dtypes import DATATYPES, from_wire
from deployments.contract import Contract
from deployments.plans import MAX_HEADS, MAX_KEY_BYTES, PlanCache, Recent, plan_of
from deployments.types import InferRequest, OutputArray, RequestedOutput, Tensor

from .serving import config, tensor

FIXED = [each for each in DATATYPES if each.wire != "BYTES"]


def planned(model, request):
    work = Contract(model.name, model).admit(request)
    return plan_of(model, request, work), work


def asked(*tensors, **more):
    return InferRequest("m", "", "", tensors, **more)


def of(name, wire, shape, raw):
    array = np.frombuffer(raw, np.dtype(from_wire(wire).numpy)).reshape(shape)
    return Tensor(name, wire, tuple(shape), array)


SIZES = st.lists(st.integers(1, 4), max_size=3)


@st.composite
def requests(draw):
    """A model and a request to it: any types, shapes and order, with and without reshape."""
    batched = draw(st.booleans())
    rows = draw(st.integers(1, 8)) if batched else 0
    inputs, tensors = [], []
    for number in range(draw(st.integers(1, 4))):
        kind, sizes = draw(st.sampled_from(FIXED)), draw(SIZES)
        reshape = None
        if draw(st.booleans()):
            reshape = tuple(reversed(sizes))
        dims = tuple(sizes)
        if reshape is None and sizes and draw(st.booleans()):
            dims = (-1, *sizes[1:])
        inputs.append(tensor(f"I{number}", kind.config, dims, reshape))
        shape = [rows, *sizes] if batched else sizes
        raw = draw(st.binary(min_size=1, max_size=1)) * (
            kind.size_bytes * int(np.prod(shape, dtype=int))
        )
        tensors.append((f"I{number}", kind.wire, shape, raw))
    model = config("m", inputs, [tensor("O", "TYPE_FP32", (1,))], 8 if batched else 0)
    return model, draw(st.permutations(tensors)), draw(st.integers(0, 7))


@given(requests())
def test_a_plan_gives_the_very_arrays_that_were_admitted(drawn):
    model, tensors, shift = drawn
    request = asked(*(of(*each) for each in tensors))
    plan, work = planned(model, request)
    assert plan is not None and plan.request.inputs == ()
    assert (plan.rows, plan.key, plan.outputs) == (work.rows, work.key, work.outputs)
    raws = [raw for *_, raw in tensors]
    body = b"x" * shift + b"".join(raws)  # unaligned as often as not
    assert plan.data_bytes == len(body) - shift
    parts = plan.from_parts(raws)
    assert parts is not None
    for arrays in (plan.from_body(body, shift), parts):
        for mine, admitted in zip(arrays, work.inputs, strict=True):
            assert admitted is not None
            assert (mine.dtype, mine.shape) == (admitted.dtype, admitted.shape)
            assert mine.tobytes() == admitted.tobytes()
            assert not mine.flags.writeable and not mine.flags.owndata


def test_parts_of_other_sizes_have_no_plan():
    model = config("m", [tensor("A", "TYPE_INT8", (2,)), tensor("B", "TYPE_INT8", (3,))], [])
    request = asked(of("B", "INT8", [1, 3], b"345"), of("A", "INT8", [1, 2], b"12"))
    plan, _ = planned(model, request)
    assert plan is not None
    arrays = plan.from_parts([b"678", b"90"])
    assert arrays is not None and [array.tobytes() for array in arrays] == [b"90", b"678"]
    assert plan.from_parts([b"67", b"890"]) is None
    assert plan.from_parts([b"678"]) is None


@pytest.mark.parametrize(
    ("inputs", "outputs", "sent"),
    [
        ("TYPE_STRING", "TYPE_FP32", Tensor("I", "BYTES", (1, 1), np.zeros(4, np.uint8))),
        ("TYPE_INT8", "TYPE_STRING", of("I", "INT8", [1, 1], b"1")),
    ],
)
def test_strings_are_not_planned(inputs, outputs, sent):
    model = config("m", [tensor("I", inputs, (1,))], [tensor("O", outputs, (1,))])
    assert planned(model, asked(sent))[0] is None


def test_strings_that_nobody_asks_for_do_not_matter():
    model = config(
        "m",
        [tensor("I", "TYPE_INT8", (1,))],
        [tensor("O", "TYPE_INT8", (1,)), tensor("S", "TYPE_STRING", (1,))],
    )
    sent = of("I", "INT8", [1, 1], b"1")
    assert planned(model, asked(sent))[0] is None
    assert planned(model, asked(sent, outputs=(RequestedOutput("O", True),)))[0] is not None


def test_inputs_without_bytes_are_not_planned():
    model = config("m", [tensor("I", "TYPE_INT8", (-1,))], [])
    empty = Tensor("I", "INT8", (1, 0), np.empty((1, 0), np.int8))
    assert planned(model, asked(empty))[0] is None


def a_plan():
    model = config("m", [tensor("I", "TYPE_INT8", (1,))], [tensor("O", "TYPE_INT8", (-1,))])
    plan, _ = planned(model, asked(of("I", "INT8", [1, 1], b"1")))
    assert plan is not None
    return plan


def test_heads_are_made_once_per_shape_and_are_bounded():
    plan, made = a_plan(), []

    def head(shape, dtype=np.int8):
        def make():
            made.append(shape)
            return len(made)

        return plan.head([OutputArray(np.zeros(shape, dtype))], make)

    assert [head((1, 2)), head((1, 3)), head((1, 2)), head((1, 2), np.int16)] == [1, 2, 1, 3]
    for size in range(100):
        head((1, size))
    assert len(plan.heads) <= MAX_HEADS


# --- what is remembered ----------------------------------------


def test_a_description_is_learned_when_it_comes_again():
    plans, plan = PlanCache(), a_plan()
    assert plans.find(b"a") is None
    assert [plans.seen(b"a"), plans.seen(b"a"), plans.seen(b"b")] == [False, True, False]
    plans.learn(b"a", plan)
    assert (plans.find(b"a"), plans.seen(b"a")) == (plan, False)


def test_what_cannot_be_planned_is_not_tried_again():
    plans = PlanCache()
    plans.learn(b"a", None)
    assert (plans.find(b"a"), plans.seen(b"a"), plans.seen(b"a")) == (None, False, False)


def test_long_descriptions_are_not_kept():
    plans, long = PlanCache(), b"x" * (MAX_KEY_BYTES + 1)
    assert [plans.seen(long), plans.seen(long), len(plans)] == [False, False, 0]
    plans.learn(long, a_plan())
    assert plans.find(long) is None  # not even looked up
    plans = PlanCache()
    assert [plans.seen(long[1:]), plans.seen(long[1:]), len(plans)] == [False, True, 1]


def test_the_memory_is_bounded_and_what_is_used_stays():
    plans, plan = PlanCache(size=16), a_plan()
    plans.learn(b"used", plan)
    plans.learn(b"unused", plan)
    for number in range(1000):
        plans.seen(b"%d" % number)
        assert plans.find(b"used") is plan
        assert len(plans) <= 16
    assert plans.find(b"unused") is None


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9))), st.integers(2, 8))
def test_the_last_half_is_always_there(steps, size):
    recent = Recent[int, int](size)
    order: list[int] = []
    for put, key in steps:
        if put:
            recent.put(key, key)
        elif recent.get(key) is None:
            continue
        order = [each for each in order if each != key] + [key]
        assert len(recent) <= size
        assert all(recent.get(each) == each for each in order[-1:])
        kept = order[-(size // 2) :]
        assert set(kept) <= {*recent._new, *recent._old}


def test_control_a_plan_is_not_a_remembered_sight():
    plans = PlanCache()
    plans.seen(b"x")
    assert len(plans) == 1 and plans.find(b"x") is None
    plans.learn(b"x", None)
    assert plans.find(b"x") is None


def test_a_request_that_tells_more_than_tensors_has_no_plan():
    model = config("m", [tensor("I0", "TYPE_FP32", (1,))], [tensor("O", "TYPE_FP32", (1,))], 8)
    request = asked(of("I0", "FP32", (1, 1), b"abcd"), parameters={"depth": 2, "timeout": 0})
    assert planned(model, request)[0] is not None  # the control
    plan, work = planned(model.model_copy(update={"backend": "python", "platform": ""}), request)
    assert plan is None and work.facts is not None
    assert (work.facts.parameters, work.facts.outputs) == ('{"depth": 2}', ("O",))
