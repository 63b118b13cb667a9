"""The seam through which a model calls others, and the clock that stands meanwhile.

Owns no way of its own: the replica has it (`deployments/neighbours.py`). Called by `messages` and
`surface` on the instance's thread, or on any thread of the model's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, Protocol

from deployments.errors import MantaError
from deployments.types import InferRequest, InferResponse


class Calls(Protocol):
    """Both return at once; what fails is the future's result, and no exception."""

    def infer(
        self, request: InferRequest, timeout_s: float | None
    ) -> Future[InferResponse | MantaError]: ...

    def control(self, verb: str, *args: Any) -> Future[Any]:
        """`ready` (name, version), `load` (name, parameters), `unload` (name, parameters)."""
        ...


class Waits:
    """How long a run has waited for other models: they have limits of their own.

    Health judges an instance by how long it runs, and waiting is not running.
    """

    def __init__(self, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._open = 0
        self._since_ns = 0
        self._waited_ns = 0

    def begin(self) -> None:
        """A run starts."""
        with self._lock:
            self._waited_ns = 0
            self._since_ns = self._clock()

    def enter(self) -> None:
        with self._lock:
            if not self._open:
                self._since_ns = self._clock()
            self._open += 1

    def leave(self, _: object = None) -> None:
        with self._lock:
            self._open -= 1
            if not self._open:
                self._waited_ns += self._clock() - self._since_ns

    def shifted(self, running_since_ns: int | None) -> int | None:
        """The start of a run, later by what it waited; None while it waits."""
        if running_since_ns is None:
            return None
        with self._lock:
            return None if self._open else running_since_ns + self._waited_ns


class Waiting:
    """Calls that `waits` is told of. `chain`: the models that wait for the run which calls, and
    that run's own."""

    def __init__(self, calls: Calls, waits: Waits) -> None:
        self._calls = calls
        self._waits = waits
        self.chain: tuple[str, ...] = ()

    def infer(
        self, request: InferRequest, timeout_s: float | None
    ) -> Future[InferResponse | MantaError]:
        self._waits.enter()
        try:
            sent = self._calls.infer(replace(request, chain=self.chain), timeout_s)
        except BaseException:
            self._waits.leave()
            raise
        sent.add_done_callback(self._waits.leave)
        return sent

    def control(self, verb: str, *args: Any) -> Future[Any]:
        self._waits.enter()
        try:
            sent = self._calls.control(verb, *args)
        except BaseException:
            self._waits.leave()
            raise
        sent.add_done_callback(self._waits.leave)
        return sent
