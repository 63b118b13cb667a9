"""A new worker's first step: asks its node's fork server for a process, instead of importing all.

Ray runs this file as the interpreter (`py_executable`) of model replicas. It owns how the server is
found and started, and the way out: whatever fails before the fork, this process becomes the worker.
Only the standard library, and little of it, since every replica pays for it.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import hashlib
import json
import os
import shlex
import socket
import stat
import struct
import sys
import time
from collections.abc import Mapping, Sequence

# Where `manta serve` has started a server before there was a Ray session to put it in.
FOLDER = "MANTA_FORK_FOLDER"
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# For everything up to the fork. Ray gives a worker a minute to register, and one that gets none
# still has its imports before it.
LIMIT_S = 40.0
_LOOK_S = 0.05
REFUSAL = b"-"
# What decides how Python, torch, the allocator and the loader come up. Processes that differ in it
# share no server; the rest of the environment, a worker brings along.
SHARED = (
    "AOTI_",
    "ATEN_",
    "CUBLAS_",
    "CUDNN_",
    "GLIBC_",
    "GOMP_",
    "KMP_",
    "LANG",
    "LC_",
    "LD_",
    "MALLOC_",
    "MKL_",
    "NCCL_",
    "NVIDIA_TF32",
    "OMP_",
    "OPENBLAS_",
    "PYTHON",
    "PYTORCH_",
    "TORCH",
)
_CODE = "import sys; sys.path[0] = sys.argv[1]; from deployments.forkserver import main; main()"


class Refused(Exception):
    """No fork this time, and nothing was started."""


def supported() -> bool:
    return sys.platform == "linux"


def executable() -> str:
    """For Ray's runtime environment: a shell word each, without site-packages for this step."""
    return " ".join(map(shlex.quote, (sys.executable, "-I", "-S", os.path.abspath(__file__))))


def main() -> None:
    arguments = sys.argv[1:]
    try:
        ask(arguments, dict(os.environ))
    except (OSError, Refused, ValueError) as error:
        print(f"this worker starts without the fork server: {error}", file=sys.stderr, flush=True)
        os.execv(sys.executable, [sys.executable, *arguments])


def ask(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """The process id of the new worker. Raises OSError or Refused when there is none."""
    if not arguments or arguments[0].startswith("-"):
        raise Refused("the interpreter is to have flags")
    request = json.dumps(
        {
            "arguments": list(arguments),
            "environment": dict(environment),
            "folder": os.getcwd(),
            "facts": facts(environment),
            "leads_group": os.getpgrp() == os.getpid(),
            "oom_score": _own_oom_score(),
        }
    ).encode()
    until_s = time.monotonic() + LIMIT_S
    early = environment.get(FOLDER, "")
    if early:
        with contextlib.suppress(OSError, Refused):
            check_owner(early)
            with dial(os.path.join(early, "s")) as connection:
                return _fork(connection, request, until_s)
    raylet = int(environment.get("RAY_RAYLET_PID", 0))
    with connect(place(arguments, environment), raylet, until_s) as connection:
        return _fork(connection, request, until_s)


def _rest_s(until_s: float) -> float:
    rest_s = until_s - time.monotonic()
    if rest_s <= 0:
        raise Refused(f"no fork within {LIMIT_S:g} s")
    return rest_s


def _fork(connection: socket.socket, request: bytes, until_s: float) -> int:
    connection.settimeout(_rest_s(until_s))
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", (0, 1, 2)))]
    connection.sendmsg([len(request).to_bytes(8, "little")], rights)
    connection.sendall(request)
    connection.settimeout(_rest_s(until_s))
    answer = connection.recv(16)
    if not answer or answer == REFUSAL:
        raise Refused("the fork server refuses" if answer else "the fork server has ended")
    return int(answer)


def facts(environment: Mapping[str, str]) -> str:
    """Equal where a fork of one process is as good as a start of the other."""
    told = [f"{k}={v}" for k, v in environment.items() if k.startswith(SHARED)]
    return hashlib.sha256("\0".join((sys.executable, ROOT, *sorted(told))).encode()).hexdigest()


def place(arguments: Sequence[str], environment: Mapping[str, str]) -> str:
    """The folder of the server in this raylet's session; short, because sockets want short ones."""
    options = dict(a[2:].split("=", 1) for a in arguments if a.startswith("--") and "=" in a)
    session = os.path.join(options.get("temp-dir", ""), options.get("session-name", ""), "sockets")
    if not os.path.isabs(session) or not os.path.isdir(session):
        raise Refused("Ray's session has no folder for sockets")
    ray = (f"{name}={environment.get(name)}" for name in ("RAY_RAYLET_PID", "RAY_JOB_ID"))
    own = " ".join((facts(environment), *ray))
    return os.path.join(session, "f." + hashlib.sha256(own.encode()).hexdigest()[:8])


def _own_oom_score() -> str:
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj") as file:
        return file.readline().strip()
    return ""


# --- finding and starting the server -------------------------------------------------------------


def connect(folder: str, lives_with: int, until_s: float) -> socket.socket:
    """A connection to the folder's server, which is started where none runs. It may still import:
    a caller waits in the backlog. `lives_with` is the process with whose end the server ends."""
    os.makedirs(folder, mode=0o700, exist_ok=True)
    check_owner(folder)
    address = os.path.join(folder, "s")
    absent = (ConnectionRefusedError, FileNotFoundError)
    with contextlib.suppress(*absent):
        return dial(address)
    with open(os.path.join(folder, "lock"), "w") as lock:
        _lock(lock.fileno(), until_s)
        with contextlib.suppress(*absent):
            return dial(address)
        launch(address, lives_with)
        return dial(address)


def _lock(descriptor: int, until_s: float) -> None:
    """Whoever has it is starting the server."""
    while True:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(min(_LOOK_S, _rest_s(until_s)))


def check_owner(folder: str) -> None:
    """Who else could write there could hand us a process of their choice, or read what we send."""
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise Refused(f"{folder} is not this user's alone")


def dial(address: str) -> socket.socket:
    """Raises Refused when another user answers: what is sent there has this worker's secrets."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(address)
        peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        if struct.unpack("3i", peer)[1] != os.geteuid():
            raise Refused("the fork server is another user's")
    except BaseException:
        connection.close()
        raise
    return connection


def launch(address: str, lives_with: int) -> int:
    """Starts a server, which inherits the socket that listens already; its process id."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(address)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(1024)
        listener.set_inheritable(True)
        told = [ROOT, str(listener.fileno()), str(lives_with)]
        pid = os.fork()
        if pid == 0:
            try:
                os.setsid()
                os.execv(sys.executable, [sys.executable, "-c", _CODE, *told])
            finally:
                os._exit(127)
    return pid


if __name__ == "__main__":
    main()
