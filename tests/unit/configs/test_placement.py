"""Instance groups -> replicas, instances and resources."""

from __future__ import annotations

import pytest

from configs.errors import ConfigError
from configs.model import InstanceGroup, ModelConfig
from configs.parameters import ModelParameters
from configs.placement import check_device, follow_package, list_gpus, plan
from configs.server import ServerSettings


def _plan(*groups, gpus=0, settings=None, **parameters):
    config = ModelConfig(name="m", instance_group=groups)
    return plan(config, ModelParameters(**parameters), settings or ServerSettings(), gpus)


CPU = InstanceGroup(name="m", kind="KIND_CPU", count=2)


def _gpu(name="g", count=1, gpus=()):
    return InstanceGroup(name=name, kind="KIND_GPU", count=count, gpus=gpus)


def test_cpu_group_is_replicas_without_sharing_and_threads_with():
    (alone,) = _plan(CPU)
    assert (alone.deployment, alone.replicas, alone.instances) == ("m", 2, 1)
    assert (alone.num_cpus, alone.num_gpus, alone.gpu, alone.resources) == (0.01, 0, None, {})
    (shared,) = _plan(CPU, enable_weight_sharing=True, cpu_fraction=0.5)
    assert (shared.replicas, shared.instances, shared.num_cpus) == (1, 2, 0.5)


def test_gpu_group_is_one_deployment_per_listed_gpu():
    first, second = _plan(_gpu(count=3, gpus=(0, 2)), gpus=3, gpu_fraction=0.25)
    assert (first.deployment, first.gpu, first.replicas) == ("g_gpu0", 0, 3)
    assert (second.deployment, second.gpu) == ("g_gpu2", 2)
    assert second.num_gpus == 0.25 and second.resources == {"manta_gpu_2": 0.25}
    assert second.without_resources().resources == {}
    assert [p.gpu for p in _plan(_gpu(), gpus=2)] == [0, 1]
    assert _plan(_gpu(), gpus=1)[0].num_gpus == 0.01


def test_model_group_takes_whole_gpus():
    group = InstanceGroup(name="k", kind="KIND_MODEL", count=1)
    assert _plan(group, gpus=2)[0].num_gpus == 1
    assert _plan(group, gpus=2, model_gpus=2)[0].num_gpus == 2
    (none,) = _plan(group)
    assert (none.num_gpus, none.num_cpus) == (0, 0.01)


def test_groups_of_every_kind_are_deployments_side_by_side():
    groups = (
        CPU,
        _gpu(count=3, gpus=(1,)),
        InstanceGroup(name="spare", kind="KIND_CPU", count=1, passive=True),
        InstanceGroup(name="k", kind="KIND_MODEL", count=1),
    )
    planned = _plan(*groups, gpus=3)
    assert [(p.deployment, p.kind, p.gpu, p.replicas, p.passive) for p in planned] == [
        ("m", "KIND_CPU", None, 2, False),
        ("g_gpu1", "KIND_GPU", 1, 3, False),
        ("spare", "KIND_CPU", None, 1, True),
        ("k", "KIND_MODEL", None, 1, False),
    ]


def test_gpu_groups_say_which_gpus_they_are_on():
    config = ModelConfig(name="m", instance_group=(_gpu(), _gpu("h", gpus=(2,)), CPU))
    listed = list_gpus(config, 3).instance_group
    assert [group.gpus for group in listed] == [(0, 1, 2), (2,), ()]
    assert list_gpus(config, 0).instance_group[0].gpus == ()


AOTI = {"name": "m", "platform": "torch_aoti"}


def _auto(kind="KIND_AUTO", gpus=()):
    return InstanceGroup(name="a", kind=kind, count=1, gpus=gpus)


@pytest.mark.parametrize(
    ("given", "device", "kinds"),
    [
        ((_auto(),), "cpu", ["KIND_CPU"]),
        ((), "cpu", ["KIND_CPU"]),
        ((_auto(), _gpu(gpus=(0,))), "cpu", ["KIND_CPU", "KIND_GPU"]),
        # what is listed is meant, and others go to the GPU
        ((_auto(gpus=(0,)),), "cpu", ["KIND_GPU"]),
        ((_auto(),), "cuda", ["KIND_GPU"]),
        ((_auto(),), "", ["KIND_GPU"]),
    ],
)
def test_auto_goes_where_the_package_can_run(given, device, kinds):
    groups = tuple(g.model_copy(update={"kind": "KIND_GPU"}) for g in given or (_auto(),))
    config = ModelConfig(**AOTI, instance_group=groups)
    found = follow_package(config, ModelConfig(**AOTI, instance_group=given), device)
    assert [group.kind for group in found.instance_group] == kinds
    files = {"cc_model_filenames": {"9.0": "h.pt2"}}
    chosen = config.model_copy(update=files)
    assert follow_package(chosen, ModelConfig(**AOTI, instance_group=given), device) == chosen


def _check(group, device, gpus, files=None, **settings):
    config = ModelConfig(**AOTI, instance_group=(group,), cc_model_filenames=files or {})
    check_device(config, device, ServerSettings(**settings), gpus)


@pytest.mark.parametrize(
    ("group", "device", "gpus", "reason"),
    [
        (CPU, "cuda", 1, "'m' has kind KIND_CPU and runs on cpu, .* compiled for cuda"),
        (_gpu(), "cpu", 1, "'g' has kind KIND_GPU and runs on cuda, .* compiled for cpu"),
        (_auto("KIND_MODEL"), "cuda", 0, "'a' has kind KIND_MODEL and runs on cpu"),
        (_auto("KIND_MODEL"), "cuda", 1, None),
        (_auto("KIND_MODEL"), "cpu", 1, None),
        (CPU, "cpu", 1, None),
        (_gpu(), "cuda", 1, None),
        (_gpu(), "", 1, None),
    ],
)
def test_a_package_runs_on_what_it_was_compiled_for(group, device, gpus, reason):
    if reason is None:
        _check(group, device, gpus)
    else:
        with pytest.raises(ConfigError, match=reason) as caught:
            _check(group, device, gpus)
        assert caught.value.args[2] == "instance_group[0].kind"


def test_which_package_a_gpu_gets_is_known_only_there():
    _check(_gpu(), "cpu", 1, files={"9.0": "h.pt2"})
    _check(_gpu(), "cpu", 1, logical_gpus=True)  # and a logical one is none


def test_names_are_unique_and_safe():
    names = [p.deployment for p in _plan(_gpu("a/b"), _gpu("a#b"), _gpu("ä b"), gpus=1)]
    assert names == ["a_b_gpu0", "a_b_gpu0_2", "__b_gpu0"]


@pytest.mark.parametrize(
    ("groups", "gpus", "parameters", "reason"),
    [
        ((_gpu(),), 0, {}, "'g' has kind KIND_GPU but no GPU is available"),
        ((_gpu(gpus=(0, 5)),), 2, {}, "'g' specifies invalid .* gpu id 5; .* are 0, 1"),
        ((_gpu(count=4),), 1, {"gpu_fraction": 0.3}, "'g' does not fit on gpu 0: GPU_FRACTION"),
        ((_gpu(count=101),), 1, {}, "the server's gpu_fraction is 0.01"),
        ((_gpu(), _gpu("h")), 1, {"gpu_fraction": 0.6}, "'h' does not fit on gpu 0"),
        ((InstanceGroup(name="k", kind="KIND_MODEL", count=3),), 2, {}, "'k' does not .* need 3"),
        (
            (InstanceGroup(name="k", kind="KIND_MODEL", count=1), _gpu()),
            1,
            {},
            "MODEL_GPUS.*1 more are shared",
        ),
        ((InstanceGroup(name="k", count=1),), 1, {}, "KIND_AUTO, which is not resolved"),
    ],
)
def test_what_can_never_be_placed_is_refused(groups, gpus, parameters, reason):
    with pytest.raises(ConfigError, match=reason):
        _plan(*groups, gpus=gpus, **parameters)


def test_what_just_fits_is_accepted():
    assert _plan(_gpu(count=10), gpus=1, gpu_fraction=0.1)[0].replicas == 10
    (one,) = _plan(_gpu(count=5), gpus=1, gpu_fraction=1.0, enable_weight_sharing=True)
    assert (one.replicas, one.instances, one.num_gpus) == (1, 5, 1.0)
