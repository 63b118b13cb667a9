"""CUDA graphs: a model's kernels recorded once per shape of its inputs, then replayed as one.

Owns the recordings and when not to use them: on the host, for strings, beyond a number of shapes
and where the model cannot be recorded. On request only (ENABLE_CUDA_GRAPHS): recording runs a model
several times, which one with state would notice. Wraps a runtime; called by `load`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch

from . import Runtime, Value, faults

logger = logging.getLogger("manta.runtimes")

SHAPES_LIMIT = 32  # a recording keeps the memory of its run
_WARM_UP_RUNS = 3  # TorchScript specialises itself in the first two

Key: TypeAlias = tuple[tuple[tuple[int, ...], torch.dtype], ...]


class _Recording:
    """One graph, the tensors that it reads and those that it writes."""

    def __init__(self, runtime: Runtime, inputs: Sequence[torch.Tensor]) -> None:
        """Raises RuntimeError where something cannot be recorded, such as a copy to the host."""
        self._inputs = [tensor.clone() for tensor in inputs]
        stream = torch.cuda.Stream(inputs[0].device)  # type: ignore[no-untyped-call]
        current = torch.cuda.current_stream(inputs[0].device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_RUNS):
                runtime.run(self._inputs)
        current.wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads of the process may go on with what a recording forbids this one.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._outputs = runtime.run(self._inputs)

    def replay(self, inputs: Sequence[torch.Tensor]) -> list[object]:
        for mine, given in zip(self._inputs, inputs, strict=True):
            mine.copy_(given, non_blocking=True)
        self._graph.replay()
        # The next replay writes to the same memory.
        return [o.clone() if isinstance(o, torch.Tensor) else o for o in self._outputs]


class Graphed:
    """For one instance: a recording belongs to one thread and stream."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._recordings: dict[Key, _Recording | None] = {}
        self.signature = runtime.signature
        self.binding = runtime.binding
        self.device = runtime.device
        self.label = runtime.label

    def run(self, inputs: Sequence[Value | None]) -> list[object]:
        tensors: list[Any] = [value for value in inputs if _recordable(value)]
        if len(tensors) < len(inputs):
            return self._runtime.run(inputs)
        key = tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors)
        if key not in self._recordings and len(self._recordings) < SHAPES_LIMIT:
            self._recordings[key] = self._record(tensors)
        recording = self._recordings.get(key)
        return self._runtime.run(inputs) if recording is None else recording.replay(tensors)

    def _record(self, tensors: Sequence[torch.Tensor]) -> _Recording | None:
        try:
            return _Recording(self._runtime, tensors)
        except RuntimeError as error:
            if faults.is_fatal(error) or faults.is_out_of_memory(error):
                raise
            logger.warning("no CUDA graph for this shape: %s", faults.clean_text(error))
            return None

    def weight_pointer(self) -> int:
        return self._runtime.weight_pointer()


def _recordable(value: Value | None) -> bool:
    return isinstance(value, torch.Tensor) and value.is_cuda and value.numel() > 0
