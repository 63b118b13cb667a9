"""The actor-level cache behind weight sharing: one load per key, counted leases.

A value lives from the first lease to the release of the last. Plain data and a condition: no ray,
no asyncio. Instances lease from it on their own threads; what a value is, it does not know.
"""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar, cast

import torch

T = TypeVar("T")


def weight_key(path: Path, device: str, *options: Hashable) -> tuple[Hashable, ...]:
    """File identity, device and load options: a file that was replaced is another key."""
    real = os.path.realpath(path)
    stat = os.stat(real)
    return (real, stat.st_size, stat.st_mtime_ns, stat.st_ino, device, options)


@dataclass(slots=True)
class _Entry:
    value: Any = None
    loading: bool = True
    leases: int = 0


class Lease(Generic[T]):
    """A share in a cached value. `reused` says that somebody else had loaded it."""

    __slots__ = ("_cache", "_key", "_value", "reused")

    def __init__(self, cache: WeightCache, key: Hashable, value: T, reused: bool) -> None:
        self._cache: WeightCache | None = cache
        self._key = key
        self._value: T | None = value
        self.reused = reused

    @property
    def value(self) -> T:
        if self._cache is None:
            raise RuntimeError("this lease was released")
        return cast(T, self._value)

    def release(self) -> None:
        """Doing it twice is doing it once."""
        cache, self._cache, self._value = self._cache, None, None
        if cache is not None:
            cache._release(self._key)

    def __enter__(self) -> Lease[T]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


class WeightCache:
    """Thread-safe. `load` runs outside the lock, so different keys load side by side."""

    def __init__(self) -> None:
        self._entries: dict[Hashable, _Entry] = {}
        self._changed = threading.Condition()

    def lease(self, key: Hashable, load: Callable[[], T]) -> Lease[T]:
        """Waits while another thread loads `key`; loads itself if that one fails."""
        with self._changed:
            while (found := self._entries.get(key)) is not None and found.loading:
                self._changed.wait()
            if found is not None:
                found.leases += 1
                return Lease(self, key, cast(T, found.value), reused=True)
            entry = self._entries[key] = _Entry()
        try:
            value = load()
        except BaseException:  # a cancelled load must not leave others waiting for ever
            with self._changed:
                del self._entries[key]
                self._changed.notify_all()
            raise
        with self._changed:
            entry.value, entry.loading, entry.leases = value, False, 1
            self._changed.notify_all()
        return Lease(self, key, value, reused=False)

    def leases(self, key: Hashable) -> int:
        with self._changed:
            entry = self._entries.get(key)
            return 0 if entry is None else entry.leases

    def __len__(self) -> int:
        with self._changed:
            return len(self._entries)

    def _release(self, key: Hashable) -> None:
        with self._changed:
            entry = self._entries[key]
            entry.leases -= 1
            if entry.leases:
                return
            del self._entries[key]
        del entry
        free_device_memory()


def free_device_memory() -> None:
    """Collect cycles first: a module is often part of one, and keeps its blocks until then."""
    gc.collect()
    empty_cache()


def empty_cache() -> None:
    """The blocks that the allocator keeps go back to the device, where there is one."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
