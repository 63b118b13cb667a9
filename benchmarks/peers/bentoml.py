"""BentoML: no v2 protocol. Arrays in JSON: the form that its adaptive batching takes."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np

from benchmarks import wire
from benchmarks.contestants import Stage
from benchmarks.models import Model
from benchmarks.peers.base import PROGRAMS, Peer
from benchmarks.servers import Launch, free_ports
from benchmarks.wire import JSON, Request

LARGEST_JSON_ROW = 1 << 18


class BentoML(Peer):
    name = "bentoml"
    packages = ("bentoml==1.4.40", "numpy")

    def launch(self, stage: Stage, folder: Path) -> Launch:
        (port,) = free_ports(1)
        shutil.copy(PROGRAMS / "bento_service.py", folder)
        command = (
            str(self.environment / "bin" / "bentoml"),
            "serve",
            "bento_service:Torch",
            "--host=127.0.0.1",
            f"--port={port}",
            f"--working-dir={folder}",
        )
        quiet = {
            "BENTOML_HOME": str(folder / "home"),
            "BENTOML_DO_NOT_TRACK": "True",
            "BENTOML_CONFIG_OPTIONS": "services.Torch.logging.access.enabled=false",
        }
        environment = self.variables(stage) | quiet
        return Launch(command, {"http": port}, "/readyz", folder, environment)

    def lacks(self, model: Model, protocol: str) -> str:
        if protocol == "http" and math.prod(model.row) > LARGEST_JSON_ROW:
            return "no binary tensors over HTTP: millions of numbers as text"
        return super().lacks(model, protocol)

    def request(self, stage: Stage, protocol: str) -> Request:
        nested = np.array(wire.numbers(stage.row), object).reshape(stage.row.shape).tolist()
        body = json.dumps({"rows": nested}, separators=(",", ":")).encode()
        return Request("http", "/infer", (JSON,), body, _read)


def _read(headers: object, body: bytes) -> np.ndarray:
    return np.array(json.loads(body), np.float32)
