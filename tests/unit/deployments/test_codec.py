"""Batches and replies as bytes: all datatypes there and back, and nothing else is let in."""

from __future__ import annotations

import contextlib

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.dtypes import DATATYPES
from deployments.channel import ALIGNMENT, ChannelError, Layout
from deployments.codec import Codec
from deployments.errors import ExecutionFailed, Internal, InvalidArgument
from deployments.types import Batch, BatchReply, OutputArray, Part, RequestFacts

NUMBERS = sorted({str(one.numpy) for one in DATATYPES if one.numpy})


def payload_of(layout: Layout) -> np.ndarray:
    data = b"".join(
        piece if isinstance(piece, bytes) else np.ascontiguousarray(piece).tobytes()
        for piece in layout.pieces
    )
    assert len(data) == layout.size and layout.size % ALIGNMENT == 0
    return np.frombuffer(data, np.uint8)


def sent(batch: Batch, codec: Codec | None = None, apart: bool = False) -> Batch:
    codec = codec or Codec()
    layout = codec.batch(batch, apart)
    return codec.read_batch(layout.header, payload_of(layout))


def made(dtype: str, *shape: int) -> np.ndarray:
    count = int(np.prod(shape))
    return (
        (np.arange(count) % 2 if dtype == "|b1" else np.arange(count)).astype(dtype).reshape(shape)
    )


@pytest.mark.parametrize("dtype", NUMBERS)
def test_rows_of_all_members_arrive_as_one_array(dtype):
    members = (made(dtype, 1, 3), made(dtype, 2, 3), made(dtype, 1, 3))
    back = sent(Batch((1, 2, 1), (members,), ("y",)))
    (whole,) = back.joined
    assert whole is not None and whole.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(whole, np.concatenate(members))
    assert (back.rows, back.outputs, back.inputs) == ((1, 2, 1), ("y",), ((),))


def test_what_does_not_fit_together_arrives_apart():
    strings = (np.frombuffer(b"\1\0\0\0a", np.uint8), np.frombuffer(b"\2\0\0\0bc", np.uint8))
    inputs = (
        (made("<f4", 1, 3), made("<f4", 1, 4)),  # shapes of their own
        (made("<f4", 1, 3), None),  # an absent member
        (made("<f4", 1, 3), made("<f8", 1, 3)),  # datatypes of their own
        strings,
        (made("<f4", 3), made("<f4", 3)),  # no row in front
        (np.array(1, "<i4"), np.array(2, "<i4")),
    )
    back = sent(Batch((1, 1), inputs, ("y", "z")))
    assert back.joined == (None,) * len(inputs)
    for before, after in zip(inputs, back.inputs, strict=True):
        for one, other in zip(before, after, strict=True):
            if one is None:
                assert other is None
            else:
                assert other is not None and other.dtype == one.dtype
                np.testing.assert_array_equal(one, other)
                assert other.shape == one.shape


def test_arrays_are_aligned_wherever_they_lie():
    inputs = ((made("|u1", 1, 3), made("|u1", 1, 3)), (made("<f8", 1, 3), made("<f8", 1, 3)))
    layout = Codec().batch(Batch((1, 1), inputs, ()))
    memory = np.empty(layout.size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    target = memory[start : start + layout.size]
    target[:] = payload_of(layout)
    back = Codec().read_batch(layout.header, target)
    assert [one.ctypes.data % ALIGNMENT for one in back.joined if one is not None] == [0, 0]


def test_asked_for_apart_nothing_is_joined():
    members = (made("<f4", 1, 3), made("<f4", 1, 3))
    back = sent(Batch((1, 1), (members,), ("y",)), apart=True)
    assert back.joined == (None,) and len(back.inputs[0]) == 2


def test_zero_sizes():
    members = (made("<f4", 2, 0), made("<f4", 1, 0))
    back = sent(Batch((2, 1), (members,), ("y",)))
    assert back.joined[0] is not None and back.joined[0].shape == (3, 0)
    (alone,) = sent(Batch((2,), ((made("<f4", 2, 0),),), ())).inputs[0]
    assert alone is not None and alone.shape == (2, 0)


def test_memory_in_another_order_arrives_in_ours():
    transposed = made("<f4", 3, 2).T
    back = sent(Batch((2,), ((transposed,),), ()))
    np.testing.assert_array_equal(back.inputs[0][0], transposed)


def test_a_header_that_repeats_describes_each_time_what_it_says():
    codec = Codec()
    for start in range(3):
        members = (made("<f4", 1, 3) + start, made("<f4", 1, 3) * start)
        back = sent(Batch((1, 1), (members,), ("y",)), codec)
        np.testing.assert_array_equal(back.joined[0], np.concatenate(members))
    for rows in range(1, 600):  # more kinds than are remembered
        assert sent(Batch((rows,), ((made("<f4", rows, 1),),), ()), codec).rows == (rows,)
    assert len(codec._outlines) <= 256 and len(codec._batches) <= 256


def test_a_foreign_datatype_is_not_sent():
    with pytest.raises(Internal, match="complex64"):
        Codec().batch(Batch((1,), ((np.zeros((1, 2), np.complex64),),), ()))


def test_more_members_than_a_header_holds_are_not_sent():
    member = np.zeros((1,) * 30, np.uint8)
    with pytest.raises(Internal, match="more members"):
        Codec().batch(Batch((1,) * 60_000, ((member,) * 60_000,), ()), apart=True)


def answered(reply: BatchReply, codec: Codec | None = None, count: int = 3) -> BatchReply:
    codec = codec or Codec()
    layout = codec.reply(reply)
    return codec.read_reply(layout.header, payload_of(layout), count)


@pytest.mark.parametrize("dtype", NUMBERS)
def test_replies_come_back_whole(dtype):
    outputs = {"y": OutputArray(made(dtype, 3, 2)), "z": OutputArray(made(dtype, 3))}
    parts = (Part((0, 2), outputs, None, 1, 2, 3), Part((1,), {}, InvalidArgument("no"), 4, 5, 6))
    codec = Codec()
    for waited_ns in (7, 8):
        back = answered(BatchReply(parts, waited_ns=waited_ns), codec)
        assert back.waited_ns == waited_ns and not back.refused
        good, bad = back.parts
        assert (good.members, good.input_ns, good.infer_ns, good.output_ns) == ((0, 2), 1, 2, 3)
        for name, output in outputs.items():
            np.testing.assert_array_equal(good.outputs[name].data, output.data)
            assert good.outputs[name].data.dtype == output.data.dtype
        assert (bad.members, bad.input_ns, type(bad.error)) == ((1,), 4, InvalidArgument)
        assert str(bad.error) == "no"


def test_strings_come_back_with_their_offsets():
    data = np.frombuffer(b"\1\0\0\0a\0\0\0\0", np.uint8)
    output = OutputArray(data, np.array([0, 5, 9]))
    (part,) = answered(BatchReply((Part((0,), {"y": output}),))).parts
    assert part.outputs["y"].data.tobytes() == data.tobytes()
    assert part.outputs["y"].offsets is not None
    assert part.outputs["y"].offsets.tolist() == [0, 5, 9]


def test_strings_come_back_with_their_shape():
    codec = Codec()
    data = np.frombuffer(b"\1\0\0\0a" * 6, np.uint8)
    for shape in ((2, 3), (3, 2), (1, 2, 3), (6,), None):
        output = OutputArray(data, np.arange(0, 31, 5), shape)
        for _ in range(2):  # also where the header is remembered
            (part,) = answered(BatchReply((Part((0,), {"y": output}),)), codec).parts
            assert part.outputs["y"].shape == shape
    empty = OutputArray(data[:0], np.zeros(1, np.int64), (2, 0, 3))
    (part,) = answered(BatchReply((Part((0,), {"y": empty}),)), codec).parts
    assert part.outputs["y"].shape == (2, 0, 3)


@pytest.mark.parametrize("shape", [(), (3,), (-1, -2), (2, 2), (1,) * 40])
def test_a_shape_of_other_strings_is_refused(shape):
    output = OutputArray(np.frombuffer(b"\1\0\0\0a" * 2, np.uint8), np.array([0, 5, 10]), shape)
    with pytest.raises(ChannelError):
        answered(BatchReply((Part((0,), {"y": output}),)))


def test_errors_that_differ_are_not_mixed_up():
    codec = Codec()
    for text in ("one", "two"):
        (part,) = answered(BatchReply((Part((0,), {}, ExecutionFailed(text)),)), codec).parts
        assert str(part.error) == f"PyTorch execute failure: {text}"


@pytest.mark.parametrize("offsets", [[0, 5], [1, 9], [0, 7, 5, 9], [0, -1, 9]])
def test_offsets_that_cut_elsewhere_are_refused(offsets):
    output = OutputArray(np.zeros(9, np.uint8), np.array(offsets))
    with pytest.raises(ChannelError):
        answered(BatchReply((Part((0,), {"y": output}),)))


def test_answers_to_members_that_were_not_sent_are_refused():
    codec = Codec()
    reply = BatchReply((Part((0,), {}), Part((1, 2), {})))
    for _ in range(2):  # also where the header is remembered
        assert len(answered(reply, codec, 3).parts) == 2
        with pytest.raises(ChannelError, match="member 2 of 2"):
            answered(reply, codec, 2)


@pytest.mark.parametrize("at", range(4))
def test_durations_below_zero_are_refused(at):
    numbers = [-1 if k == at else 1 for k in range(4)]
    with pytest.raises(ChannelError, match="below zero"):
        answered(BatchReply((Part((0,), {}, None, *numbers[:3]),), waited_ns=numbers[3]))


GOOD = {"rows": [1], "outputs": ["y"], "inputs": [{"members": [["<f4", [1, 16]]]}]}


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": []},
        {"rows": [-1]},
        {"rows": [1.5]},
        {"rows": [True]},
        {"rows": "1"},
        {"rows": [1, 1]},
        {"outputs": [3]},
        {"inputs": [{"members": []}]},
        {"inputs": [{"members": [["<c8", [1, 8]]]}]},
        {"inputs": [{"members": [["<f4", [1, 17]]]}]},
        {"inputs": [{"members": [["<f4", [1, 15]]]}, {"members": [["<f4", [1, 16]]]}]},
        {"inputs": [{"members": [["<f4", [-1, -16]]]}]},
        {"inputs": [{"members": [["<f4", [1 << 40, 1 << 40]]]}]},
        {"inputs": [{"members": [["<f4", [0, 1 << 31, 1 << 31]]]}]},
        {"inputs": [{"members": [["O", [1, 16]]]}]},
        {"inputs": [{"joined": ["<f4", [32]]}]},
        {"inputs": [{"joined": ["<f4", [1] * 33]}]},
        {"inputs": [3]},
        {"inputs": {}},
    ],
)
def test_headers_that_do_not_hold_are_refused(changes):
    payload = np.zeros(64, np.uint8)
    Codec().read_batch(orjson.dumps(GOOD), payload)
    with pytest.raises(ChannelError):
        Codec().read_batch(orjson.dumps(GOOD | changes), payload)


json = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text(max_size=5) | st.floats(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["rows", "outputs", "inputs", "joined", "members", "x"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)


def only_channel_errors(header: bytes, payload: bytes) -> None:
    data = np.frombuffer(payload, np.uint8)
    with contextlib.suppress(ChannelError):
        Codec().read_batch(header, data)
    with contextlib.suppress(ChannelError):
        Codec().read_reply(header, data, 2)


@given(st.binary(max_size=80), st.binary(max_size=200))
def test_garbage_for_a_header_raises_nothing_else(header, payload):
    only_channel_errors(header, payload)


@given(json, st.integers(0, 4))
def test_any_json_for_a_header_raises_nothing_else(header, blocks):
    only_channel_errors(orjson.dumps(header, option=orjson.OPT_NON_STR_KEYS), bytes(64 * blocks))


@given(
    rows=json,
    outputs=json,
    inputs=st.lists(
        st.fixed_dictionaries(
            {"joined": st.tuples(st.sampled_from(NUMBERS), st.lists(json, max_size=3))}
        )
        | st.fixed_dictionaries({"members": st.lists(json, max_size=3)}),
        max_size=3,
    ),
    blocks=st.integers(0, 4),
)
def test_nearly_good_headers_raise_nothing_else(rows, outputs, inputs, blocks):
    for header in (
        {"rows": rows, "outputs": outputs, "inputs": inputs},
        {"rows": [1, 2], "outputs": [], "inputs": inputs},
    ):
        only_channel_errors(orjson.dumps(header), bytes(64 * blocks))


# --- what a model of the Python backend is told, and answers -------------------------------------


def test_facts_travel_with_their_members_and_are_remembered_by_nobody():
    codec = Codec()
    for number in range(3):
        facts = tuple(
            RequestFacts(f"{number}{k}", '{"n": 1}', ("y",), ("a", "b")) for k in range(2)
        )
        members = (made("<f4", 1, 3), made("<f4", 1, 3))
        back = sent(Batch((1, 1), (members,), ("y",), facts=facts), codec)
        assert back.facts == facts
    plain = sent(Batch((1, 1), (members,), ("y",)), codec)
    assert plain.facts == ()


@pytest.mark.parametrize("facts", [b"[]", b"[[1, 2, 3, 4]]", b'[["a", "{}"]]', b"nonsense", b"{}"])
def test_bad_facts_are_not_let_in(facts):
    layout = Codec().batch(Batch((1,), ((made("<f4", 1, 3),),), ("y",)))
    header = orjson.loads(layout.header) | {"facts": len(facts)}
    data = np.frombuffer(facts.ljust(ALIGNMENT * -(-len(facts) // ALIGNMENT), b"\0"), np.uint8)
    payload = np.concatenate((payload_of(layout), data))
    with pytest.raises(ChannelError):
        Codec().read_batch(orjson.dumps(header), payload)


def test_answers_of_one_run_keep_its_rows_and_the_shape_of_strings():
    wire = np.frombuffer(b"\1\0\0\0a\1\0\0\0b", np.uint8)
    words = OutputArray(wire, np.array([0, 5, 10]), (1, 2))
    reply = BatchReply((Part((0,), {"y": words}, run_rows=3), Part((1,), {"y": words}, run_rows=0)))
    layout = Codec().reply(reply)
    back = Codec().read_reply(layout.header, payload_of(layout), 2)
    assert [part.run_rows for part in back.parts] == [3, 0]
    assert back.parts[0].outputs["y"].shape == (1, 2)
