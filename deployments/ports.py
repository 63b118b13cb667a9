"""Claiming a port that several Routers of one server share, and nobody else may hold.

A lock file per address and port is held for as long as the socket is. Called by the listener, and
by `manta serve` before it starts anything.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import tempfile
import time
from pathlib import Path

LOCK_WAIT_S = 10.0


class PortInUse(RuntimeError):
    """Facts: the port and its address."""

    def __init__(self, port: int, address: str) -> None:
        super().__init__(port, address)

    def __str__(self) -> str:
        port, address = self.args
        return f"port {port} on {address} is in use by another process"


def check_free(address: str, port: int) -> None:
    """Raises PortInUse when anything at all listens there."""
    with _plain(address) as probe:
        try:
            probe.bind((address, port))
        except OSError as error:
            raise PortInUse(port, address) from error


def _plain(address: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return sock


class PortClaim:
    """A bound, not yet listening socket, and the lock that vouches for it.

    SO_REUSEPORT lets Routers of one server (`owner`) share the port; it would as readily let a
    stranger take half of the traffic, so the first Router on a node proves that the port is free
    while it holds the lock alone, and later ones check that the lock is their own server's.
    """

    def __init__(self, address: str, port: int, owner: str) -> None:
        self._lock = _open_lock(address, port)
        try:
            self._take(address, port, owner)
            self.socket = _plain(address)
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            self.socket.bind((address, port))
        except BaseException:
            os.close(self._lock)
            raise
        self.address = address
        self.port: int = self.socket.getsockname()[1]

    def _take(self, address: str, port: int, owner: str) -> None:
        deadline_s = time.monotonic() + LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pass
            else:
                check_free(address, port)
                os.ftruncate(self._lock, 0)
                os.pwrite(self._lock, owner.encode(), 0)
                fcntl.flock(self._lock, fcntl.LOCK_SH)
                return
            try:
                fcntl.flock(self._lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:  # another Router is proving the port right now
                if time.monotonic() > deadline_s:
                    raise PortInUse(port, address) from None
                time.sleep(0.05)
                continue
            if os.pread(self._lock, 4096, 0).decode() != owner:
                raise PortInUse(port, address)
            return

    def close(self) -> None:
        """Doing it twice is doing it once: a second time, the descriptor may be another's."""
        self.socket.close()
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)


def _open_lock(address: str, port: int) -> int:
    if port == 0:  # the system chooses a free one; nothing to agree on
        return os.open(tempfile.gettempdir(), os.O_TMPFILE | os.O_RDWR, 0o600)
    name = f"{address.replace(':', '_')}-{port}.lock"
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    return os.open(private_folder() / name, flags, 0o600)


def private_folder() -> Path:
    """This user's own place among the temporary files; raises OSError if others may enter it."""
    folder = Path(tempfile.gettempdir()) / f"manta-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise PermissionError(f"{folder} is not this user's alone")
    return folder
