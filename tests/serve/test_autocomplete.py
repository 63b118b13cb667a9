"""Models without a config.pbtxt, or with half of one, are served as their files say."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tritonclient.utils import InferenceServerException

from cluster import configure
from configs import pbtxt
from deployments.repository import Repository
from tests import models
from tests.serve import repository
from tests.serve.clients import Arrays, infer, loading, rows
from tests.serve.server import Server

INPUTS = [
    "ARGS[0]",
    "ARGS[1]",
    "ARGS[2][keyA]",
    "ARGS[2][key2]",
    "KWARGS[kwarg1]",
    "KWARGS[kw_arg2]",
]
COMPLETED = ("bare_aoti", "bare_exported", "sampled", "partly")


def save_exported(root: Path, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = models.version_folder(root, name) / "model.pt2"
        torch.export.save(models.export_seed(), str(path))


@pytest.fixture(scope="module", autouse=True)
def completed(server: Server, models_root: Path, seed_package: Path) -> Iterator[None]:
    root = models_root
    for name in ("bare_aoti", "partly", "too_large"):
        shutil.copy(seed_package, models.version_folder(root, name) / "model.pt2")
    save_exported(root, "bare_exported")
    for name in ("sampled", "unsampled"):
        models.save_torchscript(models.add_sub(), root, name)
    np.savez(root / "sampled" / "sample_input.npz", b=rows(2, 4, 1), a=rows(2, 4))
    half = 'max_batch_size: 2\noutput { name: "RESULT[ZZZ]" }\n'
    half += "".join(f'input {{ name: "{name}" }}\n' for name in INPUTS[::-1])
    repository.write_config(root, "partly", half)
    repository.write_config(root, "too_large", "max_batch_size: 16\n")
    with loading(server, COMPLETED):
        yield


@pytest.fixture(params=["http", "grpc"])
def client(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def seed_arrays(count: int) -> tuple[Arrays, dict[str, torch.Tensor]]:
    arrays = {name: rows(count, 16, seed) for seed, name in enumerate(INPUTS)}
    h, v, key_a, key_2, kw1, kw2 = (torch.from_numpy(array) for array in arrays.values())
    out = models.Seed()(h, v, {"keyA": key_a, "key2": key_2}, kwarg1=kw1, kw_arg2=kw2)
    return arrays, {"RESULT[AAA]": out["AAA"], "RESULT[ZZZ]": out["ZZZ"], "RESULT[DDD][KB]": kw2}


@pytest.mark.parametrize("name", ["bare_aoti", "bare_exported"])
def test_a_bare_pt2_is_served(client: Any, name: str) -> None:
    for count in (1, 5, 8):
        arrays, wanted = seed_arrays(count)
        found = infer(client, name, arrays)
        for output, tensor in wanted.items():
            np.testing.assert_allclose(found.as_numpy(output), tensor.numpy(), atol=1e-5)


@pytest.mark.parametrize("name", ["bare_aoti", "bare_exported"])
def test_what_the_file_does_not_take_is_400(client: Any, name: str) -> None:
    with pytest.raises(InferenceServerException, match="batch-size must be <= 8") as caught:
        infer(client, name, seed_arrays(9)[0])
    assert caught.value.status() in ("400", "StatusCode.INVALID_ARGUMENT")
    wrong = seed_arrays(2)[0] | {"ARGS[1]": rows(2, 15)}
    with pytest.raises(InferenceServerException, match=r"unexpected shape for input 'ARGS\[1\]'"):
        infer(client, name, wrong)


def test_configuration_and_metadata_are_the_completed_ones(http: Any, grpc: Any) -> None:
    platforms = {"bare_aoti": "torch_aoti", "bare_exported": "torch_export"}
    for name, platform in platforms.items():
        config = http.get_model_config(name)
        assert (config["platform"], config["max_batch_size"]) == (platform, 8)
        assert [one["name"] for one in config["input"]] == INPUTS
        assert {(one["data_type"], *one["dims"]) for one in config["output"]} == {("TYPE_FP32", 16)}
        assert config["dynamic_batching"]["preferred_batch_size"] == [8]
        assert grpc.get_model_config(name).config.max_batch_size == 8
        metadata = http.get_model_metadata(name)
        assert metadata["platform"] == platform
        assert {"name": "ARGS[0]", "datatype": "FP32", "shape": [-1, 16]} in metadata["inputs"]
        told = grpc.get_model_metadata(name)
        assert [one.name for one in told.inputs] == INPUTS
        assert list(told.outputs[0].shape) == [-1, 16]


@pytest.mark.parametrize("name", COMPLETED)
def test_manta_config_prints_what_is_served(http: Any, models_root: Path, name: str) -> None:
    place = Repository([models_root])
    _, config = configure.configuration(place, place.find(name))
    assert pbtxt.to_json(config) == http.get_model_config(name)
    assert pbtxt.parse(pbtxt.to_text(config), "config.pbtxt", name) == config


def test_torchscript_by_its_sample(client: Any) -> None:
    x, y = rows(3, 4, 2), rows(3, 4, 3)
    found = infer(client, "sampled", {"a": x, "b": y})
    np.testing.assert_allclose(found.as_numpy("OUTPUT__0"), x + y, atol=1e-6)
    np.testing.assert_allclose(found.as_numpy("OUTPUT__1"), x - y, atol=1e-6)


def test_what_is_written_wins(client: Any) -> None:
    arrays, wanted = seed_arrays(2)
    found = infer(client, "partly", arrays)
    np.testing.assert_allclose(
        found.as_numpy("RESULT[ZZZ]"), wanted["RESULT[ZZZ]"].numpy(), atol=1e-5
    )
    assert found.as_numpy("RESULT[AAA]") is None
    with pytest.raises(InferenceServerException, match="batch-size must be <= 2"):
        infer(client, "partly", seed_arrays(3)[0])


def test_what_cannot_be_completed_does_not_load(http: Any, grpc: Any) -> None:
    with pytest.raises(InferenceServerException, match="is 16, and the model .* at most 8"):
        http.load_model("too_large")
    with pytest.raises(InferenceServerException, match=r"forward takes a \(Tensor\), b .*npz"):
        grpc.load_model("unsampled")
    text = "too_large/config.pbtxt:1: max_batch_size"
    assert any(text in one.get("reason", "") for one in http.get_model_repository_index())
    assert any(text in one.reason for one in grpc.get_model_repository_index().models)
