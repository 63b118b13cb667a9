"""HTTP exchanges that have a limit as a whole, over a connection that is kept: a limit per read
never ends what trickles. Used by `fuzz`."""

from __future__ import annotations

import contextlib
import http.client
import select
import socket
import threading
import zlib
from urllib.parse import urlsplit

import requests
from schemathesis import Response


class Connection:
    """Connects when it must; closed by `close`, or by an exchange that fails."""

    def __init__(self, url: str, limit_s: float) -> None:
        parts = urlsplit(url)
        self._http = http.client.HTTPConnection(parts.hostname or "", parts.port, limit_s)
        self._limit_s = limit_s

    def close(self) -> None:
        self._http.close()

    def send(self, sent: requests.PreparedRequest) -> Response:
        """Raises TimeoutError unless the whole answer is there in time, OSError and HTTPException
        for what is no answer. Its content is what was compressed."""
        connected = self._connect()
        late = threading.Event()

        def cut() -> None:
            late.set()
            with contextlib.suppress(OSError):
                connected.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(self._limit_s, cut)
        timer.start()
        try:
            answer = self._exchange(sent)
        except (OSError, http.client.HTTPException):
            self.close()
            if not late.is_set():
                raise
        finally:
            timer.cancel()
        if late.is_set():
            self.close()
            raise TimeoutError(f"no whole answer within {self._limit_s:g} s")
        return answer

    def _connect(self) -> socket.socket:
        old = self._http.sock
        if old is not None and select.select([old], [], [], 0)[0]:
            self.close()  # the server has closed it
        if self._http.sock is None:
            self._http.connect()
        connected: socket.socket = self._http.sock
        return connected

    def _exchange(self, sent: requests.PreparedRequest) -> Response:
        self._http.putrequest(sent.method or "", sent.path_url, skip_accept_encoding=True)
        for name, value in sent.headers.items():
            self._http.putheader(name, value)
        body = sent.body.encode() if isinstance(sent.body, str) else sent.body
        self._http.endheaders(body or None)
        answer = self._http.getresponse()
        content = answer.read()
        if answer.headers.get("content-encoding") in ("gzip", "deflate"):
            content = zlib.decompress(content, zlib.MAX_WBITS | 32)  # either
        headers = {name.lower(): answer.headers.get_all(name, []) for name in answer.headers}
        return Response(answer.status, headers, content, sent, 0.0, False, answer.reason)
