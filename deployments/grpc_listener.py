"""The gRPC edge of one Router: grpc.aio alone on the port, or behind HAProxy beside the lane.

Owns their start, what takes over when HAProxy cannot run, drain and stop. Decides nothing about
requests. Called by the listener.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grpc

from configs import grpc_options, grpc_tls
from configs.server import ServerSettings

from .grpc_lane import PATH, Lane
from .grpc_services import STREAM_PATH, Gatekeeper, guards
from .haproxy import Haproxy, HaproxyFailed, find_binary
from .haproxy_config import LANE, ORDINARY, Front
from .inference import Inference
from .ports import PortClaim, private_folder

logger = logging.getLogger("ray.serve")

MAX_MESSAGE_BYTES = 2**31 - 1
# HAProxy stops reading a connection while one stream on it has no room to go on, and with that the
# word that there is room the other way: two directions of a stream could wait for each other. So
# what clients send has room here, more than a connection may hold that HAProxy has not read yet.
BEHIND_HAPROXY = {"grpc.http2.lookahead_bytes": 128 << 20, "grpc.http2.bdp_probe": 0}
# HAProxy's clients get this long to learn that they must go, and at the end to read their answers.
LEAVE_S = 0.5
LAST_S = 1.0


class GrpcListener:
    """gRPC on one claimed port; the claim's own socket only holds the place.

    With `inference`, and unless the settings say otherwise, ModelInfer takes the lane.
    """

    def __init__(
        self,
        claim: PortClaim,
        add_servicer: Callable[[Any], None],
        settings: ServerSettings,
        inference: Inference | None = None,
    ) -> None:
        self._claim = claim
        self._add_servicer = add_servicer
        self._settings = settings
        self._servers: list[Any] = []
        self._lane: Lane | None = None
        if inference is not None and settings.grpc_lane:
            self._lane = Lane(inference, settings)
        self._certificates: grpc_tls.Certificates | None = None
        self._folder: Folder | None = None
        self._haproxy: Haproxy | None = None
        self._fallback: asyncio.Task[None] | None = None

    @property
    def has_lane(self) -> bool:
        """Whether HAProxy has the port."""
        return self._haproxy is not None

    async def start(self) -> None:
        """Raises CertificateError, before anything has the port."""
        self._certificates = grpc_tls.certificates(self._settings)
        if self._lane is not None:
            try:
                await self._start_lane(self._lane)
                return
            except (HaproxyFailed, OSError, RuntimeError) as error:  # grpc's own: RuntimeError
                logger.warning("HAProxy does not run, so grpc.aio has the gRPC port: %s", error)
                self._haproxy = None
        await self._take_port()

    async def _start_lane(self, lane: Lane) -> None:
        binary = find_binary()
        self._folder = Folder()
        path = self._folder.path
        await self._serve(f"unix:{path / ORDINARY}", BEHIND_HAPROXY)
        await lane.open(path / LANE)
        settings = self._settings
        front = Front(
            address=self._claim.socket.getsockname()[0],
            port=self._claim.port,
            folder=path,
            path=PATH,
            stream_path=STREAM_PATH,
            read_s=settings.http_read_timeout_s,
            answer_s=max(
                settings.max_queue_s + settings.max_execution_s, settings.model_load_timeout_s
            ),
            grace_s=settings.exit_timeout_s,
            certificates=self._certificates,
        )
        self._haproxy = Haproxy(front, binary, self._lost)
        await self._haproxy.start()
        if text := grpc_options.unheard(settings):
            logger.warning(text)

    async def _take_port(self) -> None:
        claim = self._claim
        host = f"[{claim.address}]" if ":" in claim.address else claim.address
        wanted = grpc_options.arguments(self._settings)
        await self._serve(f"{host}:{claim.port}", wanted, self._credentials())

    def _credentials(self) -> grpc.ServerCredentials | None:
        """The files as they are now."""
        files = self._certificates
        if files is None:
            return None
        root = files.root.read_bytes() if files.root else None
        pair = (files.key.read_bytes(), files.cert.read_bytes())
        return grpc.ssl_server_credentials([pair], root, require_client_auth=root is not None)

    async def _serve(
        self,
        address: str,
        wanted: Mapping[str, int],
        credentials: grpc.ServerCredentials | None = None,
    ) -> None:
        """grpc.aio cannot be given another address once it runs: each address has its own.

        `wanted` are channel arguments for clients that connect here themselves.
        """
        settings = self._settings
        arguments = {
            "grpc.max_receive_message_length": min(settings.max_body_bytes, MAX_MESSAGE_BYTES),
            "grpc.max_send_message_length": MAX_MESSAGE_BYTES,
            "grpc.so_reuseport": 1,
            **wanted,
        }
        if level := grpc_options.level(settings):
            arguments["grpc.default_compression_level"] = level
        restricted = guards(settings)
        server = grpc.aio.server(
            options=list(arguments.items()),
            interceptors=[Gatekeeper(restricted)] if restricted else None,
        )
        self._add_servicer(server)
        if credentials is None:
            server.add_insecure_port(address)
        else:
            server.add_secure_port(address, credentials)
        await server.start()
        self._servers.append(server)

    def _lost(self) -> None:
        logger.warning("HAProxy does not stay up, so grpc.aio takes the gRPC port")
        self._haproxy = None
        self._fallback = asyncio.get_running_loop().create_task(self._take_port())

    def alive(self) -> bool:
        """False when nobody can have the port any more."""
        fallback = self._fallback
        if fallback is None or not fallback.done():
            return True
        if error := fallback.exception():
            logger.error("grpc.aio cannot take the gRPC port: %s", error)
        return error is None

    async def drain(self) -> None:
        """HAProxy tells its clients to go, what is in flight is answered, then all ends."""
        if self._haproxy is not None:
            await self._haproxy.leave(LEAVE_S)
        if self._fallback is not None:
            with contextlib.suppress(Exception):
                await self._fallback
        grace_s = self._settings.exit_timeout_s
        ends = [server.stop(grace_s) for server in self._servers]
        if self._lane is not None:
            ends.append(self._lane.drain(grace_s))
        await asyncio.gather(*ends)
        if self._haproxy is not None:
            await self._haproxy.stop(LAST_S)
        if self._folder is not None:
            self._folder.close()
        self._claim.close()


class Folder:
    """A new folder for sockets, which nobody else may enter.

    A lock in it says that its owner lives: what a killed one left behind goes with the next start.
    """

    def __init__(self) -> None:
        root = private_folder()
        for other in root.glob("grpc-*"):
            _remove_if_left(other)
        self.path = Path(tempfile.mkdtemp(prefix="grpc-", dir=root))
        self._lock = _locked(self.path, os.O_CREAT)

    def close(self) -> None:
        lock, self._lock = self._lock, -1
        if lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(lock)


def _locked(folder: Path, flags: int = 0) -> int:
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CLOEXEC | flags, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise
    return lock


def _remove_if_left(folder: Path) -> None:
    with contextlib.suppress(OSError):  # without a lock: it begins just now, and is not ours
        lock = _locked(folder)
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)
