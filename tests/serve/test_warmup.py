"""Samples run on every instance before a model is ready, and fail its load if they fail."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as httpclient
from tritonclient.utils import InferenceServerException, serialize_byte_tensor

from tests import models
from tests.serve import repository
from tests.serve.clients import infer, statistics
from tests.serve.repository import EAGER, config, tensor
from tests.serve.server import Server, wait_for

# Marks when its first run begins, and does not return before it is let.
HELD = """
import pathlib
import time
import torch

FOLDER = pathlib.Path(__file__).parents[1] / "warmup"

class Held(torch.nn.Module):
    def forward(self, x):
        (FOLDER / "entered").touch()
        end = time.monotonic() + 120
        while not (FOLDER / "go_on").exists():
            if time.monotonic() > end:
                raise TimeoutError("nobody let it go on")
            time.sleep(0.02)
        return x * 2
"""
NAMES = ("warm_counter", "warm_held", "warm_words", "warm_picky")


def sample(name: str, given: str, batch_size: int = 1, more: str = "", key: str = "x") -> str:
    return (
        f'model_warmup {{ name: "{name}" batch_size: {batch_size} {more} '
        f'inputs {{ key: "{key}" value {{ {given} }} }} }}\n'
    )


@pytest.fixture(scope="module", autouse=True)
def warm_models(models_root: Path, server: Server) -> Iterator[None]:
    models.save_torchscript(models.Counter(), models_root, "warm_counter")
    row = "data_type: TYPE_FP32 dims: [ 1 ] random_data: true"
    preferred = "dynamic_batching { preferred_batch_size: [ 2 ] }\n"
    repository.write_config(
        models_root,
        "warm_counter",
        config(
            [tensor("x", "1")],
            [tensor("OUTPUT__0", "1"), tensor("OUTPUT__1", "1")],
            max_batch_size=4,
            more=preferred + sample("small", row) + sample("large", row, 4, "count: 5"),
        ),
    )
    models.save_eager(HELD, models_root, "warm_held")
    eager = 'backend: "pytorch"\nruntime: "model.py"'
    given = "data_type: TYPE_FP32 dims: [ 2 ] zero_data: true"
    repository.write_config(
        models_root,
        "warm_held",
        config(
            [tensor("x", "2")], [tensor("y", "2")], engine=eager, more=EAGER + sample("one", given)
        ),
    )
    models.save_torchscript(models.Strings(), models_root, "warm_words")
    words = tensor("words", "1", "TYPE_STRING", "reshape { shape: [] }")
    out = tensor("OUTPUT__0", "1", "TYPE_STRING", "reshape { shape: [] }")
    given = 'data_type: TYPE_STRING dims: [ 1 ] input_data_file: "words.raw"'
    more = "dynamic_batching { }\n" + sample("words", given, 2, key="words")
    repository.write_config(models_root, "warm_words", config([words], [out], more=more))
    models.save_torchscript(models.RefusesNegative(), models_root, "warm_picky")
    given = 'data_type: TYPE_FP32 dims: [ 2 ] input_data_file: "row.raw"'
    repository.write_config(
        models_root,
        "warm_picky",
        config([tensor("x", "2")], [tensor("OUTPUT__0", "2")], more=sample("row", given, 3)),
    )
    for name in NAMES:
        (models_root / name / "warmup").mkdir()
    yield
    for name in NAMES:
        httpx.post(f"http://{server.http}/v2/repository/models/{name}/unload", timeout=60)


def wait_until_told(server: Server, text: str) -> None:
    wait_for(lambda: text in server.output(), 60, text)


def state(http: Any, name: str) -> dict[str, Any]:
    (entry,) = [e for e in http.get_model_repository_index() if e["name"] == name]
    return dict(entry)


def test_samples_run_at_every_size_and_are_in_no_statistics(
    server: Server, http: Any, grpc: Any
) -> None:
    grpc.load_model("warm_counter")
    for client in (http, grpc):
        assert set(statistics(client, "warm_counter").values()) == {0}
    one = {"x": np.ones((1, 1), np.float32)}
    # `small` at 1 and 2, thrice each, as TorchScript wants; `large` at 4 and 2, five times each.
    assert infer(http, "warm_counter", one).as_numpy("OUTPUT__1").tolist() == [2 * 3 + 2 * 5 + 1]
    assert infer(grpc, "warm_counter", one).as_numpy("OUTPUT__1").tolist() == [18]
    assert statistics(http, "warm_counter")["inference_count"] == 2
    assert statistics(grpc, "warm_counter")["execution_count"] == 2
    for line in ("'small' (batch size 1, 2, 3 x each)", "'large' (batch size 4, 2, 5 x each)"):
        wait_until_told(server, f"is running warmup sample {line}")


def test_a_model_is_ready_only_after_its_warmup(
    server: Server, models_root: Path, http: Any, grpc: Any
) -> None:
    folder = models_root / "warm_held" / "warmup"
    failures: list[BaseException] = []

    def load() -> None:
        try:
            with httpclient.InferenceServerClient(server.http, network_timeout=200) as client:
                client.load_model("warm_held")
        except BaseException as error:
            failures.append(error)

    loading = threading.Thread(target=load)
    loading.start()
    try:
        wait_for((folder / "entered").exists, 120, "the sample runs")
        assert state(http, "warm_held")["state"] == "LOADING"
        for client in (http, grpc):
            assert not client.is_model_ready("warm_held")
            with pytest.raises(InferenceServerException):
                infer(client, "warm_held", {"x": np.ones((1, 2), np.float32)})
    finally:
        (folder / "go_on").touch()
        loading.join(120)
    assert not failures
    assert state(http, "warm_held")["state"] == "READY"
    for client in (http, grpc):
        assert client.is_model_ready("warm_held")
        reply = infer(client, "warm_held", {"x": np.ones((1, 2), np.float32)})
        assert reply.as_numpy("y").tolist() == [[2, 2]]


def test_strings_from_a_file(models_root: Path, http: Any, grpc: Any) -> None:
    file = models_root / "warm_words" / "warmup" / "words.raw"
    two = np.array([b"one", b"two"], object)
    file.write_bytes(serialize_byte_tensor(two).item())
    reason = "failed to run warmup sample 'words': unexpected number of string elements 2"
    for client in (http, grpc):
        with pytest.raises(InferenceServerException, match=reason):
            client.load_model("warm_words")
    file.write_bytes(serialize_byte_tensor(two[:1]).item())
    http.load_model("warm_words")
    reply = infer(grpc, "warm_words", {"words": np.array([[b"hi"]], object)})
    assert reply.as_numpy("OUTPUT__0").tolist() == [[b"hi!"]]


def test_a_failing_sample_fails_the_load_until_its_data_is_mended(
    models_root: Path, http: Any, grpc: Any
) -> None:
    file = models_root / "warm_picky" / "warmup" / "row.raw"
    place = r'warm_picky/config.pbtxt:\d+: model_warmup\[0\].inputs\["x"\].input_data_file: '

    def refused(client: Any, reason: str) -> None:
        with pytest.raises(InferenceServerException, match=reason) as caught:
            client.load_model("warm_picky")
        assert str(models_root) not in str(caught.value)
        assert not client.is_model_ready("warm_picky") and client.is_server_live()

    for client in (http, grpc):
        file.unlink(missing_ok=True)
        refused(client, place + "unable to find 'warm_picky/warmup/row.raw'")
        file.write_bytes(bytes(4))
        refused(client, place + "warmup setting expects 8 bytes for input 'x', but the data provi")
        file.write_bytes(np.array([1, -1], np.float32).tobytes())
        refused(
            client,
            "failed to run warmup sample 'row': PyTorch execute failure: .*negative value.*; "
            "batch size 3",
        )
    entry = state(http, "warm_picky")
    assert entry["state"] == "UNAVAILABLE" and "warmup sample 'row'" in entry["reason"]
    file.write_bytes(np.array([1, 2], np.float32).tobytes())
    http.load_model("warm_picky")
    for client in (http, grpc):
        reply = infer(client, "warm_picky", {"x": np.ones((1, 2), np.float32)})
        assert reply.as_numpy("OUTPUT__0").tolist() == [[2, 2]]
