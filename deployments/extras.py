"""What few requests ask beyond tensors in and out: inputs and outputs in the client's own memory,
and outputs as their best classes.

Owns that this does not hold up the event loop: what is large is done on a thread. Knows no
protocol; which regions there are is the business of `regions`. Called by `inference`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import numpy as np

from configs.server import ServerSettings

from . import classification, tensors
from .errors import Internal, InvalidArgument
from .regions import Region
from .types import Array, InferRequest, LentInput, MemoryRange, RequestedOutput, Tensor

Done = TypeVar("Done")

# A tenth of a millisecond of the loop's time, about; a thread costs as much.
INLINE_BYTES = 1 << 18

_NOTHING: Array = np.empty(0, np.uint8)


def ranges(request: InferRequest) -> Iterator[MemoryRange]:
    """All of the client's memory that a request has to do with."""
    for lent in request.lent:
        yield lent.memory
    for output in request.outputs:
        if output.memory is not None:
            yield output.memory


def copied_bytes(request: InferRequest, settings: ServerSettings) -> int:
    """Of what `fetch` will copy; raises if that is more than a request may bring."""
    size = sum(lent.memory.byte_size for lent in request.lent)
    if size > settings.max_body_bytes:
        raise InvalidArgument(
            f"inputs of {size} bytes in shared memory exceed the maximum allowed value of "
            f"{settings.max_body_bytes} bytes. Use --max-body-bytes to increase the limit."
        )
    return size


async def fetch(
    request: InferRequest, regions: Mapping[str, Region], max_rank: int
) -> InferRequest:
    """The request with all its inputs: copies, whoever writes there while it runs."""
    if not request.lent:
        return request
    for lent in request.lent:
        _check_size(lent, request.model_name, max_rank)
    size = sum(lent.memory.byte_size for lent in request.lent)
    copies = await _done(size, partial(_copies, request.lent, regions))
    inputs = list(request.inputs)
    for lent, copy in zip(request.lent, copies, strict=True):
        name, datatype, shape, model = lent.name, lent.datatype, lent.shape, request.model_name
        tensor = tensors.from_binary(name, datatype, shape, copy.data, model, max_rank)
        inputs.insert(lent.position, tensor)
    return replace(request, inputs=tuple(inputs), lent=())


def _check_size(lent: LentInput, model: str, rank: int) -> None:
    """Before anything is copied."""
    expected = tensors.byte_count(lent.name, lent.datatype, lent.shape, rank)
    if lent.datatype != "BYTES" and lent.memory.byte_size != expected:
        raise tensors.wrong_size(lent.name, model, expected, lent.memory.byte_size)


def _copies(inputs: Sequence[LentInput], regions: Mapping[str, Region]) -> list[Array]:
    copies = []
    for lent in inputs:
        copy: Array = np.empty(lent.memory.byte_size, np.uint8)
        regions[lent.memory.region].read(lent.memory.offset, copy.data)
        copies.append(copy)
    return copies


async def finish(
    request: InferRequest,
    outputs: tuple[Tensor, ...],
    labels: Mapping[str, Sequence[str]],
    batched: bool,
    regions: Mapping[str, Region],
) -> tuple[Tensor, ...]:
    """The outputs in the form that the client asked for. Nothing is written unless all fits."""
    asked = {output.name: output for output in request.outputs}
    if not asked:
        return outputs
    effort = 0
    for tensor in outputs:
        output = asked[tensor.name]
        if output.classification:
            effort += classification.effort(tensor, output.classification, batched)
        elif output.memory is not None:
            effort += _check_room(tensor, output.memory)

    def work() -> tuple[Tensor, ...]:
        return tuple(
            _finished(tensor, asked[tensor.name], labels, batched, regions) for tensor in outputs
        )

    return await _done(effort, work)


def _check_room(tensor: Tensor, memory: MemoryRange) -> int:
    size = tensor.data.nbytes
    if size > memory.byte_size:
        raise Internal(
            f"shared memory size specified with the request for output '{tensor.name}' "
            f"({memory.byte_size} bytes) should be at least {size} bytes to hold the results"
        )
    return size


def _finished(
    tensor: Tensor,
    output: RequestedOutput,
    labels: Mapping[str, Sequence[str]],
    batched: bool,
    regions: Mapping[str, Region],
) -> Tensor:
    if output.classification:
        names = labels.get(tensor.name, ())
        return classification.classify(tensor, output.classification, names, batched)
    if output.memory is not None:
        regions[output.memory.region].write(output.memory.offset, tensors.to_binary(tensor))
        return replace(tensor, data=_NOTHING, placed=True)
    return tensor


async def _done(effort: int, work: Callable[[], Done]) -> Done:
    """`work`, on a thread unless there is little of it. Cancelled, it is waited for all the same:
    the client's memory is held until nobody touches it."""
    if effort <= INLINE_BYTES:
        return work()
    running = asyncio.get_running_loop().run_in_executor(None, work)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        with contextlib.suppress(Exception):
            await running
        raise
