"""The bytes of a call: what is read from them is what protobuf reads; grpc's own limits hold."""

from __future__ import annotations

import gzip
import zlib
from contextlib import nullcontext

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.restricted import RestrictedGroup
from deployments import grpc_wire
from deployments.errors import InvalidArgument
from deployments.grpc import encode
from deployments.grpc_stubs import service_pb2 as pb
from deployments.grpc_wire import Head, Refused, Terms
from deployments.plans import MAX_KEY_BYTES
from deployments.restricted import Guards
from deployments.types import InferResponse, Tensor

PATH = "/p"
INPUT = pb.ModelInferRequest.InferInputTensor
REQUESTS = st.builds(
    lambda model, version, call, names, raw: pb.ModelInferRequest(
        model_name=model,
        model_version=version,
        id=call,
        inputs=[INPUT(name=name, shape=(1, 2)) for name in names],
        raw_input_contents=raw,
    ),
    *(st.text(max_size=200), st.text(max_size=3), st.text(max_size=5)),
    *(st.lists(st.text(max_size=9), max_size=3), st.lists(st.binary(max_size=300), max_size=3)),
)


@given(REQUESTS, st.booleans())
def test_a_scan_finds_what_protobuf_finds(request, as_view):
    data = b"head" + request.SerializeToString() + b"tail"
    parts = grpc_wire.scan(memoryview(data) if as_view else data, 4, len(data) - 4)
    assert parts is not None
    assert (parts.model, parts.version, parts.id.decode()) == (
        request.model_name,
        request.model_version,
        request.id,
    )
    assert [bytes(raw) for raw in parts.raw] == list(request.raw_input_contents)
    request.ClearField("id")
    request.ClearField("raw_input_contents")
    assert parts.key == request.SerializeToString()


@pytest.mark.parametrize("raw_last", [True, False])
def test_a_description_that_is_too_long_to_be_remembered_is_not_put_together(raw_last):
    for more, known in ((0, True), (1, False)):
        request = pb.ModelInferRequest(model_name="m", inputs=[INPUT(name="x" * 100)])
        request.inputs[0].datatype = "x" * (MAX_KEY_BYTES - request.ByteSize() - 4 + more)
        described, raw = request.SerializeToString(), b"\x3a\x01a"
        assert len(described) == MAX_KEY_BYTES + more
        message = described + raw if raw_last else raw + described
        parts = grpc_wire.scan(message, 0, len(message))
        assert (parts is not None) == known


@settings(max_examples=300)
@given(REQUESTS, st.data())
def test_a_scan_of_damaged_bytes_never_finds_what_protobuf_does_not(request, data):
    """None, or the same as protobuf says, which may then refuse it for what lies deeper."""
    raw = bytearray(request.SerializeToString() or b"\0")
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] = data.draw(st.integers(0, 255))
    parts = grpc_wire.scan(bytes(raw), 0, len(raw))
    if parts is None:
        return
    try:
        parsed = pb.ModelInferRequest.FromString(bytes(raw))
    except Exception:
        return
    assert (parts.model, parts.version, parts.id.decode()) == (
        parsed.model_name,
        parsed.model_version,
        parsed.id,
    )
    assert list(parts.raw) == list(parsed.raw_input_contents)


@pytest.mark.parametrize("call", ["", "7", "é" * 100])
@pytest.mark.parametrize("shapes", [[], [(1, 3)], [(2, 2), (0, 4), (3000,)]])
def test_an_answer_is_what_protobuf_writes(call, shapes):
    tensors = tuple(
        Tensor(f"OUT{at}", "FP32", shape, np.random.rand(*shape).astype(np.float32))
        for at, shape in enumerate(shapes)
    )
    response = InferResponse("model", "3", call, tensors)
    opened = grpc_wire.opening(response, [tensor.data.nbytes for tensor in tensors])
    reply = grpc_wire.answer(opened, call.encode(), [tensor.data for tensor in tensors])
    message = encode(response).SerializeToString()
    head, _, body = reply.partition(b"\r\n\r\n")
    size, _, rest = body.partition(b"\r\n")
    assert int(size, 16) == 5 + len(message)
    assert rest[:5] == b"\0" + len(message).to_bytes(4, "big")
    assert rest[5 : 5 + len(message)] == message
    assert rest[5 + len(message) :] == b"\r\n0\r\ngrpc-status: 0\r\n\r\n"


def test_an_answer_that_no_frame_can_hold():
    response = InferResponse("m", "1", "", (Tensor("y", "FP32", (1,), np.zeros(1, np.float32)),))
    with pytest.raises(InvalidArgument, match="exceeds gRPC's byte size limit 2147483647"):
        grpc_wire.opening(response, [2**31])


def test_the_limit_of_an_answer_is_that_of_its_whole_message(monkeypatch):
    """Both ways of writing it agree, to the byte."""
    data = np.zeros(100, np.float32)
    response = InferResponse("m", "1", "id", (Tensor("y", "FP32", (100,), data),))
    size = encode(response).ByteSize()
    for limit, fits in ((size, True), (size - 1, False), (399, False)):
        monkeypatch.setattr(grpc_wire, "MAX_MESSAGE_BYTES", limit)
        with nullcontext() if fits else pytest.raises(InvalidArgument, match=str(limit)):
            encode(response)
        with nullcontext() if fits else pytest.raises(InvalidArgument, match=str(limit)):
            opened = grpc_wire.opening(response, [400])
            grpc_wire.answer(opened, b"id", [data])


# --- metadata ----------------------------------------


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (b"1H", 3600),
        (b"2M", 120),
        (b"3S", 3),
        (b"4m", 0.004),
        (b"5u", 0.000005),
        (b"6n", 0.000000006),
        (b"99999999H", 1e8),
        (b"0S", 0),
        (b"", None),
        (b"1", None),
        (b"S", None),
        (b"-1S", None),
        (b"1.5S", None),
        (b"1s", None),
        (b" 1S", None),
        (b"1" * 19 + b"S", None),
    ],
)
def test_timeouts(value, seconds):
    assert grpc_wire.read_timeout(value) == (None if seconds is None else pytest.approx(seconds))


@pytest.mark.parametrize(
    ("fields", "code", "text"),
    [
        ([(b"grpc-timeout", b"soon")], 13, "Error parsing 'grpc-timeout' metadata"),
        ([(b"grpc-timeout", b"0m")], 4, "Deadline Exceeded"),
        ([(b"grpc-encoding", b"snappy")], 13, "Error parsing 'grpc-encoding' metadata"),
        ([(b"x", b"a" * 17000)], 8, "metadata size exceeds hard limit (value length 17000 vs."),
        ([(b"x", b"a" * 9000), (b"y", b"a" * 9000)], 8, "metadata size exceeds hard limit"),
    ],
)
def test_metadata_that_no_message_can_mend(fields, code, text):
    head = grpc_wire.read_head(b"/p", PATH, fields)
    assert head.error is not None
    assert head.error.args[0] == code and text in head.error.args[1]


def test_metadata_of_a_good_call():
    fields = [(b"grpc-timeout", b"5S"), (b"grpc-encoding", b"gzip"), (b"content-length", b"12")]
    assert grpc_wire.read_head(b"/p", PATH, fields) == Head(5.0, b"gzip", 12)
    assert grpc_wire.read_head(b"/p", PATH, []) == Head(None, b"identity")
    other = grpc_wire.read_head(b"/q", PATH, [])
    assert other.error is not None and other.error.args == (12, "Method not found!")


def test_a_restricted_call():
    group = RestrictedGroup(apis=("inference",), key="k", value="v")
    terms = Terms(guard=Guards([group], "p-").of("ModelInfer"))
    assert grpc_wire.read_head(b"/p", PATH, [(b"p-k", b"v")], terms).error is None
    for fields in ([], [(b"p-k", b"w")], [(b"k", b"v")]):
        error = grpc_wire.read_head(b"/p", PATH, fields, terms).error
        assert error is not None
        assert error.args == (14, "This API is restricted, expecting header 'p-k'")


@pytest.mark.parametrize(
    ("level", "accepted", "packing"),
    [
        (0, b"identity, deflate, gzip", b""),
        (1, b"identity, deflate, gzip", b"gzip"),
        (2, b"identity, deflate, gzip", b"deflate"),
        (3, b"identity,deflate,gzip", b"deflate"),
        (3, b"gzip", b"gzip"),
        (1, b"identity, deflate", b"deflate"),
        (3, b"identity", b""),
        (3, None, b""),
    ],
)
def test_the_clients_list_and_our_level_decide_on_compression(level, accepted, packing):
    fields = [] if accepted is None else [(b"grpc-accept-encoding", accepted)]
    assert grpc_wire.read_head(b"/p", PATH, fields, Terms(level)).packing == packing


# --- compression and texts ----------------------------------------


@pytest.mark.parametrize("encoding", [b"gzip", b"deflate"])
@pytest.mark.parametrize("noisy", [False, True])
def test_a_packed_answer_is_what_grpc_unpacks(encoding, noisy):
    data = np.random.default_rng(0).bytes(4000) if noisy else bytes(4000)
    tensor = Tensor("y", "UINT8", (4000,), np.frombuffer(data, np.uint8))
    response = InferResponse("m", "1", "", (tensor,))
    opened = grpc_wire.opening(response, [4000])
    reply = grpc_wire.packed(grpc_wire.answer(opened, b"", [data]), encoding)
    head, _, body = reply.partition(b"\r\n\r\n")
    assert b"\r\ngrpc-encoding: " + encoding in head
    size, _, rest = body.partition(b"\r\n")
    frame, end = rest[: int(size, 16)], rest[int(size, 16) :]
    assert end == b"\r\n0\r\ngrpc-status: 0\r\n\r\n"
    assert int.from_bytes(frame[1:5], "big") == len(frame) - 5
    message = frame[5:] if noisy else grpc_wire.inflate(frame[5:], encoding, 10**6)
    assert frame[0] == (0 if noisy else 1)
    assert message == encode(response).SerializeToString()


def test_what_cannot_be_unpacked():
    packed = gzip.compress(b"x" * 100)
    for data, encoding, text in (
        (b"x" * 20, b"gzip", "due to zlib error"),
        (packed, b"deflate", "due to zlib error"),
        (packed[:-9], b"gzip", "due to data error"),
        (packed + b"x", b"gzip", "due to not all input consumed"),
        (packed, b"identity", "Compression bit set but no encoding configured"),
    ):
        with pytest.raises(Refused) as error:
            grpc_wire.inflate(data, encoding, 1000)
        assert error.value.args[0] == 13 and text in error.value.args[1]
    assert grpc_wire.inflate(packed, b"gzip", 100) == b"x" * 100
    assert grpc_wire.inflate(memoryview(zlib.compress(b"x")), b"deflate", 1) == b"x"


@pytest.mark.parametrize("size", [1001, 2023, 2024, 10**8])
def test_unpacking_ends_at_the_limit(size):
    with pytest.raises(Refused) as error:
        grpc_wire.inflate(gzip.compress(b"\0" * size), b"gzip", 1000)
    assert error.value.args[0] == 8
    assert ("Decompressed" in error.value.args[1]) == (size >= 2024)


@pytest.mark.parametrize(
    ("text", "coded"),
    [
        ("plain text", b"plain text"),
        ("50%\r\né", b"50%25%0D%0A%C3%A9"),
        ("  a b ", b"%20%20a b%20"),
        (" ", b"%20"),
        ("", b""),
    ],
)
def test_a_refusal_is_one_line_of_ascii(text, coded):
    reply = grpc_wire.refusal(3, text)
    assert b"\r\ngrpc-status: 3\r\ngrpc-message: " + coded + b"\r\n" in reply
    assert reply.endswith(b"\r\ncontent-length: 0\r\n\r\n")
