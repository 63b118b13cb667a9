"""The tensors of a traced request: a bounded copy of each, and the text that Triton makes of it.

Copies are made while the bytes are there, on the Router's event loop; texts are made of them later,
by the thread that writes them. Called by `tracing` and `trace_file`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from configs import dtypes
from configs.model import ModelConfig

from .tensors import split_shape
from .types import Array, Tensor

MAX_ELEMENTS = 1 << 14
MAX_STRING_BYTES = 1 << 16
_LENGTH = struct.Struct("<I")


class TracedTensor(NamedTuple):
    """`data` are the first elements, flat; BYTES in wire form. `shape` is whole, -1 where only the
    number of strings tells it. `whole`: nothing was left out."""

    activities: tuple[str, ...]
    name: str
    datatype: str
    shape: tuple[int, ...]
    data: Array
    whole: bool


# Requests wait as the model gets them.
INPUT = ("TENSOR_QUEUE_INPUT", "TENSOR_BACKEND_INPUT")
OUTPUT = ("TENSOR_BACKEND_OUTPUT",)


def inputs_of(
    config: ModelConfig, rows: int, arrays: tuple[Array | None, ...]
) -> tuple[TracedTensor, ...]:
    """In the model's view; those that are optional and absent are left out."""
    batch = (rows,) if config.max_batch_size else ()
    kept = []
    for entry, array in zip(config.input, arrays, strict=True):
        if array is None:
            continue
        datatype = dtypes.from_config(entry.data_type).wire
        shape, data = array.shape, array
        if entry.carries_shape:
            shape, data = split_shape(array, len(entry.model_dims) + len(batch))
        elif datatype == "BYTES":
            shape = (*batch, *entry.model_dims)
        kept.append(_kept(INPUT, entry.name, datatype, shape, data))
    return tuple(kept)


def outputs_of(tensors: Iterable[Tensor]) -> tuple[TracedTensor, ...]:
    return tuple(_kept(OUTPUT, each.name, each.datatype, each.shape, each.data) for each in tensors)


def _kept(
    activities: tuple[str, ...], name: str, datatype: str, shape: tuple[int, ...], data: Array
) -> TracedTensor:
    limit = MAX_STRING_BYTES if datatype == "BYTES" else MAX_ELEMENTS
    whole = data.size <= limit
    part = np.array(data.reshape(-1)[:limit] if data.flags.c_contiguous else data.flat[:limit])
    return TracedTensor(activities, name, datatype, tuple(map(int, shape)), part, whole)


def described(tensor: TracedTensor) -> dict[str, Any]:
    """As Triton writes it: `data` and `shape` are numbers or strings with commas between them.
    `truncated` stands only where elements are left out."""
    elements, cut = _elements(tensor)
    shape = tensor.shape
    if -1 in shape and not cut:
        known = math.prod(size for size in shape if size != -1)
        shape = tuple(len(elements) // max(known, 1) if size == -1 else size for size in shape)
    document: dict[str, Any] = {
        "name": tensor.name,
        "data": ",".join(elements),
        "shape": ",".join(map(str, shape)),
        "dtype": tensor.datatype,
    }
    return {**document, "truncated": True} if cut else document


def _elements(tensor: TracedTensor) -> tuple[list[str], bool]:
    """The texts of the elements, and whether there are more."""
    if tensor.datatype == "BYTES":
        return _strings(tensor.data.tobytes(), tensor.whole)
    data = tensor.data
    if tensor.datatype == "BF16":
        data = (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if tensor.datatype == "BOOL":
        data = data.astype(np.uint8)
    return [str(value) for value in data.tolist()], not tensor.whole


def _strings(raw: bytes, whole: bool) -> tuple[list[str], bool]:
    found: list[str] = []
    at = 0
    while at + _LENGTH.size <= len(raw):
        start = at + _LENGTH.size
        at = start + _LENGTH.unpack_from(raw, at)[0]
        if at > len(raw):
            return found, True
        found.append(raw[start:at].decode(errors="replace"))
    return found, not whole
