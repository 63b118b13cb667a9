"""The one table of datatypes: configuration name, wire name, numpy and torch names, size.

Names only: imports neither numpy nor torch, so every room may read it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DataType:
    """`numpy` is a dtype string, little endian as on the wire; BF16 is carried as uint16.

    BYTES has neither a numpy nor a torch type and a size of 0 (its elements vary).
    """

    config: str
    wire: str
    numpy: str | None
    torch: str | None
    size_bytes: int


DATATYPES: tuple[DataType, ...] = (
    DataType("TYPE_BOOL", "BOOL", "|b1", "bool", 1),
    DataType("TYPE_UINT8", "UINT8", "|u1", "uint8", 1),
    DataType("TYPE_UINT16", "UINT16", "<u2", "uint16", 2),
    DataType("TYPE_UINT32", "UINT32", "<u4", "uint32", 4),
    DataType("TYPE_UINT64", "UINT64", "<u8", "uint64", 8),
    DataType("TYPE_INT8", "INT8", "|i1", "int8", 1),
    DataType("TYPE_INT16", "INT16", "<i2", "int16", 2),
    DataType("TYPE_INT32", "INT32", "<i4", "int32", 4),
    DataType("TYPE_INT64", "INT64", "<i8", "int64", 8),
    DataType("TYPE_FP16", "FP16", "<f2", "float16", 2),
    DataType("TYPE_BF16", "BF16", "<u2", "bfloat16", 2),
    DataType("TYPE_FP32", "FP32", "<f4", "float32", 4),
    DataType("TYPE_FP64", "FP64", "<f8", "float64", 8),
    DataType("TYPE_STRING", "BYTES", None, None, 0),
)

_BY_CONFIG = {datatype.config: datatype for datatype in DATATYPES}
_BY_WIRE = {datatype.wire: datatype for datatype in DATATYPES}


def from_config(name: str) -> DataType:
    """`TYPE_FP32` -> its row. Raises KeyError for an unknown name."""
    return _BY_CONFIG[name]


def from_wire(name: str) -> DataType:
    """`FP32` -> its row. Raises KeyError for an unknown name."""
    return _BY_WIRE[name]
