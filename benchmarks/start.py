"""How the server starts and what it holds: small models, from nothing to the first answers.

    python benchmarks/start.py [--models 1,30] [--idle-seconds 15] [--output benchmarks/out]
                               [-- flags for manta serve]

For each count a server of its own: seconds to ready and to answers, CPU time until then, what it
takes when idle, memory by role. `make bench-start` calls it. A server under load is `bench.py`.
"""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import processes, report, servers
from benchmarks.contestants import MANTA, manta_role
from benchmarks.servers import Launch, Server

WIDTH = 64
SETTLE_S = 5.0
CONFIG = """\
name: "{name}"
platform: "pytorch_libtorch"
max_batch_size: 32
input [ {{ name: "INPUT__0" data_type: TYPE_FP32 dims: [ {width} ] }} ]
output [ {{ name: "OUTPUT__0" data_type: TYPE_FP32 dims: [ {width} ] }} ]
instance_group [ {{ kind: KIND_CPU count: 1 }} ]
"""
RAY_ROLES = {
    "gcs_server": "Ray: gcs",
    "raylet": "Ray: raylet",
    "ServeController": "Ray: Serve controller",
}


@dataclass(frozen=True, slots=True)
class Holding:
    """Memory of one process, MiB. `pss` counts what is shared by its share, `uss` not at all."""

    role: str
    rss_mib: float
    pss_mib: float
    uss_mib: float


@dataclass(frozen=True, slots=True)
class Result:
    """One server. Times run from the start of its process; CPU is of those that still live."""

    models: int
    ready_s: float
    first_answer_s: float
    all_answers_s: float
    start_cpu_s: float
    idle_cores: dict[str, float]
    memory: list[Holding]


def build_repository(folder: Path, count: int) -> list[str]:
    """`count` models of two small layers, TorchScript, one KIND_CPU instance each; their names."""
    names = [f"small_{number:02d}" for number in range(count)]
    for name in names:
        version = folder / name / "1"
        version.mkdir(parents=True)
        layers = torch.nn.Sequential(
            torch.nn.Linear(WIDTH, WIDTH), torch.nn.ReLU(), torch.nn.Linear(WIDTH, WIDTH)
        )
        torch.jit.script(layers.eval()).save(str(version / "model.pt"))
        (folder / name / "config.pbtxt").write_text(CONFIG.format(name=name, width=WIDTH))
    return names


# --- one server ----------------------------------------------------------------------------------


def measure(folder: Path, log: Path, count: int, options: argparse.Namespace) -> Result:
    names = build_repository(folder / "repository", count)
    ports = dict(zip(("http", "grpc", "metrics"), servers.free_ports(3), strict=True))
    command = [MANTA, "serve", f"--model-repository={folder / 'repository'}"]
    command += [f"--{protocol}-port={port}" for protocol, port in ports.items()]
    launch = Launch((*command, *options.flags), ports, "/v2/health/ready", folder)
    began_s = time.perf_counter()
    with servers.running(f"manta, {count} models", launch, log) as server:
        ready_s = time.perf_counter() - began_s
        ask(server, names[0])
        first_s = time.perf_counter() - began_s
        for name in names[1:]:
            ask(server, name)
        all_s = time.perf_counter() - began_s
        cpu = processes.cpu_seconds(server.root, role)
        time.sleep(SETTLE_S)
        idle = idle_cores(server.root, options.idle_seconds)
        return Result(count, ready_s, first_s, all_s, sum(cpu.values()), idle, memory(server.root))


def ask(server: Server, name: str) -> None:
    """One row in JSON; ServerError unless it is answered with a row."""
    tensor = {"name": "INPUT__0", "shape": [1, WIDTH], "datatype": "FP32", "data": [1.0] * WIDTH}
    connection = http.client.HTTPConnection("127.0.0.1", server.launch.ports["http"], timeout=60)
    try:
        connection.request("POST", f"/v2/models/{name}/infer", json.dumps({"inputs": [tensor]}))
        response = connection.getresponse()
        body = response.read()
    finally:
        connection.close()
    if response.status != 200 or json.loads(body)["outputs"][0]["shape"] != [1, WIDTH]:
        raise servers.ServerError(f"{name}: {response.status} {body[:200]!r}")


def role(executable: str, title: str) -> str:
    if "deployments.forkserver" in title:
        return "fork server"
    found = manta_role(executable, title)
    if found != "ray":
        return found
    if "/manta serve " in title:
        return "manta serve"
    return next((name for part, name in RAY_ROLES.items() if part in title), "Ray: the rest")


def idle_cores(root: int, seconds: float) -> dict[str, float]:
    before, began_s = processes.cpu_seconds(root, role), time.perf_counter()
    time.sleep(seconds)
    spent = processes.cpu_by_role(before, processes.cpu_seconds(root, role))
    took_s = time.perf_counter() - began_s
    return {name: cpu_s / took_s for name, cpu_s in spent.items()}


def memory(root: int) -> list[Holding]:
    found = []
    for process in processes.tree(root):
        try:
            name = role(process.name(), " ".join(process.cmdline()))
            full = process.memory_full_info()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        mib = (size / processes.MIB for size in (full.rss, full.pss, full.uss))
        found.append(Holding(name, *mib))
    return found


# --- what is told --------------------------------------------------------------------------------


def start_table(results: Sequence[Result]) -> str:
    header = ["models", "ready s", "first answer s", "all answers s", "CPU s", "idle cores"]
    rows = [
        [str(one.models)]
        + [f"{s:.1f}" for s in (one.ready_s, one.first_answer_s, one.all_answers_s)]
        + [f"{one.start_cpu_s:.1f}", f"{sum(one.idle_cores.values()):.3f}"]
        for one in results
    ]
    return report.table(header, rows)


def role_table(result: Result) -> str:
    """A line per role: processes, median memory and the largest PSS, idle cores of all of them."""
    by_role: Mapping[str, list[Holding]] = defaultdict(list)
    for one in result.memory:
        by_role[one.role].append(one)
    header = ["role", "processes", "RSS MiB", "PSS MiB", "largest PSS", "USS MiB", "idle cores"]
    rows = []
    for name, held in sorted(by_role.items()):
        sizes = (
            median(one.rss_mib for one in held),
            median(one.pss_mib for one in held),
            max(one.pss_mib for one in held),
            median(one.uss_mib for one in held),
        )
        idle = f"{result.idle_cores.get(name, 0.0):.3f}"
        rows.append([name, str(len(held)), *(f"{size:.0f}" for size in sizes), idle])
    return report.table(header, rows)


def text(results: Sequence[Result], facts: Mapping[str, str]) -> str:
    machine = ", ".join(f"{name} {value}" for name, value in facts.items())
    parts = ["# Start and memory", machine, start_table(results)]
    for one in results:
        parts += [f"## {one.models} models: medians over the processes of a role", role_table(one)]
    return "\n\n".join(parts) + "\n"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="How Manta starts, and what it holds.")
    counts = [1, 30]
    parser.add_argument(
        "--models", type=lambda words: [int(word) for word in words.split(",")], default=counts
    )
    parser.add_argument("--idle-seconds", type=float, default=15)
    default = Path(__file__).resolve().parent / "out"
    parser.add_argument("--output", type=Path, default=default, help="for tables, JSON and logs")
    parser.add_argument("flags", nargs="*", help="flags for manta serve, after --")
    options = parser.parse_args(arguments)
    if not all(1 <= count <= 100 for count in options.models):
        parser.error("--models must lie in 1 to 100")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    results = []
    for count in options.models:
        with tempfile.TemporaryDirectory(prefix="ms") as folder:
            log = options.output / f"start-{count}.log"
            results.append(measure(Path(folder), log, count, options))
    facts = report.machine()
    told = text(results, facts)
    print(told)
    (options.output / "start.md").write_text(told)
    found = {"machine": facts, "results": [asdict(one) for one in results]}
    (options.output / "start.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
