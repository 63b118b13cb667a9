"""Throughput and latency against connections, one PNG per model and protocol.

Needs matplotlib (the extra `bench`); without it there are no plots and the reason is said. Called
by `bench.py`.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from benchmarks.matrix import IN_PROCESS, LIMIT_BATCHES, TORCH
from benchmarks.report import contestants, groups
from benchmarks.store import Cell, Run, Store


def draw(store: Store, folder: Path) -> list[Path]:
    """Raises ImportError without matplotlib."""
    import matplotlib  # type: ignore[import-not-found, unused-ignore]

    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot  # type: ignore[import-not-found, unused-ignore]

    written = []
    for (model, protocol, delay_us, generator), cells in groups(store).items():
        if len(cells) < 2:
            continue  # a single number of connections makes no line
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5))
        for name in contestants(store):
            series = [(cell.connections, store.find(cell, name)) for cell in cells]
            found = [(count, runs) for count, runs in series if runs]
            if found:
                _line(left, name, found, "rows_per_s", 1.0)
                _line(right, name, found, "p50_us", 1e-3)
        _limit(left, store, model)
        _label(left, "requests/s", cells)
        _label(right, "p50 latency, ms", cells)
        left.legend(fontsize="small")
        figure.suptitle(f"{model}, {protocol}, queue delay {delay_us} us, {generator}")
        figure.tight_layout()
        file = folder / f"{model}-{protocol}-{delay_us}us-{generator}.png"
        figure.savefig(file, dpi=110)
        pyplot.close(figure)
        written.append(file)
    return written


def _line(axes: Any, name: str, found: list[tuple[int, list[Run]]], value: str, scale: float):
    """Medians, and bars over the whole range of the rounds."""
    counts = [count for count, _ in found]
    values = [[getattr(run, value) * scale for run in runs] for _, runs in found]
    middle = [statistics.median(each) for each in values]
    below = [median - min(each) for median, each in zip(middle, values, strict=True)]
    above = [max(each) - median for median, each in zip(middle, values, strict=True)]
    style = "o-" if name.startswith("manta") else "s--"
    axes.errorbar(counts, middle, yerr=[below, above], fmt=style, capsize=3, label=name)


def _limit(axes: Any, store: Store, model: str) -> None:
    cell = Cell(model, IN_PROCESS, LIMIT_BATCHES[-1], 0, "loop")
    rows = [run.rows_per_s for run in store.find(cell, TORCH)]
    highest = axes.get_ylim()[1]
    if rows and statistics.median(rows) < 3 * highest:  # farther off it would flatten the rest
        axes.axhline(statistics.median(rows), color="grey", linestyle=":", label="torch, batch 32")


def _label(axes: Any, title: str, cells: list[Cell]) -> None:
    axes.set_xscale("log", base=2)
    counts = [cell.connections for cell in cells]
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("connections")
    axes.set_ylabel(title)
    axes.grid(alpha=0.3)
