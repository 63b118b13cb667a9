"""The last minute of durations, for the quantiles of summaries: small, bounded, and addable.

A window counts values in buckets 2 % wide, so a quantile is within 1 % of the value that was
measured, and the windows of several Routers add up to the window over all of them: quantiles of
quantiles would not. Kept by `statistics` where summaries are asked for, added by `aggregate`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import ceil, exp, log, nan

# As tritonserver's: the last 60 s, that move on in steps.
SLICE_S, SLICES = 10.0, 6
_WIDTH = log(1.02)
_MAX_US = 10**10  # hours; with it there are at most some 1200 buckets


def bucket_of(ns: int) -> int:
    """0 for less than a microsecond; bucket k holds from 1.02**(k - 1) to 1.02**k of them."""
    us = ns // 1000
    return 0 if us < 1 else 1 + int(log(min(us, _MAX_US)) / _WIDTH)


def value_of(bucket: int) -> float:
    """The microseconds in the middle of a bucket."""
    return 0.0 if bucket == 0 else round(exp((bucket - 0.5) * _WIDTH), 1)


class Window:
    """Counts by bucket, in slices of time of which the oldest is forgotten."""

    __slots__ = ("_slices",)

    def __init__(self) -> None:
        self._slices: list[dict[int, int]] = [{} for _ in range(SLICES)]

    def observe(self, ns: int) -> None:
        newest, bucket = self._slices[-1], bucket_of(ns)
        newest[bucket] = newest.get(bucket, 0) + 1

    def turn(self, slices: int) -> None:
        """So many slices of time have passed."""
        for _ in range(min(slices, SLICES)):
            del self._slices[0]
            self._slices.append({})

    def counts(self) -> dict[int, int]:
        return added(self._slices)


def added(many: Iterable[Mapping[int, int]]) -> dict[int, int]:
    total: dict[int, int] = {}
    for counts in many:
        for bucket, count in counts.items():
            total[bucket] = total.get(bucket, 0) + count
    return total


def quantiles(counts: Mapping[int, int], wanted: Sequence[float]) -> list[float]:
    """In microseconds; not a number where nothing was counted."""
    total = sum(counts.values())
    if not total:
        return [nan] * len(wanted)
    ordered = sorted(counts.items())
    return [_at_rank(ordered, max(1, ceil(quantile * total))) for quantile in wanted]


def _at_rank(ordered: Sequence[tuple[int, int]], rank: int) -> float:
    seen = 0
    for bucket, count in ordered:
        seen += count
        if seen >= rank:
            return value_of(bucket)
    return value_of(ordered[-1][0])
