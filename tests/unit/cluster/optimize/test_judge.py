"""Deviations, timings and the decision, without a model or a clock."""

from __future__ import annotations

import math

import pytest
import torch

from cluster.optimize.judge import (
    Candidate,
    Deviation,
    Wrong,
    bound,
    choose,
    deviation,
    measure,
    note_times,
)


def compare(want: list[float], got: list[float]) -> Deviation:
    return deviation([torch.tensor(want)], [torch.tensor(got)], ["y"])


def test_deviation_is_a_share_of_the_largest_value() -> None:
    found = compare([1.0, -10.0], [1.5, -10.0])
    assert (found.absolute, found.relative) == (0.5, 0.05)
    assert compare([0.0, 0.0], [0.0, 0.0]) == Deviation()
    assert compare([0.0], [1e-9]).relative == math.inf


def test_the_worst_output_counts() -> None:
    good, bad = torch.ones(2), torch.tensor([1.0, 1.25])
    assert deviation([good, good], [good, bad], ["a", "b"]) == Deviation(0.25, 0.25)


@pytest.mark.parametrize(
    ("want", "got", "right"),
    [
        (math.nan, math.nan, True),
        (math.inf, math.inf, True),
        (math.inf, -math.inf, False),
        (1.0, math.nan, False),
        (math.nan, 1.0, False),
        (1.0, math.inf, False),
    ],
)
def test_what_is_no_number_must_be_the_same(want: float, got: float, right: bool) -> None:
    assert compare([2.0, want], [2.0, got]).relative == (0.0 if right else math.inf)


def test_whole_numbers_are_compared_by_the_share_that_differs() -> None:
    want, got = torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 9])
    assert deviation([want], [got], ["y"]) == Deviation(5.0, 0.25)
    flags = torch.tensor([True, False])
    assert deviation([flags], [~flags], ["y"]) == Deviation(1.0, 1.0)


def test_other_shapes_and_types_are_wrong_however_close() -> None:
    one = torch.ones(1, 2)
    for other, text in (
        (torch.ones(2), r"float32\[2\], and the original's float32\[1, 2\]"),
        (one.double(), "float64"),
        ([1.0], "no tensor"),
    ):
        with pytest.raises(Wrong, match=text):
            deviation([one], [other], ["y"])
    with pytest.raises(Wrong, match="returns 2 outputs, not 1"):
        deviation([one], [one, one], ["y"])


def test_the_bound_refuses_and_takes_no_nan() -> None:
    for relative, refused in ((1e-5, False), (1e-4, False), (2e-4, True), (math.inf, True)):
        candidate = Candidate("c", deviation=Deviation(0.0, relative))
        bound(candidate, 1e-4)
        assert bool(candidate.refusal) == refused
    assert Deviation().worse(Deviation(math.nan, math.nan)).relative == math.inf


def test_measuring_takes_turns_and_the_first_round_warms_up() -> None:
    now, order = [0.0], []

    def call(name: str, seconds: float):
        def run() -> None:
            order.append(name)
            now[0] += seconds

        return run

    taken = measure({"a": call("a", 0.5), "b": call("b", 0.25)}, 2, 0.5, lambda: now[0])
    assert order == ["a", "b", "b"] * 3
    assert taken == {"a": [0.5, 0.5], "b": [0.25, 0.25]}


def test_ratios_are_of_the_same_round() -> None:
    base, other = Candidate("a"), Candidate("b")
    # The second round fell into a slow moment of the machine: it says nothing about either.
    note_times([base, other], {"a": [2.0, 20.0, 2.0], "b": [1.0, 10.0, 1.0]}, 8)
    assert other.speedups == {8: 2.0} and other.milliseconds == {8: 1000.0}
    assert base.speedups == {8: 1.0}


def candidate(label: str, *speedups: float, refusal: str = "") -> Candidate:
    gains = dict(enumerate(speedups, start=1))
    return Candidate(label, refusal, speedups=gains, sure=dict(gains))


def test_the_fastest_over_all_sizes_wins() -> None:
    one, two = candidate("one", 1.0, 4.0), candidate("two", 3.0, 3.0)
    assert choose([one, two], 1.05, 0.8) is two
    assert one.speedup == pytest.approx(2.0)


def test_control_a_slower_one_is_not_taken() -> None:
    slow, uneven = candidate("slow", 1.0, 1.04), candidate("uneven", 0.7, 5.0)
    assert choose([slow, uneven], 1.05, 0.8) is None
    assert slow.refusal == "1.02 times as fast, less than 1.05"
    assert uneven.refusal == "0.70 times as fast at batch size 1, less than 0.80"


def test_control_a_wrong_one_is_not_taken_however_fast() -> None:
    wrong = candidate("wrong", 9.0, refusal="its answers deviate")
    assert choose([wrong], 1.05, 0.8) is None
    right = candidate("right", 1.2)
    assert choose([wrong, right], 1.05, 0.8) is right


def test_control_a_lucky_one_is_not_taken() -> None:
    """Faster in the middle, slower in a quarter of the rounds: on a busy machine that is chance."""
    base, lucky = Candidate("a"), Candidate("b")
    note_times([base, lucky], {"a": [1.0] * 4, "b": [2.0, 1.1, 0.5, 0.4]}, 1)
    assert lucky.speedup > 1.05 > 1 > lucky.sure[1]
    assert choose([lucky], 1.05, 0.8) is None
    assert "too many rounds" in lucky.refusal


def test_what_was_never_measured_is_not_taken() -> None:
    assert choose([Candidate("unmeasured")], 1.05, 0.8) is None
