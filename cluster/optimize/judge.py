"""Whether a candidate is right and faster: deviations, interleaved timings, the decision.

Knows neither files nor how candidates are made; gets answers and callables.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

# The largest deviation that passes, as a share of an output's largest value.
TOLERANCES = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2}


class Wrong(Exception):
    """The answers cannot be compared at all: their number, shape or type differs."""


@dataclass(frozen=True, slots=True)
class Deviation:
    """`relative` is the largest difference over the output's largest value; of whole numbers and
    truth values it is the share that differs."""

    absolute: float = 0.0
    relative: float = 0.0

    def worse(self, other: Deviation) -> Deviation:
        return Deviation(_most(self.absolute, other.absolute), _most(self.relative, other.relative))


def _most(one: float, other: float) -> float:
    return math.inf if math.isnan(one) or math.isnan(other) else max(one, other)


def deviation(want: Sequence[object], got: Sequence[object], names: Sequence[str]) -> Deviation:
    """The worst over all outputs. Raises Wrong."""
    if len(want) != len(got):
        raise Wrong(f"it returns {len(got)} outputs, not {len(want)}")
    worst = Deviation()
    for name, right, given in zip(names, want, got, strict=True):
        if not isinstance(right, torch.Tensor) or not isinstance(given, torch.Tensor):
            raise Wrong(f"output '{name}' is no tensor")
        if right.shape != given.shape or right.dtype != given.dtype:
            raise Wrong(
                f"output '{name}' is {_describe(given)}, and the original's {_describe(right)}"
            )
        worst = worst.worse(_difference(right, given))
    return worst


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _difference(want: torch.Tensor, got: torch.Tensor) -> Deviation:
    if not want.numel():
        return Deviation()
    if not want.is_floating_point():
        unequal = (want != got).double()
        return Deviation(float((want.double() - got.double()).abs().max()), float(unequal.mean()))
    want, got = want.double(), got.double()
    # The same infinity or NaN in the same place is the same answer.
    same = (want == got) | (want.isnan() & got.isnan())
    apart = torch.where(same, 0.0, (want - got).abs())
    if not bool(apart.isfinite().all()):
        return Deviation(math.inf, math.inf)
    finite = want[want.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    absolute = float(apart.max())
    relative = absolute / largest if largest else (math.inf if absolute else 0.0)
    return Deviation(absolute, relative)


@dataclass(slots=True)
class Candidate:
    """One way to run the model. `refusal` says why it is out; "" as long as it is not.

    By batch size: the median time, the median gain, and the gain that three of four rounds reach.
    """

    label: str
    refusal: str = ""
    deviation: Deviation | None = None
    milliseconds: dict[int, float] = field(default_factory=dict)
    speedups: dict[int, float] = field(default_factory=dict)
    sure: dict[int, float] = field(default_factory=dict)

    @property
    def speedup(self) -> float:
        return overall(self.speedups)


def overall(gains: Mapping[int, float]) -> float:
    """Over all batch sizes alike: the geometric mean."""
    return math.exp(statistics.fmean(map(math.log, gains.values()))) if gains else 0.0


def bound(candidate: Candidate, tolerance: float) -> None:
    """Refuses a candidate whose answers deviate by more than `tolerance`."""
    found = candidate.deviation
    if not candidate.refusal and found is not None and not found.relative <= tolerance:
        candidate.refusal = f"its answers deviate by {found.relative:.1e}, over {tolerance:.1e}"


def measure(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    least_s: float,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds per call, one value a round. Each round has all of them in turn, so that what else
    the machine does falls on all alike; the first round warms up and does not count."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            count, begin = 0, clock()
            while not count or clock() - begin < least_s:
                call()
                count += 1
            if turn:
                taken[name].append((clock() - begin) / count)
    return taken


def note_times(
    candidates: Sequence[Candidate], taken: Mapping[str, Sequence[float]], size: int
) -> None:
    """The first candidate is the original. Ratios are of the same round, and the median counts."""
    base = taken[candidates[0].label]
    for candidate in candidates:
        seconds = taken[candidate.label]
        candidate.milliseconds[size] = statistics.median(seconds) * 1e3
        ratios = sorted(before / after for before, after in zip(base, seconds, strict=True))
        candidate.speedups[size] = statistics.median(ratios)
        candidate.sure[size] = ratios[len(ratios) // 4]


def choose(
    candidates: Sequence[Candidate], least_speedup: float, least_each: float
) -> Candidate | None:
    """The fastest that is not refused. Those are refused here that are not fast enough over all
    batch sizes, or lose too much at one of them."""
    for candidate in candidates:
        if candidate.refusal:
            continue
        if candidate.speedup < least_speedup:
            candidate.refusal = (
                f"{candidate.speedup:.2f} times as fast, less than {least_speedup:.2f}"
            )
        elif min(candidate.speedups.values()) < least_each:
            size = min(candidate.speedups, key=lambda n: candidate.speedups[n])
            candidate.refusal = (
                f"{candidate.speedups[size]:.2f} times as fast at batch size {size}, "
                f"less than {least_each:.2f}"
            )
        elif overall(candidate.sure) < min(1.0, least_speedup):
            candidate.refusal = (
                f"{candidate.speedup:.2f} times as fast, but slower in too many rounds to be sure"
            )
    passing = [candidate for candidate in candidates if not candidate.refusal]
    return max(passing, key=lambda candidate: overall(candidate.sure), default=None)
