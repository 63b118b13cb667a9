"""What loading and unloading leaves behind: nothing. `make test-long`.

Each cycle loads a model, calls it over both protocols and unloads it. MANTA_LEAK_CYCLES makes a
shorter run of it.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient

from tests import models
from tests.serve import repository
from tests.serve.clients import infer
from tests.serve.repository import EAGER, config, parameter, tensor
from tests.serve.server import Server, manta_serve, wait_for

CYCLES = int(os.environ.get("MANTA_LEAK_CYCLES", "50"))
# So many are not looked at: caches fill, and libraries are loaded at their first use.
WARM = 10
# An event loop's pool makes its threads as it first needs them; a leak would be one in each cycle.
POOL_THREADS = min(32, (os.cpu_count() or 1) + 4)
# What an allocator keeps and gives back goes up and down by this much, leak or no leak.
RSS_LIMIT_BYTES = 8 << 20
# 4 MB a tensor: it travels in shared memory.
WIDTH = 1 << 20
pytestmark = [pytest.mark.long, pytest.mark.timeout(3000)]

NAMES = ("leak_shared", "leak_eager", "leak_apart")
PROCESSES = ("Router", "Controller")


def write(root: Path, name: str) -> None:
    io = [tensor("x", "-1")], [tensor("OUTPUT__0", "-1")]
    two = "dynamic_batching { }\ninstance_group [ { kind: KIND_CPU count: 2 } ]\n"
    warm = (
        'model_warmup { name: "w" batch_size: 1 inputs { key: "x" value { data_type: TYPE_FP32 '
        "dims: [ 4 ] zero_data: true } } }\n"
    )
    if name == "leak_eager":
        models.save_eager(
            "import torch\nclass Net(torch.nn.Module):\n    def forward(self, x):\n"
            "        return x + 0\n",
            root,
            name,
        )
        engine = 'backend: "pytorch"\nruntime: "model.py"'
        text = config(*io, engine=engine, max_batch_size=4, more=EAGER + warm)
    else:
        models.save_torchscript(models.identity(), root, name)
        sharing = parameter("ENABLE_WEIGHT_SHARING", "true") if name == "leak_shared" else ""
        text = config(*io, max_batch_size=4, more=two + warm + sharing)
    repository.write_config(root, name, text)


@dataclass(frozen=True)
class Vitals:
    """What can be counted from outside, by process, and of the server as a whole."""

    counts: dict[str, int]
    rss_bytes: dict[str, int]

    def above(self, base: Vitals) -> dict[str, tuple[int, int]]:
        """Every count that is higher than it was, and memory beyond its limit: before and now."""
        more = {
            key: (base.counts.get(key, 0), count)
            for key, count in self.counts.items()
            if count > base.counts.get(key, 0)
        }
        for key, size in self.rss_bytes.items():
            if size - base.rss_bytes[key] > RSS_LIMIT_BYTES:
                more[f"{key} rss"] = (base.rss_bytes[key], size)
        return more

    def with_threads(self, more: int) -> Vitals:
        """The same with so many more threads in each process."""
        counts = {
            key: count + more * key.endswith(" threads") for key, count in self.counts.items()
        }
        return Vitals(counts, self.rss_bytes)


class Watched:
    """The server, and the ways to look at it."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.server = server
        self.folder = folder
        self.http = httpclient.InferenceServerClient(server.http, network_timeout=200)
        self.grpc = grpcclient.InferenceServerClient(server.grpc)
        self._pids = {}
        for name in PROCESSES:
            (self._pids[name],) = server.replica_pids(f"manta:{name}")

    def close(self) -> None:
        self.http.close()
        self.grpc.close()

    def cycle(self, name: str) -> None:
        self.load(name)
        self.http.unload_model(name)
        wait_for(lambda: self._state(name) == "UNAVAILABLE", 120, f"{name} is unloaded")
        wait_for(lambda: not self.server.replica_pids("leak_"), 120, "the replicas are gone")

    def load(self, name: str) -> None:
        self.http.load_model(name)
        for client, size in ((self.http, 4), (self.grpc, 4), (self.http, WIDTH)):
            x = np.arange(size, dtype=np.float32)[None]
            reply = infer(client, name, {"x": x})
            np.testing.assert_array_equal(reply.as_numpy("OUTPUT__0"), x)

    def _state(self, name: str) -> str:
        index = self.http.get_model_repository_index()
        return str(next(entry["state"] for entry in index if entry["name"] == name))

    def vitals(self) -> Vitals:
        counts = {
            "processes": len(self.server.descendants()),
            "files in the private folders": sum(1 for _ in self.folder.rglob("*")),
        }
        rss_bytes = {}
        for name, pid in self._pids.items():
            process = psutil.Process(pid)
            maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
            links = [_link(one) for one in Path(f"/proc/{pid}/fd").iterdir()]
            counts[f"{name} descriptors"] = process.num_fds()
            counts[f"{name} sockets"] = sum(link.startswith("socket:") for link in links)
            counts[f"{name} shared memory"] = sum("/memfd:" in link for link in links) + sum(
                "/memfd:" in line or "/dev/shm/" in line for line in maps
            )
            counts[f"{name} threads"] = process.num_threads()
            rss_bytes[name] = process.memory_info().rss
        return Vitals(counts, rss_bytes)

    def census(self) -> Vitals:
        """Tasks and objects, which the processes count themselves."""
        counts = {}
        for name, kinds in self.server.census().items():
            for kind, found in kinds.items():
                counts.update({f"{name} {kind} {what}": n for what, n in found.items()})
        return Vitals(counts, {})

    def settled(self, base: Vitals) -> dict[str, tuple[int, int]]:
        """What stays above the baseline for half a minute: connections are closed in time."""
        end_s = time.monotonic() + 30
        while (more := self.vitals().above(base)) and time.monotonic() < end_s:
            time.sleep(1)
        return more


def _link(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:  # it was closed meanwhile
        return ""


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    root = tmp_path_factory.mktemp("leaks")
    for name in NAMES:
        write(root, name)
    flags = ["--model-control-mode=explicit", "--exit-on-error=false"]
    with tempfile.TemporaryDirectory(prefix="ml") as folder:
        with manta_serve(root, *flags, environment={"TMPDIR": folder}) as server:
            server.wait_ready()
            watched = Watched(server, Path(folder))
            yield watched
            watched.close()
            assert server.stop() == 0, server.output()[-3000:]


def test_fifty_cycles_leave_everything_where_it_was(watched: Watched) -> None:
    for cycle in range(min(WARM, CYCLES)):
        watched.cycle(NAMES[cycle % len(NAMES)])
    counted = watched.census()
    time.sleep(5)  # what the look itself has opened is closed
    base = watched.vitals()
    history: list[Vitals] = []
    for cycle in range(CYCLES):
        watched.cycle(NAMES[cycle % len(NAMES)])
        history.append(watched.vitals())
    for name in PROCESSES:
        sizes = [one.rss_bytes[name] / 2**20 for one in history]
        print(f"{name}: MB", " ".join(f"{size:.1f}" for size in sizes))
    print("counts", base.counts, history[-1].counts)
    more = watched.census().above(counted)
    # Late counters of what was unloaded must be known as such: a bounded number of names.
    more.pop("Controller objects deployments.statistics.VersionKey", None)
    assert not more
    assert not watched.settled(base.with_threads(POOL_THREADS))


def test_control_three_models_that_stay_are_seen_everywhere(watched: Watched) -> None:
    counted, base = watched.census(), watched.vitals()
    for name in NAMES:
        watched.load(name)
    more = watched.vitals().above(base)
    for key in ("processes", "Router descriptors", "Router sockets", "Router shared memory"):
        assert key in more
    assert "files in the private folders" in more
    assert "Router objects deployments.gate.Gate" in watched.census().above(counted)
    for name in NAMES:
        watched.http.unload_model(name)
