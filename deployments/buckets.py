"""The buckets of Manta's own histograms: bounds, and their sums.

`statistics` counts into them, `metrics` shows them as Prometheus does: cumulative, by upper bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import add

# Of requests, queues and executions alike. A value belongs to the first bound that is not below it.
SECONDS = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)
BOUNDS_NS = tuple(round(bound * 1e9) for bound in SECONDS)
EMPTY = (0,) * (len(BOUNDS_NS) + 1)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def summed(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(map(add, one, other))


def by_rows(executions: Mapping[int, int]) -> tuple[int, ...]:
    """Counts by the bounds of ROWS, of executions by their size."""
    counts = [0] * (len(ROWS) + 1)
    for size, count in executions.items():
        counts[next((k for k, bound in enumerate(ROWS) if size <= bound), len(ROWS))] += count
    return tuple(counts)
