"""The classification extension: an output as its best classes, each a text `score:index:label`.

Owns Triton's rules and texts for it, and what Triton leaves open: of equal scores the lower index
comes first, and what is no number comes last. Pure, numpy only. `contract` asks whether an output
can be classified, `extras` has it done, on a thread where it takes long.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .errors import InvalidArgument
from .tensors import encode_bytes
from .types import Array, RequestedOutput, Tensor

MAX_ELEMENTS = 1_000_000  # of one row
MAX_CLASSES = 1_000_000  # in one answer
# Up to here sorting all costs no more than finding the best first.
_SORTED = 1024

_UNSUPPORTED = frozenset(("BOOL", "FP16", "BF16", "BYTES"))


def check(output: RequestedOutput, datatype: str) -> None:
    """Before anything runs: whether an output of that type can be given as classes."""
    if output.memory is not None:
        raise InvalidArgument("Output can't set both 'shared_memory_region' and 'classification'")
    if datatype in _UNSUPPORTED:
        raise InvalidArgument(
            f"class result not available for output due to unsupported type '{datatype}'"
        )


def effort(tensor: Tensor, count: int, batched: bool) -> int:
    """How much there is to do, in bytes that one could copy meanwhile; raises if it is too much."""
    rows, elements = _layout(tensor, batched)
    if elements > MAX_ELEMENTS or rows * min(count, elements) > MAX_CLASSES:
        raise InvalidArgument("classification output tensor too large")
    return 64 * rows * elements + 2048 * rows * min(count, elements)


def classify(tensor: Tensor, count: int, labels: Sequence[str], batched: bool) -> Tensor:
    """The `count` best of each row as strings, of shape [rows, k] or, without batching, [k]."""
    rows, elements = _layout(tensor, batched)
    best = min(count, elements)
    scores = tensor.data.reshape(rows, elements)
    texts: list[bytes] = []
    if best:
        order = top(scores, best)
        kind = ".6f" if scores.dtype.kind == "f" else "d"
        for row, places in zip(scores, order, strict=True):
            for score, place in zip(row[places].tolist(), places.tolist(), strict=True):
                label = labels[place] if place < len(labels) else ""
                text = f"{score:{kind}}:{place}"
                texts.append((f"{text}:{label}" if label else text).encode())
    shape = (rows, best) if batched else (best,)
    return Tensor(tensor.name, "BYTES", shape, encode_bytes(texts))


def top(scores: Array, count: int) -> Array:
    """Indices of the `count` largest of each row, best first."""
    # Turned round without overflow; what is no number is sorted behind all others either way.
    keys = np.negative(scores) if scores.dtype.kind == "f" else np.invert(scores)
    elements = keys.shape[1]
    if elements <= _SORTED or count * 4 > elements:
        return np.argsort(keys, axis=1, kind="stable")[:, :count]
    return np.stack([_first(row, count) for row in keys])


def _first(keys: Array, count: int) -> Array:
    """Indices of the `count` smallest, in order, without sorting the others."""
    last = np.partition(keys, count - 1)[count - 1]
    if last != last:
        before, equal = keys == keys, keys != keys
    else:
        before, equal = keys < last, keys == last
    chosen = np.flatnonzero(before)
    chosen = np.concatenate((chosen, np.flatnonzero(equal)[: count - len(chosen)]))
    # Ascending within equal keys already, which a stable sort keeps.
    order: Array = chosen[np.argsort(keys[chosen], kind="stable")]
    return order


def _layout(tensor: Tensor, batched: bool) -> tuple[int, int]:
    """Rows, and elements in each."""
    if not batched:
        return 1, math.prod(tensor.shape)
    return tensor.shape[0], math.prod(tensor.shape[1:])
