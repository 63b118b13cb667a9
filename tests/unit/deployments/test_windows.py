"""Quantiles of the last minute: how exact, how large, and that windows add up."""

from __future__ import annotations

import math
import random

import pytest

from deployments.windows import SLICES, Window, added, bucket_of, quantiles, value_of


def window(values_ns):
    one = Window()
    for value in values_ns:
        one.observe(value)
    return one


@pytest.mark.parametrize("us", [1, 2, 3, 10, 99, 100, 1234, 10**6, 3 * 10**9])
def test_a_value_is_found_again_within_one_percent(us):
    assert abs(value_of(bucket_of(us * 1000)) - us) <= us / 100 + 0.1


def test_less_than_a_microsecond_is_zero_and_hours_do_not_grow_it():
    assert value_of(bucket_of(999)) == 0 == value_of(bucket_of(0))
    assert bucket_of(10**30) < 1200


@pytest.mark.parametrize("quantile", [0.0, 0.5, 0.9, 0.99, 0.999, 1.0])
def test_quantiles_are_those_of_the_values(quantile):
    values = [round(random.Random(seed).lognormvariate(13, 2)) for seed in range(2000)]
    exact = sorted(values)[max(1, math.ceil(quantile * len(values))) - 1] / 1000
    (found,) = quantiles(window(values).counts(), [quantile])
    assert abs(found - exact) <= exact / 100 + 1


def test_of_nothing_there_is_no_quantile():
    assert all(math.isnan(value) for value in quantiles({}, (0.5, 0.9)))
    assert quantiles({}, ()) == []


def test_windows_add_up_to_the_window_of_all():
    values = [round(random.Random(seed).expovariate(1e-6)) for seed in range(500)]
    parts = [window(values[:100]), window(values[100:])]
    assert added(part.counts() for part in parts) == window(values).counts()


def test_slices_are_forgotten_in_turn():
    one = window([10**6])
    one.turn(SLICES - 1)
    one.observe(10**9)
    assert sum(one.counts().values()) == 2
    one.turn(1)
    assert one.counts() == {bucket_of(10**9): 1}
    one.turn(10**9)
    assert one.counts() == {}
