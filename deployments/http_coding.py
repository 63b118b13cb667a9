"""Content codings of HTTP bodies, gzip and deflate: which one is meant, and both directions.

Owns Triton's choice of a reply's coding, and the limits within which a body is inflated. What takes
long runs on a thread of the event loop's pool. Knows no protocol; the roads over HTTP call it.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Sequence
from typing import Any

from .errors import InvalidArgument, Unsupported

ACCEPTED = b"gzip, deflate"
# Tensors hardly shrink more at higher levels, which take several times as long.
LEVEL = 1
# What is larger keeps the event loop for longer than the way to a thread and back takes.
INLINE_BYTES = 16 << 10
# The same of a body that may inflate to a thousand times its size.
INLINE_PACKED_BYTES = 1 << 10
# Each member of a gzip body costs as much as some kilobytes, and need not bring a byte.
MAX_MEMBERS = 1024

_CODINGS = ("gzip", "deflate")
_WINDOW_BITS = {"gzip": 31, "deflate": 15}  # zlib's numbers for these two wrappers
_GZIP = b"\x1f\x8b"
_PIECE_BYTES = 64 << 10
_BLOCK_BYTES = 256 << 10
_MAX_ENTRIES = 32


# --- which one -----------------------------------------------------------------------------------


def of_request(value: bytes | None) -> str:
    """The coding that Content-Encoding names, "" for none. Raises Unsupported, also for several."""
    if value is None:
        return ""
    name = value.strip().lower().decode("latin-1")
    if name in ("", "identity"):
        return ""
    if name not in _CODINGS:
        raise Unsupported(
            f"Unsupported compression type '{name[:64]}'; gzip, deflate and identity are supported"
        )
    return name


def of_reply(accepted: bytes | None) -> str:
    """The coding that Accept-Encoding asks for, "" for none: of those known that with the highest
    weight, of equal ones the first. `*` counts only where identity is refused; who accepts nothing
    that is known gets identity."""
    if accepted is None:
        return ""
    weights: dict[str, float] = {}
    for entry in accepted.decode("latin-1").lower().split(",", _MAX_ENTRIES):
        name, _, parameters = entry.partition(";")
        weight = _weight(parameters)
        if weight is not None:
            weights.setdefault(name.strip(), weight)
    wanted = [name for name in weights if name in (*_CODINGS, "identity") and weights[name]]
    if wanted:
        best = max(wanted, key=lambda name: weights[name])
        return "" if best == "identity" else best
    if weights.get("identity") == 0 and weights.get("*"):
        return next((coding for coding in _CODINGS if coding not in weights), "")
    return ""


def _weight(parameters: str) -> float | None:
    """1 where there is none; None for what is no weight."""
    if not parameters.strip():
        return 1.0
    name, _, value = parameters.partition("=")
    try:
        weight = float(value)
    except ValueError:
        return None
    return weight if name.strip() == "q" and 0 <= weight <= 1 else None


# --- replies -------------------------------------------------------------------------------------


def is_large(pieces: Sequence[Any]) -> bool:
    """Whether `packed` belongs on a thread."""
    return sum(len(piece) for piece in pieces) > INLINE_BYTES


def packed(pieces: Sequence[Any], coding: str) -> bytes:
    """All pieces as one body in that coding."""
    packer = zlib.compressobj(LEVEL, zlib.DEFLATED, _WINDOW_BITS[coding])
    return b"".join([*(packer.compress(piece) for piece in pieces), packer.flush()])


async def pack(pieces: Sequence[Any], coding: str) -> bytes:
    """`packed`, wherever it belongs."""
    if is_large(pieces):
        return await asyncio.to_thread(packed, pieces, coding)
    return packed(pieces, coding)


# --- requests ------------------------------------------------------------------------------------


async def inflate(body: bytes, coding: str, limit: int) -> bytes:
    """The body inside; never takes the memory of much more than `limit`. Raises InvalidArgument."""
    if len(body) > INLINE_PACKED_BYTES:
        return await asyncio.to_thread(inflated, body, coding, limit)
    return inflated(body, coding, limit)


def inflated(body: bytes, coding: str, limit: int) -> bytes:
    inflater = _Inflater(coding, limit)
    try:
        view = memoryview(body)
        for at in range(0, len(body), _PIECE_BYTES):
            inflater.feed(view[at : at + _PIECE_BYTES])
        return inflater.whole()
    finally:
        inflater.parts.clear()  # an error would hold on to them


class _Inflater:
    """Takes a body piece by piece. zlib copies what it has not looked at: pieces must be small."""

    def __init__(self, coding: str, limit: int) -> None:
        self.parts: list[bytes] = []
        self._coding = coding
        self._limit = limit
        self._size = 0
        self._members = 0
        self._begin()

    def _begin(self) -> None:
        self._members += 1
        self._member = zlib.decompressobj(_WINDOW_BITS[self._coding])

    def feed(self, data: bytes | memoryview) -> None:
        full = False  # a block that is full: zlib may hold more of the output
        while data or full:
            if self._member.eof:
                if not data:
                    return
                self._next_member(data)
            try:
                part = self._member.decompress(data, _BLOCK_BYTES)
            except zlib.error:
                raise InvalidArgument(f"request body is no valid {self._coding} data") from None
            self._size += len(part)
            if self._size > self._limit:
                raise InvalidArgument(
                    f"inflated request body exceeds the maximum allowed value of {self._limit} "
                    "bytes. Use --http-max-input-size to increase the limit."
                )
            self.parts.append(part)
            full = len(part) == _BLOCK_BYTES
            data = self._member.unused_data if self._member.eof else self._member.unconsumed_tail

    def _next_member(self, data: bytes | memoryview) -> None:
        """A gzip body may be several, one after another; nothing else may follow the end."""
        if self._coding != "gzip" or not _GZIP.startswith(bytes(data[:2])):
            raise InvalidArgument(f"request body goes on after the end of its {self._coding} data")
        if self._members >= MAX_MEMBERS:
            raise InvalidArgument(f"request body has more than {MAX_MEMBERS} gzip members")
        self._begin()

    def whole(self) -> bytes:
        if not self._member.eof:
            raise InvalidArgument(f"request body ends before the end of its {self._coding} data")
        return b"".join(self.parts)
