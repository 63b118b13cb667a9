"""Every datatype in every runtime over every road, empty tensors, reshape both ways."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

from configs.dtypes import DataType
from tests import kinds, models
from tests.kinds import NUMERIC, TYPED
from tests.serve import repository
from tests.serve.clients import aio_client, infer, infer_aio, loading, module_of
from tests.serve.server import Server

HALVES = tuple(one for one in NUMERIC if one not in TYPED)
EAGER = 'backend: "pytorch"\nruntime: "model.py"'
SERVED = {"traced": TYPED, "halves": HALVES, "eager_kinds": NUMERIC, "package": NUMERIC}


class Reshaped(torch.nn.Module):
    """Sees what `reshape` makes of its inputs, and returns what it is to undo."""

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert list(x.shape[2:]) == [2, 3] and scale.dim() == 1
        return x * scale[:, None, None, None], scale


def every(kind: Sequence[DataType], engine: str, more: str, dims: str = "-1") -> str:
    def listed(word: str) -> list[str]:
        return [repository.tensor(f"{word}__{i}", dims, k.config) for i, k in enumerate(kind)]

    return repository.config(
        listed("INPUT"), listed("OUTPUT"), engine=engine, max_batch_size=8, more=more
    )


@pytest.fixture(scope="module")
def loaded(models_root: Path, server: Server, kinds_package: Path) -> Iterator[None]:
    libtorch = 'platform: "pytorch_libtorch"'
    for name, of in (("traced", TYPED), ("halves", HALVES)):
        kinds.save_traced(of, models.version_folder(models_root, name) / "model.pt")
        repository.write_config(models_root, name, every(of, libtorch, "dynamic_batching { }"))
    models.save_eager(kinds.source(NUMERIC), models_root, "eager_kinds")
    more = "dynamic_batching { }\n" + repository.EAGER
    repository.write_config(models_root, "eager_kinds", every(NUMERIC, EAGER, more))
    shutil.copy(kinds_package, models.version_folder(models_root, "package") / "model.pt2")
    text = every(NUMERIC, 'platform: "torch_aoti"', "dynamic_batching { }", str(kinds.WIDTH))
    repository.write_config(models_root, "package", text)
    models.save_torchscript(Reshaped(), models_root, "reshaped")
    turned, flat = "reshape { shape: [ -1, 2, 3 ] }", "reshape { shape: [ ] }"
    fp32 = "TYPE_FP32"
    repository.write_config(
        models_root,
        "reshaped",
        repository.config(
            [
                repository.tensor("x", "-1, 6", fp32, turned),
                repository.tensor("scale", "1", fp32, flat),
            ],
            [
                repository.tensor("OUTPUT__0", "-1, 6", fp32, turned),
                repository.tensor("OUTPUT__1", "1", fp32, flat),
            ],
            max_batch_size=8,
        ),
    )
    with loading(server, (*SERVED, "reshaped")):
        yield


def given(module: Any, of: Sequence[DataType], arrays: Sequence[Any], json: bool) -> list[Any]:
    made = []
    for index, (kind, array) in enumerate(zip(of, arrays, strict=True)):
        one = module.InferInput(f"INPUT__{index}", list(array.shape), kind.wire)
        if module is httpclient:
            one.set_data_from_numpy(array, binary_data=not json or kind in HALVES)
        else:
            one.set_data_from_numpy(array)
        made.append(one)
    return made


def wanted(module: Any, of: Sequence[DataType], json: bool) -> list[Any]:
    if module is not httpclient:
        return [module.InferRequestedOutput(f"OUTPUT__{i}") for i in range(len(of))]
    return [
        module.InferRequestedOutput(f"OUTPUT__{i}", binary_data=not json or kind in HALVES)
        for i, kind in enumerate(of)
    ]


def check(reply: Any, of: Sequence[DataType], expected: Sequence[Any]) -> None:
    for index, (kind, array) in enumerate(zip(of, expected, strict=True)):
        output = reply.get_output(f"OUTPUT__{index}")
        datatype = output["datatype"] if isinstance(output, dict) else output.datatype
        assert datatype == kind.wire
        found = reply.as_numpy(f"OUTPUT__{index}")
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array, err_msg=kind.wire)


@pytest.mark.parametrize("road", ["grpc", "binary", "json"])
@pytest.mark.parametrize("model", SERVED)
def test_every_datatype_in_every_runtime(
    loaded: None, http: Any, grpc: Any, model: str, road: str
) -> None:
    of, client = SERVED[model], grpc if road == "grpc" else http
    module = module_of(client)
    arrays = [kinds.values(kind, 3, seed=5) for kind in of]
    reply = client.infer(
        model, given(module, of, arrays, road == "json"), outputs=wanted(module, of, road == "json")
    )
    check(reply, of, kinds.direct(of, arrays))


def typed(model: str, of: Sequence[DataType], arrays: Sequence[Any]) -> Any:
    """A request in InferTensorContents, which stock clients do not write."""
    request = service_pb2.ModelInferRequest(model_name=model)
    for index, (kind, array) in enumerate(zip(of, arrays, strict=True)):
        entry = request.inputs.add(name=f"INPUT__{index}", datatype=kind.wire, shape=array.shape)
        narrow = "uint" if kind.wire.startswith("UINT") else "int"
        wide = kind.wire in ("BOOL", "INT64", "UINT64", "FP32", "FP64")
        field = f"{kind.wire.lower() if wide else narrow}_contents"
        getattr(entry.contents, field).extend(array.ravel().tolist())
    return request


@pytest.mark.parametrize("shape", [(2, 3), (2, 0)])
def test_typed_contents(loaded: None, grpc: Any, shape: tuple[int, int]) -> None:
    arrays = [kinds.values(kind, *shape) for kind in TYPED]
    reply = grpc._client_stub.ModelInfer(typed("traced", TYPED, arrays))
    check(grpcclient.InferResult(reply), TYPED, kinds.direct(TYPED, arrays))


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_json_has_no_halves(loaded: None, server: Server, datatype: str) -> None:
    inputs = [
        {"name": f"INPUT__{i}", "datatype": kind.wire, "shape": [1, 1], "data": [1.0]}
        for i, kind in enumerate(HALVES)
        if kind.wire == datatype
    ]
    url = f"http://{server.http}/v2/models/halves/infer"
    reply = httpx.post(url, json={"inputs": inputs}, timeout=60)
    assert reply.status_code == 400
    assert f"receiving {datatype} data via JSON is not supported" in reply.json()["error"]


@pytest.mark.parametrize("road", ["grpc", "binary", "json"])
@pytest.mark.parametrize("model", ["traced", "eager_kinds"])
def test_a22_zero_size_over_every_road(
    loaded: None, http: Any, grpc: Any, model: str, road: str
) -> None:
    of, client = SERVED[model], grpc if road == "grpc" else http
    module, json = module_of(client), road == "json"
    arrays = [kinds.values(kind, 2, 0) for kind in of]
    reply = client.infer(model, given(module, of, arrays, json), outputs=wanted(module, of, json))
    check(reply, of, kinds.direct(of, arrays))


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a22_zero_size_among_others(loaded: None, server: Server, protocol: str) -> None:
    """Empty and full ones at once, so that they meet in the queue and on the way to the model."""
    arrays = [np.zeros((1, i % 3), np.float32) for i in range(30)]

    async def run() -> list[Any]:
        async with aio_client(server, protocol) as client:
            return await asyncio.gather(*(infer_aio(client, "big", {"x": x}) for x in arrays))

    for reply, array in zip(asyncio.run(run()), arrays, strict=True):
        assert reply.as_numpy("OUTPUT__0").shape == array.shape


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_reshape_both_ways_with_variable_sizes(loaded: None, server: Server, protocol: str) -> None:
    draw = np.random.default_rng(3)
    shapes = [(1 + i % 3, i % 4, 6) for i in range(24)]
    asked = [
        {"x": draw.random(shape, np.float32), "scale": draw.random((shape[0], 1), np.float32)}
        for shape in shapes
    ]

    async def run() -> list[Any]:
        async with aio_client(server, protocol) as client:
            return await asyncio.gather(*(infer_aio(client, "reshaped", each) for each in asked))

    for reply, each in zip(asyncio.run(run()), asked, strict=True):
        x, scale = (torch.from_numpy(each[name]) for name in ("x", "scale"))
        direct, _ = Reshaped()(x.reshape(*x.shape[:2], 2, 3), scale.reshape(-1))
        found = reply.as_numpy("OUTPUT__0")
        np.testing.assert_array_equal(found, direct.reshape(x.shape).numpy())
        np.testing.assert_array_equal(reply.as_numpy("OUTPUT__1"), each["scale"])


def test_a_tensor_of_another_datatype_is_refused_at_the_door(loaded: None, http: Any) -> None:
    with pytest.raises(InferenceServerException) as caught:
        infer(http, "big", {"x": np.zeros((1, 2), np.uint32)})
    assert "data-type is 'UINT32', but model 'big' expects 'FP32'" in str(caught.value)
