"""The ways to replicas: `Reach` opens channels on this node and Serve's handles elsewhere.

`HandleClient` speaks to one deployment through Serve, by value or by reference, and names the
replica that a batch is for. Knows how Ray reports that a replica has ended, and says it in our
errors. `places` asks it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
from ray import serve
from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError, RequestCancelledError
from ray.serve.request_router import (
    PendingRequest,
    ReplicaID,
    RequestRouter,
    RunningReplica,
)

from .batcher import ModelClient
from .errors import Internal, MantaError, QueueTimeout, ReplicaLost
from .local import LocalClient
from .types import Array, Batch, BatchReply, Endpoint

logger = logging.getLogger("manta.client")

# Replicas that could not be reached, in one deployment's life; the last ones are enough.
_REMEMBERED = 256
# What a batch message costs beyond its tensors, generously: names, shapes, pickle framing.
_ENVELOPE_BYTES = 4096


# How it shows that whoever ran a batch is gone, or the node with an answer that was on its way.
ENDINGS: tuple[type[Exception], ...] = (
    RayActorError,
    NodeDiedError,
    ObjectLostError,
    DeploymentUnavailableError,
    RequestCancelledError,
)


class LeastLoaded(RequestRouter):  # type: ignore[misc]
    """Serve's choice of a replica for one call: the one that the call names, while it lives.

    Else the one with the shortest queue among all: Serve's default looks at two replicas picked at
    random; with three or more it can pick two busy ones while a third is idle.

    Without Serve's FIFOMixin, which gives what was chosen for one call to another that came before:
    two batches would be at one replica, and none at the other.

    A batch under which its replica ended is not sent to another one, as Serve would: it may be what
    ended it, and would end them all in turn.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._unreachable: deque[str] = deque(maxlen=_REMEMBERED)

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        named = None if pending_request is None else pending_request.args[1:2]
        if named:
            for replica in candidate_replicas:
                if replica.replica_id.unique_id == named[0]:
                    return [[replica]]
        return [candidate_replicas]

    def on_replica_actor_unavailable(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_unavailable(replica_id)
        self._unreachable.append(replica_id.unique_id)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._unreachable.append(replica_id.unique_id)

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, *, is_retry: bool = False
    ) -> RunningReplica:
        """Serve asks again after a replica was too busy, and after it could not be reached: then
        nobody knows whether it had begun."""
        named = pending_request.args[1:2]
        if is_retry and named and named[0] in self._unreachable:
            # Serve's own: Serve copies this class, and an error of ours might be a copy, too.
            raise DeploymentUnavailableError(self._deployment_id)
        chosen: RunningReplica = await super()._choose_replica_for_request(
            pending_request, is_retry=is_retry
        )
        return chosen


class HandleClient:
    """Batches to one deployment over a Serve handle.

    Small batches go by value (gRPC), large ones by reference (object store): `by_reference_bytes`
    is the size from which the latter is faster. Replies are judged by what earlier ones weighed per
    row; a first reply too large for a message makes the batch run once more, by reference.
    """

    def __init__(
        self,
        model_name: str,
        application: str,
        deployment: str,
        by_reference_bytes: int,
        limit_s: float,
    ) -> None:
        # Unchecked: the check would be a blocking call to Serve's controller on the Router's loop.
        handle = serve.get_deployment_handle(deployment, application, _check_exists=False)
        self._by_value = handle.options(_by_reference=False)
        self._by_reference = handle.options(_by_reference=True)
        self._model_name = model_name
        self._by_reference_bytes = by_reference_bytes
        self._limit_s = limit_s
        self._reply_bytes_per_row = 0.0

    async def execute(self, batch: Batch, replica_id: str) -> BatchReply:
        """Raises ReplicaLost when the replica ended under it, QueueTimeout when none took it."""
        rows = sum(batch.rows)
        expected = max(_size_bytes(batch), int(self._reply_bytes_per_row * rows))
        large = expected + _ENVELOPE_BYTES >= self._by_reference_bytes
        try:
            reply = await self._call(batch, replica_id, large)
        except grpc.aio.AioRpcError as error:
            if large or error.code() != grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise Internal("the call to the model instance failed") from error
            reply = await self._call(batch, replica_id, True)
        self._weigh(reply, rows)
        return reply

    async def _call(self, batch: Batch, replica_id: str, large: bool) -> BatchReply:
        handle = self._by_reference if large else self._by_value
        response = handle.execute.remote(batch, replica_id)
        try:
            reply: BatchReply = await asyncio.wait_for(_result(response), self._limit_s)
        except asyncio.TimeoutError:
            raise QueueTimeout(self._model_name) from None
        except ENDINGS as error:
            raise ReplicaLost(self._model_name) from error
        except RayTaskError as error:
            if isinstance(error.cause, MantaError):
                raise error.cause from None
            if isinstance(error.cause, ENDINGS):
                raise ReplicaLost(self._model_name) from error
            raise
        return reply

    def _weigh(self, reply: BatchReply, rows: int) -> None:
        size = sum(
            output.data.nbytes + (output.offsets.nbytes if output.offsets is not None else 0)
            for part in reply.parts
            for output in part.outputs.values()
        )
        if rows:
            self._reply_bytes_per_row = max(size / rows, self._reply_bytes_per_row * 0.9)

    async def aclose(self) -> None:
        """Lets Serve's part of the handle go: it follows the deployment until told not to."""
        for handle in (self._by_value, self._by_reference):
            with contextlib.suppress(Exception):  # an application that is gone has nothing to close
                await handle.shutdown_async()


async def _result(response: Any) -> Any:
    return await response


def _size_bytes(batch: Batch) -> int:
    arrays: list[Array] = [a for members in batch.inputs for a in members if a is not None]
    return sum(array.nbytes for array in arrays)


class _Addressed:
    """One replica of a HandleClient's deployment."""

    def __init__(self, client: HandleClient, replica_id: str, lost: Callable[[], None]) -> None:
        self._client = client
        self._replica_id = replica_id
        self._lost = lost

    async def execute(self, batch: Batch) -> BatchReply:
        try:
            return await self._client.execute(batch, self._replica_id)
        except ReplicaLost:
            self._lost()
            raise

    async def aclose(self) -> None:
        """The handle belongs to all replicas of its deployment."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Who calls, and what it may use. `limit_s` bounds a call."""

    node_id: str
    router_id: str
    use_channels: bool
    by_reference_bytes: int
    limit_s: float


class Reach:
    """The replicas of one application. `lost` is called when one was lost under a call."""

    def __init__(
        self, origin: Origin, model_name: str, application: str, lost: Callable[[], None]
    ) -> None:
        self._origin = origin
        self._model_name = model_name
        self._application = application
        self._lost = lost
        self._handles: dict[str, HandleClient] = {}

    def is_local(self, endpoint: Endpoint) -> bool:
        origin = self._origin
        here = origin.use_channels and endpoint.node_id == origin.node_id
        return here and endpoint.channel is not None

    async def channel(
        self, endpoint: Endpoint, instance: int, changed: Callable[[], None]
    ) -> LocalClient:
        """Raises ChannelError or OSError."""
        assert endpoint.channel is not None  # `is_local` says so
        client: LocalClient | None = None

        def heard() -> None:
            if client is not None and not client.open:
                self._lost()
            changed()

        client = await LocalClient.connect(
            endpoint.channel,
            instance,
            self._origin.router_id,
            self._model_name,
            heard,
            self._origin.limit_s,
        )
        return client

    def through_serve(self, deployment: str, replica_id: str) -> ModelClient:
        """A handle is made when it is first needed: it follows its deployment from then on."""
        if deployment not in self._handles:
            self._handles[deployment] = HandleClient(
                self._model_name,
                self._application,
                deployment,
                self._origin.by_reference_bytes,
                self._origin.limit_s,
            )
        return _Addressed(self._handles[deployment], replica_id, self._lost)

    async def aclose(self) -> None:
        for handle in self._handles.values():
            await handle.aclose()
