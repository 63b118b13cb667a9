"""How Serve is told which replica a batch is for, and when a replica is reached without Serve."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from ray import exceptions
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, RequestMetadata
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.request_router import PendingRequest, ReplicaID

from deployments.channel import ChannelError
from deployments.client import ENDINGS, LeastLoaded, Origin, Reach
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


GROUP = DeploymentID("group", "app")


def routed(*, lost: str, named: str, is_retry: bool) -> Any:
    """What Serve's router chooses for a call that names a replica, after one could not be reached;
    None while it still looks for one."""

    async def choose() -> Any:
        router = LeastLoaded(GROUP, DeploymentHandleSource.REPLICA)
        router.on_replica_actor_unavailable(ReplicaID(lost, GROUP))
        metadata = RequestMetadata(request_id="r", internal_request_id="i", call_method="execute")
        call = PendingRequest(args=[BATCH, named], kwargs={}, metadata=metadata)
        choice = router._choose_replica_for_request(call, is_retry=is_retry)
        try:
            return await asyncio.wait_for(choice, 0.05)
        except asyncio.TimeoutError:
            return None

    return asyncio.run(choose())


class Replica:
    """One that Serve knows, and that tells after a while how many calls it has."""

    max_ongoing_requests = 20

    def __init__(self, name: str, after_s: float) -> None:
        self.replica_id = ReplicaID(name, GROUP)
        self._after_s = after_s

    async def get_queue_len(self, *, deadline_s: float) -> int:
        await asyncio.sleep(self._after_s)
        return 0


@pytest.mark.parametrize("slow", ["one", "two"])
def test_each_batch_goes_to_the_replica_that_it_names(slow: str) -> None:
    """Serve's order of requests is another thing than whose replica answers first."""

    async def both() -> list[str]:
        router = LeastLoaded(GROUP, DeploymentHandleSource.REPLICA)
        replicas: Any = [Replica(name, 0.05 * (name == slow)) for name in ("one", "two")]
        router.update_replicas(replicas)
        calls = []
        for name in ("one", "two"):
            ids = {"request_id": name, "internal_request_id": name}
            metadata = RequestMetadata(**ids, call_method="execute")
            call = PendingRequest(args=[BATCH, name], kwargs={}, metadata=metadata)
            calls.append(router._choose_replica_for_request(call))
        return [chosen.replica_id.unique_id for chosen in await asyncio.gather(*calls)]

    assert asyncio.run(both()) == ["one", "two"]


def test_a_batch_under_which_its_replica_ended_is_not_sent_to_another() -> None:
    """Serve would: what ended one would end them all."""
    with pytest.raises(DeploymentUnavailableError):
        routed(lost="one", named="one", is_retry=True)
    assert DeploymentUnavailableError in ENDINGS


@pytest.mark.parametrize(("lost", "is_retry"), [("other", True), ("one", False)])
def test_control_a_batch_that_never_was_there_is_still_sent(lost: str, is_retry: bool) -> None:
    assert routed(lost=lost, named="one", is_retry=is_retry) is None


@pytest.mark.parametrize(
    ("kind", "ends"),
    [
        (exceptions.ActorDiedError, True),
        (exceptions.ActorUnavailableError, True),
        (exceptions.NodeDiedError, True),
        (exceptions.OwnerDiedError, True),
        (exceptions.ObjectReconstructionFailedError, True),
        (exceptions.ObjectStoreFullError, False),  # that of this node
        (exceptions.RaySystemError, False),
        (exceptions.RayTaskError, False),
    ],
)
def test_which_of_rays_errors_tell_that_a_replica_is_gone(kind: type, ends: bool) -> None:
    assert issubclass(kind, ENDINGS) is ends


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
