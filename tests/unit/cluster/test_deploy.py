"""`manta deploy --dry-run`: what it prints is applied as it is, and its sizes follow the models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cluster import capacity, cli
from cluster.capacity import CPU_COPIES, CPU_PROCESS_MIB, GPU_PROCESS_MIB, Demand, GpuShare
from cluster.deploy import CPU_IMAGE, CUDA_IMAGE, ROUTER_CPUS, ROUTER_MIB, load_base
from configs.errors import ConfigError
from tests.unit.cluster.manifests import CRDS, container, environment, errors, groups, quantity

CONFIG = """
platform: "pytorch_libtorch"
max_batch_size: 8
input {{ name: "x" data_type: TYPE_FP32 dims: 4 }}
output {{ name: "y" data_type: TYPE_FP32 dims: 4 }}
{more}
"""
SHARING = 'parameters { key: "ENABLE_WEIGHT_SHARING" value { string_value: "true" } }'


def parameter(name: str, value: object) -> str:
    return f'parameters {{ key: "{name}" value {{ string_value: "{value}" }} }}'


def model(root: Path, name: str, more: str = "", mib: int = 10) -> None:
    folder = root / name / "1"
    folder.mkdir(parents=True)
    (folder.parent / "config.pbtxt").write_text(CONFIG.format(more=more))
    with (folder / "model.pt").open("wb") as file:
        file.truncate(mib * capacity.MIB)


class Printed:
    """The manifest that a run of the command has printed."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.documents: list[dict[str, Any]] = list(yaml.safe_load_all(text))
        self.service = self.documents[0]
        self.groups = dict(groups(self.service))

    def limits(self, group: str) -> dict[str, Any]:
        return dict(container(self.groups[group])["resources"]["limits"])

    def memory_mib(self, group: str) -> float:
        return quantity(self.limits(group)["memory"]) / capacity.MIB

    def store_mib(self, group: str) -> int:
        return int(self.groups[group]["rayStartParams"]["object-store-memory"]) // capacity.MIB


@pytest.fixture
def deploy(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    def run(*words: str) -> Printed:
        code = cli.main(["deploy", str(tmp_path), "--dry-run", *words])
        said = capsys.readouterr()
        assert (code, said.err) == (0, "")
        return Printed(said.out)

    return run


def test_without_dry_run_it_says_what_to_do(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    model(tmp_path, "a")
    assert cli.main(["deploy", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert "without --dry-run is not supported" in said.err and "kubectl apply" in said.err
    assert said.out == ""


@pytest.mark.parametrize("version", CRDS)
@pytest.mark.parametrize("words", [(), ("--gpus=2",), ("--gpus=1", "--workers=3", "--cpus=5")])
def test_what_is_printed_passes_the_strict_schema(deploy, tmp_path, words, version) -> None:
    model(tmp_path, "a", "instance_group { count: 2 }")
    assert errors(deploy(*words).service, version) == []


def test_it_is_the_base_but_for_sizes(deploy, tmp_path) -> None:
    model(tmp_path, "a", "instance_group { kind: KIND_CPU }", mib=1)
    printed, base = deploy(), load_base()
    assert [one["kind"] for one in printed.documents] == [one["kind"] for one in base]
    assert printed.documents[1:] == base[1:]
    [cpu] = base[0]["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    for amounts in container(cpu)["resources"].values():
        amounts |= printed.limits("cpu")
    assert printed.service == base[0]
    assert printed.service["spec"]["serveConfigV2"] in printed.text.replace("\n    ", "\n")


def test_cpus_and_memory_of_a_worker(deploy, tmp_path) -> None:
    model(tmp_path, "two", "instance_group { kind: KIND_CPU count: 2 }", mib=1000)
    model(tmp_path, "wide", parameter("INTRA_OP_THREAD_COUNT", 3), mib=1)
    printed = deploy()
    assert printed.limits("cpu")["cpu"] == str(2 + 3 + ROUTER_CPUS)
    needed = 2 * (CPU_PROCESS_MIB + CPU_COPIES * 1000) + CPU_PROCESS_MIB + CPU_COPIES
    needed += ROUTER_MIB + printed.store_mib("cpu")
    assert needed <= printed.memory_mib("cpu") < needed + 1024
    assert "two    1        KIND_CPU  2          2" in printed.text
    assert printed.groups.keys() == {"head", "cpu"}
    assert container(printed.groups["head"])["image"] == CPU_IMAGE


def test_shared_weights_are_there_once(deploy, tmp_path) -> None:
    model(tmp_path, "a", f"instance_group {{ kind: KIND_CPU count: 4 }} {SHARING}", mib=4000)
    printed = deploy()
    assert printed.memory_mib("cpu") < 2 * CPU_COPIES * 4000
    assert printed.limits("cpu")["cpu"] == str(4 + ROUTER_CPUS)


def test_what_the_model_says_of_cpus_counts(deploy, tmp_path) -> None:
    group = "instance_group { kind: KIND_CPU count: 2 }"
    model(tmp_path, "a", f"{group} {parameter('CPU_FRACTION', 2.5)}")
    assert deploy().limits("cpu")["cpu"] == str(5 + ROUTER_CPUS)


def test_room_is_for_all_instances_that_there_may_be(deploy, tmp_path) -> None:
    scaling = parameter("AUTOSCALING", '{\\"min_count\\": 0, \\"max_count\\": 5}')
    model(tmp_path, "a", f"instance_group {{ kind: KIND_CPU count: 1 }} {scaling}")
    printed = deploy()
    assert printed.limits("cpu")["cpu"] == str(5 + ROUTER_CPUS)
    assert "a      1        KIND_CPU  5          5" in printed.text


def test_several_workers_share_it_but_each_holds_one_process(deploy, tmp_path) -> None:
    model(tmp_path, "large", "instance_group { kind: KIND_CPU count: 2 }", mib=3000)
    one, four = deploy(), deploy("--workers=4")
    assert four.groups["cpu"]["replicas"] == four.groups["cpu"]["minReplicas"] == 4
    least = CPU_PROCESS_MIB + CPU_COPIES * 3000 + ROUTER_MIB + four.store_mib("cpu")
    assert least <= four.memory_mib("cpu") < one.memory_mib("cpu")
    assert deploy("--cpus=7").limits("cpu")["cpu"] == "7"


def test_gpus(deploy, tmp_path) -> None:
    fraction = parameter("GPU_FRACTION", 0.5)
    for name in ("a", "b", "c"):
        model(tmp_path, name, f"instance_group {{ kind: KIND_GPU }} {fraction}", mib=500)
    printed = deploy("--gpus=1")
    group = printed.groups["gpu"]
    assert group["replicas"] == group["minReplicas"] == 2  # 1.5 GPUs, in halves
    assert printed.limits("gpu")["nvidia.com/gpu"] == "1"
    assert printed.limits("gpu")["cpu"] == str(2 + ROUTER_CPUS)
    assert printed.memory_mib("gpu") >= 1.5 * (GPU_PROCESS_MIB + 500) + ROUTER_MIB
    images = {container(one)["image"] for one in printed.groups.values()}
    assert images == {CUDA_IMAGE}
    assert "0.5 of 0" in printed.text and "1.5 GPUs" in printed.text


def test_groups_without_gpus_are_on_each_of_a_pod(deploy, tmp_path) -> None:
    model(tmp_path, "a", f"instance_group {{ kind: KIND_GPU }} {parameter('GPU_FRACTION', 1)}")
    printed = deploy("--gpus=4")
    assert printed.groups["gpu"]["replicas"] == 1
    assert printed.limits("gpu")["nvidia.com/gpu"] == "4"
    assert printed.groups["gpu"]["rayStartParams"]["num-gpus"] == "4"


def test_whole_gpus_of_kind_model(deploy, tmp_path) -> None:
    model(tmp_path, "a", f"instance_group {{ kind: KIND_MODEL }} {parameter('MODEL_GPUS', 2)}")
    fraction = parameter("GPU_FRACTION", 0.25)
    model(tmp_path, "b", f"instance_group {{ kind: KIND_GPU gpus: [0] }} {fraction}")
    assert deploy("--gpus=2").groups["gpu"]["replicas"] == 2
    assert "2 whole" in deploy("--gpus=2").text


def test_without_gpus_there_is_no_group_for_them(deploy, tmp_path) -> None:
    model(tmp_path, "a")  # KIND_AUTO
    assert "gpu" not in deploy().groups


def test_slices(deploy, capsys, tmp_path) -> None:
    model(tmp_path, "a", "instance_group { kind: KIND_GPU }")
    printed = deploy("--gpus=1", "--gpu-resource=nvidia.com/mig-2g.20gb")
    assert printed.limits("mig")["nvidia.com/mig-2g.20gb"] == "1"
    with pytest.raises(SystemExit):
        cli.main(["deploy", str(tmp_path), "--gpus=2", "--gpu-resource=nvidia.com/mig-2g.20gb"])
    assert "one MIG slice only" in capsys.readouterr().err


def test_names(deploy, tmp_path) -> None:
    model(tmp_path, "a", "instance_group { kind: KIND_GPU }")
    words = ("--name=other", "--namespace=ns", "--claim=disk", "--image=r.example/manta:7")
    printed = deploy("--gpus=1", *words)
    for document in printed.documents:
        assert document["metadata"]["name"] == "other"
        assert document["metadata"]["namespace"] == "ns"
    assert "app.kubernetes.io/instance: manta" not in printed.text
    _, service, policy = printed.documents
    assert service["spec"]["selector"]["app.kubernetes.io/instance"] == "other"
    chosen = policy["spec"]["podSelector"]["matchLabels"]
    for group in printed.groups.values():
        assert chosen.items() <= group["template"]["metadata"]["labels"].items()
        assert container(group)["image"] == "r.example/manta:7"
        [claim] = [v for v in group["template"]["spec"]["volumes"] if v["name"] == "models"]
        assert claim["persistentVolumeClaim"]["claimName"] == "disk"
        assert environment(container(group))["MANTA_MODEL_REPOSITORY"] == "/models"


@pytest.mark.parametrize(
    ("more", "words", "reason"),
    [
        ("instance_group { kind: KIND_GPU }", [], "no GPU is available"),
        ("instance_group { kind: KIND_GPU gpus: [3] }", ["--gpus=2"], "unsupported gpu id 3"),
        ("instance_group { kind: KIND_MODEL } " + parameter("MODEL_GPUS", 4), ["--gpus=2"], "4"),
        (
            "instance_group { kind: KIND_GPU count: 3 } " + parameter("GPU_FRACTION", 0.5),
            ["--gpus=1"],
            "does not fit on gpu 0",
        ),
        ("nonsense: 1", [], "nonsense"),
    ],
)
def test_what_the_server_would_refuse_is_refused(capsys, tmp_path, more, words, reason) -> None:
    model(tmp_path, "a", more)
    assert cli.main(["deploy", str(tmp_path), "--dry-run", *words]) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("manta deploy: ") and reason in said.err


def test_an_empty_or_missing_repository(capsys, tmp_path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        assert cli.main(["deploy", str(path), "--dry-run"]) == 1
        assert "manta deploy: " in capsys.readouterr().err


# --- packing -------------------------------------------------------------------------------------


def demand(amount: float, gpu: int | None = 0, processes: int = 1) -> Demand:
    return Demand("m", 1, "KIND_GPU", processes, 1, 1.0, 100, GpuShare(gpu, amount))


def test_thirds_fit_three_times() -> None:
    assert capacity.gpu_pods([demand(0.3333, processes=3)], 1) == 1
    assert capacity.gpu_pods([demand(0.3333, processes=4)], 1) == 2


def test_indices_are_kept_apart() -> None:
    assert capacity.gpu_pods([demand(1.0, 0), demand(1.0, 1)], 2) == 1
    assert capacity.gpu_pods([demand(1.0, 1), demand(1.0, 1)], 2) == 2


def test_whole_gpus_take_any_that_are_free() -> None:
    assert capacity.gpu_pods([demand(0.5, 0), demand(1, None)], 2) == 2
    assert capacity.gpu_pods([demand(2, None), demand(2, None)], 4) == 1
    with pytest.raises(ConfigError, match="no pod with 2 GPUs holds 3"):
        capacity.gpu_pods([demand(3, None)], 2)


@given(
    st.lists(st.tuples(st.floats(0.0001, 1), st.integers(0, 3)), max_size=30),
    st.integers(4, 8),
)
def test_no_fewer_pods_than_the_fullest_index_needs(shares, gpus) -> None:
    demands = [demand(amount, gpu) for amount, gpu in shares]
    per_index = [sum(a for a, gpu in shares if gpu == index) for index in range(4)]
    pods = capacity.gpu_pods(demands, gpus)
    assert max(per_index, default=0) - 1e-3 <= pods <= len(shares)
    # Each index is packed by itself, and first fit leaves no two pods that one could replace.
    assert pods <= 2 * max(per_index) + 1
