"""Instance groups -> what to ask of Ray: one GroupPlacement per group, or per GPU of a group.

Pure arithmetic over plain numbers; knows no Ray. Called by the Controller, which turns each
placement into a deployment.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

from . import autoscaling
from .autoscaling import Autoscaling
from .errors import ConfigError
from .model import InstanceGroup, ModelConfig
from .parameters import ModelParameters
from .server import ServerSettings

_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True)
class GroupPlacement:
    """`replicas` processes with `instances` threads each; with `autoscaling`, to begin with.

    `resources` ties a replica to the GPU with index `gpu`: fractions alone never place.
    """

    deployment: str
    kind: str
    gpu: int | None
    replicas: int
    instances: int
    num_cpus: float
    num_gpus: float
    resources: dict[str, float]
    passive: bool = False
    autoscaling: Autoscaling | None = None

    @property
    def most(self) -> int:
        """How many replicas there may be at a time."""
        return self.autoscaling.max_count if self.autoscaling else self.replicas

    def without_resources(self) -> GroupPlacement:
        """For nodes that do not advertise their GPUs by index."""
        return replace(self, resources={})


def plan(
    config: ModelConfig, parameters: ModelParameters, settings: ServerSettings, gpu_count: int
) -> tuple[GroupPlacement, ...]:
    """Placements of a normalised configuration; raises ConfigError naming group and parameter."""
    scaling = _scaling(config, parameters, settings)
    planned: list[GroupPlacement] = []
    names: set[str] = set()
    used: dict[int, float] = defaultdict(float)
    for index, group in enumerate(config.instance_group):
        for placed in _place(index, group, parameters, settings, gpu_count):
            one = placed if group.passive else replace(placed, autoscaling=scaling)
            if one.gpu is not None:
                used[one.gpu] += one.most * one.num_gpus
                _check_fit(group, index, one, used[one.gpu], parameters)
            planned.append(replace(one, deployment=_unique(one.deployment, names)))
    _check_whole(planned, len(used), gpu_count)
    return tuple(planned)


def _scaling(
    config: ModelConfig, parameters: ModelParameters, settings: ServerSettings
) -> Autoscaling | None:
    """What the server's settings say of this model, and where they do not, the model itself."""
    if config.name not in settings.autoscaling:
        return parameters.autoscaling
    scaling = settings.autoscaling[config.name]
    if scaling is not None:
        autoscaling.check(scaling, config, parameters.enable_weight_sharing, by_server=True)
    return scaling


def gpu_resource(index: int) -> str:
    """The resource of Ray that a node with this GPU offers, 1 of it."""
    return f"manta_gpu_{index}"


def list_gpus(config: ModelConfig, gpu_count: int) -> ModelConfig:
    """A normalised configuration whose KIND_GPU groups all say which GPUs they are on."""
    every = tuple(range(gpu_count))
    groups = tuple(
        group.model_copy(update={"gpus": group.gpus or every})
        if group.kind == "KIND_GPU"
        else group
        for group in config.instance_group
    )
    return config.model_copy(update={"instance_group": groups})


def follow_package(config: ModelConfig, given: ModelConfig, device: str) -> ModelConfig:
    """`config` is `given` normalised, with the GPUs that there are in mind: KIND_AUTO goes where an
    AOTI package compiled for `device` can run. "" stands for models that run anywhere."""
    if device != "cpu" or config.cc_model_filenames:
        return config
    stated = [one.kind == "KIND_AUTO" and not one.gpus for one in given.instance_group] or [True]
    groups = tuple(
        group.model_copy(update={"kind": "KIND_CPU"}) if free else group
        for group, free in zip(config.instance_group, stated, strict=True)
    )
    return config.model_copy(update={"instance_group": groups})


def check_device(config: ModelConfig, device: str, settings: ServerSettings, gpus: int) -> None:
    """ConfigError, naming the group, where it could not run a package compiled for `device`."""
    for index, group in enumerate(config.instance_group if device else ()):
        own = "cpu"
        if group.kind == "KIND_MODEL":
            own = device if gpus or device != "cuda" else "cpu"
        elif group.kind == "KIND_GPU":
            if config.cc_model_filenames:  # only the instance knows which file it loads
                continue
            own = "cpu" if settings.logical_gpus else "cuda"
        if own != device:
            raise ConfigError(
                f"instance group '{group.name}' has kind {group.kind} and runs on {own}, and the "
                f"package was compiled for {device}; compile it for {own} or change the kind",
                field=f"instance_group[{index}].kind",
            )


def _place(
    index: int,
    group: InstanceGroup,
    parameters: ModelParameters,
    settings: ServerSettings,
    gpu_count: int,
) -> Iterator[GroupPlacement]:
    sharing = parameters.enable_weight_sharing
    cpus = parameters.cpu_fraction
    base = GroupPlacement(
        deployment=group.name,
        kind=group.kind,
        gpu=None,
        replicas=1 if sharing else group.count,
        instances=group.count if sharing else 1,
        num_cpus=cpus or 0.0,
        num_gpus=0.0,
        resources={},
        passive=group.passive,
    )
    match group.kind:
        case "KIND_CPU":
            yield replace(base, num_cpus=cpus or settings.cpu_fraction)
        case "KIND_GPU":
            share = parameters.gpu_fraction or settings.gpu_fraction
            for gpu in _listed(index, group, gpu_count):
                yield replace(
                    base,
                    deployment=f"{group.name}_gpu{gpu}",
                    gpu=gpu,
                    num_gpus=share,
                    resources={gpu_resource(gpu): share},
                )
        case "KIND_MODEL":
            given = parameters.model_gpus
            gpus = min(1, gpu_count) if given is None else given
            idle = cpus or (0.0 if gpus else settings.cpu_fraction)
            yield replace(base, num_gpus=float(gpus), num_cpus=idle)
        case _:
            raise ConfigError(
                f"instance group '{group.name}' has kind {group.kind}, which is not resolved",
                field=f"instance_group[{index}].kind",
            )


def _listed(index: int, group: InstanceGroup, gpu_count: int) -> tuple[int, ...]:
    """The GPUs of a group: those that it lists, or all."""
    known = tuple(range(gpu_count))
    if not known:
        raise ConfigError(
            f"instance group '{group.name}' has kind KIND_GPU but no GPU is available",
            field=f"instance_group[{index}].kind",
        )
    for position, gpu in enumerate(group.gpus):
        if gpu not in known:
            raise ConfigError(
                f"instance group '{group.name}' specifies invalid or unsupported gpu id {gpu}; "
                f"the available ones are {', '.join(map(str, known))}",
                field=f"instance_group[{index}].gpus[{position}]",
            )
    return group.gpus or known


def _check_fit(
    group: InstanceGroup,
    index: int,
    placement: GroupPlacement,
    used: float,
    parameters: ModelParameters,
) -> None:
    if used <= 1 + _ROUNDING:
        return
    name = "GPU_FRACTION" if parameters.gpu_fraction else "the server's gpu_fraction"
    raise ConfigError(
        f"instance group '{group.name}' does not fit on gpu {placement.gpu}: {name} is "
        f"{placement.num_gpus:g} and the model's replicas there need {used:g} of 1"
        + (f", all {placement.most} of max_count" if placement.autoscaling else ""),
        field=f"instance_group[{index}]",
    )


def _check_whole(planned: list[GroupPlacement], shared_gpus: int, gpu_count: int) -> None:
    """KIND_MODEL takes whole GPUs: what does not fit would wait for ever."""
    whole = [one for one in planned if one.kind == "KIND_MODEL" and one.num_gpus]
    wanted = sum(one.most * one.num_gpus for one in whole)
    if whole and wanted + shared_gpus > gpu_count:
        others = f", {shared_gpus} more are shared by groups of KIND_GPU" if shared_gpus else ""
        raise ConfigError(
            f"instance group '{whole[-1].deployment}' does not fit: groups of KIND_MODEL need "
            f"{wanted:g} whole GPUs (MODEL_GPUS){others}, and {gpu_count} are available",
            field="instance_group",
        )


def _unique(name: str, taken: set[str]) -> str:
    """A readable name that Serve accepts and that no other group of the model has."""
    base = re.sub(r"[^\w.-]", "_", name, flags=re.ASCII)
    unique, number = base, 2
    while unique in taken:
        unique, number = f"{base}_{number}", number + 1
    taken.add(unique)
    return unique
