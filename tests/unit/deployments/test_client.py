"""How Serve is told which replica a batch is for, and when a replica is reached without Serve."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from deployments.channel import ChannelError
from deployments.client import LeastLoaded, Origin, Reach
from deployments.types import Batch, ChannelAddress, Endpoint

BATCH = Batch(rows=(1,), inputs=(), outputs=())
ORIGIN = Origin("here", "router", True, 1 << 20, 10.0)


def replica(name: str) -> Any:
    return SimpleNamespace(replica_id=SimpleNamespace(unique_id=name))


def chosen(candidates: list[Any], *arguments: object) -> list[list[Any]]:
    pending: Any = SimpleNamespace(args=list(arguments))
    router: Any = None
    return asyncio.run(LeastLoaded.choose_replicas(router, candidates, pending))


def test_a_batch_goes_to_the_replica_that_it_names() -> None:
    one, two = replica("one"), replica("two")
    assert chosen([one, two], BATCH, "two") == [[two]]


@pytest.mark.parametrize("arguments", [(BATCH, "dead"), (BATCH,), ()])
def test_any_other_call_to_the_least_loaded_of_all(arguments: tuple[object, ...]) -> None:
    one, two = replica("one"), replica("two")
    assert chosen([one, two], *arguments) == [[one, two]]


@pytest.mark.parametrize(
    ("node_id", "has_channel", "use_channels", "local"),
    [
        ("here", True, True, True),
        ("there", True, True, False),
        ("here", False, True, False),
        ("here", True, False, False),
    ],
)
def test_a_channel_is_for_the_same_node(
    node_id: str, has_channel: bool, use_channels: bool, local: bool
) -> None:
    origin = Origin("here", "router", use_channels, 1 << 20, 10.0)
    reach = Reach(origin, "m", "app", lambda: None)
    address = ChannelAddress("/run/x", "token") if has_channel else None
    assert reach.is_local(Endpoint("r", node_id, 1, address)) is local


def test_a_channel_that_nobody_listens_on_is_an_error(tmp_path: Any) -> None:
    reach = Reach(ORIGIN, "m", "app", lambda: None)
    endpoint = Endpoint("r", "here", 1, ChannelAddress(str(tmp_path / "gone"), "token"))
    with pytest.raises((OSError, ChannelError)):
        asyncio.run(reach.channel(endpoint, 0, lambda: None))
