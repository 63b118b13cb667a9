"""What the benchmark must know of a server: how to start it, how to ask it, who its processes are.

`Contestant` is the base of them all, `Stage` what they have to serve. Manta and the in-process
baseline are here; the others are in `peers/`. Measures nothing. Used by `matrix.py`.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks import runtimes, servers, wire
from benchmarks.models import Model
from benchmarks.servers import Launch, Server, ServerError, free_ports
from benchmarks.wire import Request

HERE = Path(__file__).resolve().parent
MANTA = str(Path(sys.executable).parent / "manta")
OPTIMIZE_LIMIT_S = 900
LOADS = 3
REDUCED_TOLERANCE = 0.1


@dataclass(frozen=True, slots=True)
class Stage:
    """One model, its file, the queue delay, and one row with torch's answer to it."""

    model: Model
    file: Path
    delay_us: int
    row: np.ndarray
    expected: np.ndarray

    @property
    def name(self) -> str:
        return f"{self.model.name}-{self.delay_us}us"

    @property
    def max_batch(self) -> int:
        return 32 if self.model.batched else 1


class Contestant:
    """One server in one configuration. `folder` in `launch` is its own, empty and writable."""

    name = ""
    protocols: tuple[str, ...] = ("http",)
    generator = "h2load"
    has_statistics = False
    tolerance = 1e-4  # of the one checked answer, relative to the largest value

    def launch(self, stage: Stage, folder: Path) -> Launch:
        """Writes what the server needs into `folder`. Raises ServerError."""
        raise NotImplementedError

    def request(self, stage: Stage, protocol: str) -> Request:
        if protocol == "grpc":
            return wire.v2_grpc(stage.model, stage.row)
        return wire.v2_binary(stage.model, stage.row)

    def lacks(self, model: Model, protocol: str) -> str:
        """Why it cannot serve this over that; empty where it can."""
        return "" if protocol in self.protocols else f"no v2 over {protocol}"

    def role(self, executable: str, title: str) -> str:
        return "server"

    def version(self) -> str:
        """For the report; empty where it goes without saying."""
        return ""

    def loads(self, stage: Stage, server: Server) -> dict[str, float]:
        """Seconds to load the model again, and to its first answer; none where nobody asks."""
        return {}


class Baseline(Contestant):
    """FastAPI on uvicorn, the model in the same process, one call per request."""

    def __init__(self, executor: str = "loop") -> None:
        self.name = "fastapi"
        self.executor = executor

    def launch(self, stage: Stage, folder: Path) -> Launch:
        (port,) = free_ports(1)
        command = [sys.executable, str(HERE / "baseline.py"), f"--model={stage.file}"]
        command += [f"--port={port}", f"--executor={self.executor}"]
        command += [f"--name={stage.model.name}"]
        return Launch(tuple(command), {"http": port}, "/v2/health/ready", folder)


class Manta(Contestant):
    """`manta serve` in one batching mode, with so many Routers and replicas of the model; with
    `precision` (fp32, bf16 or fp16) it serves what `manta optimize` makes of the model, with
    `runtime` the same network as a file of that runtime."""

    protocols = ("http", "grpc")
    has_statistics = True

    def __init__(
        self,
        batching: str,
        routers: int = 1,
        precision: str = "",
        runtime: str = "",
        extra: Sequence[str] = (),
        replicas: int = 1,
    ) -> None:
        self.batching, self.routers, self.precision = batching, routers, precision
        self.runtime, self.replicas = runtime, replicas
        self.extra = tuple(extra)
        self.name = f"manta-{batching}" + (f"-x{routers}" if routers > 1 else "")
        self.name += f"-r{replicas}" if replicas > 1 else ""
        self.name += "".join(f"-{one}" for one in (precision, runtime) if one)
        self.tolerance = REDUCED_TOLERANCE if precision in ("bf16", "fp16") else 1e-4

    def launch(self, stage: Stage, folder: Path) -> Launch:
        repository = folder / "repository"
        version = repository / stage.model.name / "1"
        version.mkdir(parents=True, exist_ok=True)
        engine = runtimes.write(self.runtime or "torchscript", stage.model, stage.file, version)
        config = stage.model.config(stage.delay_us, self.replicas)
        (version.parent / "config.pbtxt").write_text(engine + config)
        if self.precision:
            self._optimize(repository, stage)
        http_port, grpc_port, metrics_port = free_ports(3)
        command = [MANTA, "serve"]
        command += [f"--model-repository={repository}", f"--batching={self.batching}"]
        command += [f"--http-port={http_port}", f"--grpc-port={grpc_port}"]
        command += [f"--metrics-port={metrics_port}", f"--router-replicas={self.routers}"]
        if self.runtime:  # to be unloaded and loaded in the end
            command += ["--model-control-mode=explicit", f"--load-model={stage.model.name}"]
        ports = {"http": http_port, "grpc": grpc_port}
        return Launch(tuple(command) + self.extra, ports, "/v2/health/ready", folder)

    def loads(self, stage: Stage, server: Server) -> dict[str, float]:
        """By the repository's own calls, so that neither Ray's start nor the first import of torch
        is in it; what the compiler keeps on disk is there already."""
        if not self.runtime:
            return {}
        path = f"/v2/repository/models/{stage.model.name}"
        took: list[tuple[float, float]] = []
        for _ in range(LOADS):
            servers.post(server, f"{path}/unload")
            begin = time.monotonic()
            servers.post(server, f"{path}/load")
            loaded = time.monotonic()
            servers.check(server, self.request(stage, "http"), stage.expected, self.tolerance)
            took.append((loaded - begin, time.monotonic() - loaded))
        load_s, first_s = (median(values) for values in zip(*took, strict=True))
        return {"load_s": load_s, "first_answer_s": first_s}

    def _optimize(self, repository: Path, stage: Stage) -> None:
        """Writes a next version beside the first, which is then the one that is served."""
        command = [MANTA, "optimize", str(repository), f"--model={stage.model.name}"]
        command += [f"--precision={self.precision}", "--threads=1"]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=OPTIMIZE_LIMIT_S, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise ServerError(f"{self.name}: manta optimize did not end") from error
        if done.returncode != 0:
            raise ServerError(f"{self.name}: manta optimize: {(done.stdout + done.stderr)[-500:]}")

    def role(self, executable: str, title: str) -> str:
        return manta_role(executable, title)


def manta_role(executable: str, title: str) -> str:
    """Serve's title for a replica is ray::ServeReplica:<app>:<deployment>; the rest is Ray's."""
    if "haproxy" in executable:
        return "haproxy"
    _, found, rest = title.partition("ServeReplica:")
    if not found:
        return "ray"
    for name in ("Router", "Controller"):
        if name in rest:
            return name.lower()
    return "replica"
