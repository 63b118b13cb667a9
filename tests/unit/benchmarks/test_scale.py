"""Routers by replicas: who is started, and what their costs come to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import scale
from benchmarks.contestants import Stage
from benchmarks.models import MODELS
from benchmarks.scale import Bound, Cost
from benchmarks.store import Run, Store

from .runs import SETTINGS, run

# 40 us of Router, 20 of HAProxy, 100 of a replica, 40 of others: 200 us, and 50 of the client.
COST = Cost(router=40, haproxy=20, replica=100, others=40, client=50)


def costing(contestant: str, number: int, rate: float = 100, **cpu_us: float) -> Run:
    made: Run = run(contestant, number, rate)
    return replace(made, cpu_s={role: us * made.total / 1e6 for role, us in cpu_us.items()})


def test_every_combination_under_a_name_that_says_which():
    everyone = scale.contestants("direct")
    sizes = [(one.routers, one.replicas) for one in everyone]
    assert sizes == [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (4, 2)]
    assert len({one.name for one in everyone}) == 6
    for one in everyone:
        assert scale.combination(one.name) == ("direct", one.routers, one.replicas)
    assert scale.combination("manta-serve") == ("serve", 1, 1)
    for other in ("fastapi", "triton", "manta-serve-bf16", "manta-direct-aoti"):
        assert scale.combination(other) is None


def test_replicas_are_instances_and_routers_a_flag(tmp_path: Path):
    file = tmp_path / "model.pt"
    file.write_bytes(b"weights")
    stage = Stage(MODELS["tiny"], file, 7, np.zeros(1), np.zeros(1))
    launch = scale.contestants("serve", ["--id=x"])[-1].launch(stage, tmp_path)
    assert {"--batching=serve", "--router-replicas=4", "--id=x"} <= set(launch.command)
    config = (tmp_path / "repository" / "tiny" / "config.pbtxt").read_text()
    assert "instance_group [ { kind: KIND_CPU count: 2 } ]" in config


def test_both_modes_where_a_model_is_to_show_their_difference():
    assert scale.batchings("mlp", []) == ("direct", "serve")
    assert scale.batchings("tiny", []) == ("direct",)
    assert scale.batchings("tiny", ["serve"]) == ["serve"]


def test_costs_are_medians_and_unnamed_roles_are_the_others():
    runs = [
        costing("manta-direct", number, router=us, replica=10, controller=1, ray=2, client=5)
        for number, us in ((1, 30), (2, 90), (3, 40))
    ]
    found = scale.cost(runs)
    parts = (found.router, found.haproxy, found.replica, found.others, found.client)
    assert parts == pytest.approx((40, 0, 10, 3, 5))
    assert COST.server == 200


@pytest.mark.parametrize(
    ("routers", "replicas", "cores", "with_client", "expected"),
    [
        (1, 1, 16, False, Bound(10_000, "replica")),
        (1, 2, 16, False, Bound(20_000, "replica")),
        (1, 4, 16, False, Bound(25_000, "Router")),
        (4, 2, 16, False, Bound(20_000, "replica")),
        (4, 16, 16, False, Bound(80_000, "cores")),
        (4, 2, 2, False, Bound(10_000, "cores")),
        (4, 2, 2, True, Bound(8_000, "cores")),
    ],
)
def test_the_scarcest_stage_bounds_the_rate(routers, replicas, cores, with_client, expected):
    found = scale.bound(COST, routers, replicas, cores, with_client=with_client)
    assert found.rate == pytest.approx(expected.rate) and found.by == expected.by


def test_a_proxy_that_costs_more_than_its_router_is_the_bound():
    found = scale.bound(replace(COST, haproxy=80, replica=10), 2, 2, 16, with_client=False)
    assert found.rate == pytest.approx(25_000) and found.by == "HAProxy"


def test_no_proxy_is_no_bound_and_no_cost_no_figure():
    found = scale.bound(replace(COST, haproxy=0), 1, 16, 16, with_client=False)
    assert found.rate == pytest.approx(25_000) and found.by == "Router"
    with pytest.raises(ValueError, match="no CPU time"):
        scale.bound(Cost(0, 0, 0, 0, 0), 1, 1, 16, with_client=False)


def test_what_fills_the_cores():
    rate, routers, replicas = scale.filled(COST, 16)
    assert rate == pytest.approx(80_000)
    assert (routers, replicas) == (4, 8)  # 3.2 Routers and 8 replicas
    assert scale.filled(replace(COST, haproxy=80, others=0), 16)[1] == 6  # 5.8 HAProxies


def test_the_section(tmp_path: Path):
    store = Store(tmp_path / "bench.json", SETTINGS)
    parts = {"router": 40, "haproxy": 20, "replica": 100, "ray": 40, "client": 50}
    for number in (1, 2, 3):
        store.add(costing("manta-direct", number, 5000, **parts))
        store.add(run("fastapi", number, 100))
    assert scale.section(store, 2) == []  # nothing beside it
    for number in (1, 2, 3):
        store.add(costing("manta-direct-x4-r2", number, 6000, **parts))
    page = "\n".join(scale.section(store, 2))
    costs = "40 | 20 | 100 | 40 | 50 | 250"
    one = "| tiny, http, 64, direct | 1 | 1 | 5,000 (5,000 to 5,000)"
    assert one in page and "| 4 | 2 | 6,000 (6,000 to 6,000)" in page
    assert f"{costs} | 8,000 | 10,000 | replica |" in page
    assert f"{costs} | 8,000 | 20,000 | replica |" in page
    assert "| tiny, http, 64, direct | 4, 2 | 200 | 80,000 | 4 | 8 |" in page
