"""A real server under test: `manta serve` or `serve run` as a process of its own.

Owns ports, environment, temp directory and the end; waits are bounded.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil

from cluster.cli import SERVE_ENV, load_environment

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
START_S = 150.0
END_S = 90.0
GONE_S = 60.0  # its processes, after it
PEEK_S = 150.0

PEEK = """
import asyncio, dataclasses, json, sys
import ray
from ray import serve
ray.init(address=sys.argv[1], namespace="serve", log_to_driver=False, logging_level="error")
async def main():
    handle = serve.get_deployment_handle("Controller", "manta")
    while await asyncio.to_thread(sys.stdin.readline):
        for turn in range(100):
            try:
                print(json.dumps(await look(handle)), flush=True)
                break
            except Exception:  # whom it asks is being replaced
                if turn == 99:
                    raise
                await asyncio.sleep(0.5)
async def look(handle):
    reports = await handle.replicas.remote()
    keys = ("application deployment replica_id pid node_id instances device weight_pointers"
            " details loaded error").split()
    status = serve.status().applications
    return {
        "replicas": [{k: getattr(r, k) for k in keys} for r in reports],
        "running": {
            name: {d: s.replica_states.get("RUNNING", 0) for d, s in app.deployments.items()}
            for name, app in status.items()
        },
        "resources": [ray.cluster_resources(), ray.available_resources()],
        "nodes": len(ray.nodes()),
    }
asyncio.run(main())
"""

CENSUS = """
import asyncio, json, sys
import ray
from ray import serve
ray.init(address=sys.argv[1], namespace="serve", log_to_driver=False, logging_level="error")
async def main():
    found = {}
    for name in ("Router", "Controller"):
        found[name] = await serve.get_deployment_handle(name, "manta").census.remote()
    print(json.dumps(found))
asyncio.run(main())
"""


# From below the range that the system hands out, each worker's from its own part of it, and none a
# second time: gRPC's clients remember addresses that they could not connect to.
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_PORTS = itertools.count(18000 + _WORKER % 2 * 6000 + os.getpid() * 37 % 5000)


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago."""
    found: list[int] = []
    while len(found) < count:
        candidate = next(_PORTS)
        with socket.socket() as probe:
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", candidate))
                found.append(candidate)
    return found


def profile() -> dict[str, str]:
    """cluster/serve.env."""
    before = dict(os.environ)
    try:
        return dict(load_environment(SERVE_ENV))
    finally:
        os.environ.clear()
        os.environ.update(before)


def wait_for(what: Callable[[], Any], limit_s: float, describe: str) -> Any:
    """Polls until `what` is true; a timeout says what was waited for."""
    end_s = time.monotonic() + limit_s
    while time.monotonic() < end_s:
        value = what()
        if value:
            return value
        time.sleep(0.1)
    raise TimeoutError(f"{describe}: not within {limit_s:g} s")


def wait_equal(what: Callable[[], Any], wanted: Any, limit_s: float) -> None:
    """Polls until `what` is as wanted; a failure says what it was at last."""
    end_s = time.monotonic() + limit_s
    while (seen := what()) != wanted and time.monotonic() < end_s:
        time.sleep(0.1)
    assert seen == wanted, f"{seen} is not {wanted} within {limit_s:g} s"


def in_three_tries(what: Callable[[], Any]) -> Any:
    """What a loaded machine may put off now and then, and a fault would each time."""
    for _ in range(3):
        if found := what():
            return found
    raise AssertionError("not once in three tries")


class Server:
    """Start with `start`, end with `stop`; both are bounded, and `close` leaves nothing behind."""

    def __init__(
        self,
        command: Sequence[str],
        ports: Sequence[int],
        environment: Mapping[str, str],
        repository: Path,
        talks: bool = False,
    ) -> None:
        """One that `talks` takes commands on its standard input, and answers on its output."""
        self.repository = repository
        self.http_port, self.grpc_port, self.metrics_port = ports
        self.folder = Path(tempfile.mkdtemp(prefix="mt"))
        self.log = self.folder / "server.log"
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MANTA_"))}
        self._environment = {**inherited, "RAY_TMPDIR": str(self.folder), **environment}
        self._peeker: subprocess.Popen[bytes] | None = None
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE if talks else None,
                stdout=subprocess.PIPE if talks else log,
                stderr=log,
                bufsize=0,
                cwd=ROOT,
                env=self._environment,
                start_new_session=True,
            )

    @property
    def http(self) -> str:
        return f"127.0.0.1:{self.http_port}"

    @property
    def grpc(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"http://{self.http}{path}", timeout=30)

    def live(self) -> bool:
        if self.process.poll() is not None:
            raise RuntimeError(f"the server ended: {self.output()[-4000:]}")
        with contextlib.suppress(httpx.TransportError):
            return self.get("/v2/health/live").status_code == 200
        return False

    def ready(self) -> bool:
        with contextlib.suppress(httpx.TransportError):  # it may go after it was live
            return self.live() and self.get("/v2/health/ready").status_code == 200
        return False

    def wait_ready(self) -> None:
        try:
            wait_for(self.ready, START_S, "the server is ready")
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{self.output()[-4000:]}") from None

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def descendants(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.process.pid).children(recursive=True)
        return []

    def replica_pids(self, name: str) -> list[int]:
        """Processes of Serve replicas whose title holds `name`, e.g. `manta:Router`."""
        found = []
        for process in self.descendants():
            with contextlib.suppress(psutil.Error):
                title = " ".join(process.cmdline())
                if "ServeReplica" in title and name in title:
                    found.append(process.pid)
        return found

    def haproxies(self) -> list[psutil.Process]:
        found = []
        for process in self.descendants():
            with contextlib.suppress(psutil.Error):
                if process.name() == "haproxy":
                    found.append(process)
        return found

    def peek(self) -> dict[str, Any]:
        """The Controller's replicas and Serve's status, over the Ray API: by a process that stays,
        since to join Ray takes seconds."""
        log = self.folder / "peek.log"
        if self._peeker is None:
            with log.open("w") as errors:
                self._peeker = subprocess.Popen(
                    [sys.executable, "-c", PEEK, self._ray_address()],
                    env={**self._environment, "RAY_AUTH_MODE": "token"},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    bufsize=0,  # so that `select` sees what is there
                    cwd=ROOT,
                    start_new_session=True,
                )
        asked, answers = self._peeker.stdin, self._peeker.stdout
        assert asked is not None and answers is not None
        asked.write(b"\n")
        answer = b""
        while not answer.startswith(b"{"):
            ready, _, _ = select.select([answers], [], [], PEEK_S)
            answer = answers.readline() if ready else b""
            assert answer, log.read_text()[-3000:]
        peeked: dict[str, Any] = json.loads(answer)
        return peeked

    def census(self) -> dict[str, dict[str, dict[str, int]]]:
        """What the Router and the Controller say that they hold."""
        return self._ask(CENSUS)

    def _ask(self, script: str) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-c", script, self._ray_address()],
            env={**self._environment, "RAY_AUTH_MODE": "token"},
            capture_output=True,
            text=True,
            timeout=90,
            cwd=ROOT,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return answer

    def stop_peeking(self) -> None:
        """Before Ray ends, or is ended."""
        if self._peeker is not None:
            self._peeker.kill()
            self._peeker.wait()
            for pipe in (self._peeker.stdin, self._peeker.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
            self._peeker = None

    def _ray_address(self) -> str:
        for process in self.descendants():
            with contextlib.suppress(psutil.Error):
                words = process.cmdline()
                for word in words:
                    if word.startswith("--gcs-address="):
                        return word.partition("=")[2]
        raise RuntimeError("no Ray process knows its address")

    def send(self, number: int) -> None:
        self.stop_peeking()
        self.process.send_signal(number)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """The exit code. Leaves no process: what is still there is a failure of the server."""
        family = self.descendants()
        if self.process.poll() is None:
            self.send(number)
        code = self.process.wait(END_S)
        _, alive = psutil.wait_procs(family, timeout=GONE_S)
        assert not alive, f"left behind: {alive}"
        return code

    def close(self) -> None:
        """For fixtures: whatever happened, our processes end and the disk is clean."""
        family = self.descendants()
        self.stop_peeking()
        with contextlib.suppress(Exception):
            self.stop()
        for process in family:
            with contextlib.suppress(psutil.Error):
                process.kill()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def manta_serve(
    repository: Path, *flags: str, environment: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """`manta serve` on free ports; not waited for."""
    ports = free_ports(3)
    command = [
        str(BIN / "manta"),
        "serve",
        f"--model-repository={repository}",
        f"--http-port={ports[0]}",
        "--grpc-port",
        str(ports[1]),
        f"--metrics-port={ports[2]}",
        *flags,
    ]
    server = Server(command, ports, environment or {}, repository)
    try:
        yield server
    finally:
        server.close()


def port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return True
    return False


def kill(*pids: int) -> None:
    """Returns when they have ended."""
    victims = [psutil.Process(pid) for pid in pids]
    for victim in victims:
        victim.kill()
    wait_for(lambda: not any(map(runs, victims)), 30, "they have ended")


def runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
