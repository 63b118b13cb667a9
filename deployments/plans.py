"""Plans: what need not be worked out again for a request whose description was seen before.

A description is everything but the tensors' bytes. Owns how the inputs of such a request lie in
its bytes, and the memory of descriptions, which is bounded. Pure, and knows no protocol: the lanes
ask it, and encode their own heads of answers. Requests that have no plan go the ordinary road.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from configs.model import ModelConfig

from .contract import Work
from .types import Array, InferRequest, OutputArray

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")
Head = TypeVar("Head")

MAX_KEY_BYTES = 4096
MAX_PLANS = 256
# Answers of a planned request differ in shape only where the model decides it.
MAX_HEADS = 8


class Recent(Generic[Key, Value]):
    """The last used of many: at least half of `size`, at most `size`.

    Two generations instead of an order: what is used costs one lookup and no bookkeeping.
    """

    __slots__ = ("_half", "_new", "_old")

    def __init__(self, size: int) -> None:
        self._half = size // 2
        self._new: dict[Key, Value] = {}
        self._old: dict[Key, Value] = {}

    def __len__(self) -> int:
        return len(self._new) + len(self._old)

    def get(self, key: Key) -> Value | None:
        value = self._new.get(key)
        if value is None and (value := self._old.pop(key, None)) is not None:
            self.put(key, value)
        return value

    def put(self, key: Key, value: Value) -> None:
        if len(self._new) >= self._half:
            self._old, self._new = self._new, {}
        self._old.pop(key, None)
        self._new[key] = value


class PlannedInput(NamedTuple):
    """One configured input in the model's view. `position` counts the request's own inputs, and
    `offset` is where that one starts when all of them follow each other."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    size_bytes: int
    position: int
    offset: int


class Plan:
    """A request but for its tensors' bytes; `request` has no inputs any more."""

    __slots__ = ("data_bytes", "heads", "inputs", "key", "outputs", "request", "rows")
    facts = None  # requests with facts of their own are not planned

    def __init__(self, request: InferRequest, work: Work, inputs: tuple[PlannedInput, ...]) -> None:
        self.request = replace(request, inputs=())
        self.rows, self.key, self.outputs = work.rows, work.key, work.outputs
        self.inputs = inputs
        self.data_bytes = sum(planned.size_bytes for planned in inputs)
        self.heads: dict[Hashable, Any] = {}

    def from_body(self, body: bytes, start: int) -> tuple[Array, ...]:
        """Views of `body`, which from `start` on holds `data_bytes` of inputs back to back."""
        return tuple(
            [
                np.ndarray(shape, dtype, body, start + offset)
                for dtype, shape, _, _, offset in self.inputs
            ]
        )

    def from_parts(self, parts: Sequence[bytes]) -> tuple[Array, ...] | None:
        """Views of the request's own inputs, one part each; None where their sizes differ."""
        if len(parts) != len(self.inputs):
            return None
        arrays: list[Array] = []
        for dtype, shape, size_bytes, position, _ in self.inputs:
            part = parts[position]
            if len(part) != size_bytes:
                return None
            arrays.append(np.ndarray(shape, dtype, part))
        return tuple(arrays)

    def head(self, outputs: Sequence[OutputArray], make: Callable[[], Head]) -> Head:
        """What is said before the bytes of these outputs: of their shapes and sizes alone."""
        key = tuple([(output.data.shape, output.data.nbytes) for output in outputs])
        head: Head | None = self.heads.get(key)
        if head is None:
            head = make()
            if len(self.heads) >= MAX_HEADS:
                self.heads.clear()
            self.heads[key] = head
        return head


def plan_of(config: ModelConfig, request: InferRequest, work: Work) -> Plan | None:
    """The plan of an admitted request that brought all its inputs as bytes.

    None where the bytes decide more than values: strings in or out, and inputs without any bytes;
    and where the model is told of more than its tensors.
    """
    if work.facts is not None:
        return None
    strings = {entry.name for entry in config.output if entry.data_type == "TYPE_STRING"}
    if not strings.isdisjoint(work.outputs):
        return None
    places, offset = {}, 0
    for position, tensor in enumerate(request.inputs):
        if tensor.datatype == "BYTES" or not tensor.data.nbytes:
            return None
        places[tensor.name] = (position, offset)
        offset += tensor.data.nbytes
    inputs = []
    for entry, array in zip(config.input, work.inputs, strict=True):
        if array is None:
            return None
        inputs.append(PlannedInput(array.dtype, array.shape, array.nbytes, *places[entry.name]))
    return Plan(request, work, tuple(inputs))


class PlanCache:
    """The plans of one model version in one protocol, by the exact bytes of the description.

    A description gets its plan when it comes a second time, so that one which never comes again
    (it holds an id of its own, say) costs no more than its lookup. Long ones cost not even that.
    """

    __slots__ = ("_known",)

    def __init__(self, size: int = MAX_PLANS) -> None:
        # False: seen once. True: cannot be planned.
        self._known: Recent[bytes, Plan | bool] = Recent(size)

    def __len__(self) -> int:
        return len(self._known)

    def find(self, key: bytes) -> Plan | None:
        if len(key) > MAX_KEY_BYTES:
            return None
        known = self._known.get(key)
        return known if type(known) is Plan else None

    def seen(self, key: bytes) -> bool:
        """Whether a description without a plan is to be learned now; remembers that it came."""
        if len(key) > MAX_KEY_BYTES:
            return False
        known = self._known.get(key)
        if known is None:
            self._known.put(key, False)
        return known is False

    def learn(self, key: bytes, plan: Plan | None) -> None:
        self._known.put(key, True if plan is None else plan)
