"""LitServe: no v2 protocol. The row's raw bytes in, the answer's raw bytes out."""

from __future__ import annotations

from pathlib import Path

from benchmarks import wire
from benchmarks.contestants import Stage
from benchmarks.peers.base import Peer
from benchmarks.servers import Launch, free_ports
from benchmarks.wire import Request


class LitServe(Peer):
    name = "litserve"
    packages = ("litserve==0.2.19", "numpy")

    def launch(self, stage: Stage, folder: Path) -> Launch:
        (port,) = free_ports(1)
        command = self.program("litserve_server.py", stage, str(port))
        return Launch(command, {"http": port}, "/health", folder, self.variables(stage))

    def request(self, stage: Stage, protocol: str) -> Request:
        return wire.raw_bytes(stage.model, stage.row, "/predict")
