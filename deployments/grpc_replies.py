"""An answer of the gate as the bytes of a ModelInferResponse, for the gRPC lane.

Owns which parts are remembered with a plan. What an answer must look like is `contract`'s, how it
is framed `grpc_wire`'s.
"""

from __future__ import annotations

import numpy as np

from . import grpc_wire, tensors
from .batcher import MemberResult
from .directory import Served
from .errors import MantaError
from .inference import told
from .plans import Plan
from .types import InferResponse


def planned(served: Served, plan: Plan, call: bytes, result: MemberResult) -> bytes:
    """To a request whose description was seen before. Raises MantaError, as `anew` does."""
    outputs = [result.outputs[name] for name in plan.outputs]
    opened = plan.head(outputs, lambda: _opening(_response(served, plan.outputs, call, result)))
    raw = [np.ascontiguousarray(output.data) for output in outputs]
    return grpc_wire.answer(opened, call, raw)


def anew(served: Served, names: tuple[str, ...], call: bytes, result: MemberResult) -> bytes:
    return whole(_response(served, names, call, result))


def whole(response: InferResponse) -> bytes:
    """Of a response that `inference` has made."""
    raw = [tensors.to_binary(tensor) for tensor in response.outputs]
    return grpc_wire.answer(_opening(response), response.id.encode(), raw)


def _opening(response: InferResponse) -> grpc_wire.Opening:
    return grpc_wire.opening(response, [tensor.data.nbytes for tensor in response.outputs])


def _response(
    served: Served, names: tuple[str, ...], call: bytes, result: MemberResult
) -> InferResponse:
    identifier = call.decode()
    try:
        outputs = served.contract.answer(names, result.outputs)
    except MantaError as error:
        raise told(identifier, error) from error
    snapshot = served.snapshot
    return InferResponse(snapshot.model_name, str(snapshot.version), identifier, outputs)
