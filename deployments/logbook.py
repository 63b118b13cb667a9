"""The server's log: lines of all processes in one place, for `manta serve` to show or in a file.

Owns how much is kept for whoever asks later, and the file. Lives in the Controller; what a line
looks like is `logs`.
"""

from __future__ import annotations

import sys
from collections import deque
from typing import TextIO

from .logs import aloud

MAX_KEPT = 2000


class Lines:
    """The last lines, and how many there ever were."""

    def __init__(self) -> None:
        self._kept: deque[str] = deque(maxlen=MAX_KEPT)
        self._count = 0

    def add(self, line: str) -> None:
        self._kept.append(line)
        self._count += 1

    def since(self, seen: int) -> tuple[int, tuple[str, ...]]:
        """How many there were so far, and those after the first `seen`, as far as kept. Who has
        seen more than there are asks another than before."""
        kept, count = tuple(self._kept), self._count
        new = min(count - seen if seen <= count else count, len(kept))
        return count, kept[len(kept) - new :]


class Logbook:
    """Raises RuntimeError, which names the file, where `path` cannot be written."""

    def __init__(self, path: str = "") -> None:
        self._file = _opened(path) if path else None
        self._lines = Lines()
        self._read = False

    def write(self, line: str) -> None:
        """To the file, or for who reads; until somebody does, on this process's output too."""
        if self._file is not None:
            try:
                self._file.write(line + "\n")
            except (OSError, ValueError) as error:  # a full disk, or closed
                aloud(f"{line}\nthe log file is not written: {error}", sys.__stderr__)
            return
        self._lines.add(line)
        if not self._read:
            aloud(line, sys.__stderr__)

    def since(self, seen: int) -> tuple[int, tuple[str, ...]]:
        self._read = True
        return self._lines.since(seen)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _opened(path: str) -> TextIO:
    try:
        return open(path, "a", buffering=1, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise RuntimeError(f"log file '{path}' cannot be written: {error.strerror}") from None
