"""From the disk to what is to be deployed: versions read, completed, placed, and specified.

Deploys nothing and remembers nothing, and knows of the cluster only what it is told. Blocking
calls, made by the lifecycle in threads, and by `manta check`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from configs.autoscaling import unscaled
from configs.complete import artifact_filename, runtime_kind
from configs.errors import ConfigError
from configs.model import ModelConfig
from configs.parameters import parse_parameters
from configs.placement import GroupPlacement, check_device, follow_package, list_gpus
from configs.placement import plan as plan_groups
from configs.server import ServerSettings

from . import archives
from .errors import MantaError
from .log_settings import initial
from .repository import Found, Repository
from .types import Override, ReplicaSpec

logger = logging.getLogger("ray.serve")

UNEXPECTED = "the server failed to read or deploy the model; its log says more"


@dataclass(frozen=True)
class Plan:
    """One version, read and placed, ready to be deployed."""

    found: Found
    number: int
    config: ModelConfig
    placements: tuple[GroupPlacement, ...]
    content_hash: str
    fingerprint: str
    labels: Mapping[str, tuple[str, ...]]
    override: Override | None = None

    @property
    def cpu_instances(self) -> int:
        """Those that compute, as many as there may be."""
        return sum(
            p.most * p.instances for p in self.placements if p.kind == "KIND_CPU" and not p.passive
        )


def started_with(plan: Plan, counts: Mapping[str, int]) -> Plan:
    """The plan of a version that is scaled, beginning where `counts` of it run by deployment; no
    lower than it says, unless it may not be so high."""

    def at(placement: GroupPlacement) -> GroupPlacement:
        scaling = placement.autoscaling
        if scaling is None:
            return placement
        count = max(placement.replicas, counts.get(placement.deployment, 0))
        return replace(placement, replicas=scaling.bounded(count))

    return replace(plan, placements=tuple(map(at, plan.placements)))


def kept_at(plan: Plan, counts: Mapping[str, int]) -> Plan:
    """The same where its replicas stay: as many as run, within the bounds."""

    def at(placement: GroupPlacement) -> GroupPlacement:
        scaling, count = placement.autoscaling, counts.get(placement.deployment)
        if scaling is None or count is None:
            return placement
        return replace(placement, replicas=scaling.bounded(count))

    return replace(plan, placements=tuple(map(at, plan.placements)))


class Cluster(Protocol):
    """What there is to place on: Ray's view of it is `applications`."""

    def gpu_count(self) -> int: ...

    def resources(self) -> Collection[str]: ...


class Planner:
    """`hashes` is False for who deploys nothing: files of gigabytes are then only looked at, and
    `content_hash` is empty."""

    def __init__(
        self,
        settings: ServerSettings,
        repository: Repository,
        controller_application: str,
        cluster: Cluster,
        hashes: bool = True,
    ) -> None:
        self._settings = settings
        self._repository = repository
        self._controller_application = controller_application
        self._cluster = cluster
        self._hashes = hashes
        self._completes = not settings.disable_auto_complete_config
        cache = {"MANTA_COMPILE_CACHE": settings.compile_cache} if settings.compile_cache else {}
        self._environment = {**settings.environment, **cache}

    def plan(
        self, name: str, override: Override | None = None
    ) -> tuple[list[Plan], dict[int, str]]:
        """The versions that the policy selects, and why some of them cannot be.

        Raises ConfigError or an error of ours where the whole model cannot.
        """
        repository = self._repository
        if override is not None and override.folder:
            repository = Repository((override.folder,))
        found = repository.find(name)
        if found.error:
            raise ConfigError(found.error)
        if override is not None:
            found = replace(found, given=override.config)
        gpus = self._cluster.gpu_count()
        config = repository.read_config(found, self._completes)
        numbers, failed = repository.select_versions(config, found.versions)
        plans = []
        for number in numbers:
            try:
                plan = self._plan(repository, found, number, config, gpus)
                plans.append(replace(plan, override=override))
            except (ConfigError, MantaError) as error:
                failed[number] = str(error)
            except Exception:
                logger.exception("model %s version %d could not be read", name, number)
                failed[number] = UNEXPECTED
        return plans, failed

    def _plan(
        self, repository: Repository, found: Found, number: int, config: ModelConfig, gpus: int
    ) -> Plan:
        try:
            normal = repository.version_config(found, number, config, gpus > 0, self._completes)
            files = repository.version_files(found, number)
            device = _package_device(repository, found, number, normal)
            normal = list_gpus(follow_package(normal, config, device), gpus)
            check_device(normal, device, self._settings, gpus)
            placements = self._place(normal, files, gpus)
            labels = repository.labels(found, normal)
            repository.warmup_files(found, normal)  # refuses a missing or short one
        except ConfigError as error:
            raise repository.explain(found, error) from None
        repository.check_artifacts(found, number, normal)
        content_hash = ""
        if self._hashes:
            content_hash = repository.content_hash(found, number, normal)
        else:
            repository.content(found, number, normal)  # refuses what a hash would
        return Plan(
            found=found,
            number=number,
            config=normal,
            placements=placements,
            content_hash=content_hash,
            fingerprint=fingerprint(found, content_hash, normal, placements, self._settings),
            labels=labels,
        )

    def _place(
        self, config: ModelConfig, files: Sequence[str], gpus: int
    ) -> tuple[GroupPlacement, ...]:
        """Without index resources where no node advertises them (a plain `serve run`): there the
        listed index still decides inside the replica, on whatever node Ray picks."""
        parameters, _ = parse_parameters(config, files)
        offered = self._cluster.resources()
        return tuple(
            placement.without_resources() if set(placement.resources) - set(offered) else placement
            for placement in plan_groups(config, parameters, self._settings, gpus)
        )

    def specs(self, plan: Plan, application: str, cpu_instances: int) -> list[ReplicaSpec]:
        """One per deployment. `cpu_instances`: how many will share this machine's CPUs."""
        threads = max(1, available_cpus() // max(1, cpu_instances))
        return [
            ReplicaSpec(
                controller_application=self._controller_application,
                application=application,
                deployment=placement.deployment,
                repository=str(Path(plan.found.path).parent),
                model_name=plan.found.name,
                version=plan.number,
                config=plan.config,
                complete=self._completes,
                content_hash=plan.content_hash,
                fingerprint=plan.fingerprint,
                kind=placement.kind,
                gpu=placement.gpu,
                instances=placement.instances,
                threads=threads,
                max_execution_s=self._settings.max_execution_s,
                logical_gpus=self._settings.logical_gpus,
                environment=self._environment,
                passive=placement.passive,
                call_limit_s=self._settings.max_queue_s + self._settings.max_execution_s,
                by_reference_bytes=self._settings.by_reference_min_bytes,
                config_name=self._settings.model_config_name,
                override=plan.override,
                logging=initial(self._settings),
            )
            for placement in plan.placements
        ]


def _package_device(repository: Repository, found: Found, number: int, config: ModelConfig) -> str:
    """What an AOTI package was compiled for; "" for models that run anywhere."""
    files = repository.version_files(found, number)
    if runtime_kind(config, files) != "aoti" or artifact_filename(config) not in files:
        return ""
    return archives.inspect(repository.artifact(found, number, config)).device


def fingerprint(
    found: Found,
    content_hash: str,
    config: ModelConfig,
    placements: Sequence[GroupPlacement],
    settings: ServerSettings,
) -> str:
    """Equal when a new load would make replicas that do the very same.

    How many of them there are, and which other versions the policy selects, is none of theirs: such
    changes are made while they serve.
    """
    facts = (
        content_hash,
        str(Path(found.path).parent),
        found.given is None,
        config.open_batch,
        json.dumps(unscaled(config).model_dump(mode="json"), sort_keys=True),
        [
            (replace(p, replicas=0, autoscaling=None), sorted(p.resources.items()))
            for p in placements
        ],
        sorted(settings.environment.items()),
        settings.max_execution_s,
        settings.logical_gpus,
        settings.disable_auto_complete_config,
        settings.compile_cache,
    )
    return hashlib.sha256(repr(facts).encode(errors="surrogateescape")).hexdigest()


def available_cpus() -> int:
    """CPUs that this process may use: affinity, and the cgroup's quota where there is one."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpus = affinity or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cpus
    return cpus if quota == "max" else max(1, min(cpus, int(quota) // int(period)))
