"""Shared memory objects, as a client of the same machine makes them."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from deployments.regions import FOLDER


@contextlib.contextmanager
def objects() -> Iterator[Callable[[bytes], Path]]:
    """Makes one from its bytes; its name is the key. They go in the end."""
    made: list[Path] = []

    def make(data: bytes) -> Path:
        path = Path(FOLDER) / f"manta-test-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        path.write_bytes(data)
        made.append(path)
        return path

    try:
        yield make
    finally:
        for path in made:
            path.unlink(missing_ok=True)
