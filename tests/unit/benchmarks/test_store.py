"""What is kept, what is still to do, and which runs are compared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.store import Store

from .runs import SETTINGS, TINY, filled, run

ANCHORS = ["fastapi", "manta-serve"]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return filled(tmp_path)


def test_runs_come_back_by_key(store: Store, tmp_path: Path):
    again = Store(tmp_path / "bench.json", SETTINGS)
    assert {one.key: one for one in again.runs} == {one.key: one for one in store.runs}
    assert "tiny/http/64/1000us/h2load/fastapi/r1/s1" in {one.key for one in again.runs}
    assert again.sitting == store.sitting + 1 == 2


def test_other_settings_hide_what_was_measured(store: Store, tmp_path: Path):
    other = Store(tmp_path / "bench.json", SETTINGS | {"code": "def"})
    assert other.runs == [] and other.hidden == 12
    assert len(Store(tmp_path / "bench.json", SETTINGS | {"code": "any"}).runs) == 12
    assert Store(tmp_path / "bench.json", SETTINGS, fresh=True).hidden == 0


def test_a_file_that_was_hidden_is_not_lost(store: Store, tmp_path: Path):
    other = Store(tmp_path / "bench.json", SETTINGS | {"code": "def"})
    other.add(run("fastapi", 1, 100, sitting=other.sitting))
    assert len(Store(tmp_path / "bench.json", SETTINGS).runs) == 12


def test_nothing_is_missing_after_a_whole_round(store: Store):
    assert store.missing(TINY, 1, ANCHORS, ANCHORS) == []
    assert store.missing(TINY, 4, ANCHORS, ANCHORS) == ANCHORS


def test_who_comes_later_brings_the_anchors_along(store: Store):
    assert store.missing(TINY, 1, [*ANCHORS, "kserve"], ANCHORS) == [*ANCHORS, "kserve"]
    store.add(run("kserve", 1, 50, sitting=2))
    assert store.missing(TINY, 1, [*ANCHORS, "kserve"], ANCHORS) == [*ANCHORS, "kserve"]
    for name in ANCHORS:
        store.add(run(name, 1, 100, sitting=2))
    assert store.missing(TINY, 1, [*ANCHORS, "kserve"], ANCHORS) == []


def test_a_round_that_was_cut_short_is_measured_whole(tmp_path: Path):
    store = Store(tmp_path / "bench.json", SETTINGS)
    store.add(run("fastapi", 1, 100))
    assert store.missing(TINY, 1, [*ANCHORS, "kserve"], ANCHORS) == [*ANCHORS, "kserve"]


def test_only_runs_of_one_sitting_are_compared(store: Store):
    store.add(run("kserve", 1, 50, sitting=2))
    assert store.pairs((TINY, "manta-serve"), (TINY, "kserve")) == []
    store.add(run("manta-serve", 1, 75, sitting=2))
    ((ours, theirs),) = store.pairs((TINY, "manta-serve"), (TINY, "kserve"))
    assert (ours.rows_per_s, theirs.rows_per_s) == (75, 50)


def test_the_latest_sitting_counts_once(store: Store):
    store.add(run("fastapi", 1, 70, sitting=2))
    assert [one.rows_per_s for one in store.find(TINY, "fastapi")] == [70, 200, 100]


def test_a_problem_is_taken_back_by_a_run(store: Store):
    store.problem(str(TINY), "kserve", "it did not start")
    assert store.problems == {"kserve": {str(TINY): "it did not start"}}
    store.add(run("kserve", 1, 50))
    assert store.problems == {}


def test_cpu_is_per_request_of_the_whole_run():
    one = replace(run("manta-serve", 1, 100), total=1000, cpu_s={"router": 0.5})
    assert one.cpu_us() == {"router": 500.0}
