"""Who is measured where, in which order, and what a resumed program still has to do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import matrix
from benchmarks.contestants import Baseline, Contestant, Manta, Stage, manta_role
from benchmarks.matrix import IN_PROCESS, TORCH
from benchmarks.models import MODELS
from benchmarks.peers import PEERS
from benchmarks.stand import Plan
from benchmarks.store import Cell, Store

from .runs import SETTINGS, run

PLAN = Plan(("http", "grpc"), rounds=2, seconds=1, idle="freeze")


def stage(name: str = "tiny") -> Stage:
    return Stage(MODELS[name], Path("model.pt"), 1000, np.zeros(1), np.zeros(1))


def everyone(*peers: str) -> list[Contestant]:
    found: list[Contestant] = [Baseline(), Manta("serve"), Manta("direct", 2)]
    return found + [PEERS[name](Path("peers")) for name in peers]


def named(cells: list[Cell]) -> list[str]:
    return [str(cell) for cell in cells]


def test_cells_without_peers():
    cells = matrix.cells_of(stage(), [1, 8], PLAN, everyone())
    assert named(cells) == [
        "tiny/in-process/1/0us/loop",
        "tiny/in-process/32/0us/loop",
        "tiny/http/1/1000us/h2load",
        "tiny/http/8/1000us/h2load",
        "tiny/grpc/1/1000us/h2load",
        "tiny/grpc/8/1000us/h2load",
    ]


def test_wrk_only_where_a_peer_needs_it_and_then_for_the_anchors_too():
    contestants = everyone("torchserve", "triton")
    cells = matrix.cells_of(stage(), [8], PLAN, contestants)
    taking_part = {
        str(cell): [one.name for one in contestants if matrix.takes_part(one, cell)]
        for cell in cells
        if cell.protocol != IN_PROCESS
    }
    assert taking_part == {
        "tiny/http/8/1000us/h2load": ["fastapi", "manta-serve", "manta-direct-x2", "triton"],
        "tiny/http/8/1000us/wrk": ["fastapi", "manta-serve", "manta-direct-x2", "torchserve"],
        "tiny/grpc/8/1000us/h2load": ["manta-serve", "manta-direct-x2", "triton"],
    }


def test_large_rows_are_limited_by_single_calls():
    cells = matrix.cells_of(stage("large4"), [8], PLAN, everyone())
    assert [cell.connections for cell in cells if cell.protocol == IN_PROCESS] == [1]


def test_who_has_no_binary_form_stays_out_of_the_large_ones():
    contestants = everyone("mlserver", "bentoml", "triton")
    names = {
        cell.protocol: [one.name for one in contestants if matrix.takes_part(one, cell)]
        for cell in matrix.cells_of(stage("large4"), [8], PLAN, contestants)
    }
    assert names["http"] == ["fastapi", "manta-serve", "manta-direct-x2", "triton"]
    assert names["grpc"] == ["manta-serve", "manta-direct-x2", "mlserver", "triton"]


def test_the_order_rotates_and_visits_everybody():
    cells = [Cell("tiny", "http", count, 0, "h2load") for count in (1, 8)]
    wanted = {(number, cell): ["a", "b", "c"] for number in (1, 2) for cell in cells}
    order = list(matrix.visits(cells, wanted, 2, "freeze"))
    assert sorted(order) == sorted((n, c, x) for (n, c), names in wanted.items() for x in names)
    firsts = [order[place][2] for place in range(0, len(order), 3)]
    assert firsts == ["b", "c", "c", "a"]


def test_stopped_servers_do_all_their_cells_in_one_go():
    cells = [Cell("tiny", "http", count, 0, "h2load") for count in (1, 8)]
    wanted = {(1, cells[0]): ["a", "b"], (1, cells[1]): ["a", "b"]}
    order = [name for _, _, name in matrix.visits(cells, wanted, 1, "stop")]
    assert order == ["b", "b", "a", "a"]


def test_a_resumed_program_measures_torch_again_beside_what_is_missing(tmp_path: Path):
    store = Store(tmp_path / "bench.json", SETTINGS)
    contestants = everyone()
    cells = matrix.cells_of(stage(), [8], PLAN, contestants)
    for cell in cells:
        names = [one.name for one in contestants if matrix.takes_part(one, cell)]
        for name in [TORCH] if cell.protocol == IN_PROCESS else names:
            store.add(run(name, 1, 100, cell))
    wanted = matrix.wanted_in(cells, contestants, 2, store)
    assert not any(names for (number, _), names in wanted.items() if number == 1)
    assert wanted[2, cells[0]] == [TORCH] and len(wanted[2, cells[2]]) == 3
    contestants += everyone("kserve")[3:]
    wanted = matrix.wanted_in(cells, contestants, 2, store)
    assert wanted[1, cells[0]] == [TORCH] and len(wanted[1, cells[2]]) == 4


@pytest.mark.parametrize(
    ("executable", "title", "expected"),
    [
        ("ray::ServeRepli", "ray::ServeReplica:manta:Router", "router"),
        ("ray::ServeRepli", "ray::ServeReplica:manta:Controller.poll", "controller"),
        ("ray::ServeRepli", "ray::ServeReplica:manta.mlp.1.3:group_0", "replica"),
        ("ray::ServeContr", "ray::ServeController.listen_for_change", "ray"),
        ("raylet", "/bin/raylet", "ray"),
        ("haproxy", "/bin/haproxy -f x", "haproxy"),
    ],
)
def test_roles_of_our_processes(executable: str, title: str, expected: str):
    assert manta_role(executable, title) == expected


def test_manta_serves_the_file_with_the_flags(tmp_path: Path):
    file = tmp_path / "model.pt"
    file.write_bytes(b"weights")
    one = Stage(MODELS["tiny"], file, 7, np.zeros(1), np.zeros(1))
    launch = Manta("direct", 2, extra=["--id=x"]).launch(one, tmp_path)
    assert {"--batching=direct", "--router-replicas=2", "--id=x"} <= set(launch.command)
    assert len(set(launch.ports.values())) == 2
    folder = tmp_path / "repository" / "tiny"
    assert (folder / "1" / "model.pt").read_bytes() == b"weights"
    config = (folder / "config.pbtxt").read_text()
    assert "max_queue_delay_microseconds: 7" in config and "max_batch_size: 32" in config


def test_a_runtime_is_served_so_that_it_can_be_loaded_again(tmp_path: Path):
    file = tmp_path / "model.pt"
    file.write_bytes(b"weights")
    one = Stage(MODELS["tiny"], file, 7, np.zeros(1), np.zeros(1))
    launch = Manta("direct", runtime="eager").launch(one, tmp_path)
    assert {"--model-control-mode=explicit", "--load-model=tiny"} <= set(launch.command)
    assert Manta("direct", runtime="eager").name == "manta-direct-eager"
    assert (tmp_path / "repository" / "tiny" / "1" / "model.py").is_file()
    plain = Manta("direct").launch(one, tmp_path / "plain")
    assert not any(word.startswith("--model-control-mode") for word in plain.command)
