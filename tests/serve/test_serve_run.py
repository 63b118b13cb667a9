"""`serve run serve_config.yaml`, as it stands and with its two switches changed."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
import yaml
from tritonclient.utils import InferenceServerException

from tests import models
from tests.serve import repository
from tests.serve.clients import aio_client, infer, infer_aio, rows
from tests.serve.cluster import shipped
from tests.serve.server import BIN, Server, free_ports, profile, wait_for


@pytest.fixture(scope="module")
def one_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("one")
    models.save_torchscript(repository.mlp(), root, "mlp")
    repository.write_config(root, "mlp", repository.MLP)
    return root


def config_file(folder: Path, ports: list[int], listener: str) -> Path:
    """The shipped file; only ports, and for `serve` the two settings that the README names."""
    config = shipped(ports)
    args = config["applications"][0]["args"]
    if listener == "serve":
        args["listener"], config["proxy_location"] = "serve", "EveryNode"
    path = folder / "serve_config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


# `manta serve`, which most tests here drive, is the Router's listener with the profile.
# Serve's proxy without the profile is for `make test-long`: each of the two is met below.
@pytest.fixture(params=["router", pytest.param("serve", marks=pytest.mark.long), "serve+env"])
def serve_run(request: pytest.FixtureRequest, one_model: Path, tmp_path: Path) -> Iterator[Server]:
    listener, _, with_env = request.param.partition("+")
    ports = free_ports(3)
    environment = {"MANTA_MODEL_REPOSITORY": str(one_model), **(profile() if with_env else {})}
    command = [str(BIN / "serve"), "run", str(config_file(tmp_path, ports, listener))]
    server = Server(command, ports, environment, one_model)
    try:
        server.wait_ready()
        yield server
    finally:
        # What the README says of a bare `serve run`: SIGINT ends it in order.
        family = server.descendants()
        server.send(signal.SIGINT)
        try:
            server.process.wait(120)
            psutil.wait_procs(family, timeout=30)
        finally:
            server.close()


def is_ready(client: Any) -> bool:
    """Serve's proxy opens its ports one after the other."""
    with contextlib.suppress(InferenceServerException):
        return bool(client.is_server_ready())
    return False


def test_serve_run_answers_http_and_grpc(serve_run: Server) -> None:
    x = rows(2, 8)
    with torch.inference_mode():
        expected = repository.mlp()(torch.from_numpy(x)).numpy()
    assert serve_run.get("/").headers["content-type"] == "text/html; charset=utf-8"
    assert "/v2/models/mlp/infer" in serve_run.get("/openapi.json").json()["paths"]
    for client in (
        httpclient.InferenceServerClient(serve_run.http),
        grpcclient.InferenceServerClient(serve_run.grpc),
    ):
        wait_for(partial(is_ready, client), 60, "both of its ports are open")
        assert client.is_model_ready("mlp")
        reply = infer(client, "mlp", {"INPUT__0": x}).as_numpy("OUTPUT__0")
        np.testing.assert_allclose(reply, expected, atol=1e-5)
        with pytest.raises(InferenceServerException) as caught:
            infer(client, "nowhere", {"INPUT__0": x})
        assert str(caught.value.status()) in ("404", "StatusCode.NOT_FOUND")
        assert "nowhere" in caught.value.message()
        client.close()

    import asyncio

    async def many() -> list[Any]:
        async with aio_client(serve_run, "grpc") as client:
            calls = [infer_aio(client, "mlp", {"INPUT__0": x}) for _ in range(40)]
            return await asyncio.gather(*calls)

    for reply in asyncio.run(many()):
        np.testing.assert_allclose(reply.as_numpy("OUTPUT__0"), expected, atol=1e-5)
