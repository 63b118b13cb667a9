"""Compares the server with a bare uvicorn and Starlette server on one MLP, and prints a table.

    python benchmarks/bench.py [--seconds 4] [--rounds 5] [--connections 64,1]
                               [--batching serve,direct] [--output benchmarks/out]

Both servers are up, one is loaded at a time, in alternating rounds. `make bench` calls it; what
the columns mean stands in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import load, mlp, report, servers
from benchmarks.report import Mode, Run
from benchmarks.servers import Server


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def modes(text: str) -> list[str]:
    chosen = text.split(",")
    if unknown := set(chosen) - {"serve", "direct"}:
        raise argparse.ArgumentTypeError(f"unknown batching mode {sorted(unknown)}")
    return chosen


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Manta against bare uvicorn and Starlette.")
    parser.add_argument("--seconds", type=float, default=4, help="per run, after 1 s of warm-up")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--connections", type=numbers, default=[64, 1])
    parser.add_argument("--batching", type=modes, default=["serve", "direct"])
    parser.add_argument("--queue-delay-us", type=int, default=0)
    parser.add_argument("--baseline-only", action="store_true", help="do not start manta")
    default = Path(__file__).resolve().parent / "out"
    parser.add_argument("--output", type=Path, default=default, help="for the tables and logs")
    options = parser.parse_args(arguments)
    if not 0 < options.seconds <= 60 or not 1 <= options.rounds <= 20:
        parser.error("--seconds must lie in (0, 60], --rounds in 1 to 20")
    if not all(1 <= count <= 1024 for count in options.connections):
        parser.error("--connections must lie in 1 to 1024")
    return options


# --- measuring -----------------------------------------------------------------------------------


def direct_call_us(model_file: Path, calls: int = 2000) -> float:
    """Median time of the bare model on one row and one thread, in this process."""
    model, tensor = torch.jit.load(model_file), torch.randn(1, mlp.WIDTHS[0])
    torch.set_num_threads(1)
    took = []
    with torch.inference_mode():
        for _ in range(calls):
            begin = time.perf_counter_ns()
            model(tensor)
            took.append(time.perf_counter_ns() - begin)
    return statistics.median(took) / 1e3


def pick_executor(
    model_file: Path, request: mlp.Request, logs: Path, seconds: float
) -> dict[str, float]:
    """The baseline's throughput at 64 connections by where it runs the model, faster first."""
    found: dict[str, list[float]] = {"loop": [], "pool": []}
    for executor in ("loop", "pool", "pool", "loop"):
        (port,) = servers.free_ports(1)
        command = servers.baseline_command(model_file, port, executor)
        with servers.running("baseline", command, port, logs):
            found[executor].append(load.run(port, request, 64, seconds).throughput)
    means = {executor: statistics.mean(values) for executor, values in found.items()}
    return dict(sorted(means.items(), key=lambda entry: -entry[1]))


def measure(
    name: str,
    server: Server,
    other: Server | None,
    request: mlp.Request,
    run: tuple[int, int, float],
) -> Run:
    """One run of (connections, round, seconds) on `server`, while `other` idles."""
    connections, number, seconds = run
    counting = server.name.startswith("manta")
    before = servers.statistics(server) if counting else None
    clock, own = time.monotonic(), servers.cpu_seconds(server)
    idle = servers.cpu_seconds(other) if other else 0.0
    result = load.run(server.port, request, connections, seconds)
    wall = time.monotonic() - clock
    own_cores = (servers.cpu_seconds(server) - own) / wall
    other_cores = (servers.cpu_seconds(other) - idle) / wall if other else 0.0
    counters = servers.statistics(server).since(before) if before else None
    print(
        f"  round {number}, {connections:>2} connections, {server.name:<13}"
        f"{result.throughput:>8,.0f}/s  p50 {result.percentile_us(50) / 1e3:.2f} ms",
        file=sys.stderr,
    )
    return Run(
        mode=name,
        server="manta" if counting else "baseline",
        connections=connections,
        round=number,
        requests=result.requests,
        failed=result.failed,
        throughput=result.throughput,
        mean_us=float(result.latencies_us.mean()),
        p50_us=result.percentile_us(50),
        p99_us=result.percentile_us(99),
        own_cores=own_cores,
        other_cores=other_cores,
        counters=counters,
    )


@contextlib.contextmanager
def manta(options: argparse.Namespace, repository: Path, mode: str) -> Iterator[Server | None]:
    if options.baseline_only:
        yield None
        return
    ports = servers.free_ports(3)
    command = servers.manta_command(repository, ports, mode)
    with servers.running(f"manta-{mode}", command, ports[0], options.output) as server:
        yield server


def compare(
    options: argparse.Namespace, repository: Path, request: mlp.Request, executor: str, mode: str
) -> Mode:
    """All rounds with the server in one batching mode; who goes first changes every round."""
    model_file = repository / "mlp" / "1" / "model.pt"
    (port,) = servers.free_ports(1)
    command = servers.baseline_command(model_file, port, executor)
    runs: list[Run] = []
    with (
        servers.running("baseline", command, port, options.output) as base,
        manta(options, repository, mode) as ours,
    ):
        pair = [base] if ours is None else [base, ours]
        errors = {server.name: servers.largest_error(server, request) for server in pair}
        for number in range(1, options.rounds + 1):
            for connections in options.connections:
                for server in pair if number % 2 else pair[::-1]:
                    other = next((one for one in pair if one is not server), None)
                    run = (connections, number, options.seconds)
                    runs.append(measure(mode, server, other, request, run))
        memory = tuple(servers.memory(ours)) if ours else ()
    exit_code = ours.exit_code if ours else None
    return Mode(mode, tuple(runs), memory, errors, exit_code)


def terminate(number: int, frame: FrameType | None) -> None:
    """SIGTERM unwinds the stack, so that both servers are stopped."""
    sys.exit(128 + number)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    signal.signal(signal.SIGTERM, terminate)
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="manta-bench.") as temporary:
        repository = Path(temporary)
        try:
            model_file = mlp.build_repository(repository, options.queue_delay_us)
            request = mlp.make_request(model_file)
            executors = pick_executor(model_file, request, options.output, options.seconds)
            executor = next(iter(executors))
            result = {
                "machine": report.machine(),
                "settings": {
                    "generator": load.generator(),
                    "seconds": options.seconds,
                    "rounds": options.rounds,
                    "queue_delay_us": options.queue_delay_us,
                },
                "baseline_executors": executors,
                "baseline_executor": executor,
                "direct_call_us": direct_call_us(model_file),
            }
            names = ["none"] if options.baseline_only else options.batching
            measured = [compare(options, repository, request, executor, name) for name in names]
        except (servers.ServerError, load.LoadError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    page = report.markdown(result, measured)
    (options.output / "bench.md").write_text(page)
    text = json.dumps(report.collect(result, measured), indent=2)
    (options.output / "bench.json").write_text(text)
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
