"""MLServer: v2 over HTTP as JSON (it has no binary extension there) and over gRPC as raw bytes."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

from benchmarks import wire
from benchmarks.contestants import Stage
from benchmarks.models import Model
from benchmarks.peers.base import PROGRAMS, Peer
from benchmarks.servers import Launch, free_ports
from benchmarks.wire import Request

LARGEST_JSON_ROW = 1 << 18


class MLServer(Peer):
    name = "mlserver"
    packages = ("mlserver==1.7.1",)
    protocols = ("http", "grpc")

    def launch(self, stage: Stage, folder: Path) -> Launch:
        http_port, grpc_port, metrics_port = free_ports(3)
        settings = {
            "host": "127.0.0.1",
            "http_port": http_port,
            "grpc_port": grpc_port,
            "metrics_port": metrics_port,
            "grpc_max_message_length": 1 << 28,
            # The model in the server's own process: no hop to a worker.
            "parallel_workers": 0,
            "debug": False,
            "gzip_enabled": False,
        }
        model = {
            "name": stage.model.name,
            "implementation": "mlserver_runtime.Runtime",
            "max_batch_size": stage.max_batch if stage.model.batched else 0,
            "max_batch_time": stage.delay_us / 1e6 if stage.model.batched else 0,
        }
        (folder / "settings.json").write_text(json.dumps(settings))
        (folder / "model-settings.json").write_text(json.dumps(model))
        shutil.copy(PROGRAMS / "mlserver_runtime.py", folder)
        command = (str(self.environment / "bin" / "mlserver"), "start", str(folder))
        ports = {"http": http_port, "grpc": grpc_port}
        return Launch(command, ports, "/v2/health/ready", folder, self.variables(stage))

    def lacks(self, model: Model, protocol: str) -> str:
        if protocol == "http" and math.prod(model.row) > LARGEST_JSON_ROW:
            return "no binary tensors over HTTP: millions of numbers as text"
        return super().lacks(model, protocol)

    def request(self, stage: Stage, protocol: str) -> Request:
        if protocol == "grpc":
            return wire.v2_grpc(stage.model, stage.row)
        return wire.v2_json(stage.model, stage.row)
