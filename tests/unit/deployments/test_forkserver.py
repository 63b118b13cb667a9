"""The fork server and its client: real processes and sockets, a script in the place of Ray's."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from deployments import forkclient, forkserver
from deployments.forkserver import BadRequest, Likeness, Request

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks as Linux has them")

LIMIT_S = 150.0
# What a worker that was forked finds, written where its first argument says.
WORKER = """
import json, os, random, sys, threading
import numpy as np
import ray, torch
from ray._raylet import WorkerID
other = []
thread = threading.Thread(target=lambda: other.append(WorkerID.from_random().hex()))
thread.start(); thread.join()
found = {
    "name": __name__, "arguments": sys.argv, "folder": os.getcwd(), "pid": os.getpid(),
    "leads_group": os.getpgrp() == os.getpid(), "mark": os.environ.get("MARK"),
    "home": os.environ.get("HOME"), "path": sys.path[0], "modules": len(sys.modules),
    "luck": [WorkerID.from_random().hex(), other[0], random.random(), float(np.random.rand()),
             torch.initial_seed(), float(torch.rand(1))],
}
print("worker speaks", flush=True)
with open(sys.argv[1] + ".part", "w") as file:
    json.dump(found, file)
os.rename(sys.argv[1] + ".part", sys.argv[1])
"""

# One that is not: it imports nothing that takes long.
ALONE = """
import json, os, sys
with open(sys.argv[1] + ".part", "w") as file:
    json.dump({"arguments": sys.argv, "pid": os.getpid(), "mark": os.environ.get("MARK")}, file)
os.rename(sys.argv[1] + ".part", sys.argv[1])
"""


class Stage:
    """What looks like Ray's session, a worker program, and the process that servers live with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "session" / "sockets").mkdir(parents=True)
        self.script = folder / "worker.py"
        self.script.write_text(WORKER)
        self.alone = folder / "alone.py"
        self.alone.write_text(ALONE)
        self.raylet = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        self.count = 0

    def environment(self, **changes: str) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MANTA_"))}
        ours = {"RAY_RAYLET_PID": str(self.raylet.pid), "RAY_JOB_ID": "01000000"}
        return {**kept, **ours, "PYTHONPATH": forkclient.ROOT, **changes}

    def arguments(self, script: Path | None = None) -> list[str]:
        self.count += 1
        result = self.folder / f"result-{self.count}"
        return [
            str(script or self.script),
            str(result),
            f"--temp-dir={self.folder}",
            "--session-name=session",
        ]

    def start(
        self, arguments: list[str], environment: Mapping[str, str]
    ) -> tuple[dict[str, Any], str, int]:
        """Runs the client as Ray does; what the worker found, what both printed, whose pid."""
        command = [sys.executable, "-I", "-S", str(forkclient.__file__), *arguments]
        with tempfile.TemporaryFile("w+") as output:
            client = subprocess.Popen(
                command, env=dict(environment), cwd=self.folder, stdout=output, stderr=output
            )
            client.wait(LIMIT_S)
            result = Path(arguments[1])
            wait(result.exists)
            output.seek(0)
            return json.loads(result.read_text()), output.read(), client.pid

    def close(self) -> None:
        self.raylet.kill()
        self.raylet.wait()


def wait(what: Callable[[], Any]) -> None:
    end_s = time.monotonic() + LIMIT_S
    while not what():
        assert time.monotonic() < end_s
        time.sleep(0.02)


@pytest.fixture
def stage() -> Iterator[Stage]:
    folder = Path(tempfile.mkdtemp(prefix="fs"))  # a short path, as sockets want
    one = Stage(folder)
    yield one
    one.close()
    shutil.rmtree(folder)


def servers(stage: Stage) -> list[Path]:
    return sorted((stage.folder / "session" / "sockets").glob("f.*/s"))


def request(environment: Mapping[str, str], facts: str = "f") -> Request:
    return Request(["w.py"], dict(environment), "/", facts, False, "", ())


# --- whole ---------------------------------------------------------------------------------------


def test_workers_are_forks_that_share_no_luck_and_end_alone(stage: Stage) -> None:
    """Two workers of one server: each what Ray asked for, and neither repeats the other's ids. The
    server ends with its raylet, and callers then start by themselves."""

    def serves() -> bool:
        """It imports for long, and callers do not wait for ever."""
        worker, _, client = stage.start(stage.arguments(stage.alone), stage.environment())
        return bool(worker["pid"] != client)

    wait(serves)
    found = []
    for mark in ("one", "two"):
        arguments = stage.arguments()
        worker, output, client = stage.start(arguments, stage.environment(MARK=mark))
        assert worker["pid"] != client, output  # the client did not become it
        assert worker["arguments"] == arguments and worker["name"] == "__main__"
        assert worker["mark"] == mark and worker["home"] == os.environ.get("HOME")
        assert worker["folder"] == str(stage.folder)
        assert worker["path"] == str(stage.folder)
        assert "worker speaks" in output
        found.append(worker)
    one, two = found
    assert len(servers(stage)) == 1
    assert one["modules"] == two["modules"] > 1000
    assert not set(one["luck"]) & set(two["luck"])
    (address,) = servers(stage)
    stage.raylet.kill()
    stage.raylet.wait()

    def gone() -> bool:
        try:
            forkclient.dial(str(address)).close()
        except ConnectionRefusedError:
            return True
        return False

    wait(gone)
    worker, output, client = stage.start(stage.arguments(stage.alone), stage.environment())
    assert worker["pid"] == client
    assert "without the fork server" in output


def test_without_a_session_the_client_becomes_the_worker(stage: Stage) -> None:
    """The negative control of the first test, and the way out whatever is wrong."""
    arguments = stage.arguments(stage.alone)[:2]
    worker, output, client = stage.start(arguments, stage.environment(MARK="alone"))
    assert worker["pid"] == client and worker["mark"] == "alone"
    assert worker["arguments"] == arguments
    assert "without the fork server" in output


# --- the client ----------------------------------------------------------------------------------


class Clock:
    """The client's module `time`. Whoever waits gets his time at once."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, time_s: float) -> None:
        self.now_s += time_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Also what a socket waits for goes by it: no answer comes here."""
    clock = Clock()

    class Socket(socket.socket):
        def recv(self, size: int, flags: int = 0) -> bytes:
            clock.now_s += self.gettimeout() or 0.0
            raise TimeoutError("timed out")

    monkeypatch.setattr(forkclient, "time", clock)
    monkeypatch.setattr(socket, "socket", Socket)
    return clock


@pytest.mark.parametrize(
    ("early", "held", "waited_s"),
    [
        (False, "server", forkclient.LIMIT_S),
        (True, "server", forkclient.LIMIT_S),
        (True, "lock", forkclient.LIMIT_S),
        (False, "lock", forkclient.LIMIT_S),
        (False, "nothing", 0.0),  # the control
    ],
)
def test_all_waits_together_have_one_limit(
    stage: Stage, clock: Clock, monkeypatch: Any, early: bool, held: str, waited_s: float
) -> None:
    """Servers that accept and never answer, and a lock that somebody keeps."""
    monkeypatch.setattr(forkclient, "launch", lambda *_: 1)
    environment, arguments = stage.environment(), stage.arguments()
    folders = {"own": Path(forkclient.place(arguments, environment))}
    if early:
        folders["early"] = stage.folder / "early"
        environment[forkclient.FOLDER] = str(folders["early"])
    with contextlib.ExitStack() as stack:
        for name, folder in folders.items():
            folder.mkdir(mode=0o700)
            if name == "early" or held == "server":
                listener = stack.enter_context(socket.socket(socket.AF_UNIX))
                listener.bind(str(folder / "s"))
                listener.listen()
        if held == "lock":
            lock = stack.enter_context((folders["own"] / "lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises((OSError, forkclient.Refused)):
            forkclient.ask(arguments, environment)
    assert clock.now_s - 100.0 == pytest.approx(waited_s)


def test_facts_are_what_libraries_read_as_they_load() -> None:
    base = forkclient.facts({"OMP_NUM_THREADS": "1", "HOME": "/a"})
    assert base == forkclient.facts({"HOME": "/b", "OMP_NUM_THREADS": "1"})
    assert base != forkclient.facts({"OMP_NUM_THREADS": "2"})
    assert base != forkclient.facts({"OMP_NUM_THREADS": "1", "LD_PRELOAD": "/x.so"})


@pytest.mark.parametrize("changed", ["OMP_NUM_THREADS", "RAY_RAYLET_PID", "RAY_JOB_ID"])
def test_what_cannot_share_a_server_has_another_place(stage: Stage, changed: str) -> None:
    arguments = stage.arguments()
    own = forkclient.place(arguments, stage.environment())
    assert own == forkclient.place(arguments, stage.environment(HOME="/elsewhere"))
    assert own != forkclient.place(arguments, stage.environment(**{changed: "7"}))
    assert own.startswith(str(stage.folder / "session" / "sockets"))


def test_a_folder_that_others_can_enter_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir(mode=0o755)
    with pytest.raises(forkclient.Refused, match="alone"):
        forkclient.check_owner(str(folder))
    folder.chmod(0o700)
    forkclient.check_owner(str(folder))
    link = tmp_path / "link"
    link.symlink_to(folder)
    with pytest.raises(forkclient.Refused):
        forkclient.check_owner(str(link))


def test_flags_of_the_interpreter_mean_an_interpreter(stage: Stage) -> None:
    with pytest.raises(forkclient.Refused, match="flags"):
        forkclient.ask(["-s", str(stage.script)], {})


# --- the server ----------------------------------------------------------------------------------


def test_forks_that_draw_alike_are_noticed() -> None:
    generator = random.Random(1)
    assert forkserver.repeats(lambda: str(random.Random(generator.random()).random()).encode())
    assert not forkserver.repeats(lambda: os.urandom(8))


def test_forks_that_cannot_be_asked_count_as_alike() -> None:
    assert forkserver.repeats(lambda: b"")


def test_only_workers_of_the_same_ray_and_libraries_suit() -> None:
    likeness = Likeness("f")
    likeness._ray, likeness._sound = {"RAY_JOB_ID": "01"}, True
    assert likeness.suits(request({"RAY_JOB_ID": "01", "HOME": "/x"}))
    assert not likeness.suits(request({"RAY_JOB_ID": "02"}))
    assert not likeness.suits(request({"RAY_JOB_ID": "01", "RAY_AUTH_MODE": "token"}))
    assert not likeness.suits(request({"RAY_JOB_ID": "01"}, facts="g"))
    likeness._sound = False
    assert not likeness.suits(request({"RAY_JOB_ID": "01"}))


def exchange(payload: bytes, descriptors: tuple[int, ...], size: int | None = None) -> Request:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.settimeout(5)
        length = len(payload) if size is None else size
        socket.send_fds(ours, [length.to_bytes(8, "little")], list(descriptors))
        ours.sendall(payload)
        ours.shutdown(socket.SHUT_WR)
        return forkserver.receive(theirs)


def whole() -> bytes:
    fields = {"arguments": ["w"], "environment": {}, "folder": "/", "facts": "f"}
    return json.dumps({**fields, "leads_group": True, "oom_score": "0"}).encode()


def test_a_request_arrives_with_its_streams() -> None:
    one = exchange(whole(), (0, 1, 2))
    assert one.arguments == ["w"] and len(one.descriptors) == 3
    for descriptor in one.descriptors:
        os.close(descriptor)


@pytest.mark.parametrize(
    ("payload", "descriptors", "size"),
    [
        (b"{", (0, 1, 2), None),
        (b"[]", (0, 1, 2), None),
        (b'{"arguments": []}', (0, 1, 2), None),
        (whole(), (0, 1), None),
        (whole(), (0, 1, 2), 10_000),
        (whole(), (0, 1, 2), 0),
        (whole(), (0, 1, 2), forkserver.REQUEST_LIMIT_BYTES + 1),
    ],
)
def test_a_bad_request_is_refused_and_keeps_no_stream(
    payload: bytes, descriptors: tuple[int, ...], size: int | None
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(BadRequest):
        exchange(payload, descriptors, size)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_caller_that_has_left_is_not_served() -> None:
    """It has given up and become the worker itself: a fork would be a second one."""
    ours, theirs = socket.socketpair()
    with theirs:
        assert not forkserver._has_left(theirs)
        ours.close()
        assert forkserver._has_left(theirs)


def test_serving_ends_with_the_process_that_it_lives_with() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("")  # an unnamed one of Linux
        listener.listen()
        child.send_signal(signal.SIGKILL)
        select.select([os.pidfd_open(child.pid)], [], [], LIMIT_S)
        assert forkserver.serve(listener, lambda _: False, child.pid) is None
    child.wait()
