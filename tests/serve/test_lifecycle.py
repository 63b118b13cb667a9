"""Explicit control: load, unload, reload under load; a failed reload leaves the old one serving."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

from tests import models
from tests.serve import repository
from tests.serve.clients import aio_client, infer, infer_aio, rows
from tests.serve.server import Server, wait_for

X = rows(1, 2)


class Twice(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


@pytest.fixture
def spare(models_root: Path, http: Any) -> Iterator[Path]:
    """The directory of a model that nobody else uses; put back and unloaded afterwards."""
    folder = models_root / "spare"
    kept = models_root.parent / "spare_kept"
    shutil.copytree(folder, kept)
    yield folder
    http.unload_model("spare")
    shutil.rmtree(folder)
    shutil.move(kept, folder)


def state(http: Any, name: str) -> dict[str, str]:
    entries = [e for e in http.get_model_repository_index() if e["name"] == name]
    return dict(entries[-1])


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_load_and_unload(
    request: pytest.FixtureRequest, spare: Path, http: Any, protocol: str
) -> None:
    client = request.getfixturevalue(protocol)
    client.load_model("spare")
    assert client.is_model_ready("spare")
    assert np.array_equal(infer(client, "spare", {"x": X}).as_numpy("OUTPUT__0"), X)
    client.unload_model("spare")
    with pytest.raises(InferenceServerException, match="no available versions|not at ready"):
        infer(client, "spare", {"x": X})
    wait_for(lambda: state(http, "spare").get("reason") == "unloaded", 90, "spare is unloaded")


def test_loading_what_is_not_there(http: Any, grpc: Any) -> None:
    for client in (http, grpc):
        with pytest.raises(InferenceServerException, match="failed to poll from model repository"):
            client.load_model("nowhere")
        for name in ("../mlp", "..", "a/b", " "):
            with pytest.raises(InferenceServerException):
                client.load_model(name)
        with pytest.raises(InferenceServerException, match="torch.save"):
            client.load_model("pickled")
    assert http.is_server_ready()


def test_who_hears_of_a_failed_load_finds_its_reason_in_the_index(spare: Path, http: Any) -> None:
    """With the next request: the index is the Router's, and the Controller has failed the load."""
    config = spare / "config.pbtxt"
    old = config.read_text()
    for number in range(8):
        config.write_text(f"{old}\nnonsense_{number}: 1\n")
        with pytest.raises(InferenceServerException, match=f"nonsense_{number}"):
            http.load_model("spare")
        entries = [e for e in http.get_model_repository_index() if e["name"] == "spare"]
        assert [e for e in entries if f"nonsense_{number}" in e.get("reason", "")], entries


def test_reload_swaps_without_a_lost_request_and_a_bad_one_keeps_the_old(
    server: Server, spare: Path, http: Any, grpc: Any
) -> None:
    http.load_model("spare")
    stop = threading.Event()
    errors: list[str] = []
    answers: list[float] = []

    def load() -> None:
        import tritonclient.grpc as grpcclient

        client = grpcclient.InferenceServerClient(server.grpc)
        while not stop.is_set():
            try:
                reply = infer(client, "spare", {"x": X}).as_numpy("OUTPUT__0")
                answers.append(float(reply[0, 0] / X[0, 0]))
            except InferenceServerException as error:
                errors.append(error.message())
        client.close()

    thread = threading.Thread(target=load)
    thread.start()
    try:
        wait_for(lambda: answers or errors, 60, "the old one answers")
        models.save_torchscript(Twice(), spare.parent, "spare")
        http.load_model("spare")
        assert np.allclose(infer(http, "spare", {"x": X}).as_numpy("OUTPUT__0"), X * 2)
        (spare / "1" / "model.pt").write_bytes(b"no archive")
        with pytest.raises(InferenceServerException, match="spare"):
            http.load_model("spare")
        assert np.allclose(infer(http, "spare", {"x": X}).as_numpy("OUTPUT__0"), X * 2)
        assert state(http, "spare")["state"] == "READY"
        seen = len(answers)
        wait_for(lambda: errors or len(answers) > seen, 60, "the new one answers")
    finally:
        stop.set()
        thread.join(60)
    assert not errors
    assert set(np.round(answers).tolist()) == {1.0, 2.0}


def test_versions_of_one_model(spare: Path, http: Any) -> None:
    shutil.copytree(spare / "1", spare / "2")
    models_path = spare / "2" / "model.pt"
    with torch.no_grad():
        torch.jit.save(torch.jit.script(Twice()), str(models_path))
    text = (spare / "config.pbtxt").read_text()
    repository.write_config(spare.parent, "spare", text + "version_policy { all { } }\n")
    http.load_model("spare")
    assert http.get_model_metadata("spare")["versions"] == ["1", "2"]
    for version, factor in (("1", 1), ("2", 2), ("", 2)):
        reply = infer(http, "spare", {"x": X}, model_version=version).as_numpy("OUTPUT__0")
        assert np.allclose(reply, X * factor)
    repository.write_config(spare.parent, "spare", text)  # latest only
    http.load_model("spare")
    assert http.get_model_metadata("spare")["versions"] == ["2"]
    with pytest.raises(InferenceServerException, match="version 1"):
        infer(http, "spare", {"x": X}, model_version="1")


def test_what_waits_when_a_version_is_replaced_is_answered_by_the_new_one(
    server: Server, models_root: Path, http: Any
) -> None:
    """Thirty requests wait behind two that run when the model is loaded anew."""
    folder = models_root / "slow"
    source = folder / "1" / "model.py"
    old = source.read_text()
    asked = {"s": np.full((1, 1), 0.05, np.float32)}

    async def run() -> list[Any]:
        async with aio_client(server, "http") as client:
            held = {"s": np.full((1, 1), -1.0, np.float32)}
            calls = [asyncio.create_task(infer_aio(client, "slow", held)) for _ in range(2)]
            both = partial(wait_for, lambda: len(repository.held(folder)) == 2, 30, "both run")
            await asyncio.to_thread(both)
            calls += [asyncio.create_task(infer_aio(client, "slow", asked)) for _ in range(30)]
            await asyncio.sleep(0.5)
            await client.load_model("slow")
            go()
            return await asyncio.gather(*calls)

    try:
        source.write_text(old.replace("seconds * 2", "seconds * 3"))
        with repository.holding(folder) as go:
            replies = [reply.as_numpy("t")[0, 0] for reply in asyncio.run(run())]
    finally:
        source.write_text(old)
        http.load_model("slow")
    assert np.allclose(replies[:2], -2.0)  # what ran was answered by the old one
    assert np.allclose(replies[2:], 0.15)  # what waited, by the new one


def test_a_client_that_gives_up_a_load_does_not_stop_it(spare: Path, http: Any, grpc: Any) -> None:
    load = grpc._client_stub.RepositoryModelLoad  # stock clients cannot take a load back

    def begun() -> bool:
        index = http.get_model_repository_index()
        states = {entry.get("state") for entry in index if entry["name"] == "spare"}
        return not states.isdisjoint(("LOADING", "READY"))

    def given_up() -> bool:
        call = load.future(service_pb2.RepositoryModelLoadRequest(model_name="spare"))
        wait_for(begun, 60, "the load has begun")
        call.cancel()
        if call.cancelled():
            return True
        http.unload_model("spare")  # it was over before that: once more
        return False

    wait_for(given_up, 120, "a client has given up a load")
    wait_for(lambda: http.is_model_ready("spare"), 120, "spare is loaded all the same")


def test_a_version_that_is_gone_is_forgotten(spare: Path, http: Any) -> None:
    broken = spare / "2"
    broken.mkdir()
    (broken / "model.pt").write_bytes(b"no archive")
    with pytest.raises(InferenceServerException, match="version 2"):
        http.load_model("spare")
    shutil.rmtree(broken)
    http.load_model("spare")
    assert state(http, "spare") == {"name": "spare", "version": "1", "state": "READY"}
