"""Instance groups and parameters: who answers, who does not, and whose settings hold where."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from tests import models
from tests.serve import repository
from tests.serve.clients import aio_client, infer, infer_aio, loading, rows
from tests.serve.repository import parameter, tensor
from tests.serve.server import Server, wait_for

PROTOCOLS = ["http", "grpc"]

TWO_GROUPS_AND_ONE_PASSIVE = """
instance_group [
  { name: "first" kind: KIND_CPU },
  { name: "second" kind: KIND_CPU count: 2 host_policy: "cpu" },
  { name: "spare" kind: KIND_CPU passive: true }
]
"""

QUICK = {"INTRA_OP_THREAD_COUNT": "2", "INTER_OP_THREAD_COUNT": " 2x"}
CAREFUL = {
    "INTRA_OP_THREAD_COUNT": "3",
    "INTER_OP_THREAD_COUNT": "5",
    "INFERENCE_MODE": "Off",
    "DISABLE_CUDNN": "true",
    "DISABLE_OPTIMIZED_EXECUTION": "1",
    "ENABLE_JIT_EXECUTOR": "false",
    "ENABLE_JIT_PROFILING": "0",
    "ENABLE_TENSOR_FUSER": "off",
}
MANY = {"NUM_THREADS": "3", "NUM_INTEROP_THREADS": "4"}
FEW: dict[str, str] = {}

EAGER_THREADS = """
import torch

class Threads(torch.nn.Module):
    def forward(self, x):
        found = [torch.get_num_threads(), torch.get_num_interop_threads()]
        return torch.tensor([found]).expand(x.shape[0], 2)
"""


def parameters(values: dict[str, str]) -> str:
    return "".join(parameter(key, value) for key, value in values.items())


def write_mode(root: Path, name: str, values: dict[str, str]) -> None:
    models.save_torchscript(models.Mode(), root, name)
    outputs = [tensor("OUTPUT__0", "2", "TYPE_INT64")]
    text = repository.config([tensor("x", "1")], outputs, more=parameters(values))
    repository.write_config(root, name, text)


def write_threads(root: Path, name: str, values: dict[str, str]) -> None:
    models.save_eager(EAGER_THREADS, root, name)
    text = repository.config(
        [tensor("x", "1")],
        [tensor("y", "2", "TYPE_INT64")],
        engine='backend: "pytorch"\nruntime: "model.py"',
        more=repository.EAGER + parameters(values),
    )
    repository.write_config(root, name, text)


LOADED = ("who", "quick", "careful", "many", "few")


@pytest.fixture(scope="module")
def groups(server: Server, models_root: Path) -> Iterator[Server]:
    """All of them in one server, so that what one sets could reach the others."""
    typo = parameter("NUM_THREAD", "2")
    repository.write_who(models_root, "who", TWO_GROUPS_AND_ONE_PASSIVE + typo)
    write_mode(models_root, "quick", QUICK)
    write_mode(models_root, "careful", CAREFUL)
    write_threads(models_root, "many", MANY)
    write_threads(models_root, "few", FEW)

    with loading(server, LOADED):
        yield server


def replicas(server: Server, model: str) -> list[dict[str, Any]]:
    prefix = f"manta.{model}."
    return [r for r in server.peek()["replicas"] if r["application"].startswith(prefix)]


# --- groups --------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_requests_go_to_whichever_group_has_a_free_instance(groups: Server, protocol: str) -> None:
    """And never to a passive one, which is there and loaded."""
    found = replicas(groups, "who")
    pids: dict[str, set[int]] = {}
    for replica in found:
        pids.setdefault(replica["deployment"], set()).add(replica["pid"])
    assert {name: len(own) for name, own in pids.items()} == {"first": 1, "second": 2, "spare": 1}
    assert all(r["loaded"] and r["instances"] == 1 for r in found)
    answered: set[int] = set()

    async def crowd() -> None:
        x = np.full((1, 1), 0.1, np.float32)
        async with aio_client(groups, protocol) as client:
            replies = await asyncio.gather(*(infer_aio(client, "who", {"s": x}) for _ in range(12)))
        answered.update(int(reply.as_numpy("pid")[0, 0]) for reply in replies)

    def all_have() -> bool:
        asyncio.run(crowd())
        return answered >= pids["first"] | pids["second"]

    wait_for(all_have, 60, "every active instance has answered")
    assert answered == pids["first"] | pids["second"]


def test_the_configuration_shows_the_groups_as_they_are(groups: Server, http: Any) -> None:
    shown = http.get_model_config("who")["instance_group"]
    keys = ("name", "kind", "count", "gpus", "passive", "host_policy")
    assert [tuple(group[key] for key in keys) for group in shown] == [
        ("first", "KIND_CPU", 1, [], False, ""),
        ("second", "KIND_CPU", 2, [], False, "cpu"),
        ("spare", "KIND_CPU", 1, [], True, ""),
    ]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_with_passive_instances_alone_a_model_refuses_at_once(
    request: pytest.FixtureRequest, server: Server, models_root: Path, protocol: str
) -> None:
    client, x = request.getfixturevalue(protocol), rows(1, 2)
    models.save_torchscript(models.identity(), models_root, "resting")
    text = repository.config([tensor("x", "2")], [tensor("OUTPUT__0", "2")])
    group = "instance_group [ { kind: KIND_CPU passive: %s } ]\n"
    repository.write_config(models_root, "resting", text + group % "true")
    client.load_model("resting")
    try:
        assert not client.is_model_ready("resting")  # loaded, and yet nobody would answer
        index = request.getfixturevalue("http").get_model_repository_index()
        (entry,) = [entry for entry in index if entry["name"] == "resting"]
        assert entry["state"] == "READY" and not entry.get("reason")
        with pytest.raises(InferenceServerException) as caught:
            infer(client, "resting", {"x": x})
        assert caught.value.status() in ("503", "StatusCode.UNAVAILABLE")
        assert caught.value.message() == (
            "[request id: <id_unknown>] model 'resting' has no active instances: all its instance "
            "groups are passive"
        )
        # The control: the same model, active.
        repository.write_config(models_root, "resting", text + group % "false")
        client.load_model("resting")
        assert client.is_model_ready("resting")
        assert np.array_equal(infer(client, "resting", {"x": x}).as_numpy("OUTPUT__0"), x)
    finally:
        client.unload_model("resting")


# --- parameters ----------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_inference_mode_off_still_has_grad_off(
    request: pytest.FixtureRequest, groups: Server, protocol: str
) -> None:
    """(autograd, inference mode) as TorchScript itself finds them, in turn."""
    client, x = request.getfixturevalue(protocol), rows(1, 1)
    for _ in range(2):
        for name, wanted in (("quick", [0, 1]), ("careful", [0, 0])):
            assert infer(client, name, {"x": x}).as_numpy("OUTPUT__0").tolist() == [wanted]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_thread_counts_of_eager_models_are_their_own(
    request: pytest.FixtureRequest, groups: Server, protocol: str
) -> None:
    client, x = request.getfixturevalue(protocol), rows(1, 1)
    for _ in range(2):
        for name, wanted in (("many", [3, 4]), ("few", [1, 1])):
            assert infer(client, name, {"x": x}).as_numpy("y").tolist() == [wanted]


def count(server: Server, line: str) -> int:
    return server.output().count(line)


def test_two_models_of_different_settings_each_keep_their_own(groups: Server) -> None:
    """A13 and more: thread counts, cuDNN and the JIT are one per process, and so is the model."""
    (quick,), (careful,) = replicas(groups, "quick"), replicas(groups, "careful")
    assert quick["pid"] != careful["pid"]
    keys = "intra_op_threads inter_op_threads cudnn optimized_execution tensor_fuser".split()
    assert [quick["details"][key] for key in keys] == ["2", "2", "True", "True", "True"]
    assert [careful["details"][key] for key in keys] == ["3", "5", "False", "False", "False"]
    assert careful["details"]["jit_executor"] == careful["details"]["jit_profiling"] == "False"
    assert "jit_executor" not in quick["details"]  # never touched
    for line in (
        "Intra op thread count is set to 2 for model 'quick'",
        "Inter op thread count is set to 2 for model 'quick'",
        "Intra op thread count is set to 3 for model 'careful'",
        "Inter op thread count is set to 5 for model 'careful'",
        "Inference Mode is disabled for model 'careful'",
        "Optimized execution is disabled for model 'careful'",
        "cuDNN is disabled for model 'careful'",
        "Jit executor is disabled for model 'careful'",
        "Jit profiling is disabled for model 'careful'",
        "Tensor fuser is disabled for model 'careful'",
    ):
        wait_for(partial(count, groups, line), 30, line)  # a moment after it is logged
        assert count(groups, line) == 1, line


def test_an_unknown_parameter_is_warned_of_once(groups: Server, http: Any) -> None:
    """Four replicas in three groups, and a load that changes nothing: one line."""
    http.load_model("who")
    line = "'NUM_THREAD' of model 'who' is unknown and is ignored; did you mean 'NUM_THREADS'?"
    wait_for(lambda: count(groups, line), 30, "the warning is shown")
    assert count(groups, line) == 1


PARAMETER = "invalid/config.pbtxt:"
REFUSED = {
    "boolean": (
        parameter("DISABLE_CUDNN", "yes"),
        "parameters[\"DISABLE_CUDNN\"]: DISABLE_CUDNN: failed to convert 'yes' to boolean",
    ),
    "integer": (
        parameter("INTRA_OP_THREAD_COUNT", "four"),
        "failed to convert 'four' to integral number",
    ),
    "range": (
        parameter("INTER_OP_THREAD_COUNT", "99999999999"),
        "failed to convert '99999999999' to integral number: it is out of range",
    ),
    "hook": (parameter("MODEL_INIT_LIBRARY", "/x.so"), "MODEL_INIT_LIBRARY"),
    "gpus": (
        "instance_group [ { kind: KIND_CPU gpus: [ 0 ] } ]",
        "instance group 'invalid_0' of model 'invalid' has kind KIND_CPU but specifies one or more",
    ),
    "twice": (
        "instance_group [ { name: 'g' }, { name: 'g' } ]",
        "instance group 'g' is listed more than once",
    ),
    "profile": (
        "instance_group [ { profile: '0' } ]",
        "instance_group[0].profile: profiles are only supported for TensorRT models",
    ),
    "limiter": (
        "instance_group [ { rate_limiter { priority: 2 } } ]",
        "instance_group[0].rate_limiter: the rate limiter is not supported",
    ),
    "devices": (
        "instance_group [ { secondary_devices { kind: KIND_NVDLA } } ]",
        "instance_group[0].secondary_devices: secondary devices",
    ),
    "policy": (
        "instance_group [ { kind: KIND_CPU host_policy: 'numa_1' } ]",
        "instance_group[0].host_policy: host policy 'numa_1' is not supported",
    ),
    "capability": (
        "cc_model_filenames { key: '9.0' value: '../x.pt' }",
        "must be relative and must not leave the model's directory",
    ),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_invalid_parameters_and_groups_fail_the_load(
    request: pytest.FixtureRequest, server: Server, models_root: Path, protocol: str
) -> None:
    client = request.getfixturevalue(protocol)
    models.save_torchscript(models.identity(), models_root, "invalid")
    for more, reason in REFUSED.values():
        text = repository.config([tensor("x", "2")], [tensor("OUTPUT__0", "2")], more=more)
        repository.write_config(models_root, "invalid", text)
        with pytest.raises(InferenceServerException) as caught:
            client.load_model("invalid")
        assert reason in caught.value.message() and PARAMETER in caught.value.message()
    assert client.is_server_live() and client.is_model_ready("mlp")
