"""A model that multiplies, and what one looks at while it is loaded, changed and unloaded."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
from tritonclient.utils import InferenceServerException

from tests.serve import repository
from tests.serve.clients import infer, rows
from tests.serve.server import Server, wait_for

X = rows(1, 2)
STATUS = {
    "400": "INVALID_ARGUMENT",
    "404": "NOT_FOUND",
    "500": "INTERNAL",
    "501": "UNIMPLEMENTED",
    "503": "UNAVAILABLE",
}
LOAD_S = 120.0

TIMES = """
import torch

class Times(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x * self.factor
"""


def write_times(root: Path, name: str, factor: float, version: int = 1) -> Path:
    """A model that multiplies, by weights whose file has the same size for any factor."""
    folder = root / name / str(version)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.py").write_text(TIMES)
    torch.save({"factor": torch.tensor([float(factor)])}, folder / "model.pt")
    return folder / "model.pt"


def times_config(more: str = "", max_batch_size: int = 32) -> str:
    return repository.config(
        [repository.tensor("x", "2")],
        [repository.tensor("y", "2")],
        engine='backend: "pytorch"\nruntime: "model.py"',
        max_batch_size=max_batch_size,
        more=repository.EAGER + more,
    )


def factor(client: Any, name: str, output: str = "y", **options: Any) -> float:
    reply = infer(client, name, {"x": X}, **options).as_numpy(output)
    return float(np.round(reply[0, 0] / X[0, 0], 5))


def entries(client: Any, name: str) -> list[dict[str, str]]:
    index = client.get_model_repository_index()
    if not isinstance(index, list):
        keys = ("name", "version", "state", "reason")
        index = [{k: getattr(m, k) for k in keys if getattr(m, k)} for m in index.models]
    return [dict(one) for one in index if one["name"] == name]


def config_of(client: Any, name: str) -> dict[str, Any]:
    """As JSON, whatever the protocol."""
    if type(client).__module__.startswith("tritonclient.grpc"):
        shown: dict[str, Any] = client.get_model_config(name, as_json=True)["config"]
        return shown
    return dict(client.get_model_config(name))


def replicas(server: Server, name: str, version: int = 1) -> dict[int, str]:
    """Process -> application, for the replicas of a version."""
    prefix = f"manta.{name}.{version}."
    found = server.peek()["replicas"]
    return {r["pid"]: r["application"] for r in found if r["application"].startswith(prefix)}


def refused(call: Any, status: str, text: str) -> None:
    with pytest.raises(InferenceServerException, match=text) as caught:
        call()
    shown = str(caught.value.status()).removeprefix("StatusCode.")
    assert shown in (status, STATUS[status])


@contextlib.contextmanager
def asking(server: Server, name: str, output: str) -> Iterator[list[float]]:
    """Requests over both protocols all the while; every one of them must be answered."""
    stop = threading.Event()
    answers: list[float] = []
    errors: list[str] = []

    def ask(module: Any, address: str) -> None:
        # A client of its own, made where it is used: gevent's are bound to their thread.
        with contextlib.closing(module.InferenceServerClient(address)) as client:
            while not stop.is_set():
                try:
                    answers.append(factor(client, name, output))
                except Exception as error:
                    errors.append(repr(error))

    roads = [(httpclient, server.http), (grpcclient, server.grpc)] * 2
    threads = [threading.Thread(target=ask, args=road) for road in roads]
    for thread in threads:
        thread.start()
    try:
        yield answers
        before = len(answers)
        wait_for(lambda: len(answers) > before + 20, LOAD_S, "requests are still answered")
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert not errors, errors[:3]
