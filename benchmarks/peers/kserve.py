"""KServe's Python model server: v2 binary over HTTP and gRPC. Its batcher is a sidecar in a
cluster, so that here every request is a call of its own."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.contestants import Stage
from benchmarks.peers.base import Peer
from benchmarks.servers import Launch, free_ports

# By default it writes three lines for every request.
QUIET = {
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {"console": {"class": "logging.StreamHandler"}},
    "root": {"level": "WARNING", "handlers": ["console"]},
}


class KServe(Peer):
    name = "kserve"
    packages = ("kserve==0.21.0",)
    protocols = ("http", "grpc")

    def launch(self, stage: Stage, folder: Path) -> Launch:
        http_port, grpc_port = free_ports(2)
        logging = folder / "logging.json"
        logging.write_text(json.dumps(QUIET))
        command = self.program(
            "kserve_server.py",
            stage,
            f"--http_port={http_port}",
            f"--grpc_port={grpc_port}",
            "--workers=1",
            "--grpc_max_send_message_length=268435456",
            "--grpc_max_receive_message_length=268435456",
            "--enable_latency_logging=false",
            f"--log_config_file={logging}",
        )
        ports = {"http": http_port, "grpc": grpc_port}
        return Launch(command, ports, "/v2/health/ready", folder, self.variables(stage))
