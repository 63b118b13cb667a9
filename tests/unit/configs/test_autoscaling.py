"""The parameter AUTOSCALING: what it may say, and which models it may be said of."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from configs import pbtxt
from configs.autoscaling import Autoscaling, check, parse
from configs.errors import ConfigError
from configs.model import DynamicBatching, InstanceGroup, ModelConfig
from configs.parameters import parse_parameters
from configs.placement import plan
from configs.server import ServerSettings

CPU = InstanceGroup(name="m", kind="KIND_CPU", count=1)
SPARE = InstanceGroup(name="spare", kind="KIND_CPU", count=2, passive=True)


def model(*groups: InstanceGroup, **parameters: str) -> ModelConfig:
    return ModelConfig(
        name="m",
        platform="pytorch_libtorch",
        instance_group=groups or (CPU,),
        parameters=parameters,
    )


def test_defaults() -> None:
    one = parse('{"max_count": 3}')
    assert (one.min_count, one.max_count) == (1, 3)
    assert one.upscale_delay_s < one.downscale_delay_s
    assert [one.bounded(count) for count in (0, 2, 9)] == [1, 2, 3]


def test_what_may_wait_is_a_full_batch_unless_it_is_said() -> None:
    one, batched = parse('{"max_count": 3}'), DynamicBatching()
    assert one.target(ModelConfig(max_batch_size=8)) == 2
    assert one.target(ModelConfig(max_batch_size=8, dynamic_batching=batched)) == 8
    said = parse('{"max_count": 3, "target_queued_requests": 0.5}')
    assert said.target(ModelConfig(max_batch_size=8, dynamic_batching=batched)) == 0.5


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "failed to parse as JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("[1]", "must be a JSON object"),
        ("{}", "max_count: Field required"),
        ('{"max_count": 3, "max_count": 4}', "max_count is given twice"),
        ('{"max_count": 3, "max_replicas": 4}', "unknown field 'max_replicas'; there are min_c"),
        ('{"max_count": 0}', "max_count: .* greater than or equal to 1"),
        ('{"max_count": 99999}', "max_count: .* less than or equal to 1024"),
        ('{"max_count": "3"}', "max_count: .* valid integer"),
        ('{"max_count": true}', "max_count: .* valid integer"),
        ('{"max_count": 1.5}', "max_count: .* valid integer"),
        ('{"max_count": 3, "min_count": -1}', "min_count: .* greater than or equal to 0"),
        ('{"max_count": 3, "min_count": 4}', "^min_count 4 must not be above max_count 3"),
        ('{"max_count": 3, "target_queued_requests": 0}', "target_queued_requests: .* than 0"),
        ('{"max_count": 3, "upscale_delay_s": -1}', "upscale_delay_s: "),
        ('{"max_count": 3, "downscale_delay_s": NaN}', "downscale_delay_s: .* finite"),
        ('{"max_count": 3, "downscale_delay_s": 1e9}', "downscale_delay_s: "),
    ],
)
def test_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse(text)
    with pytest.raises(ConfigError, match=r'parameters\["AUTOSCALING"\]: AUTOSCALING: '):
        parse_parameters(model(AUTOSCALING=text))


@pytest.mark.parametrize(
    ("groups", "more", "reason"),
    [
        ((CPU,), {"ENABLE_WEIGHT_SHARING": "true"}, "ENABLE_WEIGHT_SHARING"),
        ((CPU, CPU.model_copy(update={"name": "n"})), {}, "exactly one .* there are 2"),
        ((SPARE,), {}, "exactly one .* there are 0"),
        ((CPU.model_copy(update={"count": 4}),), {}, "count 4 .* lie in 0 to 3"),
    ],
)
def test_models_that_cannot_be_scaled(
    groups: tuple[InstanceGroup, ...], more: dict[str, str], reason: str
) -> None:
    text = '{"min_count": 0, "max_count": 3}'
    with pytest.raises(ConfigError, match=reason):
        parse_parameters(model(*groups, AUTOSCALING=text, **more))
    bare, scaling = model(*groups, **more), parse(text)
    settings = ServerSettings(autoscaling={"m": scaling})
    with pytest.raises(ConfigError, match=f"server's settings.*{reason}"):
        plan(bare, parse_parameters(bare)[0], settings, 0)
    plan(bare, parse_parameters(bare)[0], ServerSettings(), 0)  # the control


def test_it_comes_back_from_what_manta_config_prints() -> None:
    config = model(AUTOSCALING='{"min_count": 0, "max_count": 3}')
    again = pbtxt.parse(pbtxt.to_text(config), "m/config.pbtxt", "m", partial=True)
    assert again.parameters == config.parameters


def test_a_group_without_a_count_begins_with_one() -> None:
    check(Autoscaling(max_count=2), model(CPU.model_copy(update={"count": 0})), False, False)


def test_the_servers_settings_win_as_a_whole() -> None:
    config = model(AUTOSCALING='{"max_count": 3, "upscale_delay_s": 9}')
    parameters, _ = parse_parameters(config)

    def planned(**settings: object) -> Autoscaling | None:
        (one,) = plan(config, parameters, ServerSettings(**settings), 0)
        return one.autoscaling

    assert planned() == Autoscaling(max_count=3, upscale_delay_s=9)
    assert planned(autoscaling={"other": {"max_count": 5}}) == planned()
    assert planned(autoscaling={"m": {"max_count": 5}}) == Autoscaling(max_count=5)
    assert planned(autoscaling={"m": None}) is None


@pytest.mark.parametrize("value", [{"max_count": "5"}, {"max": 5}, 5, {}])
def test_settings_are_as_strict(value: object) -> None:
    with pytest.raises(ValidationError, match="autoscaling"):
        ServerSettings(autoscaling={"m": value})


def test_each_listed_gpu_has_its_count_and_passive_groups_keep_theirs() -> None:
    group = InstanceGroup(name="g", kind="KIND_GPU", count=1, gpus=(0, 1))
    text = json.dumps({"min_count": 0, "max_count": 3})
    config = model(group, SPARE, AUTOSCALING=text)
    parameters, _ = parse_parameters(config)
    planned = plan(config, parameters, ServerSettings(), 2)
    assert [(p.deployment, p.replicas, p.most) for p in planned] == [
        ("g_gpu0", 1, 3),
        ("g_gpu1", 1, 3),
        ("spare", 2, 2),
    ]


@pytest.mark.parametrize("kind", ["KIND_GPU", "KIND_MODEL"])
def test_what_never_fits_is_refused_at_load(kind: str) -> None:
    group = InstanceGroup(name="g", kind=kind, count=1)
    for most, fits in ((2, True), (3, False)):
        config = model(group, AUTOSCALING=f'{{"max_count": {most}}}', GPU_FRACTION="0.5")
        parameters, _ = parse_parameters(config)
        try:
            plan(config, parameters, ServerSettings(), 1 if kind == "KIND_GPU" else 2)
            assert fits
        except ConfigError as error:
            assert not fits and "fit" in str(error)
