"""A repository on S3: a real server of that protocol on loopback, started here."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import tritonclient.http as httpclient
from tritonclient.utils import InferenceServerException

from tests import models
from tests.serve import repository
from tests.serve.clients import infer, rows
from tests.serve.server import START_S, Server, free_ports, manta_serve, wait_for

pytest.importorskip("s3fs")
pytest.importorskip("moto.server")

X = rows(1, 2)
CONFIG = repository.config([repository.tensor("x", "2")], [repository.tensor("OUTPUT__0", "2")])
KEYS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
}


class Twice(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


class Bucket:
    """`path` is that of the repository; files go up from a folder of the same form."""

    def __init__(self, address: str, folder: Path) -> None:
        import s3fs

        self.url, self.path, self.folder = f"s3://{address}/bucket/models", "bucket/models", folder
        self.filesystem = s3fs.S3FileSystem(
            key="test", secret="test", endpoint_url=f"http://{address}", use_listings_cache=False
        )
        self.filesystem.mkdir("bucket")

    def put(self, name: str, module: torch.nn.Module, version: int = 1) -> None:
        file = models.save_torchscript(module, self.folder, name)
        self.filesystem.pipe_file(f"{self.path}/{name}/config.pbtxt", CONFIG.encode())
        self.filesystem.put_file(str(file), f"{self.path}/{name}/{version}/model.pt")

    def remove(self, path: str) -> None:
        self.filesystem.rm(f"{self.path}/{path}", recursive=True)


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, **KEYS}
    )

    def answers() -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"http://127.0.0.1:{port}/moto-api/").status_code == 200
        return False

    try:
        wait_for(answers, START_S, "the S3 server answers")
        made = Bucket(f"127.0.0.1:{port}", tmp_path_factory.mktemp("upload"))
        made.put("one", models.identity())
        made.put("two", models.identity())
        yield made
    finally:
        process.kill()
        process.wait(10)


@pytest.fixture(scope="module")
def mirrored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mirrored")


@pytest.fixture(scope="module")
def stored(
    bucket: Bucket, mirrored: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    flags = ["--model-control-mode=explicit", "--load-model=one", f"--remote-directory={mirrored}"]
    flags.append(f"--model-repository={bucket.url}")
    beside = tmp_path_factory.mktemp("beside")
    with manta_serve(beside, *flags, environment=KEYS) as server:
        server.wait_ready()
        yield server
        assert server.stop() == 0, server.output()[-3000:]
        assert not list(mirrored.iterdir())


@pytest.fixture
def client(stored: Server) -> Iterator[Any]:
    made = httpclient.InferenceServerClient(stored.http, network_timeout=120)
    yield made
    made.close()


def files(mirrored: Path) -> set[str]:
    (folder,) = mirrored.iterdir()
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in found if "__pycache__" not in path.parts}


def test_only_what_is_loaded_is_fetched(client: Any, mirrored: Path) -> None:
    np.testing.assert_array_equal(infer(client, "one", {"x": X}).as_numpy("OUTPUT__0"), X)
    assert files(mirrored) == {"one/config.pbtxt", "one/1/model.pt"}
    index = client.get_model_repository_index()
    assert {"name": "two"} in index
    client.load_model("two")
    np.testing.assert_array_equal(infer(client, "two", {"x": X}).as_numpy("OUTPUT__0"), X)
    assert files(mirrored) >= {"two/config.pbtxt", "two/1/model.pt"}


def test_what_changes_there_is_loaded_anew(client: Any, bucket: Bucket, mirrored: Path) -> None:
    bucket.put("changing", models.identity())
    client.load_model("changing")
    bucket.put("changing", Twice())
    client.load_model("changing")
    np.testing.assert_array_equal(infer(client, "changing", {"x": X}).as_numpy("OUTPUT__0"), X * 2)
    bucket.put("changing", models.identity(), version=2)
    client.load_model("changing")
    assert client.get_model_metadata("changing")["versions"] == ["2"]
    bucket.remove("changing/2")
    client.load_model("changing")
    assert client.get_model_metadata("changing")["versions"] == ["1"]
    assert "changing/2/model.pt" not in files(mirrored)
    bucket.remove("changing")
    with pytest.raises(InferenceServerException, match="failed to poll from model repository"):
        client.load_model("changing")
    np.testing.assert_array_equal(infer(client, "changing", {"x": X}).as_numpy("OUTPUT__0"), X * 2)
    client.unload_model("changing")
