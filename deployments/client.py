"""The seam between Router and replicas: `execute(batch)` and `aclose()`.

`HandleClient` speaks to one deployment through Serve's handle, by value or by reference; `Pool`
spreads batches over a model's deployments (one per instance group). Knows how Ray reports that a
replica has ended, and says it in our errors. Called by the Batcher.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from typing import Any

import grpc
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError, RequestCancelledError
from ray.serve.request_router import (
    FIFOMixin,
    PendingRequest,
    RequestRouter,
    RunningReplica,
)

from .batcher import ModelClient
from .errors import Internal, MantaError, QueueTimeout, ReplicaLost
from .types import Array, Batch, BatchReply, Target

logger = logging.getLogger("manta.client")

# What a batch message costs beyond its tensors, generously: names, shapes, pickle framing.
_ENVELOPE_BYTES = 4096


class LeastLoaded(FIFOMixin, RequestRouter):  # type: ignore[misc]
    """Serve's choice of a replica for one call: the one with the shortest queue among all.

    Serve's default looks at two replicas picked at random; with three or more it can pick two busy
    ones while a third is idle, and a batch would wait for nothing.
    """

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        return [candidate_replicas]


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

    async def execute(self, batch: Batch) -> BatchReply:
        """Raises ReplicaLost when the replica ended under it, QueueTimeout when none took it."""
        rows = sum(batch.rows)
        expected = max(_size_bytes(batch), int(self._reply_bytes_per_row * rows))
        large = expected + _ENVELOPE_BYTES >= self._by_reference_bytes
        try:
            reply = await self._call(batch, large)
        except grpc.aio.AioRpcError as error:
            if large or error.code() != grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise Internal("the call to the model instance failed") from error
            reply = await self._call(batch, True)
        self._weigh(reply, rows)
        return reply

    async def _call(self, batch: Batch, large: bool) -> BatchReply:
        handle = self._by_reference if large else self._by_value
        response = handle.execute.remote(batch)
        try:
            reply: BatchReply = await asyncio.wait_for(_result(response), self._limit_s)
        except asyncio.TimeoutError:
            raise QueueTimeout(self._model_name) from None
        except (RayActorError, DeploymentUnavailableError, RequestCancelledError) as error:
            raise ReplicaLost(self._model_name) from error
        except RayTaskError as error:
            if isinstance(error.cause, MantaError):
                raise error.cause from None
            if isinstance(error.cause, RayActorError):
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


class Pool:
    """One model's deployments as one client: each batch goes where the most slots are free."""

    def __init__(self, clients: dict[str, ModelClient]) -> None:
        self._clients = clients
        self._slots = {name: 0 for name in clients}
        self._running = {name: 0 for name in clients}

    @property
    def slots(self) -> int:
        return sum(self._slots.values())

    def resize(self, targets: Sequence[Target]) -> None:
        live = {target.deployment: target.slots for target in targets}
        self._slots = {name: live.get(name, 0) for name in self._clients}

    async def execute(self, batch: Batch) -> BatchReply:
        # Never to where nobody lives, while somebody does elsewhere: it would wait there for long.
        live = [n for n in self._clients if self._slots[n]] or list(self._clients)
        name = max(live, key=lambda n: self._slots[n] - self._running[n])
        self._running[name] += 1
        try:
            return await self._clients[name].execute(batch)
        finally:
            self._running[name] -= 1

    async def aclose(self) -> None:
        for client in self._clients.values():
            await client.aclose()
