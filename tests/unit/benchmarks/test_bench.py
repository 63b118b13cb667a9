"""The command line: subsets, modes, what a figure depends on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import bench
from benchmarks.contestants import Manta, Stage
from benchmarks.models import MODELS
from benchmarks.peers import PEERS
from benchmarks.runtimes import RUNTIMES
from benchmarks.store import Store
from benchmarks.targets import DELAY_US


def test_defaults():
    options = bench.parse([])
    assert options.models == list(MODELS) and options.peers == []
    assert options.manta == [("serve", 1, "", ""), ("direct", 1, "", "")]
    assert options.rounds >= 3


def test_subsets():
    options = bench.parse(
        ["--peers=triton,kserve", "--models=tiny", "--connections=64", "--protocols=grpc"]
        + ["--manta=direct:2,serve+bf16,direct@aoti", "--manta-args=--id=x --max-queue-requests=9"]
    )
    assert options.peers == ["triton", "kserve"] and options.models == ["tiny"]
    assert options.connections == [64] and options.protocols == ["grpc"]
    assert options.manta == [
        ("direct", 2, "", ""),
        ("serve", 1, "bf16", ""),
        ("direct", 1, "", "aoti"),
    ]
    assert options.manta_args == ["--id=x", "--max-queue-requests=9"]


def test_all_peers_and_none():
    assert bench.parse(["--peers=1"]).peers == list(PEERS)
    assert bench.parse(["--peers=0"]).peers == []


@pytest.mark.parametrize(
    "argument",
    ["--peers=nobody", "--models=big", "--manta=fast", "--manta=direct:0", "--rounds=0"]
    + [
        "--seconds=0",
        "--connections=0",
        "--manta=serve+int4",
        "--manta=direct@onnx",
        "--manta=direct+bf16@aoti",
    ],
)
def test_what_there_is_not(argument: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        bench.parse([argument])
    assert "error" in capsys.readouterr().err


def test_one_network_in_each_runtime_and_what_is_asked_for_beside_it():
    options = bench.parse(["--runtimes"])
    assert [mode[3] for mode in options.manta] == list(RUNTIMES)
    assert (options.models, options.connections, options.protocols) == (["mlp"], [1, 64], ["http"])
    chosen = bench.parse(["--runtimes", "--models=encoder", "--connections=8"])
    assert (chosen.models, chosen.connections) == (["encoder"], [8])


def test_a_whole_run_ends_with_the_runtimes_and_a_subset_is_no_whole_run():
    matrix, runtimes = bench.parts_of(bench.parse(["--rounds=2"]))
    assert [mode[0] for mode in matrix.manta] == ["serve", "direct"]
    assert [mode[3] for mode in runtimes.manta] == list(RUNTIMES)
    assert (runtimes.models, runtimes.rounds, runtimes.peers) == (["mlp"], 2, [])
    for words in (["--models=tiny"], ["--manta=direct"], ["--runtimes"]):
        assert len(bench.parts_of(bench.parse(words))) == 1


def test_routers_by_replicas_are_a_run_of_their_own():
    options = bench.parse(["--scale"])
    assert (options.models, options.connections) == (["tiny", "mlp"], [64])
    assert (options.manta, options.protocols, options.rounds) == ([], ["http", "grpc"], 3)
    assert len(bench.parts_of(options)) == 1
    chosen = bench.parse(["--scale", "--models=encoder", "--manta=serve", "--protocols=grpc"])
    assert (chosen.models, chosen.protocols) == (["encoder"], ["grpc"])
    assert [mode[0] for mode in chosen.manta] == ["serve"]


def test_combinations_of_one_mode_are_started_together(tmp_path: Path):
    options = bench.parse(["--scale", "--manta-args=--id=x"])
    store = Store(tmp_path / "bench.json", {})
    stage = Stage(MODELS["mlp"], Path("model.pt"), DELAY_US, np.zeros(1), np.zeros(1))
    line_ups = list(bench.line_ups(options, stage, [], store))
    assert [[one.name.split("-")[1] for one in everyone] for everyone in line_ups] == [
        ["direct"] * 6,
        ["serve"] * 6,
    ]
    assert all(isinstance(one, Manta) and one.extra == ("--id=x",) for one in line_ups[0])


@pytest.mark.parametrize(
    "argument", ["--manta=direct:2", "--manta=direct@aoti", "--peers=triton", "--runtimes"]
)
def test_what_does_not_go_with_routers_by_replicas(argument: str):
    with pytest.raises(SystemExit):
        bench.parse(["--scale", argument])


def test_one_connection_also_without_delay_where_a_call_is_short():
    options = bench.parse([])
    assert bench.stages_of(options, MODELS["tiny"]) == [(DELAY_US, [1, 8, 32, 64]), (0, [1])]
    assert bench.stages_of(options, MODELS["resnet18"]) == [(DELAY_US, [8, 32])]
    assert bench.stages_of(options, MODELS["large4"]) == [(0, [8])]
    chosen = bench.parse(["--delays=0,50", "--connections=2"])
    assert bench.stages_of(chosen, MODELS["tiny"]) == [(0, [2]), (50, [2])]


def test_a_figure_depends_on_the_load_and_on_our_code():
    settings = bench.settings_of(bench.parse([]))
    assert settings == bench.settings_of(bench.parse(["--rounds=5", "--models=tiny"]))
    for argument in ("--seconds=2", "--manta-args=--id=x", "--idle=run"):
        assert settings != bench.settings_of(bench.parse([argument]))
    assert bench.settings_of(bench.parse(["--keep"]))["code"] == "any" != settings["code"]
