"""The local channel's frames: a fixed prefix, a JSON header that describes, and raw buffers.

Owns kinds, limits, the handshake and errors on the way; no pickle. What batches and replies look
like is `codec`, the socket is `stream`, shared memory `arena`. Used by the Router's end (`local`)
and the replica's (`doorway`, `desk`).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeAlias, TypeVar

import orjson

from . import errors
from .errors import Internal, MantaError
from .types import Array

MAGIC: Final = b"MNTA"
VERSION: Final = 1
# magic, version, kind, flags, header bytes, payload bytes, number, time sent, arena, arena bytes
PREFIX: Final = struct.Struct("<4sBBHIQQQQQ12x")
ALIGNMENT: Final = 64
assert PREFIX.size == ALIGNMENT

# Kinds. A connection begins with HELLO and WELCOME; `number` is a batch's id unless said otherwise.
HELLO: Final = 1
WELCOME: Final = 2
BATCH: Final = 3
REPLY: Final = 4
FAILED: Final = 5  # the header is an error that concerns the whole batch
AGAIN: Final = 6  # the run failed and may have changed its inputs: send them once more, in pieces
LIMIT: Final = 7  # number: how many batches may be sent without asking
WANT: Final = 8
GRANT: Final = 9
SPARE: Final = 10
RELEASE: Final = 11  # arena: its reader is done with it
DROP: Final = 12  # arena: its owner will not use it again
_KINDS: Final = frozenset(range(HELLO, DROP + 1))

# Flags.
IN_ARENA: Final = 1  # the payload lies in the arena, at its start
NEW_ARENA: Final = 2  # and its descriptor comes with this frame
REFUSED: Final = 4
KEPT: Final = 8  # somebody still looks at the batch's arena: it must not be written again
SINGLY: Final = 16
HALVES: Final = 32

MAX_HEADER_BYTES: Final = 4 << 20
# Memory for it is reserved, and filled only by what really comes.
MAX_PAYLOAD_BYTES: Final = 1 << 30
MAX_ARENA_BYTES: Final = 4 << 30
MAX_MEMBERS: Final = 1 << 16
MAX_RANK: Final = 32

_ZEROS = bytes(ALIGNMENT)

Piece: TypeAlias = "bytes | Array"
T = TypeVar("T")


class ChannelError(Exception):
    """The peer, or the connection to it, is not what it should be."""


@dataclass(slots=True)
class Frame:
    """`payload` is what came with the frame; empty when it lies in an arena."""

    kind: int
    flags: int
    payload_bytes: int
    number: int
    stamp_ns: int
    arena: int
    arena_bytes: int
    header: bytes
    payload: Array


class Layout(NamedTuple):
    """A message without its prefix: `pieces` one after another are `size` bytes of payload."""

    header: bytes
    pieces: list[Piece]
    size: int


def aligned(size: int) -> int:
    return (size + ALIGNMENT - 1) & -ALIGNMENT


def padding(size: int) -> bytes:
    return _ZEROS[: -size % ALIGNMENT]


# --- prefix --------------------------------------------------------------------------------------


def head(
    kind: int,
    layout: Layout | None = None,
    flags: int = 0,
    number: int = 0,
    stamp_ns: int = 0,
    arena: int = 0,
    arena_bytes: int = 0,
) -> bytes:
    """Prefix and padded header. The payload follows, or lies in the arena. Raises Internal for
    what the other end would refuse."""
    header = b"" if layout is None else layout.header
    size = 0 if layout is None else layout.size
    if size > MAX_PAYLOAD_BYTES and not flags & IN_ARENA:
        raise Internal(f"{size} bytes are too much for one message to or from a model instance")
    prefix = PREFIX.pack(
        MAGIC,
        VERSION,
        kind,
        flags,
        len(header),
        size,
        number,
        stamp_ns,
        arena,
        arena_bytes,
    )
    return b"".join((prefix, header, padding(len(header)))) if header else prefix


def frame_bytes(prefix: bytes | memoryview) -> int:
    """The whole length of the frame that begins so; raises ChannelError."""
    return _measure(PREFIX.unpack_from(prefix))


def _measure(fields: tuple[Any, ...]) -> int:
    magic, version, kind, flags, header, payload, _number, _stamp, _arena, arena_bytes = fields
    if magic != MAGIC or version != VERSION:
        raise ChannelError("not a frame of this protocol")
    if kind not in _KINDS:
        raise ChannelError(f"unknown kind of frame: {kind}")
    if header > MAX_HEADER_BYTES:
        raise ChannelError(f"a header of {header} bytes")
    if flags & IN_ARENA:
        if payload > arena_bytes or arena_bytes > MAX_ARENA_BYTES:
            raise ChannelError(f"{payload} bytes in an arena of {arena_bytes}")
        payload = 0
    elif payload > MAX_PAYLOAD_BYTES or payload % ALIGNMENT:
        raise ChannelError(f"a payload of {payload} bytes")
    return ALIGNMENT + aligned(header) + int(payload)


def parse(data: Array) -> Frame:
    """A whole frame, whose first byte is the first of `data`; its payload is a view of that."""
    fields = PREFIX.unpack_from(data)  # type: ignore[arg-type]
    end = _measure(fields)
    if data.nbytes < end:
        raise ChannelError("a frame that is cut short")
    _, _, kind, flags, header_bytes, payload_bytes, number, stamp_ns, arena, arena_bytes = fields
    header = data[ALIGNMENT : ALIGNMENT + header_bytes].tobytes() if header_bytes else b""
    payload = data[ALIGNMENT + aligned(header_bytes) : end]
    return Frame(kind, flags, payload_bytes, number, stamp_ns, arena, arena_bytes, header, payload)


# --- errors --------------------------------------------------------------------------------------


def describe(error: MantaError) -> list[object]:
    facts = [one if isinstance(one, (bool, int, float)) else str(one) for one in error.args]
    return [type(error).__name__, facts]


def rebuild(described: Any) -> MantaError:
    """An error of the tree by its name; one that this side does not know is Internal."""
    name, facts = described
    kind = getattr(errors, texted(name), None)
    facts = listed(facts, MAX_RANK)
    if not (isinstance(kind, type) and issubclass(kind, MantaError)):
        return Internal(" ".join(str(one) for one in facts))
    error = kind(*facts)
    str(error)  # the text needs all its facts: an IndexError shows here, and not at a client
    return error


def error_layout(error: MantaError) -> Layout:
    return Layout(orjson.dumps(describe(error)), [], 0)


def read_error(header: bytes) -> MantaError:
    """Raises ChannelError."""
    return checked(rebuild, header)


# --- the handshake -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hello:
    """How a Router introduces itself to one instance."""

    token: str
    router_id: str
    instance: int

    def layout(self) -> Layout:
        fields = {"token": self.token, "router": self.router_id, "instance": self.instance}
        return Layout(orjson.dumps(fields), [], 0)


def read_hello(header: bytes) -> Hello:
    """Raises ChannelError."""
    return checked(
        lambda one: Hello(
            texted(one["token"]), texted(one["router"]), counted(one["instance"], MAX_MEMBERS)
        ),
        header,
    )


# --- checks --------------------------------------------------------------------------------------


def checked(read: Callable[[Any], T], header: bytes) -> T:
    """Whatever is wrong with a header is the peer's mistake."""
    try:
        return read(orjson.loads(header))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise ChannelError(f"a bad header: {error}") from None


def listed(value: object, limit: int) -> list[Any]:
    if not isinstance(value, list) or len(value) > limit:
        raise ValueError("a list that is none, or too long")
    return value


def counted(value: object, limit: int) -> int:
    if type(value) is not int or not 0 <= value <= limit:
        raise ValueError(f"no count: {value!r}")
    return value


def texted(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("a name that is no text")
    return value
