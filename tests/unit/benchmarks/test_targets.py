"""Targets: medians of paired rounds against bounds, and honest words where nothing was measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import pairs, targets
from benchmarks.matrix import TORCH
from benchmarks.models import MODELS
from benchmarks.peers import PEERS
from benchmarks.store import Store
from benchmarks.targets import AIMS, TARGETS, Target

from .runs import SETTINGS, TINY, filled, run


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return filled(tmp_path)


def target(**values) -> Target:
    return replace(Target(("tiny",), (64,), ("http",), ("fastapi",), 1.6, 3.0), **values)


def test_the_median_of_the_paired_rounds_decides(store: Store):
    serve, direct = targets.judge(store, target())
    assert serve.ratio == pairs.Spread(1.6, 1.5, 2.0, 3) and serve.met is True
    assert direct.ratio == pairs.Spread(2.95, 2.9, 3.1, 3) and direct.met is False


def test_a_latency_is_to_stay_below(store: Store):
    serve, direct = targets.judge(store, target(value="p50_us", serve=0.7, direct=0.3))
    assert serve.at_most and serve.met is True
    assert direct.ratio is not None and direct.met is False


def test_the_other_side_may_have_a_delay_of_its_own(store: Store):
    store.add(run("manta-serve", 1, 50, replace(TINY, delay_us=0)))
    store.add(run("kserve", 1, 100))
    given = target(against=("kserve",), direct=None, delay_us=0)
    (same,) = targets.judge(store, given)
    (other,) = targets.judge(store, replace(given, their_delay_us=1000))
    assert same.ratio is None and other.ratio is not None and other.ratio.median == 0.5
    assert other.against == "kserve, delay 1000"


def test_not_measured_is_neither_met_nor_missed(store: Store):
    (one,) = targets.judge(store, target(against=("kserve",), direct=None))
    assert one.ratio is None and one.met is None


def test_torch_alone_is_compared_at_its_own_batch(store: Store):
    (one,) = targets.judge(store, target(against=(TORCH,), serve=0.9, direct=None))
    assert one.ratio is not None and one.ratio.median == pytest.approx(0.16)
    assert one.against == "torch at batch 32" and one.met is False


def test_the_peer_that_needs_wrk_is_compared_by_wrk(store: Store):
    store.add(run("torchserve", 1, 80))
    (one,) = targets.judge(store, target(against=("torchserve",), direct=None))
    assert one.ratio is None
    wrk = replace(TINY, generator="wrk")
    store.add(run("torchserve", 1, 80, wrk))
    store.add(run("manta-serve", 1, 160, wrk))
    (one,) = targets.judge(store, target(against=("torchserve",), direct=None))
    assert one.ratio is not None and one.ratio.median == 2


def test_an_optimized_model_is_a_contestant_of_its_own(tmp_path: Path):
    store = Store(tmp_path / "bench.json", SETTINGS)
    store.add(run("manta-serve-bf16", 1, 200))
    store.add(run("fastapi", 1, 100))
    (one,) = targets.judge(store, target(precision="bf16", direct=None))
    assert one.ratio is not None and one.ratio.median == 2 and "bf16" in one.what


def test_a_runtime_is_a_contestant_of_its_own(tmp_path: Path):
    store = Store(tmp_path / "bench.json", SETTINGS)
    store.add(run("manta-direct-aoti", 1, 300))
    store.add(run("manta-direct-torchscript", 1, 200))
    given = target(against=("manta-direct-torchscript",), runtime="aoti", serve=None)
    (one,) = targets.judge(store, given)
    assert one.ratio is not None and one.ratio.median == 1.5 and one.what.endswith(", aoti")


def test_every_target_names_what_there_is():
    for one in (*TARGETS, *AIMS):
        assert set(one.models) <= set(MODELS)
        assert set(one.against) <= {"fastapi", TORCH, "manta-direct-torchscript", *PEERS}
        assert any(list(targets.comparisons(one)))
        for model in map(MODELS.__getitem__, one.models):
            assert set(one.connections) <= set(model.connections)
            assert model.batched or one.delay_us == 0


def test_ratios_and_spread():
    together = [(run("a", 1, 300), run("b", 1, 100)), (run("a", 2, 100), run("b", 2, 100))]
    assert pairs.ratios(together) == [3, 1]
    found = pairs.spread([3, 1])
    assert found == pairs.Spread(2, 1, 3, 2)
    assert found is not None and found.show(1, " x") == "2.0 x (1.0 to 3.0)"
    assert pairs.spread([]) is None
