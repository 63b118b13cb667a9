"""The page: tables that hold the figures of the store, targets with their verdicts, plots."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import plots, report
from benchmarks.store import Store

from .runs import SETTINGS, TINY, filled, run

FACTS = {"machine": {"cpu": "x", "cores": "2"}, "settings": {"rounds": 3}}
COUNTERS = {
    "inference_count": 160,
    "execution_count": 10,
    "success": 10,
    "queue_ns": 30_000,
    "input_ns": 10_000,
    "infer_ns": 200_000,
    "output_ns": 20_000,
}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return filled(tmp_path)


def test_a_row_holds_medians_ranges_and_paired_ratios(store: Store):
    row = report.row(store, TINY, "manta-serve")
    assert row is not None
    assert row[:5] == [
        "manta-serve",
        "64",
        "160 (150 to 400)",
        "1.60 (1.50 to 2.00)",
        "0.16 (0.15 to 0.40)",
    ]
    assert row[8] == "router 100, replica 50, (client 25)"
    assert report.row(store, TINY, "kserve") is None


def test_mean_batch_is_rows_per_execution():
    counted = replace(run("manta-serve", 1, 100), counters=COUNTERS)
    assert report.mean_batch([counted, counted, run("fastapi", 1, 1)]) == 16
    assert report.mean_batch([run("fastapi", 1, 1)]) is None


def test_where_one_request_goes_adds_up():
    counted = replace(run("manta-serve", 1, 100), counters=COUNTERS)
    parts = report.breakdown([counted])
    assert parts == ["100", "3", "1", "20", "2", "74"]
    assert report.breakdown([run("fastapi", 1, 100)]) is None


def test_the_page(store: Store):
    store.problem("installation", "bentoml", "no such | version")
    store.memory("tiny", "manta-serve", [{"role": "router", "rss_mib": 12.0, "pss_mib": 8.0}] * 2)
    doubtful = replace(run("manta-serve", 4, 100), counted=0.5)
    store.add(doubtful)
    page = report.markdown(store, FACTS)
    assert "| tiny, 64, http | fastapi | serve | >= 1.6 | 1.60 (1.50 to 2.00) | met |" in page
    assert (
        "| tiny, 64, http | fastapi | direct | >= 3 | 2.95 (2.90 to 3.10) | **not met** |" in page
    )
    assert "| tiny, 64, http | torchserve | serve | >= 1.1 | - | not measured |" in page
    assert "| bentoml | installation | no such / version |" in page
    assert "its statistics show 50% of the requests" in page
    assert "| tiny/manta-serve | router | 2 | 24 | 16 |" in page
    assert "| tiny | - | 1,000 (1,000 to 1,000) |" in page


def test_a_row_for_each_runtime(store: Store):
    assert report.runtimes(store) == []
    store.add(run("manta-direct-torchscript", 1, 200))
    store.add(run("manta-direct-aoti", 1, 300))
    held = [{"role": "replica", "rss_mib": 90.0, "pss_mib": 40.0}, {"role": "ray", "rss_mib": 1.0}]
    store.memory("tiny-1000us", "manta-direct-aoti", held)
    store.loads("tiny-1000us", "manta-direct-aoti", {"load_s": 0.51, "first_answer_s": 0.02})
    text = "\n".join(report.runtimes(store))
    assert "| tiny, http, 64, 1000 us | torchscript | 200 (200 to 200) | 1.00 (" in text
    row = next(line for line in text.splitlines() if "| aoti |" in line)
    assert "| 1.50 (1.50 to 1.50) |" in row and row.endswith("| 90 | 40 | 0.51 | 0.02 |")
    assert "| - | - | - | - |" in text  # nothing was noted of the other


def test_an_empty_store_makes_a_page_too(tmp_path: Path):
    page = report.markdown(Store(tmp_path / "bench.json", SETTINGS), FACTS)
    assert "0 met, 0 not met" in page


def test_plots(store: Store, tmp_path: Path):
    pytest.importorskip("matplotlib", reason="the extra bench is not installed")
    assert plots.draw(store, tmp_path) == []  # one number of connections makes no line
    store.add(run("fastapi", 1, 50, replace(TINY, connections=8)))
    (file,) = plots.draw(store, tmp_path)
    assert file.name == "tiny-http-1000us-h2load.png"
    assert file.read_bytes().startswith(b"\x89PNG")
