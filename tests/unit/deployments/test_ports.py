"""Ports that Routers of one server share and nobody else may hold."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from deployments.ports import PortClaim, PortInUse, check_free


@pytest.fixture
def port() -> Iterator[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number = probe.getsockname()[1]
    yield number


def test_a_foreign_holder_is_named(port: int) -> None:
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(("127.0.0.1", port))
        holder.listen()
        for attempt in (
            lambda: check_free("127.0.0.1", port),
            lambda: PortClaim("127.0.0.1", port, "one"),
        ):
            with pytest.raises(PortInUse, match=f"port {port} on 127.0.0.1"):
                attempt()
    check_free("127.0.0.1", port)  # the control: once it is gone, the port is free


def test_one_owner_shares_and_another_does_not(port: int) -> None:
    first = PortClaim("127.0.0.1", port, "one")
    second = PortClaim("127.0.0.1", port, "one")
    with pytest.raises(PortInUse):
        PortClaim("127.0.0.1", port, "other")
    first.close()
    with pytest.raises(PortInUse):
        PortClaim("127.0.0.1", port, "other")  # the second still holds it
    second.close()
    PortClaim("127.0.0.1", port, "other").close()


def test_a_failed_claim_leaves_no_descriptor(port: int) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", port))
        holder.listen()
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(5):
            with pytest.raises(PortInUse):
                PortClaim("127.0.0.1", port, "one")
        assert len(os.listdir("/proc/self/fd")) == before


def test_port_zero_is_chosen_by_the_system() -> None:
    one, other = PortClaim("127.0.0.1", 0, "x"), PortClaim("127.0.0.1", 0, "x")
    assert one.port != other.port != 0
    one.close()
    other.close()
