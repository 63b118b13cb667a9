"""Instance: one executor of a model, with a thread of its own and, on CUDA, a stream.

Owns when its model loads, runs and goes, what a failed execution means for each member of a batch
(design §4: one bad request never hurts another) and its proof of life. Called by `replica.py`.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from configs.complete import runtime_kind
from configs.model import ModelConfig
from configs.parameters import ModelParameters

from . import runtimes
from .errors import ExecutionFailed, MantaError, ShuttingDown
from .runtimes import convert, faults, settings
from .runtimes.faults import FatalDeviceError
from .types import Array, Batch, BatchReply, OutputArray, Part
from .weights import Lease, WeightCache, free_device_memory, weight_key

__all__ = ["FatalDeviceError", "Instance", "Progress"]

logger = logging.getLogger("ray.serve")  # Serve writes this one to the replica's log file

T = TypeVar("T")
State = Literal["loading", "idle", "running", "stopped"]

_JOIN_S = 5.0


@dataclass(frozen=True, slots=True)
class Progress:
    """What health is judged by. Times are of time.monotonic_ns."""

    running_since_ns: int | None
    asked_since_ns: int | None  # a beat that was asked for and has not been answered
    state: State


class Instance:
    """Batches run one at a time, in the order of `submit`. Any thread may call any method.

    `cache` given: the loaded model is shared with the other instances that use the same cache.
    `threads` is the intra-op count for a model that does not give one.
    """

    def __init__(
        self,
        name: str,
        artifact: Path,
        config: ModelConfig,
        parameters: ModelParameters,
        device: str,
        kind: str,
        cache: WeightCache | None = None,
        threads: int | None = None,
    ) -> None:
        self.name = name
        self._artifact = artifact
        self._config = config
        self._parameters = parameters
        self._device = device
        self._kind = kind
        self._cache = cache
        self._threads = threads
        self._runtime_kind = runtime_kind(config, (artifact.name,))
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._runtime: runtimes.Runtime | None = None
        self._lease: Lease[runtimes.Runtime] | None = None
        self._stream: torch.cuda.Stream | None = None
        self._state: State = "loading"
        self._running_since_ns: int | None = None
        self._asked_ns: int | None = None
        # torch.compile does its work in the first run: that is loading, however long it takes.
        compiles = not parameters.torch_compile_optional_parameters.get("disable")
        self._unproven = self._runtime_kind == "eager" and compiles
        self._fatal: FatalDeviceError | None = None
        self._closed = False

    # --- life ------------------------------------------------------------------------------------

    def load(self) -> None:
        """Blocks until the model is loaded; raises ConfigError. May be called again after that."""
        self._post(self._load).result()

    def close(self) -> None:
        """What was submitted is answered first. Doing it twice is doing it once."""
        with self._lock:
            self._closed = True
            thread = self._thread
        self._tasks.put(None)
        if thread is None:
            self._state = "stopped"
        elif thread is not threading.current_thread():
            thread.join(_JOIN_S)

    def progress(self) -> Progress:
        return Progress(self._running_since_ns, self._asked_ns, self._state)

    def beat(self) -> None:
        """Asks an idle thread to show that it moves; a busy one shows it by what it runs."""
        if self._state == "idle" and self._asked_ns is None:
            self._asked_ns = time.monotonic_ns()
            self._tasks.put(self._answer_beat)

    def _answer_beat(self) -> None:
        self._asked_ns = None

    def weight_pointer(self) -> int:
        runtime = self._runtime
        return 0 if runtime is None else runtime.weight_pointer()

    def submit(self, batch: Batch) -> Future[BatchReply]:
        """Fails with FatalDeviceError when the process must end, ShuttingDown when closed."""
        return self._post(lambda: self._execute(batch))

    def run(self, batch: Batch) -> BatchReply:
        return self.submit(batch).result()

    # --- the thread ------------------------------------------------------------------------------

    def _post(self, work: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()

        def task() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = work()
            except SystemExit as error:  # a model that calls sys.exit ends its load, not the server
                future.set_exception(RuntimeError(f"the model called sys.exit({error.code!r})"))
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        with self._lock:
            if self._closed:
                future.set_exception(ShuttingDown())
                return future
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, name=self.name, daemon=True)
                self._thread.start()
            self._tasks.put(task)
        return future

    def _loop(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()
            del task  # or the last batch stays in memory until the next one
        self._unload()
        self._state = "stopped"

    def _load(self) -> None:
        if self._runtime is not None:
            return
        self._state = "loading"
        settings.apply_process(self._parameters, self._runtime_kind)
        settings.apply_thread(self._parameters, self._runtime_kind, self._threads)
        with self._guard():
            if self._cache is None or not self._artifact.is_file():
                self._runtime = self._load_runtime()
            else:
                key = weight_key(self._artifact, self._device, self._kind, self._config.name)
                self._lease = self._cache.lease(key, self._load_runtime)
                self._runtime = self._lease.value
                if self._lease.reused:
                    label = self._runtime.label
                    logger.info("Reusing %s model for instance '%s'", label, self.name)
        if self._kind != "KIND_MODEL" and self._runtime.device.type == "cuda":
            self._stream = torch.cuda.Stream(self._runtime.device)  # type: ignore[no-untyped-call]
        self._state = "idle"

    def _load_runtime(self) -> runtimes.Runtime:
        runtime = runtimes.load(
            self._artifact, self._config, self._parameters, self._device, self._kind
        )
        if runtime.device.type == "cuda":
            torch.cuda.synchronize(runtime.device)  # others' streams do not wait for these copies
        return runtime

    def _unload(self) -> None:
        self._runtime = self._stream = None
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.release()
        elif self._fatal is None:
            free_device_memory()

    def _guard(self) -> AbstractContextManager[Any]:
        return settings.guard(self._parameters, self._runtime_kind)

    # --- execution -------------------------------------------------------------------------------

    def _execute(self, batch: Batch) -> BatchReply:
        if self._fatal is not None:
            raise self._fatal
        if self._runtime is None:
            raise ExecutionFailed("the instance has not loaded its model")
        self._state = "loading" if self._unproven else "running"
        stream = nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        try:
            with self._guard(), stream:
                parts = tuple(self._run_members(self._runtime, batch))
            self._unproven = self._unproven and all(part.error is not None for part in parts)
            return BatchReply(parts)
        except FatalDeviceError as error:
            self._fatal = error
            raise
        finally:
            self._running_since_ns = None
            if self._asked_ns is not None:  # a beat that waited behind this batch
                self._asked_ns = time.monotonic_ns()
            self._state = "idle" if self._fatal is None else "stopped"

    def _run_members(self, runtime: runtimes.Runtime, batch: Batch) -> list[Part]:
        members = tuple(range(len(batch.rows)))
        if self._config.max_batch_size > 0:
            return self._attempt(runtime, batch, members)
        return [part for k in members for part in self._attempt(runtime, batch, (k,))]

    def _attempt(
        self, runtime: runtimes.Runtime, batch: Batch, members: tuple[int, ...], last: bool = False
    ) -> list[Part]:
        """`last`: this is the second try, of one member, and the error is its own."""
        try:
            return self._run_once(runtime, batch, members)
        except SystemExit as caught:
            error: Exception = RuntimeError(f"the model called sys.exit({caught.code!r})")
        except Exception as caught:
            error = caught
            logger.debug("instance '%s': execution failed", self.name, exc_info=True)
        # Outside the except clause: the traceback would hold the failed run's memory.
        error.__traceback__ = None
        error.__cause__ = error.__context__ = None
        self._raise_if_fatal(runtime, error)
        if faults.is_out_of_memory(error):
            free_device_memory()
            if len(members) > 1:
                half = len(members) // 2
                first = self._attempt(runtime, batch, members[:half])
                return first + self._attempt(runtime, batch, members[half:])
            if not last:
                return self._attempt(runtime, batch, members, last=True)
        if len(members) > 1:
            return [
                part for k in members for part in self._attempt(runtime, batch, (k,), last=True)
            ]
        return [Part(members, {}, _as_answer(error))]

    def _run_once(
        self, runtime: runtimes.Runtime, batch: Batch, members: tuple[int, ...]
    ) -> list[Part]:
        if not self._unproven:
            self._running_since_ns = time.monotonic_ns()  # each try has the whole limit
        started = time.perf_counter_ns()
        inputs, good, bad = self._build(runtime, batch, members)
        if not good:
            return bad
        self._synchronize()
        built = time.perf_counter_ns()
        values = runtime.run(inputs)
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
                    outputs[output.name] = convert.read_output(value)
                del value
        except MantaError as error:  # the same for all members: there is no culprit among them
            outputs, failure = {}, error
        del inputs, values
        if self._parameters.enable_cache_cleaning and torch.cuda.is_available():
            if self._kind != "KIND_CPU":
                torch.cuda.empty_cache()
        finished = time.perf_counter_ns()
        part = Part(good, outputs, failure, built - started, ran - built, finished - ran)
        return [part, *bad]

    def _build(
        self, runtime: runtimes.Runtime, batch: Batch, members: Sequence[int]
    ) -> tuple[list[runtimes.Value | None], tuple[int, ...], list[Part]]:
        """The inputs, who is in them, and an error for each member whose strings are no strings."""
        strings: dict[tuple[int, int], list[str]] = {}
        bad: dict[int, MantaError] = {}
        batching = self._config.max_batch_size > 0
        for index, tensor in enumerate(self._config.input):
            if tensor.data_type == "TYPE_STRING":
                for k in members:
                    array = batch.inputs[index][k]
                    try:
                        strings[index, k] = convert.decode_strings(
                            tensor, _present(array, tensor.name), batch.rows[k], batching
                        )
                    except MantaError as error:
                        bad.setdefault(k, error)
        good = tuple(k for k in members if k not in bad)
        inputs: list[runtimes.Value | None] = []
        for index, tensor in enumerate(self._config.input if good else ()):
            if tensor.data_type == "TYPE_STRING":
                inputs.append([text for k in good for text in strings[index, k]])
            else:
                arrays = [_present(batch.inputs[index][k], tensor.name) for k in good]
                inputs.append(convert.build_tensor(tensor, arrays, runtime.device))
        return inputs, good, [Part((k,), {}, error) for k, error in bad.items()]

    def _synchronize(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()

    def _raise_if_fatal(self, runtime: runtimes.Runtime, error: Exception) -> None:
        if not faults.is_fatal(error) and runtime.device.type == "cuda":
            try:  # a lost device fails every call from now on, whatever the first error said
                torch.cuda.synchronize(runtime.device)
            except RuntimeError as second:
                if not faults.is_out_of_memory(second):
                    error = FatalDeviceError(faults.clean_text(second))
        if isinstance(error, FatalDeviceError):
            raise error
        if faults.is_fatal(error):
            raise FatalDeviceError(faults.clean_text(error))


def _present(array: Array | None, name: str) -> Array:
    if array is None:
        raise ExecutionFailed(f"input '{name}' is absent, and optional inputs are not supported")
    return array


def _as_answer(error: Exception) -> MantaError:
    if isinstance(error, MantaError):
        return error
    return ExecutionFailed(faults.clean_text(error))
