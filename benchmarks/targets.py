"""What is to be reached, as data, and how far the measurements are from it.

Reads the store, measures nothing. Used by `report.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from benchmarks import pairs
from benchmarks.matrix import IN_PROCESS, TORCH
from benchmarks.pairs import Spread
from benchmarks.store import Cell, Store

DELAY_US = 1000
TORCH_BATCH = 32


@dataclass(frozen=True, slots=True)
class Target:
    """Manta over `against`. `serve` and `direct` are bounds on the median of the paired rounds:
    at least, or for a latency (`p50_us`) at most. None: nothing asked of that mode."""

    models: tuple[str, ...]
    connections: tuple[int, ...]
    protocols: tuple[str, ...]
    against: tuple[str, ...]
    serve: float | None
    direct: float | None
    value: str = "rows_per_s"
    delay_us: int = DELAY_US
    their_delay_us: int | None = None  # where it is not the same
    precision: str = ""  # of `manta optimize`; empty: the model as it is
    runtime: str = ""  # that serves the same network; empty: TorchScript, as everywhere


@dataclass(frozen=True, slots=True)
class Verdict:
    """One comparison of one target. `ratio` is None where it was not measured."""

    what: str
    against: str
    mode: str
    bound: float
    at_most: bool
    ratio: Spread | None

    @property
    def met(self) -> bool | None:
        if self.ratio is None:
            return None
        if self.at_most:
            return self.ratio.median <= self.bound
        return self.ratio.median >= self.bound


HTTP, GRPC, BOTH = ("http",), ("grpc",), ("http", "grpc")
PYTHON_SERVERS = ("mlserver", "litserve", "kserve", "bentoml")
TARGETS = (
    Target(("tiny",), (64,), HTTP, ("fastapi",), 1.6, 3.0),
    Target(("mlp",), (32,), HTTP, ("fastapi",), 1.6, 2.3),
    Target(("mlp",), (32,), HTTP, ("triton",), 0.8, 1.2),
    Target(("mlp",), (32,), HTTP, ("torchserve",), 1.0, 1.4),
    Target(("tiny",), (64,), HTTP, ("torchserve",), 1.1, 2.0),
    Target(("tiny", "mlp"), (32, 64), HTTP, PYTHON_SERVERS, 3.0, 4.0),
    Target(("tiny",), (64,), GRPC, ("mlserver", "kserve"), 4.0, 7.0),
    Target(("tiny",), (1,), HTTP, ("mlserver", "litserve"), 0.35, 0.3, "p50_us", 0),
    # The same against the configuration that they have in the rest of the matrix.
    Target(("tiny",), (1,), HTTP, ("mlserver", "litserve"), 0.35, 0.3, "p50_us", 0, DELAY_US),
    Target(("resnet18", "encoder"), (8, 32), BOTH, (TORCH,), 0.9, 0.9),
    Target(("resnet18",), (32,), HTTP, (TORCH,), 1.2, None, precision="fp32"),
    Target(("encoder",), (32,), HTTP, (TORCH,), 1.1, None, precision="fp32"),
    Target(("resnet18", "encoder"), (32,), HTTP, (TORCH,), 1.8, None, precision="bf16"),
    Target(("large4", "large20"), (8,), HTTP, ("fastapi",), 0.8, 0.8, delay_us=0),
    Target(("mlp",), (64,), HTTP, ("manta-direct-torchscript",), None, 1.0, runtime="aoti"),
)
# Beyond the targets: NVIDIA's own server on its own ground.
AIMS = (
    Target(("tiny",), (64,), BOTH, ("triton",), 1.0, 1.0),
    Target(("mlp",), (32,), BOTH, ("triton",), 1.0, 1.0),
)


def generator_for(against: str) -> str:
    """Both sides of a comparison are loaded by the same program."""
    return "wrk" if against == "torchserve" else "h2load"


def comparisons(target: Target) -> Iterator[tuple[Cell, Cell, str, str, float]]:
    """(our cell, their cell, against, mode, bound) for all that one line of the table means."""
    for model in target.models:
        for count in target.connections:
            for protocol in target.protocols:
                for against in target.against:
                    generator = generator_for(against)
                    ours = Cell(model, protocol, count, target.delay_us, generator)
                    theirs = ours
                    if target.their_delay_us is not None:
                        theirs = replace(ours, delay_us=target.their_delay_us)
                    if against == TORCH:
                        theirs = Cell(model, IN_PROCESS, TORCH_BATCH, 0, "loop")
                    for mode, bound in (("serve", target.serve), ("direct", target.direct)):
                        if bound is not None:
                            yield ours, theirs, against, mode, bound


def judge(store: Store, target: Target) -> list[Verdict]:
    found = []
    for ours, theirs, against, mode, bound in comparisons(target):
        name = "-".join(one for one in ("manta", mode, target.precision, target.runtime) if one)
        together = store.pairs((ours, name), (theirs, against))
        ratio = pairs.spread(pairs.ratios(together, target.value))
        what = f"{ours.model}, {ours.connections}, {ours.protocol}"
        if target.value == "p50_us":
            what += f", p50, delay {ours.delay_us}"
        if target.precision:
            what += f", optimized {target.precision}"
        if target.runtime:
            what += f", {target.runtime}"
        if against == TORCH:
            against = f"{TORCH} at batch {TORCH_BATCH}"
        elif target.their_delay_us is not None:
            against = f"{against}, delay {target.their_delay_us}"
        at_most = target.value == "p50_us"
        found.append(Verdict(what, against, mode, bound, at_most, ratio))
    return found
