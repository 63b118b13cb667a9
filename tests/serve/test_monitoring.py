"""The dashboard and the alerts on a real Prometheus that scrapes a loaded Manta: all return data.

Debian's package `prometheus` brings it; without it this is skipped. What Ray exports is not there:
a local Ray has no exporter on a port of its own.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as httpclient
import yaml

from tests.serve.server import Server, free_ports, wait_for
from tests.unit.cluster.test_monitoring import expressions

SCRAPES = 8


@pytest.fixture(scope="module")
def prometheus(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not installed (Debian: apt-get install prometheus)")
    folder: Path = tmp_path_factory.mktemp("prometheus")
    [port] = free_ports(1)
    targets = [{"targets": [f"127.0.0.1:{server.metrics_port}"]}]
    scrape = {"job_name": "manta", "scrape_interval": "1s", "static_configs": targets}
    (folder / "prometheus.yaml").write_text(yaml.safe_dump({"scrape_configs": [scrape]}))
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                program,
                f"--config.file={folder}/prometheus.yaml",
                f"--storage.tsdb.path={folder}/data",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def ask(prometheus: str, expression: str) -> list[Any]:
    query = urllib.parse.urlencode({"query": expression})
    with urllib.request.urlopen(f"{prometheus}/api/v1/query?{query}", timeout=60) as answer:
        document = json.load(answer)
    assert document["status"] == "success"
    return list(document["data"]["result"])


def scraped(prometheus: str) -> int:
    """How often with success: each scrape has a second at most."""
    try:
        found = ask(prometheus, 'sum_over_time(up{job="manta"}[5m])')
    except OSError:  # it starts
        return 0
    return int(found[0]["value"][1]) if found else 0


def load(client: httpclient.InferenceServerClient) -> None:
    """Some that are answered, and one that fails in the model."""
    tensor = httpclient.InferInput("INPUT__0", [2, 8], "FP32")
    tensor.set_data_from_numpy(np.ones((2, 8), np.float32))
    for _ in range(20):
        client.infer("mlp", [tensor])


def test_every_panel_has_data(prometheus: str, http: httpclient.InferenceServerClient) -> None:
    end_s = time.monotonic() + 120
    while scraped(prometheus) < SCRAPES and time.monotonic() < end_s:
        load(http)
        time.sleep(0.2)
    asked = 0
    for who, text in expressions():
        if "ray_" in text or who.startswith("Manta"):
            ask(prometheus, text)  # an alert is silent while all is well; Prometheus takes it
            continue
        asked += 1
        assert wait_for(partial(ask, prometheus, text), 30, who)
    assert asked >= 15

    def grows() -> bool:
        load(http)  # those of the beginning may be more than a minute ago by now
        found = ask(prometheus, 'max(rate(nv_inference_request_success{model="mlp"}[1m]))')
        return bool(found) and float(found[0]["value"][1]) > 0

    wait_for(grows, 60, "requests are seen")
