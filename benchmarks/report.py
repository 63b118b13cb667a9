"""Turns what `bench.py` measured into one dictionary (JSON) and a page of tables (markdown).

Measures nothing. Called by `bench.py`.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.servers import Memory, Statistics


@dataclass(frozen=True, slots=True)
class Run:
    """One server under one load in one round. CPU shares are in cores."""

    mode: str
    server: str
    connections: int
    round: int
    requests: int
    failed: int
    throughput: float
    mean_us: float
    p50_us: float
    p99_us: float
    own_cores: float
    other_cores: float
    counters: Statistics | None = None


@dataclass(frozen=True, slots=True)
class Mode:
    """All that was measured with the server in one batching mode."""

    name: str
    runs: tuple[Run, ...]
    memory: tuple[Memory, ...]
    errors: dict[str, float]
    exit_code: int | None

    def select(self, server: str, connections: int) -> list[Run]:
        wanted = (server, connections)
        return [run for run in self.runs if (run.server, run.connections) == wanted]


def machine() -> dict[str, str]:
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = {name: metadata.version(name) for name in ("torch", "ray", "uvicorn", "starlette")}
    system = f"{platform.system()} {platform.release()}"
    return (
        {"cpu": model, "cores": str(cores), "python": sys.version.split()[0]}
        | versions
        | {"system": system}
    )


def ratios(mode: Mode, connections: int) -> list[float]:
    """The server's throughput over the baseline's, round by round."""
    base = {run.round: run.throughput for run in mode.select("baseline", connections)}
    pairs = mode.select("manta", connections)
    return [run.throughput / base[run.round] for run in pairs if run.round in base]


def ratio_alone(result: dict[str, Any], mode: Mode) -> float | None:
    """Median throughput at 64 connections over the baseline's, measured with nothing else up."""
    runs = mode.select("manta", 64)
    if not runs:
        return None
    alone = result["baseline_executors"][result["baseline_executor"]]
    return statistics.median(run.throughput for run in runs) / float(alone)


def mean_batch(runs: Iterable[Run]) -> float | None:
    """Rows per execution, over all the runs that have counters."""
    counted = [run.counters for run in runs if run.counters is not None]
    executions = sum(one.execution_count for one in counted)
    return sum(one.inference_count for one in counted) / executions if executions else None


def breakdown(runs: Sequence[Run], direct_us: float) -> dict[str, float] | None:
    """Microseconds of one mean request, by where they go; the rest is what no counter covers."""
    counted = [(run, run.counters) for run in runs if run.counters is not None]
    success = sum(counters.success for _, counters in counted)
    if not success:
        return None
    requests = sum(run.requests for run, _ in counted)
    parts = {
        "queue": sum(one.queue_ns for _, one in counted) / success / 1e3,
        "compute input": sum(one.input_ns for _, one in counted) / success / 1e3,
        "compute infer": sum(one.infer_ns for _, one in counted) / success / 1e3,
        "compute output": sum(one.output_ns for _, one in counted) / success / 1e3,
    }
    mean = sum(run.mean_us * run.requests for run, _ in counted) / requests
    rest = mean - sum(parts.values())
    return {"mean latency": mean} | parts | {"the rest": rest, "a direct torch call": direct_us}


# --- markdown ------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(values: Sequence[float], digits: int = 0, unit: str = "") -> str:
    """Median, and the range in brackets."""
    if not values:
        return "-"
    low, high = (f"{value:,.{digits}f}" for value in (min(values), max(values)))
    return f"{statistics.median(values):,.{digits}f}{unit} ({low} to {high})"


def speed_rows(mode: Mode, connections: int) -> list[list[str]]:
    rows = []
    for server in ("baseline", "manta"):
        runs = mode.select(server, connections)
        if not runs:
            continue
        batch = mean_batch(runs)
        ours = server == "manta"
        rows.append(
            [
                f"manta, batching: {mode.name}" if ours else "baseline",
                str(connections),
                spread([run.throughput for run in runs]),
                spread(ratios(mode, connections), 2, " x") if ours else "1",
                f"{batch:.1f}" if batch else "-",
                spread([run.p50_us / 1e3 for run in runs], 2),
                spread([run.p99_us / 1e3 for run in runs], 2),
                f"{statistics.mean(run.own_cores for run in runs):.2f}",
                f"{statistics.mean(run.other_cores for run in runs):.2f}",
                str(sum(run.failed for run in runs)),
            ]
        )
    return rows


SPEED = ["server", "connections", "requests/s", "ratio", "mean batch", "p50 ms", "p99 ms"]
SPEED += ["CPU (cores)", "CPU of the idle one", "failed"]


def markdown(result: dict[str, Any], modes: Sequence[Mode]) -> str:
    settings = result["settings"]
    lines = ["# Benchmark: MLP 512-1024-1024-256, FP32 [1, 512], binary tensors over HTTP/1.1", ""]
    lines += ["Machine: " + ", ".join(f"{k} {v}" for k, v in result["machine"].items()) + "."]
    lines += ["Settings: " + ", ".join(f"{k} {v}" for k, v in settings.items()) + "."]
    tried = ", ".join(f"{k} {v:,.0f}/s" for k, v in result["baseline_executors"].items())
    lines += [f"Baseline: model on the {result['baseline_executor']}; alone on the machine, at 64"]
    lines += [f"connections, before the server was started: {tried}.", ""]
    counts = sorted({run.connections for mode in modes for run in mode.runs}, reverse=True)
    rows = [row for count in counts for mode in modes for row in speed_rows(mode, count)]
    lines += [table(SPEED, rows), "", "Medians over the rounds, the range in brackets.", ""]
    for mode in modes:
        if not mode.select("manta", counts[0]):
            continue
        errors = ", ".join(f"{server} {error:.1e}" for server, error in mode.errors.items())
        lines += [f"## batching: {mode.name}", "", f"Largest error against torch: {errors}."]
        lines += [f"Exit code after SIGTERM: {mode.exit_code}."]
        if (alone := ratio_alone(result, mode)) is not None:
            lines += [f"Throughput at 64, over that of the baseline alone: {alone:.2f} x."]
        lines += [""]
        parts = breakdown(mode.select("manta", 1), result["direct_call_us"])
        if parts is not None:
            shown = [[name, f"{value:,.0f}"] for name, value in parts.items()]
            lines += [table(["one request at 1 connection", "us"], shown), ""]
        shown = [[m.role, f"{m.rss_mib:,.0f}", f"{m.pss_mib:,.0f}", m.title] for m in mode.memory]
        lines += [table(["process", "RSS MiB", "PSS MiB", "title"], shown), ""]
    return "\n".join(lines)


def collect(result: dict[str, Any], modes: Sequence[Mode]) -> dict[str, Any]:
    """Everything, for bench.json: the runs and the figures that the tables show."""
    entries = []
    for mode in modes:
        counts = sorted({run.connections for run in mode.runs})
        summary = {
            str(count): {
                "ratios": ratios(mode, count),
                "ratio": statistics.median(ratios(mode, count)) if ratios(mode, count) else None,
                "mean_batch": mean_batch(mode.select("manta", count)),
            }
            for count in counts
        }
        parts = breakdown(mode.select("manta", 1), result["direct_call_us"])
        figures = {"breakdown_us": parts, "ratio_alone": ratio_alone(result, mode)}
        entries.append(asdict(mode) | {"summary": summary} | figures)
    return result | {"modes": entries}
