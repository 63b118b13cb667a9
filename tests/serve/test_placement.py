"""Instance groups on two logical GPUs, and start-up with models that cannot be loaded."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests import models
from tests.serve import repository
from tests.serve.clients import aio_client, infer_aio, loading, rows
from tests.serve.server import Server, manta_serve, wait_equal, wait_for

GROUPS = {
    "first": ("instance_group [ { kind: KIND_GPU gpus: [ 0 ] } ]", "0.25"),
    "second": ("instance_group [ { kind: KIND_GPU gpus: [ 1 ] } ]", "0.25"),
    "both": ("instance_group [ { kind: KIND_GPU gpus: [ 0, 1 ] count: 2 } ]", "0.1"),
    "auto": ("", "0.05"),
}
MIXED = """
instance_group [
  { name: "host" kind: KIND_CPU },
  { name: "cards" kind: KIND_GPU },
  { name: "spare" kind: KIND_GPU gpus: [ 1 ] passive: true }
]
"""


def test_by_default_a_broken_model_ends_the_server(tmp_path: Path) -> None:
    """In test_start.py such models are served beside."""
    models.save_torchscript(repository.mlp(), tmp_path, "mlp")
    repository.write_config(tmp_path, "mlp", repository.MLP)
    repository.build_broken(tmp_path)
    with manta_serve(tmp_path) as server:
        assert server.process.wait(180) == 1
        output = server.output()
        assert "failed to load all models" in output
        assert "platfrm" in output and "torch.save" in output and "INPUT__7" in output


@pytest.fixture(scope="module")
def placed(pair: Server) -> Iterator[Server]:
    root = pair.repository
    for name, (group, share) in GROUPS.items():
        models.save_torchscript(repository.mlp(), root, name)
        text = repository.parameter("GPU_FRACTION", share) + group
        repository.write_config(root, name, repository.MLP + text)
    repository.write_who(root, "mixed", repository.parameter("GPU_FRACTION", "0.02") + MIXED)
    with loading(pair, (*GROUPS, "mixed")):
        yield pair


def by_model(peeked: dict[str, Any]) -> dict[str, list[str]]:
    """Model -> the listed index of each of its replicas."""
    found: dict[str, list[str]] = {}
    for replica in peeked["replicas"]:
        found.setdefault(replica["application"].split(".")[1], []).append(replica["details"]["gpu"])
    return {name: sorted(gpus) for name, gpus in found.items()}


def test_groups_land_where_they_are_listed_with_the_fractions_asked_for(placed: Server) -> None:
    wanted = {
        "nap": ["", ""],
        "first": ["0"],
        "second": ["1"],
        "both": ["0", "0", "1", "1"],
        "auto": ["0", "1"],  # no group: one instance on every GPU
        "mixed": ["", "0", "1", "1"],
    }
    wait_equal(lambda: by_model(placed.peek()), wanted, 60)
    each = 0.25 + 2 * 0.1 + 0.05 + 0.02
    shares = {
        "manta_gpu_0": round(each, 4),
        "manta_gpu_1": round(each + 0.02, 4),  # a passive instance has its share too
        "GPU": round(2 * each + 0.02, 4),
    }

    def used() -> dict[str, float]:
        total, free = placed.peek()["resources"]
        return {name: round(total[name] - free.get(name, 0.0), 4) for name in shares}

    wait_equal(used, shares, 60)  # Ray hears of it from its nodes now and then


def test_groups_of_different_kinds_answer_together(placed: Server) -> None:
    """Each of them, and never the passive one, which holds the second GPU as another does."""
    pids: dict[str, set[int]] = {}

    def deployments() -> set[str]:
        for replica in placed.peek()["replicas"]:
            if replica["application"].startswith("manta.mixed."):
                pids.setdefault(replica["deployment"], set()).add(replica["pid"])
        return set(pids)

    wait_equal(deployments, {"host", "cards_gpu0", "cards_gpu1", "spare_gpu1"}, 60)
    active = pids["host"] | pids["cards_gpu0"] | pids["cards_gpu1"]
    answered: set[int] = set()

    async def crowd() -> None:
        x = np.full((1, 1), 0.1, np.float32)
        async with aio_client(placed, "grpc") as client:
            calls = [infer_aio(client, "mixed", {"s": x}) for _ in range(12)]
            replies = await asyncio.gather(*calls)
        answered.update(int(reply.as_numpy("pid")[0, 0]) for reply in replies)

    def all_have() -> bool:
        asyncio.run(crowd())
        return answered >= active

    wait_for(all_have, 60, "every active instance has answered")
    assert answered == active


def test_the_configuration_lists_the_gpus(placed: Server) -> None:
    for name, gpus in (("auto", [[0, 1]]), ("second", [[1]]), ("mixed", [[], [0, 1], [1]])):
        shown = placed.get(f"/v2/models/{name}/config").json()["instance_group"]
        assert [group["gpus"] for group in shown] == gpus


def test_models_on_logical_gpus_answer(placed: Server) -> None:
    x = rows(1, 8)
    body = {
        "inputs": [
            {"name": "INPUT__0", "datatype": "FP32", "shape": [1, 8], "data": x.ravel().tolist()}
        ]
    }
    for name in GROUPS:
        for _ in range(4):
            address = f"http://{placed.http}/v2/models/{name}/infer"
            reply = httpx.post(address, json=body, timeout=60)
            assert reply.status_code == 200
