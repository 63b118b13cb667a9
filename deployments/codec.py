"""Batches and replies as headers and raw buffers, in both directions.

Owns their layout and every check of what a peer sent: datatypes from the one table, shapes against
byte counts. Remembers headers that repeat, which under load nearly all do. Called by `local` and
`desk`; frames are `channel`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
import orjson

from configs.dtypes import DATATYPES

from .channel import (
    MAX_ARENA_BYTES,
    MAX_HEADER_BYTES,
    MAX_MEMBERS,
    MAX_PAYLOAD_BYTES,
    MAX_RANK,
    ChannelError,
    Layout,
    Piece,
    aligned,
    checked,
    counted,
    describe,
    listed,
    padding,
    rebuild,
    texted,
)
from .errors import Internal, MantaError
from .types import Array, Batch, BatchReply, OutputArray, Part, RequestFacts

_CACHED_HEADER_BYTES = 4096
_CACHED_HEADERS = 256
_DTYPES: dict[str, np.dtype[Any]] = {
    str(one.numpy): np.dtype(str(one.numpy)) for one in DATATYPES if one.numpy is not None
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


# --- batches -------------------------------------------------------------------------------------


class _Segment(NamedTuple):
    """One array of a payload."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int

    def of(self, payload: Array) -> Array:
        return np.ndarray(self.shape, self.dtype, payload, self.offset)


class _BatchPlan(NamedTuple):
    rows: tuple[int, ...]
    outputs: tuple[str, ...]
    joined: tuple[_Segment | None, ...]
    members: tuple[tuple[_Segment | None, ...], ...]
    size: int
    facts: _Segment | None = None


class _Outline(NamedTuple):
    """What can be known of a layout without the data: its header, and padding after each piece."""

    header: bytes
    pads: tuple[bytes, ...]
    size: int


class Codec:
    """Both directions of one connection. Remembers the headers that repeat."""

    def __init__(self) -> None:
        self._outlines: dict[Hashable, _Outline] = {}
        self._batches: dict[bytes, _BatchPlan] = {}
        self._replies: dict[bytes, _ReplyPlan] = {}

    def batch(self, batch: Batch, apart: bool = False) -> Layout:
        """`apart`: every member's arrays by themselves. Raises Internal for a foreign datatype."""
        rows, inputs = batch.rows, batch.inputs
        joined = [None if apart else _join(rows, members) for members in inputs]
        described = tuple(
            whole
            if whole is not None
            else tuple(None if one is None else (one.dtype, one.shape) for one in members)
            for whole, members in zip(joined, inputs, strict=True)
        )
        facts = _pack_facts(batch.facts) if batch.facts else b""
        key = (rows, batch.outputs, described, len(facts))
        outline = self._outlines.get(key)
        if outline is None:
            outline = _outline_batch(batch, joined, len(facts))
            _remember(self._outlines, key, outline)
        pieces: list[Piece] = []
        pads = iter(outline.pads)
        for whole, members in zip(joined, inputs, strict=True):
            if whole is not None:
                pieces += members  # type: ignore[arg-type]  # a joined input has all its members
                pieces.append(next(pads))
            else:
                for one in members:
                    if one is not None:
                        pieces += (one, next(pads))
        if facts:
            pieces += (facts, next(pads))
        return Layout(outline.header, pieces, outline.size)

    def read_batch(self, header: bytes, payload: Array) -> Batch:
        """Views of the payload. Raises ChannelError."""
        plan = self._batches.get(header)
        if plan is None:
            plan = checked(_plan_batch, header)
            if len(header) <= _CACHED_HEADER_BYTES:
                _remember(self._batches, header, plan)
        if payload.nbytes != plan.size:
            raise ChannelError(f"{payload.nbytes} bytes of inputs, {plan.size} described")
        joined = tuple(None if one is None else one.of(payload) for one in plan.joined)
        inputs = tuple(
            tuple(None if one is None else one.of(payload) for one in members)
            for members in plan.members
        )
        facts = () if plan.facts is None else _read_facts(plan.facts.of(payload), len(plan.rows))
        return Batch(plan.rows, inputs, plan.outputs, joined, facts)

    def reply(self, reply: BatchReply) -> Layout:
        """Raises Internal for a foreign datatype."""
        key: Hashable = tuple(_part_key(part) for part in reply.parts)
        failed = any(part.error is not None for part in reply.parts)
        outline = None if failed else self._outlines.get(key)
        if outline is None:
            outline = _outline_reply(reply)
            if not failed:
                _remember(self._outlines, key, outline)
        numbers = [reply.waited_ns]
        pieces: list[Piece] = [b"", outline.pads[0]]
        pads = iter(outline.pads[1:])
        for part in reply.parts:
            numbers += (part.input_ns, part.infer_ns, part.output_ns)
            for output in part.outputs.values():
                pieces += (output.data, next(pads))
                if output.offsets is not None:
                    pieces += (output.offsets, next(pads))
        pieces[0] = struct.pack(f"<{len(numbers)}q", *numbers)
        return Layout(outline.header, pieces, outline.size)

    def read_reply(self, header: bytes, payload: Array, count: int) -> BatchReply:
        """Views of the payload; `count` members were sent. Raises ChannelError."""
        plan = self._replies.get(header)
        if plan is None:
            plan = checked(_plan_reply, header)
            if len(header) <= _CACHED_HEADER_BYTES and not plan.failed:
                _remember(self._replies, header, plan)
        if payload.nbytes != plan.size:
            raise ChannelError(f"{payload.nbytes} bytes of outputs, {plan.size} described")
        if plan.end > count:
            raise ChannelError(f"an answer to member {plan.end - 1} of {count}")
        numbers = struct.unpack_from(f"<{1 + 3 * len(plan.parts)}q", payload)  # type: ignore[arg-type]
        if min(numbers) < 0:
            raise ChannelError("a duration below zero")
        parts = []
        for at, (members, outputs, error, run_rows) in enumerate(plan.parts):
            made = {
                name: OutputArray(
                    data.of(payload),
                    None if offsets is None else _offsets(data, offsets, payload),
                    shape,
                )
                for name, data, offsets, shape in outputs
            }
            input_ns, infer_ns, output_ns = numbers[1 + 3 * at : 4 + 3 * at]
            parts.append(Part(members, made, error, input_ns, infer_ns, output_ns, run_rows))
        return BatchReply(tuple(parts), waited_ns=numbers[0])


def _remember(cache: dict[Any, Any], key: Hashable, value: object) -> None:
    if len(cache) >= _CACHED_HEADERS:
        cache.clear()
    cache[key] = value


def _join(
    rows: tuple[int, ...], members: Sequence[Array | None]
) -> tuple[np.dtype[Any], tuple[int, ...]] | None:
    """Datatype and row shape, when the members' arrays one after another are one array."""
    first = members[0] if len(members) > 1 else None
    if first is None or not first.shape:
        return None
    dtype, shape = first.dtype, first.shape
    tail = shape[1:]
    for count, one in zip(rows, members, strict=True):
        if one is None or (one.dtype is not dtype and one.dtype != dtype):
            return None
        if one.shape != shape and one.shape[1:] != tail:
            return None
        if not one.shape or one.shape[0] != count:
            return None
    return dtype, tail


def _outline_batch(
    batch: Batch, joined: Sequence[tuple[np.dtype[Any], tuple[int, ...]] | None], facts_bytes: int
) -> _Outline:
    described: list[object] = []
    pads = []
    size = 0
    for whole, members in zip(joined, batch.inputs, strict=True):
        if whole is not None:
            dtype, tail = whole
            described.append({"joined": [_name(dtype), tail]})
            sizes = [sum(one.nbytes for one in members if one is not None)]
        else:
            described.append(
                {
                    "members": [
                        None if one is None else [_name(one.dtype), one.shape] for one in members
                    ]
                }
            )
            sizes = [one.nbytes for one in members if one is not None]
        pads += [padding(one) for one in sizes]
        size += sum(aligned(one) for one in sizes)
    header: dict[str, Any] = {
        "rows": batch.rows,
        "outputs": batch.outputs,
        "inputs": described,
    }
    if facts_bytes:
        header["facts"] = facts_bytes
        pads.append(padding(facts_bytes))
        size += aligned(facts_bytes)
    return _Outline(_packed(header), tuple(pads), size)


def _plan_batch(header: Any) -> _BatchPlan:
    rows = tuple(counted(one, MAX_PAYLOAD_BYTES) for one in listed(header["rows"], MAX_MEMBERS))
    outputs = tuple(texted(name) for name in listed(header["outputs"], MAX_MEMBERS))
    if not rows:
        raise ValueError("no members")
    joined: list[_Segment | None] = []
    members: list[tuple[_Segment | None, ...]] = []
    at = 0
    for one in listed(header["inputs"], MAX_MEMBERS):
        if "joined" in one:
            name, tail = one["joined"]
            segment, at = _segment(name, [sum(rows), *listed(tail, MAX_RANK - 1)], at)
            joined.append(segment)
            members.append(())
            continue
        described = listed(one["members"], MAX_MEMBERS)
        if len(described) != len(rows):
            raise ValueError(f"{len(described)} arrays for {len(rows)} members")
        segments: list[_Segment | None] = []
        for each in described:
            if each is None:
                segments.append(None)
            else:
                segment, at = _segment(each[0], listed(each[1], MAX_RANK), at)
                segments.append(segment)
        joined.append(None)
        members.append(tuple(segments))
    facts: _Segment | None = None
    if "facts" in header:
        facts, at = _segment("|u1", [header["facts"]], at)
    return _BatchPlan(rows, outputs, tuple(joined), tuple(members), at, facts)


# --- facts: data and no header, since they hardly ever repeat -------------------------------------


def _pack_facts(facts: Sequence[RequestFacts]) -> bytes:
    return orjson.dumps([[one.id, one.parameters, one.outputs, one.chain] for one in facts])


def _read_facts(data: Array, count: int) -> tuple[RequestFacts, ...]:
    def read(described: Any) -> tuple[RequestFacts, ...]:
        if len(listed(described, MAX_MEMBERS)) != count:
            raise ValueError(f"facts of {len(described)} among {count} members")
        return tuple(_facts(one) for one in described)

    return checked(read, data.tobytes())


def _facts(described: Any) -> RequestFacts:
    request_id, parameters, outputs, chain = described
    return RequestFacts(
        texted(request_id),
        texted(parameters),
        tuple(texted(name) for name in listed(outputs, MAX_MEMBERS)),
        tuple(texted(name) for name in listed(chain, MAX_MEMBERS)),
    )


# --- replies -------------------------------------------------------------------------------------


class _ReplyPlan(NamedTuple):
    """By part: members, outputs as (name, data, offsets, shape of strings), error, the run's rows.
    `end`: past the last member."""

    parts: tuple[
        tuple[
            tuple[int, ...],
            tuple[tuple[str, _Segment, _Segment | None, tuple[int, ...] | None], ...],
            MantaError | None,
            int,
        ],
        ...,
    ]
    size: int
    failed: bool
    end: int


def _part_key(part: Part) -> Hashable:
    outputs = tuple(
        (
            name,
            one.data.dtype,
            one.data.shape,
            None if one.offsets is None else len(one.offsets),
            one.shape,
        )
        for name, one in part.outputs.items()
    )
    return part.members, part.run_rows, outputs


def _outline_reply(reply: BatchReply) -> _Outline:
    size = 8 * (1 + 3 * len(reply.parts))
    pads = [padding(size)]
    size = aligned(size)
    described = []
    for part in reply.parts:
        outputs = []
        for name, one in part.outputs.items():
            count = None if one.offsets is None else len(one.offsets)
            outputs.append([name, _name(one.data.dtype), one.data.shape, count, one.shape])
            for array in (one.data, one.offsets):
                if array is not None:
                    pads.append(padding(array.nbytes))
                    size += aligned(array.nbytes)
        error = None if part.error is None else describe(part.error)
        described.append([part.members, outputs, error, part.run_rows])
    return _Outline(_packed(described), tuple(pads), size)


def _plan_reply(header: Any) -> _ReplyPlan:
    described = listed(header, MAX_MEMBERS)
    at = aligned(8 * (1 + 3 * len(described)))
    parts = []
    for members, outputs, error, run_rows in described:
        indices = tuple(counted(one, MAX_MEMBERS) for one in listed(members, MAX_MEMBERS))
        made = []
        for name, dtype, shape, count, strings in listed(outputs, MAX_MEMBERS):
            data, at = _segment(dtype, listed(shape, MAX_RANK), at)
            offsets = None
            if count is not None:
                if data.dtype.itemsize != 1 or len(data.shape) != 1:
                    raise ValueError("offsets of what is no string")
                offsets, at = _segment("<i8", [counted(count, MAX_PAYLOAD_BYTES)], at)
            made.append((texted(name), data, offsets, _string_shape(strings, count)))
        rows = -1 if run_rows == -1 else counted(run_rows, MAX_PAYLOAD_BYTES)
        failure = None if error is None else rebuild(error)
        parts.append((indices, tuple(made), failure, rows))
    failed = any(part[2] is not None for part in parts)
    end = max((index + 1 for part in parts for index in part[0]), default=0)
    return _ReplyPlan(tuple(parts), at, failed, end)


def _string_shape(shape: object, count: object) -> tuple[int, ...] | None:
    """The shape of as many strings as there are offsets but for one."""
    if shape is None:
        return None
    dims = tuple(counted(one, MAX_PAYLOAD_BYTES) for one in listed(shape, MAX_RANK))
    if count is None or not dims or math.prod(dims) + 1 != count:
        raise ValueError("a shape that does not fit its strings")
    return dims


def _offsets(data: _Segment, segment: _Segment, payload: Array) -> Array:
    """Where strings begin: ascending, from the first byte to the end."""
    offsets = segment.of(payload)
    size = data.shape[0]
    if not len(offsets) or offsets[0] != 0 or offsets[-1] != size or (np.diff(offsets) < 0).any():
        raise ChannelError("offsets outside of what they cut")
    return offsets


# --- arrays -------------------------------------------------------------------------------------


def _packed(described: object) -> bytes:
    header = orjson.dumps(described)
    if len(header) > MAX_HEADER_BYTES:
        raise Internal("a batch of more members than one message describes")
    return header


def _name(dtype: np.dtype[Any]) -> str:
    name = _NAMES.get(dtype)
    if name is None:
        raise Internal(f"arrays of {dtype} are not sent")
    return name


def _segment(name: object, shape: Sequence[object], at: int) -> tuple[_Segment, int]:
    dtype = _DTYPES.get(texted(name))
    if dtype is None:
        raise ValueError(f"unknown datatype {name!r}")
    dims = tuple(counted(one, MAX_ARENA_BYTES) for one in shape)
    size = extent = dtype.itemsize
    for one in dims:
        size *= one
        extent *= max(one, 1)  # numpy refuses what would be too large without its zeros
    if at + extent > MAX_ARENA_BYTES:
        raise ValueError(f"an array of {extent} bytes")
    return _Segment(dtype, dims, at), at + aligned(size)
