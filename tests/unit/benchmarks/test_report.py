"""The report: ratios by round, batches and times from counters, tables that hold them."""

from __future__ import annotations

import json

import pytest

from benchmarks import report, servers
from benchmarks.report import Mode, Run
from benchmarks.servers import Memory, Statistics


def run(server: str, connections: int, number: int, throughput: float) -> Run:
    counters = None
    if server == "manta":
        counters = Statistics(160, 10, 160, 160 * 3000, 160 * 1000, 160 * 20000, 160 * 2000)
    return Run(
        mode="direct",
        server=server,
        connections=connections,
        round=number,
        requests=100,
        failed=0,
        throughput=throughput,
        mean_us=100.0,
        p50_us=90.0,
        p99_us=200.0,
        own_cores=1.0,
        other_cores=0.1,
        counters=counters,
    )


@pytest.fixture
def mode() -> Mode:
    runs = []
    for connections in (64, 1):
        for number, base, ours in ((1, 100, 120), (2, 200, 300), (3, 100, 90)):
            runs.append(run("baseline", connections, number, base))
            runs.append(run("manta", connections, number, ours))
    memory = (Memory("Router", 7, "ray::ServeReplica:manta:Router", 120.0, 80.0),)
    return Mode("direct", tuple(runs), memory, {"baseline": 0.0, "manta-direct": 1e-7}, 0)


def test_ratios_are_paired_by_round(mode: Mode):
    assert report.ratios(mode, 64) == [1.2, 1.5, 0.9]


def test_mean_batch_is_rows_per_execution(mode: Mode):
    assert report.mean_batch(mode.select("manta", 64)) == 16
    assert report.mean_batch(mode.select("baseline", 64)) is None


def test_breakdown_adds_up_to_the_mean(mode: Mode):
    parts = report.breakdown(mode.select("manta", 1), direct_us=5.0)
    assert parts is not None
    assert parts["compute infer"] == 20 and parts["queue"] == 3
    names = ("queue", "compute input", "compute infer", "compute output", "the rest")
    assert sum(parts[name] for name in names) == pytest.approx(parts["mean latency"]) == 100
    assert report.breakdown(mode.select("baseline", 1), direct_us=5.0) is None


def test_statistics_since():
    before, after = Statistics(1, 1, 1, 1, 1, 1, 1), Statistics(8, 7, 6, 5, 4, 3, 2)
    assert after.since(before) == Statistics(7, 6, 5, 4, 3, 2, 1)


def test_page_and_json_hold_the_figures(mode: Mode):
    result = {
        "machine": report.machine(),
        "settings": {"rounds": 3},
        "baseline_executors": {"loop": 100.0},
        "baseline_executor": "loop",
        "direct_call_us": 5.0,
    }
    page = report.markdown(result, [mode])
    assert (
        "| manta, batching: direct | 64 | 120 (90 to 300) | 1.20 x (0.90 to 1.50) | 16.0 |" in page
    )
    assert "| Router | 120 | 80 |" in page
    assert "over that of the baseline alone: 1.20 x." in page
    collected = json.loads(json.dumps(report.collect(result, [mode])))
    assert collected["modes"][0]["summary"]["64"]["ratio"] == 1.2


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("ray::ServeReplica:manta:Router", "Router"),
        ("ray::ServeReplica:manta:Controller.poll", "Controller"),
        ("ray::ServeReplica:manta.mlp.1.3:group_0", "model replica"),
        ("ray::ServeController.listen_for_change", None),
        ("/bin/raylet", None),
    ],
)
def test_role(title: str, expected: str | None):
    assert servers.role(title) == expected
