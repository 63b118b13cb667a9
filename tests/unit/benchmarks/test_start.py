"""The start benchmark: what it builds, how it tells processes apart, what its tables say."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from benchmarks import start
from benchmarks.start import Holding, Result
from configs.pbtxt import parse


def test_the_repository_holds_models_that_load(tmp_path: Path) -> None:
    names = start.build_repository(tmp_path, 3)
    assert names == ["small_00", "small_01", "small_02"]
    for name in names:
        config = parse((tmp_path / name / "config.pbtxt").read_text(), "config.pbtxt", name)
        assert config.name == name
        model = torch.jit.load(tmp_path / name / "1" / "model.pt")
        assert model(torch.ones(2, start.WIDTH)).shape == (2, start.WIDTH)


@pytest.mark.parametrize(
    ("executable", "title", "role"),
    [
        ("ray::ServeRepl", "ray::ServeReplica:manta:Router", "router"),
        ("ray::ServeRepl", "ray::ServeReplica:manta.m.1.7:m_0", "replica"),
        (
            "python",
            "/v/bin/python -c from deployments.forkserver import main; main()",
            "fork server",
        ),
        ("manta", "/v/bin/python /v/bin/manta serve --model-repository=/r", "manta serve"),
        ("ray::ServeCont", "ray::ServeController", "Ray: Serve controller"),
        ("raylet", "/v/ray/core/src/ray/raylet/raylet --raylet_socket_name=/s", "Ray: raylet"),
        ("ray::IDLE", "ray::IDLE", "Ray: the rest"),
    ],
)
def test_processes_have_roles(executable: str, title: str, role: str) -> None:
    assert start.role(executable, title) == role


def test_memory_is_that_of_the_whole_tree() -> None:
    (own, *_) = start.memory(os.getpid())
    assert own.rss_mib >= own.pss_mib >= own.uss_mib > 1


def test_the_tables_show_medians_by_role_and_the_largest_share() -> None:
    held = [Holding("replica", 260, pss, 40) for pss in (50, 51, 90)] + [Holding("router", 9, 8, 7)]
    one = Result(3, 1.25, 1.5, 2.0, 7.0, {"replica": 0.25, "router": 0.01}, held)
    told = start.text([one], {"cpu": "x"})
    assert "| 3 | 1.2 | 1.5 | 2.0 | 7.0 | 0.260 |" in told
    assert "| replica | 3 | 260 | 51 | 90 | 40 | 0.250 |" in told
    assert "| router | 1 | 9 | 8 | 8 | 7 | 0.010 |" in told


def test_flags_for_the_server_come_after_two_dashes() -> None:
    options = start.parse(["--models", "1,2", "--", "--batching=direct"])
    assert (options.models, options.flags) == ([1, 2], ["--batching=direct"])


@pytest.mark.parametrize("count", ["0", "101"])
def test_a_count_out_of_range_is_refused(count: str) -> None:
    with pytest.raises(SystemExit):
        start.parse(["--models", count])
