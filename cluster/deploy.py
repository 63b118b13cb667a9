"""`manta deploy PATH --dry-run`: prints what to apply to a cluster with KubeRay.

Owns the command line and the manifest, which is `base/` with names, images, sizes and a group of
GPU workers; how much there must be of what is for `capacity` to say. Talks to no cluster.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from configs.errors import ConfigError
from configs.placement import gpu_resource
from configs.server import ServerSettings
from deployments.errors import MantaError

from . import capacity
from .capacity import Demand

GOOD, BAD, WRONG = 0, 1, 2
BASE = Path(__file__).with_name("base")
CPU_IMAGE, CUDA_IMAGE = "manta:0.1.0-cpu", "manta:0.1.0-cuda"
WHOLE_GPU = "nvidia.com/gpu"
_INSTANCE = "app.kubernetes.io/instance"
_NAME = "manta"
# A Router, and Ray's own processes on a worker.
ROUTER_CPUS, ROUTER_MIB = 1, 1024
GIB = 1024  # in MiB

DESCRIPTION = """\
Prints the manifest (RayService, Service, NetworkPolicy) that serves a model repository on a
Kubernetes cluster with KubeRay. The size of its workers is computed from the instance groups and
the files of the models; no model is loaded."""
EPILOG = """\
The repository is read here, and lies in the cluster on the volume claim that --claim names. Sizes
are an estimate: what a model computes with beside its weights is not in them.

  manta deploy PATH --dry-run | kubectl apply --server-side -f -

exit codes: 0 printed; 1 the repository has an error; 2 a wrong command line."""
NO_APPLY = """\
manta deploy: without --dry-run is not supported: Manta talks to no cluster. Apply what it prints:
  manta deploy {path} --dry-run | kubectl apply --server-side -f -"""


def main(arguments: Sequence[str]) -> int:
    options = _parse(arguments)
    if not options.dry_run:
        print(NO_APPLY.format(path=options.path), file=sys.stderr)
        return WRONG
    documents = load_base()
    try:
        settings = _settings(documents[0], options.path)
        demands = capacity.read(Path(settings.model_repository[0]), settings, options.gpus)
        if not demands:
            raise ConfigError(f"there is no model in {options.path}")
        render(documents, demands, options)
    except (ConfigError, MantaError) as error:
        print(f"manta deploy: {error}", file=sys.stderr)
        return BAD
    print(heading(options.path, demands))
    print(to_text(documents), end="")
    return GOOD


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="manta deploy",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("path", metavar="PATH", help="the model repository, as it is here")
    add("--dry-run", action="store_true", help="print the manifest; there is no other way yet")
    add("--name", default=_NAME, help="of the RayService (default: %(default)s)")
    add("--namespace", help="where it belongs (default: none is named)")
    add("--image", help=f"of all pods (default: {CPU_IMAGE}, or {CUDA_IMAGE} where there are GPUs)")
    add("--claim", default="manta-models", help="the volume claim (default: %(default)s)")
    add("--workers", type=_count, default=1, metavar="N", help="CPU workers (default: 1)")
    add("--cpus", type=_count, metavar="N", help="CPUs of a worker (default: computed)")
    add("--gpus", type=_gpus, default=0, metavar="N", help="GPUs of a GPU worker (default: 0)")
    add(
        "--gpu-resource",
        default=WHOLE_GPU,
        metavar="NAME",
        help="what Kubernetes calls them, such as nvidia.com/mig-1g.10gb (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    if "mig-" in options.gpu_resource and options.gpus > 1:
        parser.error("a process can use one MIG slice only: --gpus 1 with --gpu-resource")
    return options


def _count(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 1024:
        raise argparse.ArgumentTypeError(f"{value} must lie in 1 to 1024")
    return value


def _gpus(text: str) -> int:
    value = int(text)
    if not 0 <= value <= 64:
        raise argparse.ArgumentTypeError(f"{value} must lie in 0 to 64")
    return value


def load_base() -> list[dict[str, Any]]:
    """The documents of `base/`, the RayService first."""
    index = yaml.safe_load((BASE / "kustomization.yaml").read_text())
    texts = [(BASE / name).read_text() for name in index["resources"]]
    return [document for text in texts for document in yaml.safe_load_all(text)]


def _settings(service: dict[str, Any], path: str) -> ServerSettings:
    """Those that the manifest's own server would have, for this repository."""
    arguments = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"][0]["args"]
    return ServerSettings(**arguments, model_repository=(os.path.abspath(path),))


# --- the manifest --------------------------------------------------------------------------------


def render(
    documents: list[dict[str, Any]], demands: Sequence[Demand], options: argparse.Namespace
) -> None:
    """Makes the base's documents those of this repository."""
    cluster = documents[0]["spec"]["rayClusterConfig"]
    [cpu] = cluster["workerGroupSpecs"]
    on_gpu = [one for one in demands if one.share]
    cpu["replicas"] = cpu["minReplicas"] = options.workers
    cpu["maxReplicas"] = max(cpu["maxReplicas"], options.workers)
    pods = capacity.gpu_pods(on_gpu, options.gpus) if on_gpu else 0
    if pods:
        group = gpu_group(cpu, options.gpus, options.gpu_resource)
        group["replicas"] = group["minReplicas"] = pods
        group["maxReplicas"] = max(group["maxReplicas"], pods)
        size(group, on_gpu, pods, options.cpus)
        cluster["workerGroupSpecs"].append(group)
    size(cpu, [one for one in demands if not one.share], options.workers, options.cpus)
    templates = [group["template"] for group in cluster["workerGroupSpecs"]]
    for template in (cluster["headGroupSpec"]["template"], *templates):
        [container] = template["spec"]["containers"]
        container["image"] = options.image or (CUDA_IMAGE if pods else CPU_IMAGE)
        for volume in template["spec"]["volumes"]:
            if "persistentVolumeClaim" in volume:
                volume["persistentVolumeClaim"]["claimName"] = options.claim
    for document in documents:
        document["metadata"]["name"] = options.name
        if options.namespace:
            document["metadata"]["namespace"] = options.namespace
        _relabel(document, options.name)


def gpu_group(cpu: dict[str, Any], gpus: int, resource: str) -> dict[str, Any]:
    """A group like the CPU workers', with `gpus` of a resource of Kubernetes, known by index."""
    group = copy.deepcopy(cpu)
    indices = ", ".join(f'"{gpu_resource(index)}": 1' for index in range(gpus))
    group["groupName"] = "mig" if "mig-" in resource else "gpu"
    group["rayStartParams"] |= {"num-gpus": str(gpus), "resources": f"'{{{indices}}}'"}
    pod = group["template"]["spec"]
    pod["tolerations"] = [{"key": WHOLE_GPU, "operator": "Exists", "effect": "NoSchedule"}]
    [container] = pod["containers"]
    container["image"] = CUDA_IMAGE
    for amounts in container["resources"].values():
        amounts |= {"memory": "16Gi", resource: str(gpus)}
    return group


def size(
    group: dict[str, Any], demands: Sequence[Demand], pods: int, cpus: int | None = None
) -> None:
    """CPUs and memory of each of the group's pods: its part of all, and no less than one process
    with what every worker has."""
    needs = capacity.total(demands)
    store = int(group["rayStartParams"]["object-store-memory"]) // capacity.MIB
    memory = max(needs.memory_mib / pods, needs.largest_mib) + ROUTER_MIB + store
    [container] = group["template"]["spec"]["containers"]
    for amounts in container["resources"].values():
        amounts["cpu"] = str(cpus or math.ceil(needs.cpus / pods) + ROUTER_CPUS)
        amounts["memory"] = f"{max(4, math.ceil(memory / GIB))}Gi"


def _relabel(node: Any, name: str) -> None:
    """All labels and selectors of the instance."""
    if isinstance(node, dict):
        if _INSTANCE in node:
            node[_INSTANCE] = name
        node = list(node.values())
    if isinstance(node, list):
        for one in node:
            _relabel(one, name)


# --- text ----------------------------------------------------------------------------------------


def heading(path: str, demands: Sequence[Demand]) -> str:
    """What the sizes are made of, as comments."""
    rows = [("model", "version", "kind", "processes", "instances", "CPUs", "MiB", "GPU")]
    rows += [
        (
            one.model,
            str(one.version),
            one.kind,
            str(one.processes),
            str(one.processes * one.instances),
            f"{one.cpus:g}",
            str(one.memory_mib),
            _share(one),
        )
        for one in demands
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    everything = capacity.total(demands)
    lines += [
        f"{everything.processes} processes, {everything.cpus:g} CPUs, {everything.memory_mib} MiB, "
        f"{sum(one.processes * one.share.amount for one in demands if one.share):g} GPUs",
        "MiB is an estimate from the files' sizes; what a model computes with is not in it.",
    ]
    return "\n".join(f"# {line}" for line in (f"manta deploy {path}", *lines))


def _share(demand: Demand) -> str:
    if demand.share is None:
        return "-"
    if demand.share.gpu is None:
        return f"{demand.share.amount:g} whole"
    return f"{demand.share.amount:g} of {demand.share.gpu}"


class _Dumper(yaml.SafeDumper):
    """PyYAML is told of styles by subclasses: a text of several lines stays one."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None
    ),
)


def to_text(documents: Sequence[dict[str, Any]]) -> str:
    text: str = yaml.dump_all(
        documents, Dumper=_Dumper, sort_keys=False, width=100, explicit_start=True
    )
    return text
