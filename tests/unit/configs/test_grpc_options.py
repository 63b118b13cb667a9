"""Options of the gRPC port: which are set, and who does not take them."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from configs import grpc_options
from configs.server import ServerSettings


def values(name: str) -> Any:
    return True if name.endswith("calls") else 7


def test_unset_they_are_left_to_grpc() -> None:
    settings = ServerSettings()
    assert grpc_options.arguments(settings) == {} and grpc_options.unheard(settings) == ""
    assert grpc_options.level(settings) == 0


def test_each_is_a_setting_and_becomes_its_channel_argument() -> None:
    given = {name: values(name) for name in grpc_options.CHANNEL_ARGUMENTS}
    settings = ServerSettings(**given)
    arguments = grpc_options.arguments(settings)
    assert set(arguments) == set(grpc_options.CHANNEL_ARGUMENTS.values())
    assert arguments["grpc.keepalive_time_ms"] == 7
    assert arguments["grpc.keepalive_permit_without_calls"] == 1
    text = grpc_options.unheard(settings)
    assert all(name in text for name in given) and "--grpc-lane=false" in text


def test_off_is_a_value_too() -> None:
    settings = ServerSettings(
        grpc_keepalive_permit_without_calls=False, grpc_http2_max_ping_strikes=0
    )
    assert grpc_options.arguments(settings) == {
        "grpc.keepalive_permit_without_calls": 0,
        "grpc.http2.max_ping_strikes": 0,
    }


@pytest.mark.parametrize(
    "given",
    [
        {"grpc_keepalive_time_ms": 0},
        {"grpc_keepalive_time_ms": 2**31},
        {"grpc_http2_max_ping_strikes": -1},
        {"grpc_max_connection_age_ms": "soon"},
        {"grpc_infer_response_compression_level": "most"},
        {"grpc_max_response_pool_size": 0},
    ],
)
def test_nonsense_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(given))):
        ServerSettings(**given)


@pytest.mark.parametrize(
    "name", [*grpc_options.CHANNEL_ARGUMENTS, "grpc_infer_response_compression_level"]
)
def test_serves_proxy_has_none_of_them(name: str) -> None:
    value = "low" if name.endswith("level") else values(name)
    given: dict[str, Any] = {"listener": "serve", name: value}
    with pytest.raises(ValidationError, match=f"{name} needs listener 'router'"):
        ServerSettings(**given)


@pytest.mark.parametrize(("name", "level"), [("none", 0), ("low", 1), ("medium", 2), ("high", 3)])
def test_levels(name: Any, level: int) -> None:
    assert grpc_options.level(ServerSettings(grpc_infer_response_compression_level=name)) == level


def test_serves_proxy_tells_of_its_services_unless_metadata_are_restricted() -> None:
    def reflects(*groups: Any) -> bool:
        return grpc_options.reflects(ServerSettings(grpc_restricted_protocol=groups))

    assert reflects() and reflects("health:k=v") and not reflects("trace:k=v", "metadata:j=w")
