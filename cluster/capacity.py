"""What a model repository needs of a cluster: processes, CPUs, memory, GPUs, pods with GPUs.

Reads and places as the Controller does, by its Planner; the rest is arithmetic on instance groups
and the sizes of files. Loads nothing, and knows neither Ray nor Kubernetes. Called by `deploy`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.errors import ConfigError
from configs.parameters import ModelParameters, parse_parameters
from configs.placement import GroupPlacement
from configs.server import ServerSettings
from deployments.planner import Plan, Planner
from deployments.repository import Repository

from .machine import Machine

MIB = 1 << 20
# Beside the weights. Forks share much of the first, and the second is CUDA's context in host
# memory: both are on the safe side for models that bring little code of their own.
CPU_PROCESS_MIB, GPU_PROCESS_MIB = 300, 1500
# While it loads, a model is in memory as a file's content and as tensors.
CPU_COPIES, GPU_COPIES = 2.0, 1.0
_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True)
class GpuShare:
    """What one process asks for: a share of the GPU with index `gpu`, or `amount` whole ones."""

    gpu: int | None
    amount: float


@dataclass(frozen=True, slots=True)
class Demand:
    """One instance group of one version, on one GPU where it lists several; of a group that is
    scaled, all that there may be."""

    model: str
    version: int
    kind: str
    processes: int
    instances: int
    cpus: float
    process_mib: int
    share: GpuShare | None

    @property
    def memory_mib(self) -> int:
        return self.processes * self.process_mib


@dataclass(frozen=True, slots=True)
class Totals:
    """Over all demands of one side, with a GPU or without."""

    processes: int
    cpus: float
    memory_mib: int
    largest_mib: int


def read(root: Path, settings: ServerSettings, gpus: int) -> tuple[Demand, ...]:
    """All versions that would be loaded, on nodes with `gpus` GPUs each.

    Raises ConfigError or an error of ours: what the server would refuse has no place in a manifest.
    """
    repository = Repository([root])
    repository.check()
    planner = Planner(settings, repository, "", Machine(gpus), hashes=False)
    demands: list[Demand] = []
    for found in repository.scan():
        plans, failed = planner.plan(found.name)
        for reason in failed.values():
            raise ConfigError(reason)
        for plan in plans:
            files = repository.version_files(found, plan.number)
            parameters, _ = parse_parameters(plan.config, files)
            demands += [_demand(plan, one, parameters) for one in plan.placements]
    return tuple(demands)


def _demand(plan: Plan, placement: GroupPlacement, parameters: ModelParameters) -> Demand:
    share = None
    if placement.num_gpus:
        share = GpuShare(placement.gpu, placement.num_gpus)
    weights = weights_mib(Path(plan.found.path) / str(plan.number))
    process, copies = CPU_PROCESS_MIB, CPU_COPIES
    if share is not None:
        process, copies = GPU_PROCESS_MIB, GPU_COPIES
    return Demand(
        model=plan.found.name,
        version=plan.number,
        kind=placement.kind,
        processes=placement.most,
        instances=placement.instances,
        cpus=_cpus(placement, parameters, share is not None),
        process_mib=process + math.ceil(copies * weights),
        share=share,
    )


def _cpus(placement: GroupPlacement, parameters: ModelParameters, on_gpu: bool) -> float:
    """What the model says (CPU_FRACTION), else a CPU for each of its threads that compute; on a
    GPU, one that feeds it."""
    if parameters.cpu_fraction is not None:
        return placement.most * parameters.cpu_fraction
    if placement.passive:
        return placement.most * placement.num_cpus
    threads = parameters.intra_op_thread_count or parameters.num_threads
    each = 1 if on_gpu else placement.instances * max(1, threads)
    return float(placement.most * each)


def weights_mib(folder: Path) -> float:
    """All files of a version directory: nearly all of it is weights."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / MIB


def total(demands: Iterable[Demand]) -> Totals:
    chosen = tuple(demands)
    return Totals(
        processes=sum(one.processes for one in chosen),
        cpus=sum(one.cpus for one in chosen),
        memory_mib=sum(one.memory_mib for one in chosen),
        largest_mib=max((one.process_mib for one in chosen), default=0),
    )


def gpu_pods(demands: Iterable[Demand], gpus: int) -> int:
    """How many pods with `gpus` GPUs hold all shares, each on its index; first fit, largest first.

    Ray places in its own way, and may need one more where shares do not divide a GPU.
    """
    shares = [one.share for one in demands if one.share for _ in range(one.processes)]
    free: list[list[float]] = []
    for share in sorted(shares, key=lambda one: (one.gpu is not None, -one.amount)):
        if not any(_take(pod, share) for pod in free):
            free.append([1.0] * gpus)
            if not _take(free[-1], share):
                raise ConfigError(f"no pod with {gpus} GPUs holds {share.amount:g} of them")
    return len(free)


def _take(pod: list[float], share: GpuShare) -> bool:
    """Whether it fits; then `pod`, what is free of each GPU, is less by it."""
    indices: Sequence[int]
    if share.gpu is not None:
        indices, each = (share.gpu,), share.amount
    else:
        whole = round(share.amount)
        indices, each = [i for i, rest in enumerate(pod) if rest >= 1 - _ROUNDING][:whole], 1.0
        if len(indices) < whole:
            return False
    if any(pod[index] < each - _ROUNDING for index in indices):
        return False
    for index in indices:
        pod[index] -= each
    return True
