"""Bytes, JSON and BYTES to arrays and back, with the checks that need no model (numpy only).

Owns Triton's texts on sizes, counts and data types. Knows no
protocol and no model configuration. The edges call it for inputs and outputs.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from itertools import chain
from typing import Any

import numpy as np

from configs import dtypes

from .errors import Internal, InvalidArgument
from .types import Array, Tensor

MAX_ELEMENTS = 2**63 - 1
MAX_BYTES = 2**63 - 1
MAX_DEPTH = 100
MAX_RANK = 64 if int(np.__version__.split(".")[0]) >= 2 else 32  # numpy's own limit
# Strings are parsed one by one on the event loop: 2**20 of them take about a tenth of a second.
MAX_STRINGS = 1 << 20

_LENGTH = struct.Struct("<I")
_BYTE = np.dtype(np.uint8)
_JSON_KINDS = {"b": frozenset((bool,)), "i": frozenset((int,)), "u": frozenset((int,))}
_FLOAT_KINDS = frozenset((int, float))
_STRING_KINDS = frozenset((str,))
_JSON_KIND_NAMES = {"b": "boolean", "i": "signed-integer", "u": "unsigned-integer", "f": "number"}


# --- data types and counts -----------------------------------------------------------------------


def datatype_of(name: str, wire: str) -> dtypes.DataType:
    """The row of a wire datatype, for input `name`."""
    try:
        return dtypes.from_wire(wire)
    except (KeyError, TypeError):
        raise InvalidArgument(f"invalid datatype '{wire}' for inference input '{name}'") from None


def element_count(name: str, shape: tuple[int, ...], max_rank: int = MAX_RANK) -> int:
    """Elements of a shape; refuses what no array can have."""
    most = min(max_rank, MAX_RANK)
    if len(shape) > most:
        raise InvalidArgument(
            f"input '{name}' has {len(shape)} dimensions, at most {most} are allowed"
        )
    if shape and min(shape) < 0:
        raise InvalidArgument(f"input '{name}' has the negative dimension {min(shape)}")
    # Zeros are left out: numpy refuses what overflows without them, even an empty array.
    if math.prod(filter(None, shape)) > MAX_ELEMENTS:
        raise InvalidArgument(
            f"shape of input '{name}' causes total element count to exceed maximum size of "
            f"{MAX_ELEMENTS}"
        )
    return math.prod(shape)


def byte_count(name: str, datatype: str, shape: tuple[int, ...], max_rank: int = MAX_RANK) -> int:
    """Bytes of a fixed-size tensor; 0 for BYTES, whose size only its data tells."""
    size = datatype_of(name, datatype).size_bytes
    count = element_count(name, shape, max_rank) * size
    if math.prod(filter(None, shape)) * size > MAX_BYTES:
        raise InvalidArgument(f"byte size overflow for input '{name}'")
    return count


# --- binary --------------------------------------------------------------------------------------


def from_binary(
    name: str,
    datatype: str,
    shape: tuple[int, ...],
    view: bytes | memoryview,
    model: str = "",
    max_rank: int = MAX_RANK,
) -> Tensor:
    """A tensor over `view`, which is not copied. Strings are checked by `check_strings` later."""
    kind = datatype_of(name, datatype)
    expected = byte_count(name, datatype, shape, max_rank)
    if kind.numpy is None:
        return Tensor(name, datatype, shape, np.frombuffer(view, _BYTE) if len(view) else _NOTHING)
    if len(view) != expected:
        raise wrong_size(name, model, expected, len(view))
    dtype = np.dtype(kind.numpy)
    if not expected:
        return Tensor(name, datatype, shape, np.empty(shape, dtype))
    return Tensor(name, datatype, shape, np.frombuffer(view, dtype).reshape(shape))


def wrong_size(name: str, model: str, expected: int, got: int) -> InvalidArgument:
    return InvalidArgument(
        f"input byte size mismatch for input '{name}' for model '{model}'. "
        f"Expected {expected}, got {got}"
    )


def to_binary(tensor: Tensor) -> memoryview:
    """The wire form of a tensor, little endian and row-major, copied only if it is strided."""
    data = np.ascontiguousarray(tensor.data)
    return data.reshape(-1).view(_BYTE).data if data.size else memoryview(b"")


# --- strings -------------------------------------------------------------------------------------


def encode_bytes(elements: Iterable[bytes]) -> Array:
    """BYTES elements in wire form: a little-endian uint32 length and the bytes, back to back."""
    joined = b"".join(chain.from_iterable((_LENGTH.pack(len(e)), e) for e in elements))
    return np.frombuffer(joined, _BYTE) if joined else _NOTHING


def decode_bytes(name: str, data: Array) -> list[bytes]:
    """The elements of a BYTES tensor in wire form."""
    raw = data.tobytes()
    elements = []
    at, end = 0, len(raw)
    while at < end:
        if at + 4 > end:
            raise InvalidArgument(
                f"incomplete string length indicator for inference input '{name}', expecting 4 "
                f"bytes but only {end - at} bytes available"
            )
        start = at + 4
        at = start + _LENGTH.unpack_from(raw, at)[0]
        if at > end:
            raise InvalidArgument(
                f"incomplete string data for inference input '{name}', expecting string of length "
                f"{at - start} but only {end - start} bytes available"
            )
        elements.append(raw[start:at])
        if len(elements) > MAX_STRINGS:
            raise InvalidArgument(f"'{name}' has more than {MAX_STRINGS} string elements")
    return elements


def check_strings(name: str, data: Array, expected: int, model: str) -> None:
    """BYTES input `name` holds exactly `expected` whole elements."""
    got = len(decode_bytes(name, data))
    if got < expected:
        raise InvalidArgument(
            f"expected {expected} string elements for inference input '{name}' for model "
            f"'{model}', got {got}"
        )
    if got > expected:
        raise InvalidArgument(
            f"unexpected number of string elements {got} for inference input '{name}' for model "
            f"'{model}', expecting {expected}"
        )


def join_shape(shape: tuple[int, ...], data: Array) -> Array:
    """A BYTES tensor whose elements alone do not tell its shape: that first, then the elements."""
    head: Array = np.array(shape, "<i8").view(_BYTE)
    return np.concatenate((head, data))


def split_shape(data: Array, rank: int) -> tuple[tuple[int, ...], Array]:
    """What `join_shape` has joined."""
    size = rank * 8
    return tuple(np.frombuffer(data[:size].tobytes(), "<i8").tolist()), data[size:]


# --- JSON ----------------------------------------------------------------------------------------


def from_json(
    name: str,
    datatype: str,
    shape: tuple[int, ...],
    data: Any,
    max_rank: int = MAX_RANK,
    max_depth: int = MAX_DEPTH,
) -> Tensor:
    """A tensor from JSON data, flat or nested in any way; strict about the elements' types."""
    kind = datatype_of(name, datatype)
    if datatype in ("FP16", "BF16"):
        raise InvalidArgument(
            f"receiving {datatype} data via JSON is not supported. Please use the binary data "
            f"format for input '{name}'"
        )
    byte_count(name, datatype, shape, max_rank)
    count = element_count(name, shape, max_rank)
    if not count:
        dtype = _BYTE if kind.numpy is None else np.dtype(kind.numpy)
        return Tensor(
            name, datatype, shape, _NOTHING if kind.numpy is None else np.empty(shape, dtype)
        )
    flat, found = _flatten(data, max_depth)
    if len(flat) < count:
        raise Internal("Failed to parse 'data' field: shape does not match true shape")
    if len(flat) > count:
        raise Internal("Unable to parse 'data': Shape does not match true shape of 'data' field")
    if kind.numpy is None:
        _check_kinds(name, found, _STRING_KINDS, "string")
        return Tensor(name, datatype, shape, encode_bytes(map(_utf8, flat)))
    return Tensor(
        name, datatype, shape, _numbers(name, datatype, kind.numpy, flat, found).reshape(shape)
    )


def from_numbers(name: str, datatype: str, flat: list[Any], shape: tuple[int, ...]) -> Array:
    """Numbers of the right Python type as an array; integers must fit the datatype."""
    kind = datatype_of(name, datatype)
    return _numbers(name, datatype, kind.numpy or "", flat, set(map(type, flat))).reshape(shape)


def to_json_data(tensor: Tensor) -> Array | list[str]:
    """A flat array, or a list of strings for BYTES. JSON has no FP16, no BF16 and only UTF-8."""
    if tensor.datatype in ("FP16", "BF16"):
        raise InvalidArgument(
            f"sending {tensor.datatype} data via JSON is not supported. Please use the binary data "
            f"format for output '{tensor.name}'"
        )
    if tensor.datatype == "BYTES":
        try:
            return [element.decode() for element in decode_bytes(tensor.name, tensor.data)]
        except UnicodeDecodeError:
            raise InvalidArgument(
                f"output '{tensor.name}' is not UTF-8 text. Please use the binary data format"
            ) from None
    return np.ascontiguousarray(tensor.data).reshape(-1)


def all_finite(data: Array | list[str]) -> bool:
    """False when JSON needs the literals NaN or Infinity to carry `data`."""
    return isinstance(data, list) or data.dtype.kind != "f" or bool(np.isfinite(data).all())


def _flatten(data: Any, max_depth: int) -> tuple[list[Any], set[type]]:
    """Row-major leaves and their types. Level by level in C where nesting is regular."""
    if type(data) is not list:
        raise Internal("Unable to parse 'data': attempt to access JSON non-array as array")
    flat = data
    for _ in range(max_depth):
        found = set(map(type, flat))
        if list not in found:
            return flat, found
        if len(found) > 1:
            flat = _leaves(flat, max_depth)
            return flat, set(map(type, flat))
        flat = list(chain.from_iterable(flat))
    raise too_deep(max_depth)


def _leaves(data: list[Any], max_depth: int) -> list[Any]:
    leaves, stack = [], [iter(data)]
    while stack:
        for item in stack[-1]:
            if type(item) is list:
                if len(stack) >= max_depth:
                    raise too_deep(max_depth)
                stack.append(iter(item))
                break
            leaves.append(item)
        else:
            stack.pop()
    return leaves


def too_deep(limit: int) -> InvalidArgument:
    return InvalidArgument(f"JSON nesting depth exceeds maximum allowed limit ({limit})")


def _numbers(name: str, datatype: str, numpy: str, flat: list[Any], found: set[type]) -> Array:
    dtype = np.dtype(numpy)
    _check_kinds(
        name, found, _JSON_KINDS.get(dtype.kind, _FLOAT_KINDS), _JSON_KIND_NAMES[dtype.kind]
    )
    if dtype.kind in "iu" and flat:
        limits = np.iinfo(dtype)
        low, high = min(flat), max(flat)
        if low < limits.min or high > limits.max:
            wrong = low if low < limits.min else high
            raise InvalidArgument(f"value {wrong} of input '{name}' is out of range for {datatype}")
    try:
        with np.errstate(over="ignore"):  # an FP32 beyond its range is an infinity, as in Triton
            return np.array(flat, dtype)
    except OverflowError:
        raise InvalidArgument(f"a value of input '{name}' is out of range for {datatype}") from None


def _check_kinds(name: str, found: set[type], wanted: frozenset[type], kind: str) -> None:
    if not found <= wanted:
        raise Internal(
            f"Unable to parse 'data' of input '{name}': attempt to access JSON non-{kind} as {kind}"
        )


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise InvalidArgument("a string holds a lone surrogate, which UTF-8 cannot carry") from None


_NOTHING: Array = np.empty(0, _BYTE)
