from __future__ import annotations

from deployments.buckets import BOUNDS_NS, EMPTY, ROWS, SECONDS, by_rows, summed


def test_bounds_ascend_and_are_whole_nanoseconds():
    for bounds in (BOUNDS_NS, ROWS):
        assert list(bounds) == sorted(set(bounds))
    assert [bound / 1e9 for bound in BOUNDS_NS] == list(SECONDS)
    assert len(EMPTY) == len(SECONDS) + 1


def test_executions_by_size():
    counts = dict(zip((*ROWS, 513), by_rows({1: 5, 2: 1, 3: 2, 4: 1, 512: 7, 513: 3}), strict=True))
    assert {size: count for size, count in counts.items() if count} == {
        1: 5,
        2: 1,
        4: 3,
        512: 7,
        513: 3,
    }


def test_sums():
    assert summed((1, 2), (3, 4)) == (4, 6)
