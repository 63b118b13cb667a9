"""Life of a server under test: a real one, checked, frozen, thawed and stopped."""

from __future__ import annotations

import http.client
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from benchmarks import processes, servers
from benchmarks.contestants import Manta, Stage
from benchmarks.models import MODELS
from benchmarks.peers import PEERS
from benchmarks.servers import Launch, ServerError
from benchmarks.wire import Request

# Answers GET with 200 and POST with what it was sent, from a child process of its own.
PROGRAM = """
import subprocess, sys
if len(sys.argv) == 2:
    sys.exit(subprocess.call([sys.executable, __file__, sys.argv[1], "child"]))
from http.server import BaseHTTPRequestHandler, HTTPServer
class Echo(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def do_POST(self):
        if self.path == "/missing":
            self.send_error(404)
            return
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)
HTTPServer(("127.0.0.1", int(sys.argv[1])), Echo).serve_forever()
"""


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    (port,) = servers.free_ports(1)
    return Launch((sys.executable, str(program), str(port)), {"http": port}, "/ready", tmp_path)


def echo(values: np.ndarray) -> Request:
    return Request("http", "/", (), values.tobytes(), lambda _, body: np.frombuffer(body))


class Echoing(Manta):
    """Asks an echo what it expects to hear."""

    def request(self, stage: Stage, protocol: str) -> Request:
        return echo(stage.expected)


def test_a_model_is_loaded_again_and_asked_where_runtimes_are_compared(
    launch: Launch, tmp_path: Path
):
    values = np.arange(4.0)
    stage = Stage(MODELS["tiny"], tmp_path / "model.pt", 0, values, values)
    with servers.running("echo", launch, tmp_path / "log") as server:
        assert Echoing("direct").loads(stage, server) == {}
        found = Echoing("direct", runtime="aoti").loads(stage, server)
        assert set(found) == {"load_s", "first_answer_s"}
        with pytest.raises(ServerError, match="status 404"):
            servers.post(server, "/missing")
    with pytest.raises(ServerError, match="/v2"):
        servers.post(server, "/v2")


def test_a_server_is_checked_and_leaves_nothing_behind(launch: Launch, tmp_path: Path):
    values = np.arange(4.0)
    with servers.running("echo", launch, tmp_path / "log") as server:
        answer = servers.check(server, echo(values), values, 1e-6)
        assert (answer.error, answer.size) == (0, 32)
        with pytest.raises(ServerError, match="off by"):
            servers.check(server, echo(values), values + 1, 1e-6)
        started = processes.tree(server.root)
        assert len(started) == 2
    assert all(processes.gone(process) for process in started)
    with pytest.raises((OSError, http.client.HTTPException)):
        servers.get(launch.ports["http"], "/ready")


def test_a_frozen_server_takes_no_cpu_and_comes_back(launch: Launch, tmp_path: Path):
    with servers.running("echo", launch, tmp_path / "log") as server:
        processes.freeze(server.root)
        states = {process.status() for process in processes.tree(server.root)}
        assert states == {psutil.STATUS_STOPPED}
        processes.thaw(server.root)
        servers.wait_ready(server)
        processes.freeze(server.root)  # and a frozen one can be stopped
    assert server.exit_code is not None


def test_a_server_that_ends_at_once_shows_its_last_words(tmp_path: Path):
    command = (sys.executable, "-c", "print('no model'); raise SystemExit(3)")
    with pytest.raises(ServerError, match="(?s)exit code 3.*no model"):
        servers.start("broken", Launch(command, {"http": 1}, "/", tmp_path), tmp_path / "log")


def test_cpu_and_memory_by_role(launch: Launch, tmp_path: Path):
    def role(executable: str, title: str) -> str:
        return "child" if title.endswith("child") else "parent"

    with servers.running("echo", launch, tmp_path / "log") as server:
        before = processes.cpu_seconds(server.root, role)
        found = {entry.role: entry for entry in processes.memory(server.root, role)}
        after = processes.cpu_seconds(server.root, role)
    assert {name for name, _ in before} == {"child", "parent"} == set(found)
    assert found["child"].rss_mib >= found["child"].pss_mib > 0
    assert all(seconds >= 0 for seconds in processes.cpu_by_role(before, after).values())


def test_a_new_process_counts_from_zero():
    before, after = {("a", 1): 2.0}, {("a", 1): 2.5, ("a", 2): 1.0, ("b", 3): 4.0}
    assert processes.cpu_by_role(before, after) == {"a": 1.5, "b": 4.0}


def test_peers_are_pinned():
    for peer in PEERS.values():
        assert "==" in peer.packages[0]
        assert not any(package.startswith("torch==") for package in peer.packages)
