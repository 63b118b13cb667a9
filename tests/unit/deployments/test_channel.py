"""Frames: what goes in comes out, and what no peer of ours would send is refused."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments import channel, errors
from deployments.channel import ChannelError, Hello, Layout
from deployments.errors import ExecutionFailed, Internal, InvalidArgument, MantaError


def as_array(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


def test_a_frame_comes_out_as_it_went_in():
    layout = Layout(b'{"a":1}', [b"x" * 128], 128)
    data = channel.head(channel.BATCH, layout, channel.SINGLY, 7, 99) + b"x" * 128
    assert channel.frame_bytes(data) == len(data)
    frame = channel.parse(as_array(data))
    assert (frame.kind, frame.flags, frame.number, frame.stamp_ns) == (3, channel.SINGLY, 7, 99)
    assert (frame.header, frame.payload.tobytes()) == (b'{"a":1}', b"x" * 128)


def test_a_payload_in_an_arena_is_no_part_of_the_frame():
    layout = Layout(b"{}", [], 640)
    head = channel.head(channel.REPLY, layout, channel.IN_ARENA, 1, 0, 5, 1024)
    frame = channel.parse(as_array(head))
    assert (frame.payload.nbytes, frame.payload_bytes) == (0, 640)
    assert (frame.arena, frame.arena_bytes) == (5, 1024)


def prefix(**changes: int | bytes) -> bytes:
    fields = {
        "magic": channel.MAGIC,
        "version": channel.VERSION,
        "kind": channel.BATCH,
        "flags": 0,
        "header": 0,
        "payload": 0,
        "number": 0,
        "stamp": 0,
        "arena": 0,
        "arena_bytes": 0,
    }
    return channel.PREFIX.pack(*(fields | changes).values())


@pytest.mark.parametrize(
    "changes",
    [
        {"magic": b"HTTP"},
        {"version": 2},
        {"kind": 0},
        {"kind": 200},
        {"header": channel.MAX_HEADER_BYTES + 1},
        {"payload": channel.MAX_PAYLOAD_BYTES + 64},
        {"payload": 65},
        {"flags": channel.IN_ARENA, "payload": 128, "arena_bytes": 64},
        {"flags": channel.IN_ARENA, "arena_bytes": channel.MAX_ARENA_BYTES + 1},
    ],
)
def test_a_bad_prefix_is_refused_before_anything_is_read(changes):
    channel.frame_bytes(prefix())
    with pytest.raises(ChannelError):
        channel.frame_bytes(prefix(**changes))


def test_what_the_other_end_would_refuse_is_not_sent():
    layout = Layout(b"", [], channel.MAX_PAYLOAD_BYTES + 64)
    with pytest.raises(Internal, match="too much for one message"):
        channel.head(channel.BATCH, layout)


def test_a_frame_cut_short_is_refused():
    with pytest.raises(ChannelError, match="cut short"):
        channel.parse(as_array(prefix(payload=640) + b"x" * 64))


@settings(deadline=None)
@given(st.binary(min_size=64, max_size=300))
def test_garbage_raises_nothing_else(data):
    with pytest.raises(ChannelError):
        channel.parse(as_array(data))


@settings(deadline=None)
@given(st.binary(min_size=50, max_size=300))
def test_garbage_behind_the_magic_raises_nothing_else(data):
    try:
        channel.parse(as_array(channel.MAGIC + bytes([channel.VERSION]) + data.ljust(64)))
    except ChannelError:
        pass


ERRORS = [
    found
    for _, found in inspect.getmembers(errors, inspect.isclass)
    if issubclass(found, MantaError)
]


@pytest.mark.parametrize("kind", ERRORS)
def test_every_error_survives_the_way(kind):
    error = kind("m", 3, "why")
    header = channel.error_layout(error).header
    back = channel.read_error(header)
    assert type(back) is kind and str(back) == str(error)


def test_unknown_errors_are_internal():
    back = channel.read_error(b'["NewError",["why",3]]')
    assert type(back) is Internal and str(back) == "why 3"
    back = channel.read_error(b'["Code",["why"]]')  # in that module, and no error
    assert type(back) is Internal


@pytest.mark.parametrize(
    "header",
    [b"", b"{", b"[]", b'["Internal"]', b'[3,["a"]]', b'["QueueFull",[]]', b"\xff", b'["a",3]'],
)
def test_bad_errors_are_refused(header):
    with pytest.raises(ChannelError):
        channel.read_error(header)


def test_facts_that_are_no_json_become_text():
    header = channel.error_layout(ExecutionFailed(ValueError("why"))).header
    assert str(channel.read_error(header)) == "PyTorch execute failure: why"
    assert isinstance(channel.read_error(header), InvalidArgument | ExecutionFailed)


def test_the_handshake():
    hello = Hello("secret", "router-1", 3)
    assert channel.read_hello(hello.layout().header) == hello
    for bad in (b"{}", b'{"token":1,"router":"r","instance":0}', b"[1]"):
        with pytest.raises(ChannelError):
            channel.read_hello(bad)
