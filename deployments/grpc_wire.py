"""The bytes of a ModelInfer call: metadata, framing, compression, and where a message's parts lie.

Pure. What it refuses, it refuses in grpc's words, with grpc's codes; it answers in grpc's form.
The lane asks it; what a message means is the business of `grpc`.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .errors import InvalidArgument, Restricted
from .forwarding import Forwarding
from .grpc_stubs import service_pb2 as pb
from .plans import MAX_KEY_BYTES
from .restricted import Guard
from .tracing import Carrier, carrier
from .types import InferResponse

MAX_METADATA_BYTES = 16384  # grpc's own limit
MAX_MESSAGE_BYTES = 2**31 - 1
PREFIX_BYTES = 5  # the compressed flag, and the length as four bytes

_INVALID_ARGUMENT, _DEADLINE_EXCEEDED, _RESOURCE_EXHAUSTED = 3, 4, 8
_UNIMPLEMENTED, _INTERNAL, _UNAVAILABLE = 12, 13, 14
_TIMEOUT = re.compile(rb"([0-9]{1,18})([HMSmun])")
_UNIT_S = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
_LONGEST_S = 1e8
_IDENTITY = b"identity"
_BLOCK_BYTES = 1024  # so much above a limit grpc unpacks, and then names another reason
_WINDOW_BITS = {b"gzip": 31, b"deflate": 15}  # in gRPC's order, the least compression first
# An answer is looked at closely only where its outputs alone come this near to the limit.
_SLACK_BYTES = 1 << 20
# ModelInferRequest's fields, each with its wire type: all that the protocol knows are bytes.
_NAME, _VERSION, _ID, _RAW = 0x0A, 0x12, 0x1A, 0x3A
_DESCRIPTION = frozenset((0x22, 0x2A, 0x32))  # parameters, inputs, outputs
_RAW_OUTPUT = b"\x32"

_START = b"HTTP/1.1 200 OK\r\ncontent-type: application/grpc\r\n"
_CHUNKED = (
    _START + b"grpc-accept-encoding: identity, deflate, gzip\r\ntransfer-encoding: chunked\r\n\r\n"
)
_TRAILERS = b"\r\n0\r\ngrpc-status: 0\r\n\r\n"


class Refused(Exception):
    """Facts: grpc's status code, details. What grpc.aio answers before a message is anyone's."""


def too_large(size: int, limit: int) -> Refused:
    text = f"SERVER: Received message larger than max ({size} vs. {limit})"
    return Refused(_RESOURCE_EXHAUSTED, text)


def expired() -> Refused:
    return Refused(_DEADLINE_EXCEEDED, "Deadline Exceeded")


def incomplete() -> Refused:
    return Refused(_INTERNAL, "the call ended before its message was complete")


# --- metadata ------------------------------------------------------------------------------------


class Terms(NamedTuple):
    """What the server has settled for every call: the level of compression of its answers, as gRPC
    counts them, who may call, and which metadata become parameters."""

    level: int = 0
    guard: Guard | None = None
    forwarding: Forwarding | None = None


_NO_TERMS = Terms()


class Head(NamedTuple):
    """What the fields of a call say. `length` is None for a body in chunks; `error` is for calls
    that no message can mend; `forwarded` are parameters, where the server has a pattern; `packing`
    is how the answer is to be compressed, if at all; `carrier` is the client's trace."""

    timeout_s: float | None
    encoding: bytes
    length: int | None = None
    error: Refused | None = None
    forwarded: Mapping[str, str] | None = None
    packing: bytes = b""
    carrier: Carrier | None = None


def read_head(
    path: bytes, wanted: str, fields: Sequence[tuple[bytes, bytes]], terms: Terms = _NO_TERMS
) -> Head:
    """Of a call to `path`; names are lower case, as HAProxy writes them."""
    named = dict(fields)
    size = named.get(b"content-length", b"")
    length = int(size) if size.isdigit() else None
    timeout_s, error = None, None
    encoding = named.get(b"grpc-encoding", _IDENTITY)
    timeout = named.get(b"grpc-timeout")
    if path != wanted.encode():
        error = Refused(_UNIMPLEMENTED, "Method not found!")
    elif sum(len(name) + len(value) for name, value in fields) > MAX_METADATA_BYTES:
        error = _metadata_too_large(fields)
    elif encoding != _IDENTITY and encoding not in _WINDOW_BITS:
        error = Refused(_INTERNAL, "Error parsing 'grpc-encoding' metadata")
    elif timeout is not None and (timeout_s := read_timeout(timeout)) is None:
        error = Refused(_INTERNAL, "Error parsing 'grpc-timeout' metadata")
    elif timeout_s == 0:
        error = expired()
    elif terms.guard is not None:
        error = _restricted(terms.guard, named)
    forwarded = None
    if terms.forwarding is not None and error is None:
        try:
            forwarded = terms.forwarding.of_grpc(fields) or None
        except InvalidArgument as reserved:
            error = Refused(_INVALID_ARGUMENT, str(reserved))
    packing = _packing(named.get(b"grpc-accept-encoding", b""), terms.level)
    return Head(timeout_s, encoding, length, error, forwarded, packing, carrier(named))


def _restricted(guard: Guard, named: Mapping[bytes, bytes]) -> Refused | None:
    try:
        guard.check(named)
    except Restricted as error:
        return Refused(_UNAVAILABLE, str(error))
    return None


def _packing(accepted: bytes, level: int) -> bytes:
    """The encoding that gRPC chooses for a level, among those that the client takes."""
    taken = {name.strip() for name in accepted.split(b",")} if level else ()
    ranked = [name for name in _WINDOW_BITS if name in taken]
    return ranked[(0, 0, len(ranked) // 2, -1)[level]] if ranked else b""


def read_timeout(value: bytes) -> float | None:
    """Seconds; None for what is no timeout."""
    match = _TIMEOUT.fullmatch(value)
    return None if match is None else min(int(match[1]) * _UNIT_S[match[2]], _LONGEST_S)


def _metadata_too_large(fields: Sequence[tuple[bytes, bytes]]) -> Refused:
    longest = max(len(value) for _, value in fields)
    shown = f" (value length {longest} vs. {MAX_METADATA_BYTES})"
    text = "received metadata size exceeds hard limit"
    return Refused(_RESOURCE_EXHAUSTED, text + (shown if longest > MAX_METADATA_BYTES else ""))


# --- messages ------------------------------------------------------------------------------------


def announced(body: bytes | bytearray, start: int, limit: int) -> int:
    """The length of the message whose prefix starts there."""
    size = int.from_bytes(body[start + 1 : start + PREFIX_BYTES], "big")
    if size > limit:
        raise too_large(size, limit)
    return size


def inflate(data: bytes | memoryview, encoding: bytes, limit: int) -> bytes:
    """The message inside a compressed one; never takes the memory of much more than `limit`."""
    if encoding == _IDENTITY:
        raise Refused(_INTERNAL, "Compression bit set but no encoding configured")
    inflater = zlib.decompressobj(_WINDOW_BITS[encoding])
    try:
        message = inflater.decompress(data, limit + _BLOCK_BYTES)
    except zlib.error:
        raise Refused(_INTERNAL, "Decompression failed due to zlib error") from None
    if len(message) == limit + _BLOCK_BYTES:
        raise Refused(_RESOURCE_EXHAUSTED, "Decompressed message larger than max")
    if len(message) > limit:
        raise too_large(len(message), limit)
    if not inflater.eof:
        raise Refused(_INTERNAL, "Decompression failed due to data error")
    if inflater.unused_data:
        raise Refused(_INTERNAL, "Decompression failed due to not all input consumed")
    return message


class Parts(NamedTuple):
    """A ModelInferRequest, unparsed. `key` is all of it but its id and its raw contents; `raw` are
    those contents."""

    model: str
    version: str
    id: bytes
    key: bytes
    raw: Sequence[bytes]


def scan(data: Any, at: int, end: int) -> Parts | None:
    """Of bytes or a view; None for what has to be parsed to be understood, or to be refused, or has
    a description of such a length that nobody remembers it."""
    model = version = call = b""
    key: list[bytes] = []
    raw: list[bytes] = []
    seen: set[int] = set()
    kept = at  # what starts here and belongs to the key is not in it yet
    try:
        while at < end:
            tag, size, start = data[at], data[at + 1], at + 2
            if size > 0x7F:
                size, start = _varint(data, at + 1)
            stop = start + size
            if tag == _RAW or tag == _ID:
                if at - kept > MAX_KEY_BYTES:
                    return None
                key.append(data[kept:at])
                kept = stop
                if tag == _RAW:
                    raw.append(data[start:stop])
                else:
                    call = data[start:stop]
            elif tag == _NAME:
                model = data[start:stop]
            elif tag == _VERSION:
                version = data[start:stop]
            elif tag not in _DESCRIPTION:
                return None
            if tag <= _ID:
                if tag in seen:
                    return None
                seen.add(tag)
            at = stop
        if at != end or at - kept > MAX_KEY_BYTES:
            return None
        key.append(data[kept:at])
        str(call, "utf-8")
        return Parts(str(model, "utf-8"), str(version, "utf-8"), bytes(call), b"".join(key), raw)
    except (IndexError, UnicodeDecodeError):
        return None


def _varint(data: Any, at: int) -> tuple[int, int]:
    """Its value, and where it ends. Raises IndexError when it has no end."""
    value = shift = 0
    while shift < 35:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise IndexError


# --- answers -------------------------------------------------------------------------------------


class Opening(NamedTuple):
    """All of an answer that stands before, between and beside its raw outputs and its id."""

    whole: bytes  # up to the first raw output, when there is no id
    before: bytes
    after: bytes
    tags: tuple[bytes, ...]  # one in front of each raw output
    size: int  # of the message, without an id


def opening(response: InferResponse, sizes: Sequence[int]) -> Opening:
    """What `grpc.encode` makes of it, but for the outputs' bytes, of which there are `sizes`."""
    before = pb.ModelInferResponse(
        model_name=response.model_name, model_version=response.model_version
    ).SerializeToString()
    message = pb.ModelInferResponse()
    for tensor in response.outputs:
        message.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
    after = message.SerializeToString()
    tags = tuple(_RAW_OUTPUT + _to_varint(size) for size in sizes)
    size = len(before) + len(after) + sum(map(len, tags)) + sum(sizes)
    return Opening(_framed(size) + before + after, before, after, tags, size)


def answer(opened: Opening, call: bytes, raw: Sequence[Any]) -> bytes:
    """The bytes of a good answer to the call with that id."""
    if call:
        field = _id_field(call)
        pieces: list[Any] = [
            _framed(opened.size + len(field)),
            opened.before,
            field,
            opened.after,
        ]
    else:
        pieces = [opened.whole]
    for tag, piece in zip(opened.tags, raw, strict=True):
        pieces += (tag, piece)
    pieces.append(_TRAILERS)
    return b"".join(pieces)


def packed(reply: bytes, encoding: bytes) -> bytes:
    """A good answer with its message compressed, or as it is where that makes it no smaller."""
    start = reply.index(b"\r\n", len(_CHUNKED)) + 2 + PREFIX_BYTES
    message = memoryview(reply)[start : len(reply) - len(_TRAILERS)]
    packer = zlib.compressobj(wbits=_WINDOW_BITS[encoding])
    body = packer.compress(message) + packer.flush()
    flag = 1
    if len(body) >= len(message):
        flag, body = 0, bytes(message)
    head = b"%bgrpc-encoding: %b\r\n\r\n" % (_CHUNKED[:-2], encoding)
    frame = b"%x\r\n%c%b" % (len(body) + PREFIX_BYTES, flag, len(body).to_bytes(4, "big"))
    return b"".join((head, frame, body, _TRAILERS))


def check_size(response: InferResponse, sizes: Sequence[int]) -> None:
    """Raises InvalidArgument when an answer whose outputs have these sizes is too large to send."""
    if sum(sizes) > MAX_MESSAGE_BYTES - _SLACK_BYTES:
        _framed(opening(response, sizes).size + len(_id_field(response.id.encode())))


def _framed(size: int) -> bytes:
    """The head of an answer up to its message, which is one chunk. Raises InvalidArgument."""
    if size > MAX_MESSAGE_BYTES:
        raise InvalidArgument(
            f"Response has byte size {size} which exceeds gRPC's byte size limit "
            f"{MAX_MESSAGE_BYTES}."
        )
    return b"%b%x\r\n\0%b" % (_CHUNKED, size + PREFIX_BYTES, size.to_bytes(4, "big"))


def refusal(code: int, text: str, last: bool = False) -> bytes:
    """The bytes of an answer without a message: status and details stand in its head.

    `last`: it is the last on its connection.
    """
    return b"%bgrpc-status: %d\r\ngrpc-message: %b\r\ncontent-length: 0\r\n%b\r\n" % (
        *(_START, code, _percent_encoded(text), b"connection: close\r\n" if last else b""),
    )


def _percent_encoded(text: str) -> bytes:
    """As grpc-message wants it; also spaces at the ends, which HTTP would take for padding."""
    raw = text.encode(errors="replace")
    inner = raw.strip(b" ")
    lead = len(raw) - len(raw.lstrip(b" "))
    coded = b"".join(
        b"%c" % byte if 0x20 <= byte <= 0x7E and byte != 0x25 else b"%%%02X" % byte
        for byte in inner
    )
    return b"%20" * lead + coded + b"%20" * (len(raw) - lead - len(inner))


def _id_field(call: bytes) -> bytes:
    return b"\x1a" + _to_varint(len(call)) + call if call else b""


def _to_varint(value: int) -> bytes:
    coded = bytearray()
    while value > 0x7F:
        coded.append(value & 0x7F | 0x80)
        value >>= 7
    coded.append(value)
    return bytes(coded)
