"""Runs for the tests of store, targets and report: figures that are easy to check by eye."""

from __future__ import annotations

from pathlib import Path

from benchmarks.matrix import IN_PROCESS, TORCH
from benchmarks.store import Cell, Run, Store

SETTINGS = {"seconds": 1.5, "code": "abc"}
TINY = Cell("tiny", "http", 64, 1000, "h2load")
ALONE = Cell("tiny", IN_PROCESS, 32, 0, "loop")


def run(contestant: str, number: int, rows_per_s: float, cell: Cell = TINY, sitting: int = 1):
    return Run(
        cell=cell,
        contestant=contestant,
        round=number,
        sitting=sitting,
        rows_per_s=rows_per_s,
        mean_us=100.0,
        p50_us=1e6 / rows_per_s,
        p99_us=200.0,
        requests=100,
        failed=0,
        total=200,
        wall_s=2.0,
        cpu_s={"router": 0.02, "replica": 0.01, "client": 0.005},
    )


def filled(folder: Path) -> Store:
    """FastAPI at 100, 200, 100; Manta at 160, 400, 150 (serve) and 310, 590, 290 (direct)."""
    store = Store(folder / "bench.json", SETTINGS)
    for number, (base, serve, direct) in enumerate(
        [(100, 160, 310), (200, 400, 590), (100, 150, 290)], start=1
    ):
        store.add(run("fastapi", number, base))
        store.add(run("manta-serve", number, serve))
        store.add(run("manta-direct", number, direct))
        store.add(run(TORCH, number, 1000.0, ALONE))
    return store
