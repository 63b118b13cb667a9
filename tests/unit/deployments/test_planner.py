"""From the disk to what is to be deployed, on a cluster that is told and not asked."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass

import pytest

from configs.autoscaling import Autoscaling
from configs.errors import ConfigError
from configs.server import ServerSettings
from deployments.arrivals import counts, scalings
from deployments.errors import Internal
from deployments.planner import Planner, kept_at, started_with
from deployments.repository import Repository
from deployments.types import Override

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


def planner(root, cluster=None, hashes=True, **more):
    settings = ServerSettings(model_repository=(str(root),), **more)
    return Planner(settings, Repository((root,)), "manta", cluster or Cluster(), hashes)


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


def test_who_only_looks_reads_no_file_for_its_hash(tmp_path, monkeypatch):
    write(tmp_path)
    (plan,), _ = planner(tmp_path).plan("m")
    monkeypatch.setattr(Repository, "content_hash", None)
    (seen,), _ = planner(tmp_path, hashes=False).plan("m")
    assert plan.content_hash and seen.content_hash == ""
    assert (seen.config, seen.placements) == (plan.config, plan.placements)


@pytest.mark.parametrize("hashes", [True, False])
def test_a_file_that_leads_out_is_refused_whoever_looks(tmp_path, hashes):
    root = tmp_path / "models"
    write(root)
    (tmp_path / "outside").write_bytes(b"secret")
    (root / "m" / "1" / "extra.txt").symlink_to(tmp_path / "outside")
    plans, failed = planner(root, hashes=hashes).plan("m")
    assert plans == [] and "'m/1/extra.txt' leads out of the model repository" in failed[1]


def test_what_other_settings_would_load_otherwise_is_loaded_again(tmp_path):
    write(tmp_path)

    def fingerprint(**more):
        return planner(tmp_path, **more).plan("m")[0][0].fingerprint

    assert fingerprint() == fingerprint(max_queue_requests=7)
    others = {"disable_auto_complete_config": True}, {"compile_cache": str(tmp_path / "kept")}
    assert len({fingerprint(), *(fingerprint(**more) for more in others)}) == 3


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


def write_package(root, device, more="", platform="torch_aoti"):
    """What tells the device of a package, and nothing that could run."""
    write(root, more)
    (root / "m" / "1" / "model.pt").unlink()
    text = CONFIG.replace("pytorch_libtorch", platform)
    (root / "m" / "config.pbtxt").write_text(text + more)
    with zipfile.ZipFile(root / "m" / "1" / "model.pt2", "w") as package:
        folder = "model/data/aotinductor/model/"
        package.writestr(folder + "wrapper_metadata.json", f'{{"AOTI_DEVICE_KEY": "{device}"}}')


@pytest.mark.parametrize(
    ("device", "more", "gpus", "kind", "listed"),
    [
        ("cpu", "", 2, "KIND_CPU", ()),
        ("cpu", "", 0, "KIND_CPU", ()),
        ("cuda", "", 2, "KIND_GPU", (0, 1)),
        ("cuda", "instance_group { kind: KIND_MODEL }", 2, "KIND_MODEL", ()),
    ],
)
def test_a_package_goes_where_it_can_run(tmp_path, device, more, gpus, kind, listed):
    write_package(tmp_path, device, more)
    (plan,), failed = planner(tmp_path, Cluster(gpus)).plan("m")
    (group,) = plan.config.instance_group
    assert failed == {} and (group.kind, group.gpus) == (kind, listed)
    assert {placement.kind for placement in plan.placements} == {kind}


@pytest.mark.parametrize(
    ("device", "more", "gpus", "group"),
    [
        ("cuda", "instance_group { name: 'host' kind: KIND_CPU }", 1, "host' has kind KIND_CPU"),
        ("cuda", "", 0, "m' has kind KIND_CPU"),
        ("cpu", "instance_group { name: 'card' kind: KIND_GPU }", 1, "card' has kind KIND_GPU"),
    ],
)
def test_a_package_for_another_device_is_refused_before_it_is_loaded(
    tmp_path, device, more, gpus, group
):
    write_package(tmp_path, device, more)
    plans, failed = planner(tmp_path, Cluster(gpus)).plan("m")
    assert plans == [] and "m/config.pbtxt" in failed[1]
    assert f"instance group '{group}" in failed[1] and f"compiled for {device}" in failed[1]


def test_a_passive_group_computes_nothing(tmp_path):
    groups = "instance_group [ { kind: KIND_CPU count: 3 }, { kind: KIND_CPU passive: true } ]"
    write(tmp_path, groups)
    (plan,), _ = planner(tmp_path).plan("m")
    assert plan.cpu_instances == 3
    assert [spec.passive for spec in planner(tmp_path).specs(plan, "a", 3)] == [False, True]


def test_a_bad_configuration_and_a_missing_model_are_the_whole_models(tmp_path):
    write(tmp_path, "max_batch_size: -1")
    with pytest.raises(ConfigError, match="max_batch_size"):
        planner(tmp_path).plan("m")
    with pytest.raises(Internal, match="failed to poll"):
        planner(tmp_path).plan("nobody")


GIVEN = """{"platform": "pytorch_libtorch", "max_batch_size": 8,
 "input": [{"name": "a", "data_type": "TYPE_FP32", "dims": [4]}],
 "output": [{"name": "b", "data_type": "TYPE_FP32", "dims": [4]}]}"""


def test_a_given_configuration_replaces_the_whole_file(tmp_path):
    write(tmp_path, "version_policy { all { } }", versions=(1, 2))
    (plan,), _ = planner(tmp_path).plan("m", Override(GIVEN))
    assert (plan.number, plan.config.max_batch_size) == (2, 8)  # latest: the file's policy is gone
    assert plan.override == Override(GIVEN)
    (spec,) = planner(tmp_path).specs(plan, "a", 1)
    assert spec.override == plan.override and spec.repository == str(tmp_path)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("{", "^config: Expecting"),
        ("[]", "^config: it is not a JSON object$"),
        (GIVEN.replace("platform", "platfrm"), 'no field named "platfrm"'),
        (GIVEN.replace('"max_batch_size": 8', '"name": "n"'), "^config: name: the name 'n' must"),
        (GIVEN.replace("8", "-8"), "^config: max_batch_size: must be 0 or greater"),
    ],
)
def test_a_given_configuration_that_is_none_is_the_whole_models(tmp_path, given, reason):
    write(tmp_path)
    with pytest.raises(ConfigError, match=reason):
        planner(tmp_path).plan("m", Override(given))


def test_what_a_given_configuration_misplaces_is_told_by_its_name(tmp_path):
    write(tmp_path)
    group = '"instance_group": [{"kind": "KIND_GPU"}], "platform"'
    plans, failed = planner(tmp_path).plan("m", Override(GIVEN.replace('"platform"', group)))
    assert plans == [] and failed[1].startswith("config: instance_group[0].kind: ")


def test_given_files_are_used_alone(tmp_path):
    write(tmp_path / "disk", versions=(1, 2))
    write(tmp_path / "given", versions=(7,))
    override = Override(GIVEN, str(tmp_path / "given"))
    (plan,), failed = planner(tmp_path / "disk").plan("m", override)
    assert (plan.number, failed) == (7, {})
    (spec,) = planner(tmp_path / "disk").specs(plan, "a", 1)
    assert spec.repository == override.folder
    # A model that no repository has, too.
    assert planner(tmp_path / "empty").plan("m", override)[0] == [plan]


def test_how_many_there_are_and_which_others_makes_no_other_replica(tmp_path):
    write(tmp_path, versions=(1, 2))

    def plan(count, more=""):
        group = f"instance_group {{ kind: KIND_CPU count: {count} }}\n"
        (tmp_path / "m" / "config.pbtxt").write_text(CONFIG + group + more)
        return planner(tmp_path).plan("m")[0][-1]

    one = plan(1)
    for same in (plan(3), plan(1, "version_policy { all { } }"), plan(1, "# a comment")):
        assert same.fingerprint == one.fingerprint
    assert (counts(one), counts(plan(3))) == ({"m_0": 1}, {"m_0": 3})


def test_control_everything_else_does(tmp_path):
    write(tmp_path)
    text = tmp_path / "m" / "config.pbtxt"
    seen = {planner(tmp_path).plan("m")[0][0].fingerprint}
    for more in (
        "max_batch_size: 2",
        "instance_group { name: 'x' kind: KIND_CPU }",
        "instance_group { kind: KIND_CPU passive: true }",
        "parameters { key: 'INFERENCE_MODE' value { string_value: 'false' } }",
        "parameters { key: 'ENABLE_WEIGHT_SHARING' value { string_value: 'true' } }"
        " instance_group { kind: KIND_CPU count: 2 }",
    ):
        text.write_text(CONFIG + more)
        seen.add(planner(tmp_path).plan("m")[0][0].fingerprint)
    text.write_text(CONFIG)
    (tmp_path / "m" / "1" / "model.pt").write_bytes(b"other weights")
    seen.add(planner(tmp_path).plan("m")[0][0].fingerprint)
    seen.add(planner(tmp_path).plan("m", Override(GIVEN.replace("8", "0")))[0][0].fingerprint)
    assert len(seen) == 8


SCALED = """instance_group {{ kind: KIND_CPU count: {count} }}
parameters {{ key: "AUTOSCALING" value {{ string_value: "{text}" }} }}
"""


def scaled(count=1, least=0, most=4):
    text = f'{{"min_count": {least}, "max_count": {most}}}'.replace('"', '\\"')
    return SCALED.format(count=count, text=text)


def test_bounds_and_counts_make_no_other_replicas(tmp_path):
    write(tmp_path, scaled())
    plain = CONFIG + "instance_group { kind: KIND_CPU }"
    fingerprints = set()
    for text in (CONFIG + scaled(), CONFIG + scaled(2, 1, 3), plain):
        (tmp_path / "m" / "config.pbtxt").write_text(text)
        (plan,), failed = planner(tmp_path).plan("m")
        assert failed == {}
        fingerprints.add(plan.fingerprint)
    assert len(fingerprints) == 1
    (plan,), _ = planner(tmp_path, autoscaling={"m": Autoscaling(max_count=3)}).plan("m")
    assert plan.fingerprint in fingerprints and scalings(plan) == {"m_0": Autoscaling(max_count=3)}
    (tmp_path / "m" / "config.pbtxt").write_text(CONFIG + scaled(2))
    (plan,), _ = planner(tmp_path).plan("m")
    assert plan.cpu_instances == 4  # what their threads are divided by


@pytest.mark.parametrize(
    ("running", "begins", "stays"), [(0, 2, 1), (1, 2, 1), (3, 3, 3), (9, 4, 4)]
)
def test_a_version_that_is_scaled_goes_on_from_what_runs(tmp_path, running, begins, stays):
    write(tmp_path, scaled(count=2, least=1))
    (plan,), _ = planner(tmp_path).plan("m")
    assert counts(started_with(plan, {"m_0": running})) == {"m_0": begins}
    assert counts(kept_at(plan, {"m_0": running})) == {"m_0": stays}
    assert counts(started_with(plan, {})) == counts(kept_at(plan, {})) == {"m_0": 2}


def test_control_one_that_is_not_has_what_is_written(tmp_path):
    write(tmp_path, "instance_group { kind: KIND_CPU count: 2 }")
    (plan,), _ = planner(tmp_path).plan("m")
    assert started_with(plan, {"m_0": 5}) == kept_at(plan, {"m_0": 5}) == plan


def test_one_that_cannot_be_scaled_does_not_load_and_tells_the_line(tmp_path):
    write(tmp_path, scaled(count=9))
    plans, failed = planner(tmp_path).plan("m")
    assert plans == [] and "m/config.pbtxt:5: " in failed[1] and "count 9" in failed[1]
