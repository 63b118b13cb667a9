"""Several Routers and several replicas of a model: what each combination gives and costs, and what
the same costs would give on more cores.

Owns the combinations, the arithmetic and its table. Measures nothing: `matrix` does, one model and
one batching mode at a time. Used by `bench.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks import report
from benchmarks.contestants import Manta
from benchmarks.store import Cell, Run, Store

ROUTERS = (1, 2, 4)
REPLICAS = (1, 2)
CORES = 16
DEFAULTS: Mapping[str, Any] = {
    "manta": [],
    "models": ["tiny", "mlp"],
    "connections": [64],
    "protocols": ["http", "grpc"],
}
# What a mode costs shows in any model; with all of them the whole would take too long.
BATCHINGS = {"mlp": ("direct", "serve")}
OTHER_BATCHINGS = ("direct",)
NAME = re.compile(r"manta-(serve|direct)(?:-x(\d+))?(?:-r(\d+))?")

MODEL = (
    "CPU is in microseconds per request, medians over the rounds; *others* are the Controller and "
    "Ray's own processes. *At most* is the smallest of Routers / a Router's CPU per request, "
    "Routers / its HAProxy's (each Router has one), replicas / a replica's, and cores / the sum. "
    "It assumes that each of these processes keeps no more than one core busy, that requests "
    "spread evenly over them, that a request costs there what it costs here, and that nothing "
    f"but cores is short. Here the client is part of the sum; with {CORES} cores it is elsewhere."
)


def contestants(batching: str, extra: Sequence[str] = ()) -> list[Manta]:
    """Every combination, the smallest first."""
    return [
        Manta(batching, routers, extra=extra, replicas=replicas)
        for replicas in REPLICAS
        for routers in ROUTERS
    ]


def batchings(model: str, asked: Sequence[str]) -> Sequence[str]:
    return asked or BATCHINGS.get(model, OTHER_BATCHINGS)


def combination(contestant: str) -> tuple[str, int, int] | None:
    """Batching, Routers, replicas; None for anybody else."""
    found = NAME.fullmatch(contestant)
    if found is None:
        return None
    return found[1], int(found[2] or 1), int(found[3] or 1)


# --- arithmetic ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cost:
    """CPU of one request in microseconds. `others` are the Controller and Ray's own processes."""

    router: float
    haproxy: float
    replica: float
    others: float
    client: float

    @property
    def server(self) -> float:
        return self.router + self.haproxy + self.replica + self.others


@dataclass(frozen=True, slots=True)
class Bound:
    """Requests/s that cannot be passed, and by whom: "Router", "HAProxy", "replica" or "cores"."""

    rate: float
    by: str


def cost(runs: Sequence[Run]) -> Cost:
    """Medians over the rounds, role by role; at least one run."""
    each = [run.cpu_us() for run in runs]

    def of(*roles: str) -> float:
        return median(sum(one.get(role, 0.0) for role in roles) for one in each)

    known = ("router", "haproxy", "replica", "client")
    others = sorted({role for one in each for role in one} - set(known))
    return Cost(of("router"), of("haproxy"), of("replica"), of(*others), of("client"))


def bound(one: Cost, routers: int, replicas: int, cores: int, *, with_client: bool) -> Bound:
    """By the sentence of `MODEL`."""
    total = one.server + (one.client if with_client else 0.0)
    stages = [
        ("Router", routers, one.router),
        ("HAProxy", routers, one.haproxy),
        ("replica", replicas, one.replica),
        ("cores", cores, total),
    ]
    rates = [(count / cpu_us * 1e6, by) for by, count, cpu_us in stages if cpu_us > 0]
    if not rates:
        raise ValueError("no CPU time was measured")
    return Bound(*min(rates))


def filled(one: Cost, cores: int) -> tuple[float, int, int]:
    """Requests/s that fill so many cores, and the Routers and replicas that it takes."""
    rate = cores / one.server * 1e6
    routers = math.ceil(rate * max(one.router, one.haproxy) / 1e6)
    return rate, max(1, routers), max(1, math.ceil(rate * one.replica / 1e6))


# --- the page ------------------------------------------------------------------------------------


def section(store: Store, cores: int) -> list[str]:
    """Lines; none where no two combinations were measured. `cores` are this machine's."""
    rows, most = [], []
    for cell, batching, found in _measured(store):
        for (routers, replicas), runs in found.items():
            rows.append(_row(cell, batching, routers, replicas, runs, cores))
        (routers, replicas), runs = max(found.items())
        rate, more_routers, more_replicas = filled(cost(runs), CORES)
        most.append(
            [
                _named(cell, batching),
                f"{routers}, {replicas}",
                f"{cost(runs).server:,.0f}",
                f"{rate:,.0f}",
                str(more_routers),
                str(more_replicas),
            ]
        )
    if not rows:
        return []
    header = ["model, protocol, conn., batching", "Routers", "replicas", "requests/s", "p50 ms"]
    header += ["batch", "CPU us: Router", "HAProxy", "replica", "others", "client", "sum"]
    header += [f"at most on {cores} cores", f"on {CORES}", "by"]
    above = ["model, protocol, conn., batching", "costs of Routers, replicas", "CPU us"]
    above += ["requests/s", "Routers", "replicas"]
    return [
        "",
        "## Routers and replicas",
        "",
        MODEL,
        "",
        report.table(header, rows),
        "",
        f"What would fill {CORES} cores, by the costs of the largest combination:",
        "",
        report.table(above, most),
    ]


def _measured(
    store: Store,
) -> Iterator[tuple[Cell, str, dict[tuple[int, int], list[Run]]]]:
    """Runs by (Routers, replicas), for each cell and mode of which there are several."""
    for cells in report.groups(store).values():
        for cell in cells:
            found: dict[str, dict[tuple[int, int], list[Run]]] = {}
            for name in report.contestants(store):
                one, runs = combination(name), store.find(cell, name)
                if one is not None and runs:
                    found.setdefault(one[0], {})[one[1:]] = runs
            for batching, by_size in sorted(found.items()):
                if len(by_size) > 1:
                    yield cell, batching, dict(sorted(by_size.items()))


def _row(
    cell: Cell, batching: str, routers: int, replicas: int, runs: Sequence[Run], cores: int
) -> list[str]:
    one = cost(runs)
    here = bound(one, routers, replicas, cores, with_client=True)
    there = bound(one, routers, replicas, CORES, with_client=False)
    batch = report.mean_batch(runs)
    parts = (one.router, one.haproxy, one.replica, one.others, one.client, one.server + one.client)
    return [
        _named(cell, batching),
        str(routers),
        str(replicas),
        report.show([run.rows_per_s for run in runs]),
        report.show([run.p50_us / 1e3 for run in runs], digits=2),
        f"{batch:.1f}" if batch else "-",
        *(f"{part:,.0f}" for part in parts),
        f"{here.rate:,.0f}",
        f"{there.rate:,.0f}",
        there.by,
    ]


def _named(cell: Cell, batching: str) -> str:
    return f"{cell.model}, {cell.protocol}, {cell.connections}, {batching}"
