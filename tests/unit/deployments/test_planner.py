"""From the disk to what is to be deployed, on a cluster that is told and not asked."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from configs.errors import ConfigError
from configs.server import ServerSettings
from deployments.errors import Internal
from deployments.planner import Planner
from deployments.repository import Repository

CONFIG = """platform: "pytorch_libtorch"
input { name: "a" data_type: TYPE_FP32 dims: 4 }
output { name: "b" data_type: TYPE_FP32 dims: 4 }
"""


@dataclass(frozen=True)
class Cluster:
    gpus: int = 0
    indexed: bool = True

    def gpu_count(self) -> int:
        return self.gpus

    def resources(self) -> list[str]:
        return [f"manta_gpu_{index}" for index in range(self.gpus)] if self.indexed else []


def planner(root, cluster=None):
    settings = ServerSettings(model_repository=(str(root),))
    return Planner(settings, Repository((root,)), "manta", cluster or Cluster())


def write(root, more="", versions=(1,)):
    for version in versions:
        (root / "m" / str(version)).mkdir(parents=True)
        (root / "m" / str(version) / "model.pt").write_bytes(b"weights")
    (root / "m" / "config.pbtxt").write_text(CONFIG + more)


def test_a_version_is_completed_placed_and_specified(tmp_path):
    write(tmp_path, versions=(1, 2))
    (plan,), failed = planner(tmp_path).plan("m")
    assert failed == {} and plan.number == 2 and plan.cpu_instances == 1
    assert plan.config.instance_group[0].kind == "KIND_CPU"
    (spec,) = planner(tmp_path).specs(plan, "manta.m.2.1", 1)
    assert (spec.model_name, spec.version, spec.kind) == ("m", 2, "KIND_CPU")
    assert spec.content_hash == plan.content_hash and spec.fingerprint == plan.fingerprint


@pytest.mark.parametrize(("indexed", "resources"), [(True, {"manta_gpu_1": 0.01}), (False, {})])
def test_resources_by_index_are_asked_for_where_nodes_offer_them(tmp_path, indexed, resources):
    write(tmp_path, "instance_group { kind: KIND_GPU gpus: 1 }")
    (plan,), _ = planner(tmp_path, Cluster(2, indexed)).plan("m")
    (placement,) = plan.placements
    assert placement.gpu == 1 and placement.resources == resources


def test_a_version_without_its_file_fails_alone(tmp_path):
    write(tmp_path, "version_policy { all { } }", versions=(1, 2))
    (tmp_path / "m" / "2" / "model.pt").unlink()
    (plan,), failed = planner(tmp_path).plan("m")
    assert plan.number == 1
    assert failed == {2: "unable to find 'm/2/model.pt' for model 'm' version 2"}


def test_a_group_that_no_gpu_suits_is_told_with_its_line(tmp_path):
    write(tmp_path, "instance_group { kind: KIND_GPU }")
    plans, failed = planner(tmp_path).plan("m")
    assert plans == [] and "m/config.pbtxt:4: instance_group[0].kind" in failed[1]


def test_a_bad_configuration_and_a_missing_model_are_the_whole_models(tmp_path):
    write(tmp_path, "max_batch_size: -1")
    with pytest.raises(ConfigError, match="max_batch_size"):
        planner(tmp_path).plan("m")
    with pytest.raises(Internal, match="failed to poll"):
        planner(tmp_path).plan("nobody")
