"""tritonserver's options of the gRPC port that are gRPC's own, as data.

Owns which setting is which of gRPC's channel arguments, the order of compression levels, and who
does not take them: HAProxy and Serve's proxy. Settings are ServerSettings, whose module reads this
one; so do `cli` and the gRPC listener.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import grpc_tls

CHANNEL_ARGUMENTS: Mapping[str, str] = {
    "grpc_keepalive_time_ms": "grpc.keepalive_time_ms",
    "grpc_keepalive_timeout_ms": "grpc.keepalive_timeout_ms",
    "grpc_keepalive_permit_without_calls": "grpc.keepalive_permit_without_calls",
    "grpc_http2_max_pings_without_data": "grpc.http2.max_pings_without_data",
    "grpc_http2_min_recv_ping_interval_without_data_ms": (
        "grpc.http2.min_ping_interval_without_data_ms"
    ),
    "grpc_http2_max_ping_strikes": "grpc.http2.max_ping_strikes",
    "grpc_max_connection_age_ms": "grpc.max_connection_age_ms",
    "grpc_max_connection_age_grace_ms": "grpc.max_connection_age_grace_ms",
}
_LEVELS = ("none", "low", "medium", "high")


def level(settings: Any) -> int:
    """Of compression, as gRPC numbers them; 0 is none."""
    return _LEVELS.index(settings.grpc_infer_response_compression_level)


def given(settings: Any) -> tuple[str, ...]:
    """Which of CHANNEL_ARGUMENTS somebody has set."""
    return tuple(name for name in CHANNEL_ARGUMENTS if getattr(settings, name) is not None)


def arguments(settings: Any) -> dict[str, int]:
    """Channel arguments for a grpc.aio that has the port to itself."""
    return {CHANNEL_ARGUMENTS[name]: int(getattr(settings, name)) for name in given(settings)}


def unheard(settings: Any) -> str:
    """What to warn of where HAProxy has the gRPC port; "" for nothing."""
    names = ", ".join(given(settings))
    if not names:
        return ""
    return (
        f"{names}: HAProxy has the gRPC port and knows nothing of it; --grpc-lane=false gives the "
        "port to grpc.aio, which does"
    )


def beyond_serve(settings: Any) -> tuple[str, ...]:
    """What is set of this port that Serve's own gRPC proxy has no place for."""
    names = [*given(settings), *(name for name in grpc_tls.SWITCHES if getattr(settings, name))]
    if level(settings):
        names.append("grpc_infer_response_compression_level")
    return tuple(names)


def reflects(settings: Any) -> bool:
    """Whether Serve's proxy, which answers that itself, may tell of its services."""
    return not any("metadata" in group.apis for group in settings.grpc_restricted_protocol)
