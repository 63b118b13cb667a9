"""Outputs as classes, with stock clients: `class_count` on both protocols, against torch."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tritonclient.http as httpclient
from tritonclient.utils import InferenceServerException

from tests import models
from tests.serve import repository
from tests.serve.clients import aio_client, infer, infer_aio, inputs, loading, module_of, rows
from tests.serve.server import Server

LABELS = ("cat", "dog", "bird and bee")
MANY = 1_000_000


@pytest.fixture(scope="module")
def loaded(models_root: Path, server: Server) -> Iterator[None]:
    labelled = 'label_filename: "labels.txt"'
    for name in ("labelled", "unlabelled"):
        models.save_torchscript(repository.mlp(), models_root, name)
        output = repository.tensor("OUTPUT__0", "4", more=labelled)
        text = repository.config([repository.tensor("INPUT__0", "8")], [output])
        repository.write_config(models_root, name, text)
    (models_root / "labelled" / "labels.txt").write_text("\n".join(LABELS))
    for name, data_type in (("integers", "TYPE_INT64"), ("halves", "TYPE_FP16")):
        models.save_torchscript(models.identity(), models_root, name)
        text = repository.config(
            [repository.tensor("x", "-1", data_type)],
            [repository.tensor("OUTPUT__0", "-1", data_type)],
            max_batch_size=0,
            more="",
        )
        repository.write_config(models_root, name, text)
    with loading(server, ("labelled", "integers", "halves")):
        yield


@pytest.fixture(params=["http", "grpc"])
def client(loaded: None, request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def asked(client: Any, count: int, **more: Any) -> list[Any]:
    return [module_of(client).InferRequestedOutput("OUTPUT__0", class_count=count, **more)]


def texts(reply: Any) -> list[list[str]]:
    found = reply.as_numpy("OUTPUT__0")
    return [[text.decode() for text in row] for row in found.reshape(-1, found.shape[-1])]


def check(found: list[str], scores: torch.Tensor, count: int) -> None:
    """The best of one row of a labelled output."""
    best = torch.topk(scores, min(count, len(scores)))
    assert len(found) == len(best.indices)
    for text, score, index in zip(found, best.values, best.indices, strict=True):
        value, place, *label = text.split(":")
        assert int(place) == index and len(value.partition(".")[2]) == 6
        assert float(value) == pytest.approx(float(score), abs=1e-5)
        assert label == list(LABELS[index : index + 1])  # the fourth class has none


def direct(x: Any) -> torch.Tensor:
    with torch.inference_mode():
        scores: torch.Tensor = repository.mlp()(torch.from_numpy(x))
    return scores


@pytest.mark.parametrize("count", [1, 3, 4, 100])
@pytest.mark.parametrize("batch", [1, 5])
def test_the_best_of_each_row_with_their_labels(client: Any, batch: int, count: int) -> None:
    x = rows(batch, 8, seed=count)
    reply = infer(client, "labelled", {"INPUT__0": x}, outputs=asked(client, count))
    assert reply.as_numpy("OUTPUT__0").shape == (batch, min(count, 4))
    for found, scores in zip(texts(reply), direct(x), strict=True):
        check(found, scores, count)
    output = reply.get_output("OUTPUT__0")
    datatype = output["datatype"] if isinstance(output, dict) else output.datatype
    assert datatype == "BYTES"


def test_classes_as_json(loaded: None, http: Any) -> None:
    x = rows(2, 8)
    outputs = asked(http, 2, binary_data=False)
    reply = http.infer("labelled", inputs(httpclient, {"INPUT__0": x}), outputs=outputs)
    data = reply.get_output("OUTPUT__0")["data"]
    for found, scores in zip((data[:2], data[2:]), direct(x), strict=True):
        check(found, scores, 2)


def test_both_protocols_say_the_same(loaded: None, http: Any, grpc: Any) -> None:
    x = {"INPUT__0": rows(3, 8)}
    replies = [infer(each, "labelled", x, outputs=asked(each, 4)) for each in (http, grpc)]
    assert texts(replies[0]) == texts(replies[1])


def test_integers_without_a_batch(client: Any) -> None:
    """Of equal scores the lower index comes first."""
    x = np.array([5, -(2**63), 7, 5, 2**63 - 1], np.int64)
    reply = infer(client, "integers", {"x": x}, outputs=asked(client, 4))
    assert reply.as_numpy("OUTPUT__0").shape == (4,)
    assert texts(reply) == [[f"{2**63 - 1}:4", "7:2", "5:0", "5:3"]]


def test_odd_floats(client: Any) -> None:
    x = np.array([[np.nan, -np.inf, 1e10, 0.0, np.inf, 1e-9, np.nan]], np.float32)
    reply = infer(client, "big", {"x": x}, outputs=asked(client, 7))
    assert texts(reply) == [
        ["inf:4", "10000000000.000000:2", "0.000000:5", "0.000000:3", "-inf:1", "nan:0", "nan:6"]
    ]


def test_the_best_of_a_million(client: Any) -> None:
    """They are found on a thread, and the server answers others meanwhile."""
    x = np.random.default_rng(0).permutation(MANY).astype(np.float32)[None]
    reply = infer(client, "big", {"x": x}, outputs=asked(client, 3))
    best = np.argsort(-x[0])[:3]
    assert texts(reply) == [[f"{x[0][i]:.6f}:{i}" for i in best]]


def test_members_of_one_batch_get_their_own(loaded: None, server: Server) -> None:
    async def run(protocol: str) -> list[Any]:
        async with aio_client(server, protocol) as one:
            calls = []
            for k in range(12):
                outputs = asked(one, k % 4 + 1) if k % 3 else None
                x = {"INPUT__0": rows(1, 8, seed=k)}
                calls.append(infer_aio(one, "labelled", x, outputs=outputs))
            return await asyncio.gather(*calls)

    for protocol in ("http", "grpc"):
        for k, reply in enumerate(asyncio.run(run(protocol))):
            scores = direct(rows(1, 8, seed=k))
            if k % 3:
                check(texts(reply)[0], scores[0], k % 4 + 1)
            else:
                np.testing.assert_allclose(reply.as_numpy("OUTPUT__0"), scores, atol=1e-5)


WORDS = np.array([[b"a"]], np.object_)
LARGE = "classification output tensor too large"
UNSUPPORTED = "class result not available for output due to unsupported type"
BAD = [
    ("strings", {"words": WORDS}, 1, f"{UNSUPPORTED} 'BYTES'"),
    ("halves", {"x": np.zeros(4, np.float16)}, 1, f"{UNSUPPORTED} 'FP16'"),
    ("big", {"x": np.zeros((1, MANY + 1), np.float32)}, 1, LARGE),
    ("big", {"x": np.zeros((2, MANY), np.float32)}, MANY, LARGE),
    ("labelled", {"INPUT__0": rows(1, 8)}, -1, "classification"),
]


@pytest.mark.parametrize(("model", "arrays", "count", "text"), BAD)
def test_what_cannot_be_classified(
    client: Any, model: str, arrays: Any, count: int, text: str
) -> None:
    with pytest.raises(InferenceServerException) as caught:
        infer(client, model, arrays, outputs=asked(client, count))
    assert caught.value.status() in ("400", "StatusCode.INVALID_ARGUMENT")
    assert text in caught.value.message()
    reply = infer(client, "labelled", {"INPUT__0": rows(1, 8)}, outputs=asked(client, 1))
    assert len(texts(reply)[0]) == 1


def test_a_missing_label_file_fails_the_load(loaded: None, http: Any) -> None:
    with pytest.raises(InferenceServerException) as caught:
        http.load_model("unlabelled")
    text = "output[0].label_filename: unable to find 'unlabelled/labels.txt'"
    assert text in caught.value.message()


def test_a_label_file_from_elsewhere_fails_the_load(
    loaded: None, http: Any, models_root: Path, tmp_path: Path
) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    link = models_root / "unlabelled" / "labels.txt"
    link.symlink_to(tmp_path / "secret.txt")
    try:
        with pytest.raises(InferenceServerException) as caught:
            http.load_model("unlabelled")
    finally:
        link.unlink()
    assert "leads out of the model repository" in caught.value.message()
    assert "secret" not in caught.value.message()


def test_the_server_names_the_extension(http: Any, grpc: Any) -> None:
    for extensions in (
        http.get_server_metadata()["extensions"],
        grpc.get_server_metadata().extensions,
    ):
        assert "classification" in extensions
