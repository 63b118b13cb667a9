"""Strings as models see them: BYTES in wire form to `list[str]` or numpy object arrays, and back.

TorchScript takes and gives flat lists of str (UTF-8). Python models take object arrays of bytes, of
any shape, and give object, bytes or str arrays, or lists. Called by `execution` and `convert`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from configs.model import ModelInput
from deployments.errors import ExecutionFailed, InvalidArgument
from deployments.tensors import decode_bytes, split_shape
from deployments.types import Array, OutputArray

_LENGTH = struct.Struct("<I")
_TEXT_KINDS = "OSU"  # numpy's object, bytes and str arrays


# --- inputs --------------------------------------------------------------------------------------


def decode_strings(tensor: ModelInput, array: Array, rows: int, batching: bool) -> list[str]:
    """One member's BYTES; raises InvalidArgument, which concerns that member alone."""
    elements = decode_bytes(tensor.name, array)
    strings: list[str] = []
    for element in elements:
        try:
            strings.append(element.decode())
        except UnicodeDecodeError as error:
            raise InvalidArgument(
                f"element {len(strings)} of input '{tensor.name}' is not UTF-8, which is all that "
                "a PyTorch model takes as a string"
            ) from error
    _shape(tensor, len(strings), rows, batching)
    return strings


def decode_objects(tensor: ModelInput, array: Array, rows: int, batching: bool) -> Array:
    """One member's BYTES as an object array of bytes, in the model's shape, batch dimension
    included; raises InvalidArgument, which concerns that member alone."""
    shape = None
    if tensor.carries_shape:
        shape, array = split_shape(array, len(tensor.model_dims) + batching)
    elements = decode_bytes(tensor.name, array)
    if shape is None:
        shape = _shape(tensor, len(elements), rows, batching)
    made = np.empty(len(elements), object)
    made[:] = elements
    return made.reshape(shape)


def _shape(tensor: ModelInput, count: int, rows: int, batching: bool) -> tuple[int, ...]:
    """The configured shape with its one variable size worked out from the count of elements."""
    shape = (rows, *tensor.model_dims) if batching else tensor.model_dims
    fixed = 1
    for size in shape:
        fixed *= size if size >= 0 else 1
    if -1 in shape and count % fixed == 0:
        return tuple(count // fixed if size < 0 else size for size in shape)
    if count != fixed or -1 in shape:
        expected = f"a multiple of {fixed}" if -1 in shape else str(fixed)
        raise InvalidArgument(
            f"unexpected number of string elements in input '{tensor.name}': "
            f"expected {expected}, got {count}"
        )
    return shape


# --- outputs -------------------------------------------------------------------------------------


def is_text(value: Any) -> bool:
    """Whether a model means strings by it. What its elements are is looked at by `encode`."""
    if isinstance(value, list):
        return all(isinstance(item, (str, bytes)) or is_text(item) for item in value)
    return isinstance(value, np.ndarray) and value.dtype.kind in _TEXT_KINDS


def encode(name: str, value: Any) -> OutputArray:
    """A list, nested or not, or an array of strings, in wire form. Raises MantaError."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return encode_strings(value)
    try:
        array = np.asarray(value) if isinstance(value, np.ndarray) else np.array(value, object)
    except ValueError:  # numpy's word for lists that agree neither in length nor in depth
        raise _not_text(name, "a list of lists of different lengths") from None
    if not array.ndim:
        raise InvalidArgument(f"output '{name}' is a scalar, which is not supported")
    encoded = _encode([_bytes(name, item) for item in array.reshape(-1).tolist()])
    return encoded if array.ndim == 1 else OutputArray(encoded.data, encoded.offsets, array.shape)


def encode_strings(strings: Sequence[str]) -> OutputArray:
    try:
        return _encode([text.encode() for text in strings])
    except UnicodeEncodeError as error:
        raise ExecutionFailed("the model returned a string that is not UTF-8") from error


def _bytes(name: str, item: Any) -> bytes:
    if isinstance(item, bytes):
        return item
    if not isinstance(item, str):
        raise _not_text(name, type(item).__name__)
    try:
        return item.encode()
    except UnicodeEncodeError as error:
        raise ExecutionFailed("the model returned a string that is not UTF-8") from error


def _not_text(name: str, found: str) -> InvalidArgument:
    return InvalidArgument(f"output '{name}' must hold only str or bytes, and holds {found}")


def _encode(elements: list[bytes]) -> OutputArray:
    offsets = np.zeros(len(elements) + 1, np.int64)
    np.cumsum([len(data) + _LENGTH.size for data in elements], out=offsets[1:])
    wire = b"".join(chain.from_iterable((_LENGTH.pack(len(data)), data) for data in elements))
    return OutputArray(np.frombuffer(wire, np.uint8), offsets)
