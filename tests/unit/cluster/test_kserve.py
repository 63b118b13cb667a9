"""The ServingRuntime for KServe: its command line is one of ours, its pod is closed like KubeRay's.

KServe's own CRD is not at hand: what is checked is what `manta serve` and Kubernetes take.
"""

from __future__ import annotations

from typing import Any

import kubernetes_validate
import pytest
import yaml

from cluster.flags import parse
from configs.server import ServerSettings
from tests.unit.cluster.manifests import CLUSTER, container, groups, rayservice


@pytest.fixture(scope="module")
def runtime() -> dict[str, Any]:
    return dict(yaml.safe_load((CLUSTER / "kserve.yaml").read_text()))


def test_its_arguments_are_those_of_manta_serve(runtime: dict[str, Any]) -> None:
    [one] = runtime["spec"]["containers"]
    command, *words = one["args"]
    assert command == "serve" and one["name"] == "kserve-container"
    settings = ServerSettings(**parse(words))
    assert settings.model_repository == ("/mnt/models",)
    assert (settings.http_port, settings.grpc_port) == (8080, 9000)
    assert one["ports"][0]["containerPort"] == settings.http_port
    annotations = runtime["metadata"]["annotations"]
    assert annotations["prometheus.kserve.io/port"] == str(settings.metrics_port)
    for probe in (one["readinessProbe"], one["livenessProbe"]):
        assert probe["httpGet"]["port"] == settings.http_port


def test_what_kserve_chooses_it_by(runtime: dict[str, Any]) -> None:
    assert (runtime["apiVersion"], runtime["kind"]) == (
        "serving.kserve.io/v1alpha1",
        "ServingRuntime",
    )
    assert runtime["spec"]["protocolVersions"] == ["v2", "grpc-v2"]
    names = {one["name"] for one in runtime["spec"]["supportedModelFormats"]}
    assert names == {"triton", "pytorch"}


def test_its_pod_is_one_of_kuberneteses(runtime: dict[str, Any]) -> None:
    spec = {key: runtime["spec"][key] for key in ("containers", "volumes")}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "manta"}, "spec": spec}
    kubernetes_validate.validate(pod, "1.32", strict=True)


def test_its_pod_is_as_closed_as_kuberays(runtime: dict[str, Any]) -> None:
    [one] = runtime["spec"]["containers"]
    service = rayservice(CLUSTER / "base")
    worker = container(dict(groups(service))["cpu"])
    context = one["securityContext"]
    assert worker["securityContext"].items() <= context.items()
    assert context["runAsNonRoot"] and context["runAsUser"] == 1000
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert one["image"] == worker["image"]
    assert {mount["mountPath"] for mount in one["volumeMounts"]} == {"/tmp", "/dev/shm"}
