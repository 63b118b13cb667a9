"""Traces in Triton's own form: a file that is an array of events, as JSON.

Owns the file, its thread, and that several Routers write to different ones. A full disk, or more
traces than it can write, costs traces and never a request. Made by `tracers`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .ports import private_folder
from .traced_tensors import described
from .tracing import Carrier, Finished, Parent

logger = logging.getLogger("manta.trace")

MAX_WAITING, MAX_WAITING_BYTES = 4096, 64 << 20
WRITE_BYTES = 1 << 20  # so much text is one write; a trace is never in two
MAX_ROUTERS = 1024
_OPEN, _BETWEEN, _CLOSE = b"[\n", b",\n", b"\n]\n"


class TraceFile:
    """`path` is the first Router's on a node; a second one's is `path`.router2, and so on. With a
    log frequency, file k of them has `.k` behind it. What was there before is overwritten."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._lock = -1
        self._waiting: queue.Queue[Finished | None] = queue.Queue(MAX_WAITING)
        self._thread = threading.Thread(target=self._run, name="manta-traces", daemon=True)
        self._lost = 0
        self._put_bytes = self._got_bytes = 0  # of tensors; each of them is one thread's own
        self._texts: list[bytes] = []  # of the next write, which goes there
        self._to: _Array | None = None
        self._text_bytes = self._held_bytes = 0  # of these, and of their tensors
        self._failed = False
        self._all: _Array | None = None  # of those without a log frequency
        self._some: _Array | None = None
        self._index, self._in_file = 0, 0
        self._thread.start()

    def parent(self, carrier: Carrier) -> Parent | None:
        """Traces of this form know no client's."""
        return None

    def take(self, trace: Finished) -> None:
        size = _tensor_bytes(trace)
        try:
            if size and self._put_bytes + size - self._got_bytes > MAX_WAITING_BYTES:
                raise queue.Full
            self._waiting.put_nowait(trace)
            self._put_bytes += size
        except queue.Full:
            self._lost += 1
            if self._lost == 1:
                logger.warning("more traces than can be written: some are left out")

    def close(self, limit_s: float) -> None:
        """Writes what waits, within the limit. For a thread: it blocks."""
        deadline_s = time.monotonic() + limit_s
        with contextlib.suppress(queue.Full):
            self._waiting.put(None, timeout=limit_s)
        self._thread.join(max(deadline_s - time.monotonic(), 0))

    # --- the thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            try:
                trace = self._waiting.get_nowait()
            except queue.Empty:
                self._flush()
                trace = self._waiting.get()
            if trace is None:
                break
            self._add(trace)
        self._flush()
        if self._lock >= 0:
            os.close(self._lock)

    def _add(self, trace: Finished) -> None:
        """To what is written next, as far as that is the same file's and no more than one write."""
        try:
            place = self._place(trace)
            texts = [text.encode() for text in texts_of(trace)]
        except Exception as error:
            self._tell(error)
            self._got_bytes += _tensor_bytes(trace)
            return
        if place is not self._to:
            self._flush()
            self._to = place
        self._texts += texts
        self._text_bytes += sum(map(len, texts))
        self._held_bytes += _tensor_bytes(trace)
        if self._text_bytes >= WRITE_BYTES:
            self._flush()

    def _flush(self) -> None:
        texts, self._texts, self._text_bytes = self._texts, [], 0
        try:
            if texts and self._to is not None:
                self._to.append(texts)
                self._failed = False
        except Exception as error:
            self._tell(error)
        self._got_bytes += self._held_bytes
        self._held_bytes = 0

    def _tell(self, error: Exception) -> None:
        """Once, until it works again."""
        if not self._failed:
            text = getattr(error, "strerror", None) or type(error).__name__
            logger.error("traces cannot be written: %s", text)
        self._failed = True

    def _place(self, trace: Finished) -> _Array:
        if self._lock < 0:
            self._path, self._lock = claim(self._path)
        frequency = trace.settings.log_frequency
        if frequency == 0:
            if self._all is None:
                self._all = _Array(str(self._path))
            return self._all
        if self._some is None or self._in_file >= frequency:
            self._some, self._in_file = _Array(f"{self._path}.{self._index}"), 0
            self._index += 1
        self._in_file += 1
        return self._some


class _Array:
    """A file that holds a whole JSON array after each write, also one that fails."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._end = 0  # of the last event

    def append(self, events: list[bytes]) -> None:
        data = (_BETWEEN if self._end else _OPEN) + _BETWEEN.join(events) + _CLOSE
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (0 if self._end else os.O_TRUNC)
        file = os.open(self._path, flags, 0o640)
        try:
            _put(file, data, self._end)
        except OSError:
            # A full disk still has the place of what stood here before.
            with contextlib.suppress(OSError):
                _put(file, _CLOSE if self._end else _OPEN + _CLOSE, self._end)
            raise
        finally:
            os.close(file)
        self._end += len(data) - len(_CLOSE)


def _put(file: int, data: bytes, at: int) -> None:
    """The end of the file, whatever was behind. Raises OSError."""
    written = 0
    while written < len(data):
        written += os.pwrite(file, data[written:], at + written)
    os.ftruncate(file, at + written)


def claim(path: Path) -> tuple[Path, int]:
    """A name that no other Router of this node has, and the lock on it; it ends with its file or
    its process. Raises OSError."""
    for number in range(1, MAX_ROUTERS):
        name = path if number == 1 else path.with_name(f"{path.name}.router{number}")
        digest = hashlib.sha256(os.fsencode(name.absolute())).hexdigest()[:32]
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        lock = os.open(private_folder() / f"trace-{digest}.lock", flags, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
        else:
            return name, lock
    raise OSError("too many Routers write traces")


def texts_of(trace: Finished) -> Iterator[str]:
    """The events that Triton writes of one trace, in its order, as JSON."""
    number = trace.ids.number
    version = int(trace.version) if trace.version.isdigit() else -1
    head: dict[str, Any] = {"id": number, "model_name": trace.model, "model_version": version}
    if trace.request_id:
        head["request_id"] = trace.request_id
    yield json.dumps(head)
    for name, at_ns in trace.stamps:
        yield json.dumps({"id": number, "timestamps": [{"name": name, "ns": at_ns}]})
    for tensor in trace.tensors:
        document = json.dumps(described(tensor))  # once: it is long
        for activity in tensor.activities:
            yield f'{{"id": {number}, "activity": "{activity}", "tensor": {document}}}'


def _tensor_bytes(trace: Finished) -> int:
    return sum(tensor.data.nbytes for tensor in trace.tensors)
