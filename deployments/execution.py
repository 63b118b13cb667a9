"""Execution: one batch through a loaded model, and what a failure means for each of its members.

One bad request never hurts another: what fails together is run again apart. Runs on the
instance's thread, which owns the rest of its life. Called by `instance.py`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from configs.model import ModelConfig, ModelInput

from . import runtimes
from .desk import How, SendAgain
from .errors import ExecutionFailed, MantaError
from .runtimes import convert, faults, ragged
from .runtimes import strings as text
from .runtimes.faults import FatalDeviceError
from .types import Array, Batch, OutputArray, Part
from .weights import free_device_memory

logger = logging.getLogger("ray.serve")  # Serve writes this one to the replica's log file


class Execution:
    """`stream`: the instance's own on CUDA. `trying` is called at the start of every try,
    `clean` at its end."""

    def __init__(
        self,
        name: str,
        runtime: runtimes.Runtime,
        config: ModelConfig,
        stream: torch.cuda.Stream | None,
        trying: Callable[[], None],
        clean: Callable[[], None] | None = None,
    ) -> None:
        self._name = name
        self._runtime = runtime
        self._config = config
        self._stream = stream
        self._trying = trying
        self._ragged = ragged.of(config)
        objects = runtime.signature.objects
        self._decode = text.decode_objects if objects else text.decode_strings
        self._clean = clean

    def run(self, batch: Batch, how: How) -> tuple[Part, ...]:
        """Raises FatalDeviceError, and SendAgain for joined inputs that a failed run may have
        changed: sent once more in pieces, `how` says in which the members are run. Or "whole": one
        that fails is not run again in pieces, unless it needs more memory than there is."""
        stream = nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        with stream:
            return tuple(self._run_members(batch, how))

    def _run_members(self, batch: Batch, how: How) -> list[Part]:
        members = tuple(range(len(batch.rows)))
        if how == "halves":
            return self._halves(batch, members)
        if how == "singly":
            return self._singly(batch, members)
        if self._config.max_batch_size > 0:
            return self._attempt(batch, members, whole=how == "whole")
        return [part for k in members for part in self._attempt(batch, (k,))]

    def _attempt(
        self, batch: Batch, members: tuple[int, ...], last: bool = False, whole: bool = False
    ) -> list[Part]:
        """`last`: this is the second try, of one member, and the error is its own."""
        try:
            return self._run_once(batch, members)
        except SystemExit as caught:
            error: Exception = RuntimeError(f"the model called sys.exit({caught.code!r})")
        except Exception as caught:
            error = caught
            logger.debug("instance '%s': execution failed", self._name, exc_info=True)
        # Outside the except clause: the traceback would hold the failed run's memory.
        error.__traceback__ = None
        error.__cause__ = error.__context__ = None
        self._raise_if_fatal(error)
        if self._clean is not None:
            self._clean()
        # The run may have changed what it was given; of a joined input there is no other copy.
        on_host = self._runtime.device.type == "cpu"
        spoiled = on_host and any(one is not None for one in batch.joined)
        if faults.is_out_of_memory(error):
            free_device_memory()
            if len(members) > 1:
                if spoiled:
                    raise SendAgain("halves")
                return self._halves(batch, members)
            # The host has no cache to empty, and a member alone no other copy than it was given.
            if not last and not on_host:
                return self._attempt(batch, members, last=True)
        if len(members) > 1 and not whole:
            if spoiled:
                raise SendAgain("singly")
            return self._singly(batch, members)
        return [Part(members, {}, _as_answer(error))]

    def _halves(self, batch: Batch, members: tuple[int, ...]) -> list[Part]:
        half = len(members) // 2
        first = self._attempt(batch, members[:half])
        return first + self._attempt(batch, members[half:])

    def _singly(self, batch: Batch, members: tuple[int, ...]) -> list[Part]:
        return [part for k in members for part in self._attempt(batch, (k,), last=True)]

    def _run_once(self, batch: Batch, members: tuple[int, ...]) -> list[Part]:
        self._trying()
        started = time.perf_counter_ns()
        inputs, good, bad = self._build(batch, members)
        if not good:
            return bad
        self._synchronize()
        built = time.perf_counter_ns()
        values = self._runtime.run(inputs)
        self._synchronize()  # an error of the device shows here and not in a later batch
        ran = time.perf_counter_ns()
        outputs: dict[str, OutputArray] = {}
        failure: MantaError | None = None
        try:
            for output, value in zip(self._config.output, values, strict=True):
                convert.check_output(output, value)
            wanted = set(batch.outputs)
            for index, output in enumerate(self._config.output):
                value, values[index] = values[index], None
                if output.name in wanted:
                    outputs[output.name] = convert.read_output(output, value)
                del value
        except MantaError as error:  # the same for all members: there is no culprit among them
            outputs, failure = {}, error
        del inputs, values
        if self._clean is not None:
            self._clean()
        finished = time.perf_counter_ns()
        part = Part(good, outputs, failure, built - started, ran - built, finished - ran)
        return [part, *bad]

    def _build(
        self, batch: Batch, members: Sequence[int]
    ) -> tuple[list[runtimes.Value | None], tuple[int, ...], list[Part]]:
        """The inputs, who is in them, and an error for each member whose strings are no strings."""
        strings: dict[tuple[int, int], Any] = {}
        bad: dict[int, MantaError] = {}
        batching = self._config.max_batch_size > 0
        for index, tensor in enumerate(self._config.input):
            if tensor.data_type == "TYPE_STRING" and not _is_absent(tensor, batch, index, members):
                for k in members:
                    array = batch.member(index, k)
                    try:
                        strings[index, k] = self._decode(
                            tensor, _present(array, tensor.name), batch.rows[k], batching
                        )
                    except MantaError as error:
                        bad.setdefault(k, error)
        good = tuple(k for k in members if k not in bad)
        inputs: list[runtimes.Value | None] = []
        for index, tensor in enumerate(self._config.input if good else ()):
            if _is_absent(tensor, batch, index, members):
                inputs.append(None)
                continue
            flat = self._ragged is not None and index in self._ragged.flat
            if tensor.data_type == "TYPE_STRING":
                inputs.append(_together([strings[index, k] for k in good], flat))
                continue
            whole = batch.joined[index] if batch.joined else None
            if whole is not None and len(good) == len(batch.rows):
                arrays = [whole]
            else:
                arrays = [_present(batch.member(index, k), tensor.name) for k in good]
                if len(arrays) == 1 < len(members):
                    # It is looked at as it is, and run again should this fail: not what it was.
                    arrays = [arrays[0].copy()]
            if flat:
                arrays = [array.reshape(-1) for array in arrays]
            inputs.append(convert.build_tensor(tensor, arrays, self._runtime.device))
        if self._ragged is not None and good:
            shapes = [
                [_shape(batch, strings, index, k) for k in good] for index in self._ragged.sources
            ]
            inputs += self._ragged.generate(shapes, self._runtime.device)
        return inputs, good, [Part((k,), {}, error) for k, error in bad.items()]

    def _synchronize(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()

    def _raise_if_fatal(self, error: Exception) -> None:
        if not faults.is_fatal(error) and self._runtime.device.type == "cuda":
            try:  # a lost device fails every call from now on, whatever the first error said
                torch.cuda.synchronize(self._runtime.device)
            except RuntimeError as second:
                if not faults.is_out_of_memory(second):
                    error = FatalDeviceError(faults.clean_text(second))
        if isinstance(error, FatalDeviceError):
            raise error
        if faults.is_fatal(error):
            raise FatalDeviceError(faults.clean_text(error))


def _is_absent(tensor: ModelInput, batch: Batch, index: int, members: Sequence[int]) -> bool:
    """Whether an optional input was left out: by all members, as the Router sees to it."""
    return tensor.optional and all(batch.member(index, k) is None for k in members)


def _shape(
    batch: Batch, strings: dict[tuple[int, int], Any], index: int, k: int
) -> tuple[int, ...]:
    """Of one member's input, as its request has it."""
    if (index, k) not in strings:
        array = batch.member(index, k)
        return () if array is None else array.shape
    text = strings[index, k]
    return (len(text),) if isinstance(text, list) else tuple(text.shape)


def _together(strings: list[Any], flat: bool) -> runtimes.Value:
    if isinstance(strings[0], list):
        return [one for member in strings for one in member]
    if flat:
        strings = [array.reshape(-1) for array in strings]
    return np.concatenate(strings) if len(strings) > 1 else strings[0]


def _present(array: Array | None, name: str) -> Array:
    if array is None:
        raise ExecutionFailed(f"input '{name}' is absent from a request of this batch")
    return array


def _as_answer(error: Exception) -> MantaError:
    if isinstance(error, MantaError):
        return error
    return ExecutionFailed(faults.clean_text(error))
