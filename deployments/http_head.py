"""The head of an infer call, request line and fields: read once, and known when it comes again.

Owns which calls the lane can carry, by their heads alone, and the memory of heads, which is
bounded. What is wrong with any other head is told on the ordinary road. Called by `http_lane`.
"""

from __future__ import annotations

import urllib.parse
from collections.abc import Mapping
from typing import NamedTuple

import httptools

from configs.server import ServerSettings

from . import http_body, http_coding, http_infer
from .errors import MantaError
from .forwarding import Forwarding, forwarding
from .http_replies import Field
from .plans import Recent
from .restricted import Guard, Guards, headers
from .tracing import Carrier, carrier

START = b"POST /v2/models/"
END = b"\r\n\r\n"
MAX_HEADS = 1024
MAX_HEAD_BYTES = 4096

_ELSEWHERE = frozenset((b"expect", b"upgrade", b"transfer-encoding", b"content-encoding"))


class Head(NamedTuple):
    """What a head says. `body_bytes` -1: not for the lane. `coding`: the answer's, "" for none.
    `forwarded`: parameters that its fields are, where the server has a pattern for them.
    `carrier`: the client's trace, as it came."""

    model: str
    version: str
    body_bytes: int
    json_bytes: int | None
    keep_alive: bool
    coding: str = ""
    forwarded: Mapping[str, str] | None = None
    carrier: Carrier | None = None


NOT_OURS = Head("", "", -1, None, False)


class _Reader:
    """Takes one head from httptools, which calls it; uvicorn reads heads in the same way."""

    def __init__(self) -> None:
        self.url = b""
        self.fields: list[Field] = []
        self.facts: tuple[bytes, str, bool] | None = None
        self._begun = 0
        self._body = False
        self._parser = httptools.HttpRequestParser(self)

    def feed(self, data: bytes) -> bool:
        """Whether `data` is the head of one request, from its first byte to its last."""
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            return False
        return self._begun == 1 and not self._body

    def on_message_begin(self) -> None:
        self._begun += 1

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.fields.append((name, value))

    def on_headers_complete(self) -> None:
        parser = self._parser
        version = parser.get_http_version()
        keep_alive = version != "1.0" and parser.should_keep_alive()
        self.facts = (parser.get_method(), version, keep_alive)

    def on_body(self, body: bytes) -> None:
        self._body = True


def read_head(
    data: bytes,
    settings: ServerSettings,
    headers: Forwarding | None = None,
    guard: Guard | None = None,
) -> Head:
    """NOT_OURS unless the lane can carry the call: with all of its limits kept, but for time.

    `guard`: infer calls are restricted, and who is refused hears so on the ordinary road.
    """
    reader = _Reader()
    if not reader.feed(data) or reader.facts is None:
        return NOT_OURS
    method, version, keep_alive = reader.facts
    try:
        url = httptools.parse_url(reader.url)
        match = http_infer.PATH.fullmatch(urllib.parse.unquote(url.path.decode("ascii")))
    except (httptools.HttpParserError, UnicodeDecodeError):
        return NOT_OURS
    fields = http_body.fold([(name.lower(), value) for name, value in reader.fields])
    if (
        match is None
        or method != b"POST"
        or version not in ("1.1", "1.0")
        or b"content-length" not in fields
        or not _ELSEWHERE.isdisjoint(fields)
    ):
        return NOT_OURS
    announced = fields.get(b"inference-header-content-length")
    try:
        if guard is not None:
            guard.check(fields)
        http_body.check_length(fields, http_body.body_limit(announced, settings))
        body_bytes = int(fields[b"content-length"])
        json_bytes = http_infer.header_length(announced, body_bytes)
        forwarded = None if headers is None else headers.of_http(reader.fields)
    except MantaError:
        return NOT_OURS
    coding = http_coding.of_reply(fields.get(b"accept-encoding"))
    return Head(
        match[1],
        match[2] or "",
        body_bytes,
        json_bytes,
        keep_alive,
        coding,
        forwarded or None,
        carrier(fields),
    )


class Heads:
    """Clients send the same head again and again: it is parsed once."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._forwarding = forwarding(
            settings.http_header_forward_pattern, headers(settings.http_restricted_api)
        )
        self._guard = Guards(settings.http_restricted_api).of("infer")
        self._known: Recent[bytes, Head] = Recent(MAX_HEADS)

    def __len__(self) -> int:
        return len(self._known)

    def find(self, data: bytes) -> tuple[Head, int]:
        """The head that `data` starts with, and where its body starts."""
        if not data.startswith(START):
            return NOT_OURS, 0
        # A head that is not over by then is too long, or may be: the ordinary road counts.
        end = data.find(END, 0, self._settings.http_max_header_bytes) + len(END)
        if end < len(END):
            return NOT_OURS, 0
        key = data[:end]
        head = self._known.get(key)
        if head is None:
            head = read_head(key, self._settings, self._forwarding, self._guard)
            if end <= MAX_HEAD_BYTES:
                self._known.put(key, head)
        return head, end
