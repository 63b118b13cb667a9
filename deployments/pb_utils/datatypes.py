"""Triton's numbers of datatypes against numpy's types, and BYTES in wire form.

Called by models, by their public names, and by `tensor`.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import numpy.typing as npt

from configs.dtypes import DATATYPES

_LENGTH = struct.Struct("<I")
# As TRITONSERVER_DataType counts them.
_NAMES = (
    *("TYPE_INVALID", "TYPE_BOOL", "TYPE_UINT8", "TYPE_UINT16", "TYPE_UINT32", "TYPE_UINT64"),
    *("TYPE_INT8", "TYPE_INT16", "TYPE_INT32", "TYPE_INT64", "TYPE_FP16", "TYPE_FP32", "TYPE_FP64"),
    *("TYPE_STRING", "TYPE_BF16"),
)
NUMBERS = {name: number for number, name in enumerate(_NAMES)}
BYTES, BF16 = NUMBERS["TYPE_STRING"], NUMBERS["TYPE_BF16"]
WIRE = {NUMBERS[one.config]: one.wire for one in DATATYPES}

TRITON_STRING_TO_NUMPY: dict[str, type[Any]] = {
    one.config: np.dtype(one.numpy).type
    for one in DATATYPES
    if one.numpy is not None and one.wire != "BF16"  # numpy has none
} | {"TYPE_STRING": np.object_}
_BY_NUMBER = {NUMBERS[name]: kind for name, kind in TRITON_STRING_TO_NUMPY.items()}
_BY_NUMPY = {kind: number for number, kind in _BY_NUMBER.items()} | {np.bytes_: BYTES}


def triton_string_to_numpy(triton_type_string: str) -> type[Any]:
    """`TYPE_FP32` -> numpy.float32. Raises KeyError."""
    return TRITON_STRING_TO_NUMPY[triton_type_string]


def triton_to_numpy_type(data_type: int) -> type[Any] | None:
    """None where numpy has no such type."""
    return _BY_NUMBER.get(data_type)


def numpy_to_triton_type(data_type: npt.DTypeLike) -> int | None:
    """None for a type that is none of Triton's."""
    return _BY_NUMPY.get(np.dtype(data_type).type)


def serialize_byte_tensor(input_tensor: npt.NDArray[Any]) -> bytes:
    """The elements in C order, each with its length as little-endian uint32 before it.

    What is neither bytes nor str is written as its str().
    """
    if input_tensor.dtype.type not in (np.object_, np.bytes_):
        raise ValueError(f"an array of {input_tensor.dtype} is no tensor of bytes")
    elements = [
        one if isinstance(one, bytes) else str(one).encode()
        for one in input_tensor.ravel().tolist()
    ]
    return b"".join([part for one in elements for part in (_LENGTH.pack(len(one)), one)])


def deserialize_bytes_tensor(encoded_tensor: bytes) -> npt.NDArray[np.object_]:
    """A one-dimensional array of bytes. Raises ValueError for what is cut off."""
    elements, at, end = list[bytes](), 0, len(encoded_tensor)
    while at < end:
        start = at + _LENGTH.size
        if start > end:
            raise ValueError("the length of an element is cut off")
        at = start + _LENGTH.unpack_from(encoded_tensor, start - _LENGTH.size)[0]
        if at > end:
            raise ValueError("an element is cut off")
        elements.append(bytes(encoded_tensor[start:at]))
    made = np.empty(len(elements), np.object_)
    made[:] = elements
    return made
