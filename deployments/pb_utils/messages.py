"""pb_utils.InferenceRequest and InferenceResponse: what a model is given, answers, and asks others.

Owns what a request may say and what is refused by name. A request to another model goes out through
`calls`. Made by models and by `execution_by_request`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, ClassVar

from deployments.errors import MantaError
from deployments.types import InferRequest, InferResponse, RequestedOutput

from . import tensor
from .calls import Calls
from .faults import TritonError, TritonModelException, heard
from .tensor import Tensor

MEMORY_CPU, MEMORY_GPU = 0, 1
RELEASE_ALL, RELEASE_RESCHEDULE = 1, 2


class PreferredMemory:
    """Where the outputs of another model's answer should lie."""

    def __init__(self, preferred_memory_type: int, preferred_device_id: int = 0) -> None:
        if preferred_memory_type not in (MEMORY_CPU, MEMORY_GPU):
            raise TritonModelException(f"{preferred_memory_type!r} is no type of memory")
        self.memory_type = preferred_memory_type
        self.device_id = preferred_device_id


class InferenceResponse:
    """Tensors, or an error. Names of tensors are those of the configuration."""

    def __init__(
        self,
        output_tensors: Sequence[Tensor] = (),
        error: TritonError | None = None,
        parameters: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(output_tensors, (list, tuple)):
            raise TritonModelException("'output_tensors' must be a list of pb_utils.Tensor")
        for one in output_tensors:
            if not isinstance(one, Tensor):
                kind = type(one).__name__
                raise TritonModelException(f"an output must be a pb_utils.Tensor and not {kind}")
        if error is not None and not isinstance(error, TritonError):
            kind = type(error).__name__
            raise TritonModelException(f"'error' must be a pb_utils.TritonError and not {kind}")
        if parameters:
            raise TritonModelException("parameters of a response are not supported")
        self._outputs = list(output_tensors)
        self._error = error

    def output_tensors(self) -> list[Tensor]:
        return self._outputs

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error

    def parameters(self) -> str:
        return "{}"


class InferenceRequest:
    """A request that came in, or one that is to go to another model.

    `calls` is the way out; the subclass of one replica has it.
    """

    calls: ClassVar[Calls | None] = None

    def __init__(
        self,
        request_id: str = "",
        correlation_id: int | str = 0,
        inputs: Sequence[Tensor] = (),
        requested_output_names: Sequence[str] = (),
        model_name: str = "",
        model_version: int = -1,
        flags: int = 0,
        timeout: int = 0,
        preferred_memory: PreferredMemory | None = None,
        trace: object = None,
        parameters: Mapping[str, Any] | None = None,
    ) -> None:
        for one in inputs:
            if not isinstance(one, Tensor):
                kind = type(one).__name__
                raise TritonModelException(f"an input must be a pb_utils.Tensor and not {kind}")
        for key, value in (parameters or {}).items():
            if not isinstance(key, str) or not isinstance(value, (bool, int, float, str)):
                raise TritonModelException(
                    f"parameter {key!r} of a request must be a bool, a number or a string"
                )
        del trace  # traces are not supported: there is none to hand on
        self._id = request_id
        self._correlation_id = correlation_id
        self._inputs = list(inputs)
        self._outputs = list(requested_output_names)
        self._model_name = model_name
        self._model_version = model_version
        self._flags = flags
        self._timeout_us = timeout
        self._memory = preferred_memory
        self._parameters: str | Mapping[str, Any] = parameters or {}

    @classmethod
    def received(
        cls,
        request_id: str,
        inputs: list[Tensor],
        outputs: Sequence[str],
        parameters: str,
        model_name: str,
        model_version: int,
    ) -> InferenceRequest:
        made = cls(request_id, 0, inputs, outputs, model_name, model_version)
        made._parameters = parameters
        return made

    # --- what it says ----------------------------------------------------------------------------

    def inputs(self) -> list[Tensor]:
        return self._inputs

    def request_id(self) -> str:
        return self._id

    def correlation_id(self) -> int | str:
        """0: sequences are not supported."""
        return self._correlation_id

    def requested_output_names(self) -> list[str]:
        """All outputs of the model where the client asked for none by name."""
        return self._outputs

    def model_name(self) -> str:
        return self._model_name

    def model_version(self) -> int:
        return self._model_version

    def parameters(self) -> str:
        """A JSON object."""
        known = self._parameters
        return known if isinstance(known, str) else json.dumps(dict(known))

    def flags(self) -> int:
        return self._flags

    def set_flags(self, flags: int) -> None:
        self._flags = flags

    def timeout(self) -> int:
        """Microseconds; 0 is no limit of its own."""
        return self._timeout_us

    def preferred_memory(self) -> PreferredMemory | None:
        return self._memory

    def trace(self) -> None:
        """Traces are not supported."""

    def is_cancelled(self) -> bool:
        """False: a request that a client gives up before it runs never comes here, and one that
        runs is not told."""
        return False

    def get_response_sender(self) -> Any:
        raise TritonModelException(
            "get_response_sender is for decoupled models, which are not supported: return the "
            "response from execute"
        )

    def set_release_flags(self, flags: int) -> None:
        if flags != RELEASE_ALL:
            raise TritonModelException("rescheduling of requests is not supported")

    # --- to another model ------------------------------------------------------------------------

    def exec(self, decoupled: bool = False) -> InferenceResponse:
        """Blocks until the other model has answered; its failure is the response's error."""
        return self._response(self._send(decoupled).result())

    def async_exec(self, decoupled: bool = False) -> Awaitable[InferenceResponse]:
        """As `exec`, for an execute that is `async def`. It is sent at once."""
        return self._awaited(self._send(decoupled))

    async def _awaited(self, sent: Future[InferResponse | MantaError]) -> InferenceResponse:
        return self._response(await asyncio.wrap_future(sent))

    def _send(self, decoupled: bool) -> Future[InferResponse | MantaError]:
        if decoupled:
            raise TritonModelException("exec(decoupled=True): decoupled models are not supported")
        if self._flags or self._correlation_id:
            raise TritonModelException(
                "flags and correlation_id are for models with sequences, which are not supported"
            )
        if self.calls is None:
            raise TritonModelException("other models cannot be called from here")
        if not self._model_name:
            raise TritonModelException("a request to another model needs a model_name")
        given = self._parameters
        request = InferRequest(
            model_name=self._model_name,
            model_version="" if self._model_version < 0 else str(self._model_version),
            id=self._id,
            inputs=tuple(tensor.to_wire(one) for one in self._inputs),
            outputs=tuple(RequestedOutput(name, True) for name in self._outputs),
            parameters=json.loads(given) if isinstance(given, str) else dict(given),
        )
        return self.calls.infer(request, self._timeout_us / 1e6 or None)

    def _response(self, answer: InferResponse | MantaError) -> InferenceResponse:
        if isinstance(answer, MantaError):
            return InferenceResponse(error=heard(answer))
        outputs = [
            tensor.from_wire(one.name, one.datatype, one.shape, one.data) for one in answer.outputs
        ]
        memory = self._memory
        if memory is not None and memory.memory_type == MEMORY_GPU:
            outputs = [one.to_device(f"cuda:{memory.device_id}") for one in outputs]
        return InferenceResponse(outputs)
