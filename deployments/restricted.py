"""Restricted APIs: which operation belongs to which of Triton's APIs, and who may call it.

Owns the one table of operations, of both protocols, and the comparison with the value that opens
an API. The edges ask once, after routing and when they are made: what is not restricted costs
nothing per request. How groups are written is `configs/restricted`'s.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Mapping, Sequence

from configs.restricted import RestrictedGroup

from .errors import Restricted

METADATA_PREFIX = "triton-grpc-protocol-"
# Endpoints of HttpApp (with the infer call, which is no route) and RPCs: all that can be asked of
# this server. What has no entry cannot be served, so that no way round a restriction gets in.
API_OF: Mapping[str, str] = {
    **dict.fromkeys(("live", "ready", "model_ready", "healthz", "routes"), "health"),
    **dict.fromkeys(("ServerLive", "ServerReady", "ModelReady", "Check"), "health"),
    **dict.fromkeys(("server_metadata", "model_metadata", "page", "openapi"), "metadata"),
    **dict.fromkeys(("ServerMetadata", "ModelMetadata", "ServerReflectionInfo"), "metadata"),
    **dict.fromkeys(("infer", "infer_elsewhere", "generate", "generate_stream"), "inference"),
    **dict.fromkeys(("ModelInfer", "ModelStreamInfer"), "inference"),
    **dict.fromkeys(("model_config", "ModelConfig"), "model-config"),
    **dict.fromkeys(("index", "load", "unload"), "model-repository"),
    **dict.fromkeys(
        ("RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload"), "model-repository"
    ),
    **dict.fromkeys(("statistics", "ModelStatistics", "metrics"), "statistics"),
    **dict.fromkeys(("memory_status", "memory_register", "memory_unregister"), "shared-memory"),
    **dict.fromkeys(
        (
            f"{kind}SharedMemory{verb}"
            for kind in ("System", "Cuda")
            for verb in ("Status", "Register", "Unregister")
        ),
        "shared-memory",
    ),
    **dict.fromkeys(("trace", "TraceSetting"), "trace"),
    **dict.fromkeys(("logging", "LogSettings"), "logging"),
}


class Guard:
    """Lets pass who sends the value in `header`."""

    __slots__ = ("_name", "_value", "header")

    def __init__(self, header: str, value: str) -> None:
        self.header = header
        self._name, self._value = header.lower().encode(), value.encode()

    def check(self, fields: Mapping[bytes, bytes]) -> None:
        """Of a request, by names in lower case. Raises Restricted.

        How long it takes does not tell how much of a wrong value is right.
        """
        if not hmac.compare_digest(fields.get(self._name, b""), self._value):
            raise Restricted(self.header)


class Guards:
    """Those of one protocol. `prefix` is what its header names have before a group's key."""

    def __init__(self, groups: Sequence[RestrictedGroup], prefix: str = "") -> None:
        self._by_api: dict[str, Guard] = {}
        for group in groups:
            guard = Guard(prefix + group.key, group.value.get_secret_value())
            self._by_api |= dict.fromkeys(group.apis, guard)

    def __bool__(self) -> bool:
        return bool(self._by_api)

    def of(self, operation: str) -> Guard | None:
        """None where everybody may. Raises KeyError for what is not in the table."""
        return self._by_api.get(API_OF[operation])


def headers(groups: Iterable[RestrictedGroup], prefix: str = "") -> frozenset[str]:
    """Whose values open something, in lower case: they are for nobody else to see."""
    return frozenset((prefix + group.key).lower() for group in groups)


def fields_of(metadata: Iterable[tuple[str, str | bytes]]) -> dict[bytes, bytes]:
    """gRPC's metadata as a Guard reads it."""
    return {
        name.encode(): value if isinstance(value, bytes) else value.encode()
        for name, value in metadata
    }
