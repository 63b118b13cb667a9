"""Neighbours: how the models of one replica reach other models, which is through a Router.

There such a request is checked, queued and batched like anyone's. Owns the limit of a call and what
Ray's failures mean for it. Lives on the replica's event loop; models call it on their own threads,
by the seam of `pb_utils/calls`.
"""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import Future
from typing import Any

import grpc
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError, RequestCancelledError

from .errors import Internal, MantaError, QueueTimeout, Unavailable
from .types import InferRequest, InferResponse, Tensor

logger = logging.getLogger("ray.serve")  # Serve writes this one to the replica's log file

# Beside the limits that the Router keeps itself: it answers first, unless it has ended.
_MARGIN_S = 5.0
# What a message costs beyond its tensors, generously.
_ENVELOPE_BYTES = 4096


class Neighbours:
    """`limit_s`: how long a call may take. From `by_reference_bytes` on tensors go through the
    object store. Made on the loop that carries the calls."""

    def __init__(self, application: str, limit_s: float, by_reference_bytes: int) -> None:
        handle = serve.get_deployment_handle("Router", application, _check_exists=False)
        self._by_value = handle.options(_by_reference=False)
        self._by_reference = handle.options(_by_reference=True)
        self._loop = asyncio.get_running_loop()
        self._limit_s = limit_s + _MARGIN_S
        self._by_reference_bytes = by_reference_bytes
        self._answer_bytes: dict[str, int] = {}  # by model, of its last answer

    # --- on the models' threads ------------------------------------------------------------------

    def infer(
        self, request: InferRequest, timeout_s: float | None
    ) -> Future[InferResponse | MantaError]:
        """The answer, or why there is none; it raises nothing."""
        return asyncio.run_coroutine_threadsafe(self._infer(request, timeout_s), self._loop)

    def control(self, verb: str, *args: Any) -> Future[Any]:
        """`ready`, `load` and `unload`: what `Router.control_for_model` answers."""
        return asyncio.run_coroutine_threadsafe(self._control(verb, *args), self._loop)

    # --- on the loop -----------------------------------------------------------------------------

    async def _infer(
        self, request: InferRequest, timeout_s: float | None
    ) -> InferResponse | MantaError:
        model = request.model_name
        expected = max(_size_bytes(request.inputs), self._answer_bytes.get(model, 0))
        large = expected + _ENVELOPE_BYTES >= self._by_reference_bytes
        limit_s = self._limit_s if timeout_s is None else min(timeout_s, self._limit_s)
        try:
            answer = await asyncio.wait_for(self._ask(request, large), limit_s)
        except asyncio.TimeoutError:
            return QueueTimeout(model) if timeout_s is None else _too_late(model)
        except (RayActorError, DeploymentUnavailableError, RequestCancelledError):
            return Unavailable(f"the server did not answer a request to model '{model}'")
        except Exception:
            logger.exception("a request to model '%s' failed", model)
            return Internal(f"the server failed to call model '{model}'")
        if isinstance(answer, InferResponse):
            self._answer_bytes[model] = _size_bytes(answer.outputs)
        return answer

    async def _ask(self, request: InferRequest, large: bool) -> InferResponse | MantaError:
        handle = self._by_reference if large else self._by_value
        try:
            answer: InferResponse | MantaError = await handle.infer_for_model.remote(request)
        except grpc.aio.AioRpcError as error:
            if large or error.code() != grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise
            return await self._ask(request, True)  # an answer too large for a message
        return answer

    async def _control(self, verb: str, *args: Any) -> Any:
        try:
            return await self._by_value.control_for_model.remote(verb, *args)
        except (RayActorError, DeploymentUnavailableError, RequestCancelledError):
            return Unavailable("the server did not answer")
        except Exception:
            logger.exception("%s failed", verb)
            return Internal(f"the server failed to {verb} a model")


def _too_late(model: str) -> MantaError:
    return Unavailable(f"Request timeout expired: model '{model}' did not answer in time")


def _size_bytes(tensors: tuple[Tensor, ...]) -> int:
    return sum(tensor.data.nbytes for tensor in tensors)
