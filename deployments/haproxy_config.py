"""What HAProxy is told, as text: limits, times, sockets, certificates, and which call goes where.

Owns the names in the folder that it shares with its parent, and that no value means more to HAProxy
than it says. Knows nothing of gRPC but two paths. Written down by `haproxy`, which runs it.
"""

from __future__ import annotations

import ipaddress
import re
import resource
from dataclasses import dataclass
from pathlib import Path

from configs.grpc_tls import Certificates

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
