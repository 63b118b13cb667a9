"""Shared weights on the real server: who reuses, what it costs, and that answers stay right."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import torch

from tests import models
from tests.serve import repository
from tests.serve.clients import aio_client, infer, infer_aio, rows
from tests.serve.repository import config, parameter, tensor
from tests.serve.server import Server, wait_for

WIDTH = 4096
WEIGHT_BYTES = WIDTH * WIDTH * 4
SHARING = parameter("ENABLE_WEIGHT_SHARING", "true")
NAMES = (
    "share_many",
    "share_none",
    "wide_one",
    "wide_shared",
    "wide_apart",
    "cleaned",
    "uncleaned",
)


class Wide(torch.nn.Module):
    """64 MB of weights in one piece."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


def group(count: int, kind: str = "KIND_CPU") -> str:
    return f"instance_group [ {{ kind: {kind} count: {count} }} ]\n"


@pytest.fixture(scope="module", autouse=True)
def sharing_models(models_root: Path, server: Server) -> Iterator[None]:
    plain = [tensor("INPUT__0", "8")], [tensor("OUTPUT__0", "4")]
    wide = [tensor("x", str(WIDTH))], [tensor("OUTPUT__0", str(WIDTH))]
    cleaning = parameter("ENABLE_CACHE_CLEANING", "true") + parameter("MODEL_GPUS", "0")
    for name, io, more in (
        ("share_many", plain, SHARING + group(16)),
        ("share_none", plain, group(2)),
        ("wide_one", wide, SHARING + group(1)),
        ("wide_shared", wide, SHARING + group(4)),
        ("wide_apart", wide, group(2)),
        ("cleaned", plain, cleaning + group(1, "KIND_MODEL")),
        ("uncleaned", plain, parameter("ENABLE_CACHE_CLEANING", "true") + group(1)),
    ):
        path = models.version_folder(models_root, name) / "model.pt"
        if io is plain:
            models.save_torchscript(repository.mlp(), models_root, name)
        elif name == "wide_one":
            models.save_torchscript(Wide().eval(), models_root, name)
        else:
            os.link(models_root / "wide_one" / "1" / "model.pt", path)
        repository.write_config(models_root, name, config(*io, max_batch_size=8, more=more))
    yield
    for name in NAMES:
        httpx.post(f"http://{server.http}/v2/repository/models/{name}/unload", timeout=60)


def replicas(server: Server, name: str) -> list[dict[str, Any]]:
    found = server.peek()["replicas"]
    return [one for one in found if one["application"].startswith(f"manta.{name}.")]


def test_sixteen_instances_load_once_and_say_so_fifteen_times(server: Server, http: Any) -> None:
    http.load_model("share_many")
    http.load_model("share_none")
    wait_for(lambda: "model 'share_none' version 1 is READY" in server.output(), 60, "it is told")

    def lines(of: str) -> list[str]:
        told = [each for each in server.output().splitlines() if "Reusing TorchScript" in each]
        return [each for each in told if of in each]

    # What a replica says comes by another way, and later than that it is ready.
    many = "for instance 'share_many_1_"
    wait_for(lambda: len(lines(many)) >= 15, 60, "they have said so")
    assert len(lines(many)) == len(set(lines(many))) == 15
    assert not lines("share_none")  # the control
    (shared,) = replicas(server, "share_many")
    assert shared["instances"] == 16 and len(set(shared["weight_pointers"])) == 1


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_concurrent_answers_are_those_of_one_at_a_time(
    server: Server, http: Any, protocol: str
) -> None:
    """Bit for bit: without dynamic batching each request is a run of its own, on any instance."""
    http.load_model("share_many")
    x = rows(200, 8, seed=5)
    with torch.inference_mode():
        direct = [repository.mlp()(torch.from_numpy(x[i : i + 1])).numpy() for i in range(len(x))]

    async def run() -> list[Any]:
        async with aio_client(server, protocol) as client:
            calls = [
                infer_aio(client, "share_many", {"INPUT__0": x[i : i + 1]}) for i in range(len(x))
            ]
            return [reply.as_numpy("OUTPUT__0") for reply in await asyncio.gather(*calls)]

    together = asyncio.run(run())
    for i in range(0, len(x), 10):
        alone = infer(http, "share_many", {"INPUT__0": x[i : i + 1]}).as_numpy("OUTPUT__0")
        np.testing.assert_array_equal(together[i], alone)
    np.testing.assert_allclose(np.concatenate(together), np.concatenate(direct), atol=1e-5)


def test_four_sharing_instances_cost_what_one_does(server: Server, http: Any) -> None:
    private = {}
    for name in ("wide_one", "wide_shared", "wide_apart"):
        http.load_model(name)
        for _ in range(8):
            reply = infer(http, name, {"x": np.ones((1, WIDTH), np.float32)})
            assert (reply.as_numpy("OUTPUT__0") == WIDTH).all()
        pids = [one["pid"] for one in replicas(server, name)]
        private[name] = sum(psutil.Process(pid).memory_full_info().uss for pid in pids)
        assert len(pids) == (2 if name == "wide_apart" else 1)
    assert private["wide_one"] > WEIGHT_BYTES
    assert private["wide_shared"] - private["wide_one"] < 0.1 * WEIGHT_BYTES
    # The control: two that do not share have the weights twice.
    assert private["wide_apart"] - private["wide_one"] > 0.9 * WEIGHT_BYTES


def test_the_cache_is_cleaned_per_execution_off_the_cpu_only(
    server: Server, http: Any, grpc: Any
) -> None:
    for name in ("cleaned", "uncleaned"):
        http.load_model(name)
        for client in (http, grpc, http):
            infer(client, name, {"INPUT__0": rows(1, 8)})

    def cleanings(name: str) -> str:
        (one,) = replicas(server, name)
        return str(one["details"]["cache_cleanings"])

    # A replica tells the Controller once a second.
    wait_for(lambda: cleanings("cleaned") == "3", 60, "the replica has told of 3 cleanings")
    assert cleanings("uncleaned") == "0"
