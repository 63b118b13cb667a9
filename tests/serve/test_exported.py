"""Programs of torch.export.save over the real server, as they are and compiled when they load."""

from __future__ import annotations

import asyncio
import pickle
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tritonclient.utils import InferenceServerException

from tests import models
from tests.serve import repository
from tests.serve.clients import aio_client, infer, infer_aio, loading, rows, statistics
from tests.serve.server import Server, wait_for

REQUESTS = 100
SIZES = (8, 16, 4)
PLAIN, COMPILED = "exported_plain", "exported_compiled"


class Bounded(torch.nn.Module):
    """A dimension of any size between bounds, and an output of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = models.mlp(SIZES)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.layers(x).sum(1)
        return {"y": y, "best": y.argmax(1)}


def export() -> Any:
    batch = torch.export.Dim("batch", min=1, max=16)
    length = torch.export.Dim("length", min=2, max=10)
    return torch.export.export(
        Bounded().eval(), (torch.randn(3, 4, 8),), dynamic_shapes=({0: batch, 1: length},)
    )


@pytest.fixture(scope="module", autouse=True)
def programs(server: Server, models_root: Path) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = export()
        for name in (PLAIN, COMPILED, "exported_evil"):
            path = models.version_folder(models_root, name) / "model.pt2"
            torch.export.save(program, str(path))
    engine = 'platform: "torch_export"\n'
    two = "instance_group { kind: KIND_CPU count: 2 }\n"
    repository.write_config(models_root, PLAIN, engine)
    more = two + repository.parameter("COMPILE_ON_LOAD", "true")
    repository.write_config(models_root, COMPILED, engine + more)
    poison(models_root / "exported_evil" / "1" / "model.pt2")
    with loading(server, (PLAIN, COMPILED)):
        yield


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


def poison(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            sample = name.endswith("sample_inputs/model.pt")
            archive.writestr(name, pickle.dumps(Evil(path.with_name("mark"))) if sample else data)


@pytest.fixture(params=["http", "grpc"])
def client(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def sequence(count: int, length: int, seed: int = 0) -> np.ndarray:
    return rows(count * length, 8, seed).reshape(count, length, 8)


def wanted(x: np.ndarray) -> dict[str, torch.Tensor]:
    with torch.inference_mode():
        found: dict[str, torch.Tensor] = Bounded().eval()(torch.from_numpy(x))
    return found


@pytest.mark.parametrize("protocol", ["http", "grpc"])
@pytest.mark.parametrize("name", [PLAIN, COMPILED])
def test_many_at_once(server: Server, http: Any, name: str, protocol: str) -> None:
    before = statistics(http, name)["execution_count"]
    asyncio.run(_many(server, name, protocol))
    assert statistics(http, name)["execution_count"] - before < REQUESTS


async def _many(server: Server, name: str, protocol: str) -> None:
    client = aio_client(server, protocol)
    given = [sequence(1 + k % 3, 5, k) for k in range(REQUESTS)]
    try:
        found = await asyncio.gather(*(infer_aio(client, name, {"ARGS[0]": x}) for x in given))
    finally:
        await client.close()
    for x, answer in zip(given, found, strict=True):
        right = wanted(x)
        np.testing.assert_allclose(answer.as_numpy("RESULT[y]"), right["y"].numpy(), atol=1e-5)
        np.testing.assert_array_equal(answer.as_numpy("RESULT[best]")[:, 0], right["best"].numpy())


@pytest.mark.parametrize("name", [PLAIN, COMPILED])
def test_sizes_beyond_what_it_was_exported_for(client: Any, name: str) -> None:
    infer(client, name, {"ARGS[0]": sequence(16, 10)})
    for x, reason in (
        (sequence(17, 5), "batch-size must be <= 16"),
        (sequence(2, 11), r"input 'ARGS\[0\]' does not fit .*expected to be <= 10, but got: 11"),
        (sequence(2, 5)[:, :, :7], r"Expected \[-1,-1,8\], got \[2,5,7\]"),
        (sequence(2, 5).astype(np.float64), "data-type is 'FP64'"),
    ):
        with pytest.raises(InferenceServerException, match=reason) as caught:
            infer(client, name, {"ARGS[0]": np.ascontiguousarray(x)})
        assert caught.value.status() in ("400", "StatusCode.INVALID_ARGUMENT")
    infer(client, name, {"ARGS[0]": sequence(1, 2)})  # and goes on


def test_two_replicas_compile_once(compile_cache: Path, server: Server) -> None:
    assert len(list(compile_cache.glob("*.pt2"))) == 1
    assert not list(compile_cache.glob("building-*"))
    line = f"'{COMPILED}/1/model.pt2' is compiled"
    wait_for(lambda: line in server.output(), 30, line)


def test_an_archive_that_would_run_code_is_refused(http: Any, models_root: Path) -> None:
    with pytest.raises(
        InferenceServerException, match="sample inputs hold more than plain tensors"
    ):
        http.load_model("exported_evil")
    assert not (models_root / "exported_evil" / "1" / "mark").exists()
    infer(http, PLAIN, {"ARGS[0]": sequence(1, 3)})
