"""A Ray cluster as an operator has it: `ray start --head`, and Manta on it by `serve deploy`.

One node, its dashboard on loopback, the throughput profile, Ray's token authentication.
"""

from __future__ import annotations

import contextlib
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.serve.server import BIN, ROOT, START_S, Server, free_ports, profile, wait_for

DEPLOY_S = 120.0


def shipped(ports: list[int], **args: Any) -> dict[str, Any]:
    """serve_config.yaml on other ports, and with more arguments."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    config["applications"][0]["args"] |= {
        "http_port": ports[0],
        "grpc_port": ports[1],
        "metrics_port": ports[2],
        **args,
    }
    config["http_options"]["port"], config["grpc_options"]["port"] = ports[:2]
    return config


class Cluster(Server):
    """`process` is the head node. `deploy` before anything else is asked."""

    def __init__(self, repository: Path, folder: Path) -> None:
        *ports, gcs, dashboard, client, agent = free_ports(7)
        self._ports, self._config = ports, folder / "serve_config.yaml"
        self._dashboard = f"http://127.0.0.1:{dashboard}"
        command = [str(BIN / "ray"), "start", "--head", "--block", "--disable-usage-stats"]
        command += [f"--port={gcs}", f"--dashboard-port={dashboard}", "--num-cpus=2"]
        command += [f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}"]
        # Of 9998 ports that Ray would keep for workers otherwise, ours are some.
        command += ["--min-worker-port=0", "--max-worker-port=0"]
        environment = {
            **profile(),
            "MANTA_MODEL_REPOSITORY": str(repository),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
        }
        super().__init__(command, ports, environment, repository)

    def deploy(self, deployments: Any = (), **args: Any) -> None:
        """Returns when Serve has it; what follows from it then happens."""
        config = shipped(self._ports, **args)
        if deployments:
            config["applications"][0]["deployments"] = deployments
        self._config.write_text(yaml.safe_dump(config))
        wait_for(self._answers, START_S, "Ray's dashboard answers")
        command = [str(BIN / "serve"), "deploy", "--address", self._dashboard, str(self._config)]
        done = subprocess.run(
            command,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=DEPLOY_S,
            cwd=ROOT,
        )
        assert done.returncode == 0, done.stderr[-3000:]

    def status(self) -> dict[str, Any]:
        """Serve's word on the application `manta`: status, message, deployments."""
        reply = self._ask_dashboard("/api/serve/applications/")
        shown: dict[str, Any] = reply.raise_for_status().json()["applications"]["manta"]
        return shown

    def wait_status(self, wanted: str) -> dict[str, Any]:
        def reached() -> dict[str, Any] | None:
            with contextlib.suppress(httpx.HTTPError):  # Serve may be busy
                status = self.status()
                return status if status["status"] == wanted else None
            return None

        found: dict[str, Any] = wait_for(reached, DEPLOY_S, f"the application is {wanted}")
        return found

    def _answers(self) -> bool:
        if self.process.poll() is not None:
            raise RuntimeError(f"Ray ended: {self.output()[-3000:]}")
        with contextlib.suppress(httpx.TransportError):
            return self._ask_dashboard("/api/version").is_success
        return False

    def _ask_dashboard(self, path: str) -> httpx.Response:
        token = f"Bearer {self._environment['RAY_AUTH_TOKEN']}"
        return httpx.get(self._dashboard + path, headers={"Authorization": token}, timeout=60)


@contextlib.contextmanager
def ray_cluster(repository: Path, folder: Path) -> Iterator[Cluster]:
    cluster = Cluster(repository, folder)
    try:
        yield cluster
    finally:
        cluster.close()
