"""Headers of a request that become its parameters, over HTTP and gRPC.

Owns which may, and Triton's text on those that may not. The roads ask it, and only where the server
was given a pattern. The parameters reach models that are told of more than their tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from configs.patterns import header_pattern

from .contract import PROTOCOL_PARAMETERS
from .errors import InvalidArgument
from .types import InferRequest

RESERVED = frozenset((*PROTOCOL_PARAMETERS, "headers"))
# Where an ASGI scope has the headers with their names as they were sent; `headers` has them lower.
AS_SENT = "manta.headers"
# What HTTP/2 and its carriers say of a call, and grpc.aio does not show.
_CARRIERS = frozenset(
    (
        "connection",
        "content-length",
        "content-type",
        "host",
        "te",
        "transfer-encoding",
    )
)


class Forwarding:
    def __init__(self, pattern: re.Pattern[str], hidden: frozenset[str]) -> None:
        self._pattern = pattern
        self._hidden = hidden

    def of_http(self, fields: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
        """Names as they are given, of equal ones the last. Raises InvalidArgument."""
        return self._chosen((name.decode("latin-1"), value) for name, value in fields)

    def of_grpc(self, metadata: Iterable[tuple[Any, Any]]) -> dict[str, str]:
        """The same of a call's metadata, as grpc.aio has them or as HTTP carries them; binary ones
        are no text."""
        named = ((_text(name).lower(), value) for name, value in metadata)
        return self._chosen(
            (name, value)
            for name, value in named
            if not name.endswith("-bin") and not name.startswith("grpc-") and name not in _CARRIERS
        )

    def _chosen(self, fields: Iterable[tuple[str, Any]]) -> dict[str, str]:
        chosen = {}
        for name, value in fields:
            if self._pattern.search(name) is None:
                continue
            lower = name.lower()
            if lower in self._hidden:
                continue
            if lower in RESERVED or lower.startswith("triton_"):
                raise InvalidArgument(
                    f"parameter '{name[:64]}' is reserved for Triton usage and cannot be forwarded"
                )
            chosen[name] = _text(value)
        return chosen


def forwarding(pattern: str, hidden: frozenset[str] = frozenset()) -> Forwarding | None:
    """None without a pattern. `hidden`, in lower case, are for no model, whatever it says."""
    compiled = header_pattern(pattern)
    return None if compiled is None else Forwarding(compiled, hidden)


def add(request: InferRequest, forwarded: Mapping[str, str]) -> InferRequest:
    """What headers say counts: a proxy sets them, and the body is the client's."""
    if not forwarded:
        return request
    return replace(request, parameters={**request.parameters, **forwarded})


def as_sent(scope: Mapping[str, Any]) -> Iterable[tuple[bytes, bytes]]:
    """The headers of an ASGI scope, by the names that the client wrote where those are known."""
    extensions = scope.get("extensions") or {}
    fields: Iterable[tuple[bytes, bytes]] = extensions.get(AS_SENT) or scope["headers"]
    return fields


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    try:
        return bytes(value).decode()
    except UnicodeDecodeError:
        return bytes(value).decode("latin-1")
