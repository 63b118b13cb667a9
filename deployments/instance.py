"""Instance: one executor of a model, with a thread of its own and, on CUDA, a stream.

Owns when its model loads, runs and goes, what its thread waits for, and its proof of life. What an
execution means for each member of a batch is `execution`. Called by `replica.py`.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch

from configs.complete import runtime_kind
from configs.model import ModelConfig
from configs.parameters import ModelParameters

from . import runtimes
from .desk import Desk, How
from .errors import ExecutionFailed, ShuttingDown
from .execution import Execution
from .execution_by_request import ExecutionByRequest
from .pb_utils.calls import Calls, Waiting, Waits
from .poller import Poller, Work
from .runtimes import python_model, settings
from .runtimes.faults import FatalDeviceError
from .slots import Slots
from .types import Batch, BatchReply, Part
from .weights import Lease, WeightCache, empty_cache, free_device_memory, weight_key

__all__ = ["FatalDeviceError", "Instance", "Progress"]

logger = logging.getLogger("ray.serve")  # Serve writes this one to the replica's log file

T = TypeVar("T")
State = Literal["loading", "idle", "running", "stopped"]

# How long a caller waits for the thread to end.
_JOIN_S = 5.0
# How long answers may take to leave when the instance closes.
_FLUSH_S = 1.0
# How long the `finalize` of a model of the Python backend may take.
_FINALIZE_S = 20.0


class Executes(Protocol):
    def run(self, batch: Batch, how: How) -> tuple[Part, ...]: ...


@dataclass(frozen=True, slots=True)
class Progress:
    """What health is judged by. Times are of time.monotonic_ns."""

    running_since_ns: int | None
    asked_since_ns: int | None  # a beat that was asked for and has not been answered
    state: State


class Instance:
    """Batches run one at a time, in the order in which they come. Any thread may call any method.

    The thread waits for Routers' connections (`attach`) and for what is posted to it at once, so
    that a batch from a connection costs no change of threads. `slots` says how many batches it
    has. `cache` given: the loaded model is shared with the other instances that use the same cache.
    `clean` empties the device's cache, after each execution where the model asks for that.
    `calls`: how a model of the Python backend reaches other models.
    `threads` is the intra-op count for a model that does not give one. `on_fatal` hears, on the
    thread, that the process must end.
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
        on_fatal: Callable[[FatalDeviceError], None] | None = None,
        clean: Callable[[], None] = empty_cache,
        calls: Calls | None = None,
    ) -> None:
        self.name = name
        self.slots = Slots()
        self.finished_ns = 0
        self.in_force: Mapping[str, str] = {}  # torch's settings, once loading has begun
        self.cleanings = 0
        self._artifact = artifact
        self._config = config
        self._parameters = parameters
        self._device = device
        self._kind = kind
        self._cache = cache
        self._threads = threads
        self._on_fatal = on_fatal
        self._empty_cache = clean
        self._calls = calls
        self._waits = Waits()
        self._python: python_model.PythonModel | None = None
        self._runtime_kind = runtime_kind(config, (artifact.name,))
        self._lock = threading.Lock()
        self._poller: Poller | None = None
        self._thread: threading.Thread | None = None
        self._runtime: runtimes.Runtime | None = None
        self._lease: Lease[runtimes.Runtime] | None = None
        self._execution: Executes | None = None
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
        """What was submitted is answered first, but a caller waits for that only so long
        (`draining` does). Doing it twice is doing it once."""
        with self._lock:
            self._closed = True
            thread = self._thread
        if self._poller is not None:
            self._poller.post(None)
        if thread is None:
            self._state = "stopped"
        elif thread is not threading.current_thread():
            thread.join(_JOIN_S if self._python is None else _FINALIZE_S)

    def progress(self) -> Progress:
        since_ns = self._running_since_ns
        if self._python is not None:
            since_ns = self._waits.shifted(since_ns)
        return Progress(since_ns, self._asked_ns, self._state)

    def beat(self) -> None:
        """Asks an idle thread to show that it moves; a busy one shows it by what it runs."""
        if self._state == "idle" and self._asked_ns is None and self._poller is not None:
            self._asked_ns = time.monotonic_ns()
            self._poller.post(self._answer_beat)

    def _answer_beat(self) -> None:
        self._asked_ns = None

    def weight_pointer(self) -> int:
        runtime = self._runtime
        return 0 if runtime is None else runtime.weight_pointer()

    def submit(self, batch: Batch) -> Future[BatchReply]:
        """Whether or not there is room. Fails with FatalDeviceError when the process must end,
        ShuttingDown when closed."""
        self.slots.admit(always=True)
        return self._post(self._timed(batch), self.slots.done)

    def offer(self, batch: Batch) -> Future[BatchReply] | None:
        """As `submit`, if there is room."""
        if not self.slots.admit():
            return None
        return self._post(self._timed(batch), self.slots.done)

    def queue(self, batch: Batch) -> Future[BatchReply]:
        """As `submit`, when its turn comes among all who want to send; cancel it to give up."""
        future: Future[BatchReply] = Future()
        task = _task(future, self._timed(batch), self.slots.done)

        def admitted() -> bool:
            if future.cancelled() or self._poller is None:
                return False
            self._poller.ready(task)
            return True

        self.slots.queue(admitted)
        self._post(lambda: None)  # there may be room by now
        return future

    def run(self, batch: Batch) -> BatchReply:
        return self.submit(batch).result()

    def warm(self, batch: Batch) -> BatchReply:
        """A run that is part of the load: it takes no slot, and however long it takes, it is no
        hang. It fails as a whole, if it does."""
        return self._post(lambda: self._warm(batch)).result()

    def _warm(self, batch: Batch) -> BatchReply:
        self._unproven = True  # until it has succeeded
        return self.execute(batch, "whole")

    def attach(self, sock: socket.socket, router_id: str) -> None:
        """Takes over a Router's connection: its batches are read on the instance's own thread."""
        opened = self._post(lambda: self._open(sock, router_id))
        if opened.done() and isinstance(opened.exception(), ShuttingDown):
            sock.close()

    def drain(self) -> None:
        """Routers are told to send no more; what they have sent is answered."""
        self.slots.drain()
        self._post(lambda: None)

    @property
    def connected(self) -> bool:
        """Whether any Router is there to hear its answers."""
        return self._poller is not None and self._poller.connected

    # --- the thread ------------------------------------------------------------------------------

    def _post(self, work: Callable[[], T], done: Work | None = None) -> Future[T]:
        """`done` is called once the work is done, or comes to nothing."""
        future: Future[T] = Future()
        with self._lock:
            if not self._closed:
                if self._poller is None:
                    self._poller = Poller(self.slots)
                    self._thread = threading.Thread(
                        target=self._loop, args=(self._poller,), name=self.name, daemon=True
                    )
                    self._thread.start()
                self._poller.post(_task(future, work, done))
                return future
        if done is not None:
            done()
        future.set_exception(ShuttingDown())
        return future

    def _loop(self, poller: Poller) -> None:
        try:
            while (work := poller.next()) is not None:
                work()
                del work  # or the last batch stays in memory until the next one
            for work in poller.last():
                work()
            poller.finish(_FLUSH_S)
            self._unload()
        finally:  # also should there be a mistake of ours: health must see it
            self._state = "stopped"

    def _open(self, sock: socket.socket, router_id: str) -> None:
        assert self._poller is not None
        try:
            Desk(sock, router_id, self.slots, self._poller, self)
        except Exception:  # nobody would read it: the Router must not wait for that
            logger.exception("connection of router %s", router_id)
            sock.close()

    def _load(self) -> None:
        if self._execution is not None:
            return
        self._state = "loading"
        settings.apply_process(self._parameters, self._runtime_kind)
        settings.apply_thread(self._parameters, self._runtime_kind, self._threads)
        self.in_force = settings.in_force(self._parameters, self._runtime_kind)
        for line in settings.thread_lines(self._config, self._parameters, self.in_force):
            logger.info("%s", line)
        if self._runtime_kind == "python":
            self._load_python()
            self._state = "idle"
            return
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
        stream: torch.cuda.Stream | None = None
        if self._kind != "KIND_MODEL" and self._runtime.device.type == "cuda":
            stream = torch.cuda.Stream(self._runtime.device)  # type: ignore[no-untyped-call]
        cleans = self._parameters.enable_cache_cleaning and self._kind != "KIND_CPU"
        self._execution = Execution(
            self.name,
            self._runtime,
            self._config,
            stream,
            self._trying,
            self._clean if cleans else None,
        )
        self._state = "idle"

    def _load_python(self) -> None:
        calls = None if self._calls is None else Waiting(self._calls, self._waits)
        self._python = python_model.load(
            self._artifact, self._config, self._device, self._kind, self.name, calls
        )
        self._execution = ExecutionByRequest(
            self.name, self._python, self._config, self._trying, calls
        )

    def _load_runtime(self) -> runtimes.Runtime:
        runtime = runtimes.load(
            self._artifact, self._config, self._parameters, self._device, self._kind
        )
        if runtime.device.type == "cuda":
            torch.cuda.synchronize(runtime.device)  # others' streams do not wait for these copies
        return runtime

    def _unload(self) -> None:
        self._runtime = self._execution = None
        if self._python is not None:
            self._python.finalize()
            self._python = None
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.release()
        elif self._fatal is None:
            free_device_memory()

    def _guard(self) -> AbstractContextManager[Any]:
        return settings.guard(self._parameters, self._runtime_kind)

    # --- execution -------------------------------------------------------------------------------

    def _timed(self, batch: Batch) -> Callable[[], BatchReply]:
        """Also tells for how long it waited for a run before it to end."""
        sent_ns = time.monotonic_ns()

        def work() -> BatchReply:
            waited_ns = max(0, self.finished_ns - sent_ns)
            return replace(self.execute(batch), waited_ns=waited_ns)

        return work

    def execute(self, batch: Batch, how: How = "") -> BatchReply:
        """On the instance's thread. Raises SendAgain when the batch is joined and has failed."""
        if self._fatal is not None:
            raise self._fatal
        if self._execution is None:
            raise ExecutionFailed("the instance has not loaded its model")
        self._state = "loading" if self._unproven else "running"
        try:
            with self._guard():
                parts = self._execution.run(batch, how)
            self._unproven = self._unproven and all(part.error is not None for part in parts)
            return BatchReply(parts)
        except FatalDeviceError as error:
            self._fatal = error
            if self._on_fatal is not None:
                self._on_fatal(error)
            raise
        finally:
            self._running_since_ns = None
            self.finished_ns = time.monotonic_ns()
            if self._asked_ns is not None:  # a beat that waited behind this batch
                self._asked_ns = time.monotonic_ns()
            self._state = "idle" if self._fatal is None else "stopped"

    def _clean(self) -> None:
        self.cleanings += 1
        self._empty_cache()

    def _trying(self) -> None:
        """A batch, or a piece of one that failed, starts: each has the whole limit."""
        if not self._unproven:
            self._running_since_ns = time.monotonic_ns()
        if self._python is not None:
            self._waits.begin()


def _task(future: Future[T], work: Callable[[], T], done: Work | None) -> Work:
    def task() -> None:
        if not future.set_running_or_notify_cancel():
            if done is not None:
                done()
            return
        failure: BaseException | None = None
        try:
            result = work()
        except SystemExit as error:  # a model that calls sys.exit ends its load, not the server
            failure = RuntimeError(f"the model called sys.exit({error.code!r})")
        except BaseException as error:
            failure = error
        if done is not None:
            done()
        if failure is None:
            future.set_result(result)
        else:
            future.set_exception(failure)

    return task
