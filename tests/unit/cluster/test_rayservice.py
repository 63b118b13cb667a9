"""The RayService and its overlays: KubeRay's schemas, Serve's, and what KubeRay checks in its code.

Kustomize is not at hand: `manifests.build` applies the overlays' patches, which are plain RFC 6902.
"""

from __future__ import annotations

import copy
import importlib
import json
import re
from typing import Any

import kubernetes_validate
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from cluster.cli import SERVE_ENV
from cluster.deploy import WHOLE_GPU, gpu_group, load_base
from configs.placement import gpu_resource
from configs.server import ServerSettings
from deployments.app import CONTROLLER_MARGIN_S
from tests.unit.cluster.manifests import (
    CLUSTER,
    CRDS,
    OVERLAYS,
    ROOT,
    build,
    container,
    environment,
    errors,
    groups,
    quantity,
    rayservice,
)

BASE = CLUSTER / "base"
FOLDERS = [BASE, *(CLUSTER / "overlays" / name for name in OVERLAYS)]
KUBERNETES = "1.32"  # of the schemas for what is not KubeRay's


@pytest.fixture(scope="module", params=FOLDERS, ids=lambda folder: folder.name)
def service(request: pytest.FixtureRequest) -> dict[str, Any]:
    return rayservice(request.param)


def arguments(service: dict[str, Any]) -> dict[str, Any]:
    [application] = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    return dict(application["args"])


# --- schemas -------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", CRDS)
def test_the_strict_schema_of_kuberay(service: dict[str, Any], version: str) -> None:
    assert errors(service, version) == []


def test_the_oldest_and_the_newest_release_are_there() -> None:
    assert sorted(CRDS) == ["v1.5.1", "v1.6.2"]


@pytest.mark.parametrize("version", CRDS)
@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "rayClusterConfg"), {}),
        (("spec", "rayClusterConfig", "gcsFaultToleranceOptions", "redisAdress"), "redis:6379"),
        (("spec", "rayClusterConfig", "workerGroupSpecs", 0, "replicas"), "two"),
        (("spec", "rayClusterConfig", "authOptions", "mode"), "tokens"),
        (
            ("spec", "rayClusterConfig", "headGroupSpec", "template", "spec", "hostNetwrk"),
            True,
        ),
    ],
    ids=lambda value: str(value[-1]) if isinstance(value, tuple) else "",
)
def test_control_a_planted_mistake_fails(version: str, path: tuple[Any, ...], value: Any) -> None:
    service = copy.deepcopy(rayservice(CLUSTER / "overlays" / "ha"))
    node: Any = service
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    assert len(errors(service, version)) == 1


def test_the_other_documents_are_kuberneteses_own() -> None:
    others = [one for folder in FOLDERS for one in build(folder) if one["kind"] != "RayService"]
    assert {one["kind"] for one in others} == {
        "Service",
        "NetworkPolicy",
        "PersistentVolumeClaim",
        "PodDisruptionBudget",
    }
    for one in others:
        kubernetes_validate.validate(one, KUBERNETES, strict=True)


def test_control_a_field_that_kubernetes_does_not_know() -> None:
    [policy] = [one for one in build(BASE) if one["kind"] == "NetworkPolicy"]
    broken = copy.deepcopy(policy)
    broken["spec"]["podSelectors"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, KUBERNETES, strict=True)


def test_serve_accepts_the_application(service: dict[str, Any]) -> None:
    parsed = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    [application] = parsed.applications
    module, _, name = application.import_path.partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    assert ServerSettings(**application.args).listener == "router"
    assert parsed.proxy_location == "Disabled"


def test_the_base_serves_what_serve_config_says() -> None:
    told = yaml.safe_load(rayservice(BASE)["spec"]["serveConfigV2"])
    assert told == yaml.safe_load((ROOT / "serve_config.yaml").read_text())


def test_the_manifest_is_where_one_looks_for_it() -> None:
    assert (CLUSTER / "rayservice.yaml").resolve() == (BASE / "rayservice.yaml").resolve()


# --- what KubeRay's code asks for ----------------------------------------------------------------


def test_versions_agree(service: dict[str, Any]) -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    cluster = service["spec"]["rayClusterConfig"]
    assert cluster["rayVersion"] == pins["ray"]
    [version] = re.findall(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)
    images = {container(group)["image"] for _, group in groups(service)}
    assert images in ({f"manta:{version}-cpu"}, {f"manta:{version}-cuda"})


def test_tokens_are_asked_for(service: dict[str, Any]) -> None:
    cluster = service["spec"]["rayClusterConfig"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert tuple(map(int, cluster["rayVersion"].split("."))) >= (2, 52)


def test_without_an_autoscaler_groups_have_bounds(service: dict[str, Any]) -> None:
    cluster = service["spec"]["rayClusterConfig"]
    assert not cluster.get("enableInTreeAutoscaling")
    for group in cluster["workerGroupSpecs"]:
        assert 1 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_probes_and_start_are_kuberays(service: dict[str, Any]) -> None:
    for _, group in groups(service):
        one = container(group)
        assert not one.keys() & {"livenessProbe", "readinessProbe", "startupProbe"}
        assert not one.keys() & {"command", "args"}


def test_ports(service: dict[str, Any]) -> None:
    settings = ServerSettings(**arguments(service))
    for name, group in groups(service):
        ports = {port["name"]: port["containerPort"] for port in container(group)["ports"]}
        assert all(len(port) <= 15 for port in ports)
        assert ports["serve"] == settings.http_port == 8000
        assert ports["grpc"] == settings.grpc_port == 8001
        assert ports["manta-metrics"] == settings.metrics_port == 8002
        assert ports["metrics"] == 8080  # Ray's, whose name KubeRay takes for it
        head = {"gcs-server": 6379, "dashboard": 8265}
        assert head.items() <= ports.items() if name == "head" else not head.keys() & ports.keys()


def test_the_environment_is_the_same_everywhere(service: dict[str, Any]) -> None:
    """The ingress profile and the addresses: Router and Controller run on any node."""
    lines = [line for line in SERVE_ENV.read_text().splitlines() if not line.startswith("#")]
    profile = dict(line.split("=", 1) for line in lines)
    [given] = {tuple(environment(container(group)).items()) for _, group in groups(service)}
    variables = dict(given)
    assert profile.items() <= variables.items()
    assert variables.keys() - profile.keys() == {
        "HOME",
        "MANTA_MODEL_REPOSITORY",
        "MANTA_HTTP_ADDRESS",
        "MANTA_GRPC_ADDRESS",
        "MANTA_METRICS_ADDRESS",
        "MANTA_COMPILE_CACHE",
        "RAY_USAGE_STATS_ENABLED",
    }


def test_the_settings_that_the_environment_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    service = rayservice(BASE)
    for name, value in environment(container(dict(groups(service))["head"])).items():
        monkeypatch.setenv(name, value)
    settings = ServerSettings(**arguments(service))
    assert settings.model_repository == ("/models",)
    assert settings.fork_server
    addresses = {settings.http_address, settings.grpc_address, settings.metrics_address}
    assert addresses == {"0.0.0.0"}  # /-/healthz is asked for on the pod's address
    assert settings.compile_cache.startswith("/tmp/")


def test_no_model_runs_on_the_head(service: dict[str, Any]) -> None:
    parameters = dict(groups(service))["head"]["rayStartParams"]
    assert parameters["num-cpus"] == "0"
    assert all(isinstance(value, str) for value in parameters.values())


def test_there_is_time_to_end_in_order(service: dict[str, Any]) -> None:
    needed_s = ServerSettings(**arguments(service)).exit_timeout_s + CONTROLLER_MARGIN_S
    for _, group in groups(service):
        shell, option, words = container(group)["lifecycle"]["preStop"]["exec"]["command"]
        pause_s = int(re.fullmatch(r"sleep (\d+); ray stop", words)[1])  # type: ignore[index]
        assert (shell, option) == ("/bin/bash", "-c") and pause_s >= needed_s
        assert group["template"]["spec"]["terminationGracePeriodSeconds"] >= 2 * needed_s
    assert service["spec"]["rayClusterDeletionDelaySeconds"] >= needed_s


def test_memory_adds_up(service: dict[str, Any]) -> None:
    for _, group in groups(service):
        one = container(group)
        resources = one["resources"]
        for amounts in resources.values():
            assert {"cpu", "memory"} <= amounts.keys()
        assert resources["limits"]["memory"] == resources["requests"]["memory"]
        memory = quantity(resources["limits"]["memory"])
        [shared] = [v for v in group["template"]["spec"]["volumes"] if v["name"] == "shared-mem"]
        assert shared["emptyDir"]["medium"] == "Memory"
        shared_bytes = quantity(shared["emptyDir"]["sizeLimit"])
        store = int(group["rayStartParams"]["object-store-memory"])
        assert store < shared_bytes < memory


# --- security (what is demanded of manifests) ----------------------------------------------------


def test_the_restricted_security_context(service: dict[str, Any]) -> None:
    for _, group in groups(service):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not pod["automountServiceAccountToken"] and not pod["enableServiceLinks"]
        assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC"}
        assert container(group)["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


def test_what_can_be_written_and_what_cannot(service: dict[str, Any]) -> None:
    for _, group in groups(service):
        mounts = {one["mountPath"]: one for one in container(group)["volumeMounts"]}
        volumes = {one["name"]: one for one in group["template"]["spec"]["volumes"]}
        assert mounts.keys() == {"/models", "/tmp", "/dev/shm"}
        for path in ("/tmp", "/dev/shm"):
            assert "emptyDir" in volumes[mounts[path]["name"]]
        assert mounts["/models"]["readOnly"]
        assert volumes[mounts["/models"]["name"]]["persistentVolumeClaim"]["readOnly"]


def test_the_network_policy_covers_the_pods(service: dict[str, Any]) -> None:
    [policy] = [one for one in build(BASE) if one["kind"] == "NetworkPolicy"]
    chosen = policy["spec"]["podSelector"]["matchLabels"]
    for _, group in groups(service):
        assert chosen.items() <= group["template"]["metadata"]["labels"].items()
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    opened = [
        (rule["from"], sorted(port["port"] for port in rule["ports"]))
        for rule in policy["spec"]["ingress"]
        if "ports" in rule
    ]
    assert [ports for _, ports in opened] == [[8000, 8265], [8000, 8001], [8002, 8080]]
    for rule in (*policy["spec"]["ingress"], *policy["spec"]["egress"]):
        peers = rule.get("from") or rule["to"]
        assert peers and all(peers), "an empty peer is everybody"
        if "ports" not in rule:
            assert peers == [{"podSelector": {"matchLabels": chosen}}]


def test_the_service_finds_routers_by_named_ports() -> None:
    [service] = [one for one in build(BASE) if one["kind"] == "Service"]
    assert service["spec"]["selector"]["ray.io/serve"] == "true"
    named = {port["name"] for port in container(dict(groups(rayservice(BASE)))["cpu"])["ports"]}
    assert {port["targetPort"] for port in service["spec"]["ports"]} == {"serve", "grpc"} <= named
    assert [port["port"] for port in service["spec"]["ports"]] == [8000, 8001]


# --- overlays ------------------------------------------------------------------------------------


def changed(name: str) -> set[str]:
    """Where the overlay's RayService differs from the base's."""
    return set(_differences(rayservice(BASE), rayservice(CLUSTER / "overlays" / name)))


def _differences(one: Any, other: Any, path: str = "") -> list[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        keys = {**one, **other}
        found = [_differences(one.get(k), other.get(k), f"{path}/{k}") for k in keys]
    elif isinstance(one, list) and isinstance(other, list):
        long = max(len(one), len(other))
        pairs = [(one[i : i + 1], other[i : i + 1]) for i in range(long)]
        found = [
            _differences(a[0], b[0], f"{path}/{i}") if a and b else [f"{path}/{i}"]
            for i, (a, b) in enumerate(pairs)
        ]
    else:
        return [] if one == other else [path]
    return [line for lines in found for line in lines]


_HEAD = "/spec/rayClusterConfig/headGroupSpec"
_WORKER = "/spec/rayClusterConfig/workerGroupSpecs/0"
_IMAGES = {f"{group}/template/spec/containers/0/image" for group in (_HEAD, _WORKER)}


@pytest.mark.parametrize("name", ["gpu", "mig"])
def test_gpus_are_a_group_of_their_own(name: str) -> None:
    assert changed(name) == {*_IMAGES, "/spec/rayClusterConfig/workerGroupSpecs/1"}


def test_a_group_of_gpus_is_what_manta_deploy_makes() -> None:
    for name, resource in (("gpu", WHOLE_GPU), ("mig", "nvidia.com/mig-1g.10gb")):
        service = rayservice(CLUSTER / "overlays" / name)
        [cpu] = load_base()[0]["spec"]["rayClusterConfig"]["workerGroupSpecs"]
        assert dict(groups(service))[name] == gpu_group(cpu, 1, resource)


@pytest.mark.parametrize("gpus", [1, 2, 8])
def test_gpus_are_known_by_index(gpus: int) -> None:
    [cpu] = load_base()[0]["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    group = gpu_group(cpu, gpus, WHOLE_GPU)
    told = group["rayStartParams"]["resources"]
    assert told[0] == told[-1] == "'", "KubeRay puts it on a shell's command line"
    assert json.loads(told[1:-1]) == {gpu_resource(index): 1 for index in range(gpus)}
    assert group["rayStartParams"]["num-gpus"] == str(gpus)
    for amounts in container(group)["resources"].values():
        assert amounts[WHOLE_GPU] == str(gpus)


def test_two_routers_and_a_head_that_may_die() -> None:
    service = rayservice(CLUSTER / "overlays" / "ha")
    assert changed("ha") == {
        "/spec/excludeHeadPodFromServeSvc",
        "/spec/rayClusterConfig/gcsFaultToleranceOptions",
        "/spec/serveConfigV2",
        f"{_WORKER}/replicas",
        f"{_WORKER}/minReplicas",
        f"{_WORKER}/template/spec/topologySpreadConstraints",
    }
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    [application] = config["applications"]
    assert application.pop("deployments") == [
        {"name": "Router", "max_replicas_per_node": 1, "ray_actor_options": {"num_cpus": 0.1}}
    ]
    assert application["args"].pop("router_replicas") == 2
    assert config == yaml.safe_load(rayservice(BASE)["spec"]["serveConfigV2"])
    # A new Router needs a node without one while the old ones still serve.
    assert dict(groups(service))["cpu"]["replicas"] > 2


def test_redis_is_asked_for_once() -> None:
    """KubeRay refuses the options beside the older annotation and the variables that they set."""
    service = rayservice(CLUSTER / "overlays" / "ha")
    options = service["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]
    assert options["redisPassword"].keys() == {"valueFrom"}  # no secret in a manifest
    assert not service["metadata"].get("annotations")
    head = dict(groups(service))["head"]
    taken = {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "RAY_external_storage_namespace"}
    assert not taken & environment(container(head)).keys()
    assert "redis-password" not in head["rayStartParams"]


def test_the_overlay_for_development_is_smaller() -> None:
    base, dev = (dict(groups(rayservice(one))) for one in (BASE, CLUSTER / "overlays" / "dev"))
    sizes = re.compile("/resources/|/object-store-memory$|/maxReplicas$")
    assert all(sizes.search(path) for path in changed("dev"))
    for name, group in dev.items():
        for what in ("cpu", "memory"):
            limits = [container(one[name])["resources"]["limits"][what] for one in (base, dev)]
            assert quantity(limits[1]) <= quantity(limits[0])
        claims = [v for v in group["template"]["spec"]["volumes"] if "persistentVolumeClaim" in v]
        [made] = [d for d in build(CLUSTER / "overlays" / "dev") if "Claim" in d["kind"]]
        assert claims[0]["persistentVolumeClaim"]["claimName"] == made["metadata"]["name"]


def test_every_overlay_is_tested() -> None:
    assert {path.name for path in (CLUSTER / "overlays").iterdir()} == set(OVERLAYS)
