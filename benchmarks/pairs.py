"""Statistics of paired rounds: medians with their spread. Pure arithmetic."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.store import Run

NOISE = 1.3  # a median ratio nearer to one than this says nothing, on a machine of two shared cores


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and range of a few values."""

    median: float
    low: float
    high: float
    count: int

    def show(self, digits: int = 0, unit: str = "") -> str:
        low, high = (f"{value:,.{digits}f}" for value in (self.low, self.high))
        return f"{self.median:,.{digits}f}{unit} ({low} to {high})"


def spread(values: Sequence[float]) -> Spread | None:
    if not values:
        return None
    return Spread(statistics.median(values), min(values), max(values), len(values))


def ratios(pairs: Iterable[tuple[Run, Run]], value: str = "rows_per_s") -> list[float]:
    """Ours over theirs, round by round."""
    return [
        getattr(ours, value) / getattr(theirs, value)
        for ours, theirs in pairs
        if getattr(theirs, value)
    ]


def digits_for(value: float) -> int:
    """As many as tell figures of this size apart."""
    return 0 if value >= 100 else 1 if value >= 10 else 2
