"""Doorway: where a replica lets Routers of its own node in.

Owns the listening socket, its directory (mode 0700, one per replica) and the handshake: the peer's
user, then a token. An accepted connection goes to an instance, which reads it from then on. Lives
on the replica's event loop; used by `replica`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import os
import secrets
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from . import channel
from .channel import ChannelError, Frame
from .stream import check_peer
from .types import ChannelAddress

logger = logging.getLogger("ray.serve")  # Serve writes this one to the replica's log file

HELLO_S = 2.0
MAX_HELLO_BYTES = 4096

_PREFIX = "manta-channel-"
_SOCKET = "socket"
_MAX_PATH_BYTES = 100  # of sun_path's 108
_MAX_GREETINGS = 64
_BACKLOG = 128
# A directory this young may be about to get its socket, or a listener there.
_YOUNG_S = 60.0

Admit = Callable[[int, socket.socket, str], None]


class _Silent(ChannelError):
    """A peer that went without a word: a `sweep` looks whether anybody listens."""


class Doorway:
    """`admit(instance, sock, router_id)` takes over a connection; `instances` counts them."""

    def __init__(self, instances: int, admit: Admit) -> None:
        self._instances = instances
        self._admit = admit
        self._token = secrets.token_hex(32)
        self._listener: socket.socket | None = None
        self._directory: Path | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._greetings: set[asyncio.Task[None]] = set()

    def open(self) -> ChannelAddress | None:
        """None where it cannot be: Routers then come through Serve."""
        try:
            sweep(_base())
            self._directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_base()))
            path = str(self._directory / _SOCKET)
            if len(os.fsencode(path)) > _MAX_PATH_BYTES:
                raise OSError(f"{path} is too long for a socket")
            self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._listener.setblocking(False)
            self._listener.bind(path)
            self._listener.listen(_BACKLOG)
        except (OSError, AttributeError) as error:
            logger.warning("no local channel, batches come through Serve: %s", error)
            self.close()
            return None
        self._accepting = asyncio.get_running_loop().create_task(self._accept(self._listener))
        return ChannelAddress(path, self._token)

    def close(self) -> None:
        """No new connections; those that were admitted belong to their instances."""
        for task in (self._accepting, *self._greetings):
            if task is not None:
                task.cancel()
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        self.remove()

    def remove(self) -> None:
        """The directory, on any thread: the last thing that a process does which must end now."""
        directory, self._directory = self._directory, None
        if directory is not None:
            _remove(directory)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(listener)
            except OSError as error:  # out of descriptors, mostly: others will be closed
                logger.warning("a connection was not accepted: %s", error)
                await asyncio.sleep(0.1)
                continue
            sock.setblocking(False)
            if len(self._greetings) >= _MAX_GREETINGS:
                sock.close()
                continue
            task = loop.create_task(self._greet(sock))
            self._greetings.add(task)
            task.add_done_callback(self._greetings.discard)

    async def _greet(self, sock: socket.socket) -> None:
        try:
            check_peer(sock)
            hello = channel.read_hello((await asyncio.wait_for(_first(sock), HELLO_S)).header)
            if not hmac.compare_digest(hello.token.encode(), self._token.encode()):
                raise ChannelError("a wrong token")
            if hello.instance >= self._instances:
                raise ChannelError(f"there is no instance {hello.instance}")
            sock.send(channel.head(channel.WELCOME))
        except _Silent as error:
            logger.debug("a connection came to nothing: %s", error)
            sock.close()
        except (ChannelError, OSError, UnicodeError, asyncio.TimeoutError) as error:
            logger.warning("a connection was refused: %s", error or "it said nothing")
            sock.close()
        except BaseException:
            sock.close()
            raise
        else:
            self._admit(hello.instance, sock, hello.router_id)


async def _first(sock: socket.socket) -> Frame:
    """The frame that a connection begins with, and nothing of what follows it."""
    import numpy as np

    data = b""
    size = channel.ALIGNMENT
    while len(data) < size:
        more = await asyncio.get_running_loop().sock_recv(sock, size - len(data))
        if not more:
            kind = ChannelError if data else _Silent
            raise kind("the connection is closed")
        data += more
        if len(data) == channel.ALIGNMENT:
            size = channel.frame_bytes(data)
            if size > MAX_HELLO_BYTES:
                raise ChannelError(f"a first frame of {size} bytes")
    frame = channel.parse(np.frombuffer(data, np.uint8))
    if frame.kind != channel.HELLO or frame.flags:
        raise ChannelError("a connection that does not begin with its name")
    return frame


def _base() -> str:
    """Where the directory goes: a socket's path must be short."""
    base = tempfile.gettempdir()
    room = len(_PREFIX) + 8 + len(_SOCKET) + 2
    return base if len(os.fsencode(base)) + room <= _MAX_PATH_BYTES else "/tmp"


def sweep(base: str) -> None:
    """Removes what processes that were killed have left behind: nobody listens there."""
    if not hasattr(os, "geteuid"):
        return
    for directory in Path(base).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            found = directory.lstat()
            path = directory / _SOCKET
            if found.st_uid != os.geteuid() or not directory.is_dir() or directory.is_symlink():
                continue
            if time.time() - found.st_mtime <= _YOUNG_S:
                continue
            if path.exists():
                if not _listens(path):
                    _remove(directory)
            elif not any(directory.iterdir()):
                _remove(directory)


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
        except OSError:
            return True
    return True


def _remove(directory: Path) -> None:
    with contextlib.suppress(OSError):
        (directory / _SOCKET).unlink()
    with contextlib.suppress(OSError):
        directory.rmdir()
