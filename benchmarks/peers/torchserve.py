"""TorchServe: a Java front end and a Python worker. Raw bytes in, raw bytes out.

h2load refuses its status line, so that it is loaded by wrk; `matrix.py` loads the references with
wrk too, and compares like with like.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

from benchmarks import wire
from benchmarks.contestants import Stage
from benchmarks.peers.base import PROGRAMS, Peer
from benchmarks.servers import Launch, ServerError, free_ports
from benchmarks.wire import Request

ARCHIVE_LIMIT_S = 120


class TorchServe(Peer):
    name = "torchserve"
    packages = (
        "torchserve==0.12.0",
        "torch-model-archiver==0.12.0",
        "numpy",
        "setuptools<80",
        "pyyaml",
    )
    generator = "wrk"

    def launch(self, stage: Stage, folder: Path) -> Launch:
        if not shutil.which("java"):
            raise ServerError("torchserve: there is no Java here")
        http_port, management_port, metrics_port, grpc_port, grpc_management = free_ports(5)
        store = folder / "store"
        store.mkdir()
        self._archive(stage, store)
        delay_ms = max(1, stage.delay_us // 1000)  # whole milliseconds, at least one
        model = {
            "1.0": {
                "defaultVersion": True,
                "marName": f"{stage.model.name}.mar",
                "minWorkers": 1,
                "maxWorkers": 1,
                "batchSize": stage.max_batch,
                "maxBatchDelay": delay_ms,
                "responseTimeout": 120,
            }
        }
        lines = {
            "inference_address": f"http://127.0.0.1:{http_port}",
            "management_address": f"http://127.0.0.1:{management_port}",
            "metrics_address": f"http://127.0.0.1:{metrics_port}",
            "grpc_inference_port": grpc_port,
            "grpc_management_port": grpc_management,
            "max_request_size": 1 << 28,
            "max_response_size": 1 << 28,
            "job_queue_size": 1000,
            "disable_system_metrics": "true",
            "model_store": store,
            "load_models": f"{stage.model.name}.mar",
            "models": json.dumps({stage.model.name: model}),
        }
        config = folder / "config.properties"
        config.write_text("".join(f"{name}={value}\n" for name, value in lines.items()))
        shutil.copy(PROGRAMS / "torchserve_log4j2.xml", folder)
        command = [str(self.environment / "bin" / "torchserve"), "--start", "--foreground"]
        command += ["--no-config-snapshots", "--disable-token-auth", f"--ts-config={config}"]
        command += [f"--log-config={folder / 'torchserve_log4j2.xml'}"]
        environment = self.variables(stage) | {"TEMP": str(folder)}
        return Launch(tuple(command), {"http": http_port}, "/ping", folder, environment)

    def _archive(self, stage: Stage, store: Path) -> None:
        command = [str(self.environment / "bin" / "torch-model-archiver")]
        command += [f"--model-name={stage.model.name}", "--version=1.0"]
        command += [f"--serialized-file={stage.file}", f"--export-path={store}"]
        command += [f"--handler={PROGRAMS / 'torchserve_handler.py'}"]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=ARCHIVE_LIMIT_S, check=False
        )
        if done.returncode != 0:
            raise ServerError(f"torch-model-archiver: {done.stderr[-400:]}")

    def request(self, stage: Stage, protocol: str) -> Request:
        return wire.raw_bytes(stage.model, stage.row, f"/predictions/{stage.model.name}")

    def role(self, executable: str, title: str) -> str:
        return "worker" if "model_service_worker" in title else "server"
