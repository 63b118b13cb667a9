"""The fork server: a process that has imported torch and Ray Serve, and becomes replicas by fork.

They share its pages and skip its imports. Before a fork it opens no device, connects to nothing and
runs no thread but those of numpy's BLAS, which survive one. Started by `forkclient.py` or `manta
serve`; ends with the process that it was told to live with. Who starts, and when, is up to Ray.
"""

from __future__ import annotations

import array
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import socket
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import forkclient

# Before anybody asks: what needs no Ray, torch above all.
EARLY = (
    "fastapi",
    "uvicorn",
    "deployments.instance",
    "deployments.runtimes.torchscript",
    "deployments.runtimes.eager",
    "deployments.runtimes.aoti",
    "deployments.runtimes.exported",
    # What Ray and anyio import in each worker otherwise.
    "pydantic.v1",
    "anyio._backends._asyncio",
)
# With the first worker: Ray reads its variables once, as it is imported, job and raylet among them.
WITH_RAY = (
    "ray._private.workers.default_worker",
    "ray.serve._private.controller",  # a replica gets a handle to it
    "ray.serve._private.replica",
    "deployments.replica",
)
REQUEST_LIMIT_BYTES = 16 << 20
READ_LIMIT_S = 10.0
REAP_S = 5.0


class BadRequest(Exception):
    """A caller that cannot be served; it then starts without us."""


@dataclass(frozen=True, slots=True)
class Request:
    """A worker to become: Ray's command for it, and what it had when it asked."""

    arguments: list[str]
    environment: dict[str, str]
    folder: str
    facts: str
    leads_group: bool
    oom_score: str
    descriptors: tuple[int, ...]


def main() -> None:
    listener = socket.socket(fileno=int(sys.argv[2]))
    listener.set_inheritable(False)
    lives_with = int(sys.argv[3])
    if lives_with and not os.path.exists(f"/proc/{lives_with}"):
        return  # before the imports: a caller waits
    os.chdir("/")
    for name in EARLY:
        importlib.import_module(name)
    request = serve(listener, Likeness(forkclient.facts(os.environ)).suits, lives_with)
    if request is not None:
        become(request)


# --- before a fork -------------------------------------------------------------------------------


class Likeness:
    """Which workers this process can become; those of another environment start without it."""

    def __init__(self, facts: str) -> None:
        self._facts = facts
        self._ray: Mapping[str, str] | None = None
        self._sound = False

    def suits(self, request: Request) -> bool:
        """May take a second the first time: Ray is imported then."""
        if request.facts != self._facts:
            return False
        wanted = {k: v for k, v in request.environment.items() if k.startswith("RAY_")}
        if self._ray is None:
            self._ray = wanted
            for name in [n for n in os.environ if n.startswith("RAY_")]:
                del os.environ[name]
            os.environ.update(wanted)
            self._sound = import_ray()
        return self._sound and wanted == self._ray


def import_ray() -> bool:
    """Whether it may be forked afterwards: Ray's generator of ids, once it has begun, goes on
    alike in every fork, and its modules take random ids as they decorate actors."""
    import ray.actor

    class SystemIds:
        from_random = staticmethod(lambda: real(os.urandom(real.size())))

    real, ray.actor.ActorClassID = ray.actor.ActorClassID, SystemIds
    try:
        for name in WITH_RAY:
            importlib.import_module(name)
    finally:
        ray.actor.ActorClassID = real
    gc.collect()
    gc.freeze()  # a collection in a fork would write to every page that it looks at
    if repeats(lambda: bytes(ray.WorkerID.from_random().binary())):
        print("fork server: Ray would repeat its ids, so nothing is forked", file=sys.stderr)
        return False
    return True


def repeats(draw: Callable[[], bytes]) -> bool:
    """Whether two forks draw the same; true as well when they cannot be asked."""
    drawn = [_ask_fork(draw) for _ in range(2)]
    return not all(drawn) or drawn[0] == drawn[1]


def _ask_fork(draw: Callable[[], bytes]) -> bytes:
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writable, draw())
        finally:
            os._exit(0)
    os.close(writable)
    with open(readable, "rb") as file:
        answer = file.read()
    os.waitpid(pid, 0)
    return answer


# --- serving -------------------------------------------------------------------------------------


def serve(
    listener: socket.socket, suits: Callable[[Request], bool], lives_with: int
) -> Request | None:
    """Returns in each fork with what it is to become, and at the end with None."""
    with contextlib.ExitStack() as stack:
        sources: list[Any] = [listener]
        if lives_with:
            try:
                sources.append(os.pidfd_open(lives_with))
            except ProcessLookupError:
                return None
            stack.callback(os.close, sources[1])
        stack.enter_context(listener)
        while True:
            ready, _, _ = select.select(sources, [], [], REAP_S)
            _reap()
            if not ready:
                continue
            if listener not in ready:
                return None
            connection, _ = listener.accept()
            with connection:
                request = _answer(connection, suits)
            if request is not None:
                return request


def _reap() -> None:
    """Ray notices itself how a worker ends; here it only leaves the table of processes."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _answer(connection: socket.socket, suits: Callable[[Request], bool]) -> Request | None:
    """The request, in the fork that is for it; None here, where the caller has been told."""
    pid: int | None = None
    try:
        connection.settimeout(READ_LIMIT_S)
        request = receive(connection)
        try:
            if suits(request) and not _has_left(connection):
                pid = os.fork()
                if pid == 0:
                    return request
        finally:
            if pid != 0:
                _close(request.descriptors)
        connection.sendall(forkclient.REFUSAL if pid is None else str(pid).encode())
    except (BadRequest, OSError) as error:  # the caller sees the connection close
        print(f"fork server: {error}", file=sys.stderr, flush=True)
    return None


def _has_left(connection: socket.socket) -> bool:
    """A caller that has waited too long is a worker already."""
    ready, _, _ = select.select([connection], [], [], 0)
    return bool(ready) and not connection.recv(1, socket.MSG_PEEK)


def receive(connection: socket.socket) -> Request:
    """Raises BadRequest, or OSError when the caller is slow or gone."""
    peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    if struct.unpack("3i", peer)[1] != os.geteuid():
        raise BadRequest("the caller is another user")
    head, ancillary, _, _ = connection.recvmsg(8, socket.CMSG_SPACE(3 * array.array("i").itemsize))
    descriptors = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
    try:
        body = _read(connection, int.from_bytes(head, "little") if len(head) == 8 else 0)
        if len(descriptors) != 3:
            raise BadRequest("a worker needs its three streams")
        return Request(**json.loads(body), descriptors=tuple(descriptors))
    except (TypeError, ValueError) as error:
        _close(descriptors)
        raise BadRequest(f"the request cannot be read: {error}") from error
    except BaseException:
        _close(descriptors)
        raise


def _read(connection: socket.socket, size: int) -> bytes:
    if not 0 < size <= REQUEST_LIMIT_BYTES:
        raise BadRequest(f"a request of {size} bytes")
    body = bytearray()
    while len(body) < size:
        piece = connection.recv(size - len(body))
        if not piece:
            raise BadRequest("the request ends early")
        body += piece
    return bytes(body)


def _close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


# --- in the fork ---------------------------------------------------------------------------------


def become(request: Request) -> None:
    """Runs Ray's worker program as if this interpreter had just been started with it."""
    put_on(request)
    script = request.arguments[0]
    sys.argv = list(request.arguments)
    sys.path[0] = os.path.dirname(script)
    runpy.run_path(script, run_name="__main__")


def put_on(request: Request) -> None:
    """What else tells processes apart: streams, group, folder, environment, luck."""
    import torch

    for target, descriptor in enumerate(request.descriptors):
        os.dup2(descriptor, target)
    _close([descriptor for descriptor in request.descriptors if descriptor > 2])
    if request.leads_group:
        os.setpgid(0, 0)
    os.chdir(request.folder)
    os.environ.clear()
    os.environ.update(request.environment)
    with contextlib.suppress(OSError):  # the kernel's order of victims: Ray sets it for workers
        if request.oom_score:
            Path("/proc/self/oom_score_adj").write_text(request.oom_score)
    np.random.seed()  # these would draw alike in all forks; Python's own takes care of itself
    torch.default_generator.seed()
