"""gRPC: protobuf messages to the verbs of `inference` and back, status from our error code.

Owns Triton's texts on that form. `handle` serves any carrier of single calls: `grpc_services`, and
by its parts the lane and streams.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import grpc
from google.protobuf import json_format

from configs import pbtxt
from configs.server import ServerSettings

from . import grpc_memory, grpc_wire, log_settings, tensors, trace_settings
from .errors import GRPC_STATUS, Internal, InvalidArgument, MantaError, ShuttingDown, Unsupported
from .grpc_stubs import service_pb2 as pb
from .inference import Inference
from .regions import memory_range
from .tracing import GRPC, Arrival, Tracer, carrier_of
from .types import (
    InferRequest,
    InferResponse,
    LentInput,
    MemoryRange,
    ParameterValue,
    RequestedOutput,
    Tensor,
)

Handler = Callable[[Any, Inference], Awaitable[Any]]

logger = logging.getLogger("manta.grpc")

INFER = "ModelInfer"
MAX_ERROR_BYTES = 2048  # percent-encoded, it must fit 8 KiB of trailers
_CLOSING = "GRPC server is shutting down and has stopped accepting new requests."
_EMPTY_FINAL = "triton_enable_empty_final_response"  # the one key of Triton's that a client may set
# Which field of InferTensorContents holds a datatype; FP16 and BF16 have none.
_CONTENTS: Mapping[str, str] = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    "INT64": "int64_contents",
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
# As what Triton calls a field in its texts.
_KINDS: Mapping[str, str] = {
    **{field: datatype for datatype, field in _CONTENTS.items()},
    "int_contents": "INT32",
    "uint_contents": "UINT32",
}


# --- requests ------------------------------------------------------------------------------------


def decode(message: Any, settings: ServerSettings) -> InferRequest:
    """A request whose tensors view the message's own bytes where they came raw."""
    limit = settings.max_tensors_per_request
    if max(len(message.inputs), len(message.outputs)) > limit:
        raise InvalidArgument(f"at most {limit} inputs and {limit} outputs are allowed")
    parameters = _parameters(message.parameters)
    # An answer of one response is final as it is; only others would have an empty one after it.
    if type(parameters.pop(_EMPTY_FINAL, False)) is not bool:
        raise InvalidArgument(
            f"invalid value type for '{_EMPTY_FINAL}' parameter, expected bool_param."
        )
    inputs, lent = _inputs(message, settings)
    return InferRequest(
        model_name=message.model_name,
        model_version=message.model_version,
        id=message.id,
        inputs=inputs,
        outputs=tuple([_output(entry, settings.allow_client_shm) for entry in message.outputs]),
        parameters=parameters,
        lent=lent,
    )


def _inputs(
    message: Any, settings: ServerSettings
) -> tuple[tuple[Tensor, ...], tuple[LentInput, ...]]:
    """Those that came, and those that lie in the client's memory."""
    lent, entries = [], []
    for position, entry in enumerate(message.inputs):
        memory = _memory(entry, settings.allow_client_shm) if entry.parameters else None
        if memory is None:
            entries.append(entry)
            continue
        if entry.HasField("contents"):
            raise InvalidArgument(
                f"contents field must not be specified when using shared memory for '{entry.name}' "
                f"for model '{message.model_name}'"
            )
        lent.append(LentInput(position, entry.name, entry.datatype, tuple(entry.shape), memory))
    return _brought(message, entries, settings.max_tensor_rank), tuple(lent)


def _brought(message: Any, entries: list[Any], rank: int) -> tuple[Tensor, ...]:
    raw = message.raw_input_contents
    if not raw:
        return tuple(_typed(entry, message.model_name, rank) for entry in entries)
    for entry in entries:
        if entry.HasField("contents"):
            raise InvalidArgument(
                "contents field must not be specified when using raw_input_contents for "
                f"'{entry.name}' for model '{message.model_name}'"
            )
    if len(raw) != len(entries):
        raise InvalidArgument(
            f"expected {len(entries)} entries in raw_input_contents, got {len(raw)} for "
            f"model '{message.model_name}'"
        )
    return tuple(
        tensors.from_binary(
            entry.name, entry.datatype, tuple(entry.shape), view, message.model_name, rank
        )
        for entry, view in zip(entries, raw, strict=True)
    )


def _typed(entry: Any, model: str, rank: int) -> Tensor:
    """A tensor from InferTensorContents, whose fields are wider than most datatypes."""
    name, datatype, shape = entry.name, entry.datatype, tuple(entry.shape)
    kind = tensors.datatype_of(name, datatype)
    tensors.byte_count(name, datatype, shape, rank)
    count = tensors.element_count(name, shape, rank)
    field = _CONTENTS.get(datatype)
    values = list(getattr(entry.contents, field)) if field else []
    if count and not values:
        raise InvalidArgument(
            f"unable to find data for input tensor '{name}' for model '{model}' in request."
        )
    for other, _ in entry.contents.ListFields():
        if other.name != field:
            raise InvalidArgument(
                f"unexpected explicit tensor data for input tensor '{name}' for model '{model}' "
                f"of type '{_KINDS[other.name]}', expected datatype '{datatype}'"
            )
    if len(values) != count and datatype != "BYTES":
        raise InvalidArgument(
            f"input byte size mismatch for input '{name}' for model '{model}'. Expected "
            f"{count * kind.size_bytes}, got {len(values) * kind.size_bytes}"
        )
    if datatype == "BYTES":
        return Tensor(name, datatype, shape, tensors.encode_bytes(values))
    return Tensor(name, datatype, shape, tensors.from_numbers(name, datatype, values, shape))


def _output(entry: Any, allow_memory: bool) -> RequestedOutput:
    if not entry.parameters:
        return RequestedOutput(entry.name, True)
    memory = _memory(entry, allow_memory)
    classification = _parameters(entry.parameters).get("classification")
    if classification is None:
        return RequestedOutput(entry.name, True, 0, memory)
    if type(classification) is not int:
        raise InvalidArgument(
            "invalid value type for 'classification' parameter, expected int64_param"
        )
    if classification <= 0:
        raise InvalidArgument("invalid value for 'classification' parameter, expected >= 0")
    return RequestedOutput(entry.name, True, classification, memory)


def _memory(entry: Any, allowed: bool) -> MemoryRange | None:
    parameters = _parameters(entry.parameters)
    return memory_range(entry.name, parameters, allowed, grpc_memory.wrong_type)


def _parameters(entries: Mapping[str, Any]) -> dict[str, ParameterValue]:
    values: dict[str, ParameterValue] = {}
    for key, parameter in entries.items():
        choice = parameter.WhichOneof("parameter_choice")
        if choice is None:
            raise InvalidArgument(f"parameter '{key}' has no value")
        values[key] = getattr(parameter, choice)
    return values


def add_parameters(message: Any, forwarded: Mapping[str, str]) -> None:
    """What the call's metadata say counts, as over HTTP."""
    for name, value in forwarded.items():
        message.parameters[name].string_param = value


# --- responses -----------------------------------------------------------------------------------


def encode(response: InferResponse, into: Any = None) -> Any:
    """Always raw, as Triton answers; `into` is an empty message, if there is one already."""
    grpc_wire.check_size(response, [tensor.data.nbytes for tensor in response.outputs])
    message = pb.ModelInferResponse() if into is None else into
    message.model_name, message.model_version = response.model_name, response.model_version
    message.id = response.id
    for tensor in response.outputs:
        message.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        message.raw_output_contents.append(bytes(tensors.to_binary(tensor)))
    return message


# --- verbs ---------------------------------------------------------------------------------------


async def _server_live(_: Any, inference: Inference) -> Any:
    return pb.ServerLiveResponse(live=inference.live())


async def _server_ready(_: Any, inference: Inference) -> Any:
    return pb.ServerReadyResponse(ready=inference.ready())


async def _model_ready(request: Any, inference: Inference) -> Any:
    return pb.ModelReadyResponse(ready=inference.model_ready(request.name, request.version))


async def _server_metadata(_: Any, inference: Inference) -> Any:
    return pb.ServerMetadataResponse(**inference.server_metadata())


async def _model_metadata(request: Any, inference: Inference) -> Any:
    return pb.ModelMetadataResponse(**inference.model_metadata(request.name, request.version))


async def _model_config(request: Any, inference: Inference) -> Any:
    config = inference.model_config(request.name, request.version)
    return pb.ModelConfigResponse(config=pbtxt.to_proto(config))


async def _model_infer(request: Any, inference: Inference, context: Any = None) -> Any:
    # A 404 comes before the tensors.
    served = inference.find(request.model_name, request.model_version)
    tracer = served.gate.tracer
    arrival = None
    if tracer is not None:
        arrival = arrived(tracer, () if context is None else context.invocation_metadata())
    asked = decode(request, inference.settings)
    return encode(await inference.infer(asked, arrival=arrival))


def arrived(tracer: Tracer, metadata: Any) -> Arrival:
    """A request of a call with these metadata, if it has any."""
    return tracer.arrive(GRPC, carrier_of(metadata or ()))


async def _model_statistics(request: Any, inference: Inference) -> Any:
    statistics = await inference.administration.statistics(request.name, request.version)
    return json_format.ParseDict(statistics, pb.ModelStatisticsResponse())


async def _repository_index(request: Any, inference: Inference) -> Any:
    _check_repository(request)
    return pb.RepositoryIndexResponse(models=await inference.administration.index(request.ready))


async def _repository_model_load(request: Any, inference: Inference) -> Any:
    _check_repository(request)
    await inference.administration.load(request.model_name, _repository_parameters(request))
    return pb.RepositoryModelLoadResponse()


async def _repository_model_unload(request: Any, inference: Inference) -> Any:
    _check_repository(request)
    await inference.administration.unload(request.model_name, _repository_parameters(request))
    return pb.RepositoryModelUnloadResponse()


async def _log_settings(request: Any, inference: Inference) -> Any:
    shown = await inference.administration.log_settings(log_settings.from_proto(request.settings))
    reply = pb.LogSettingsResponse()
    for name, field in log_settings.FIELDS.items():
        setattr(reply.settings[name], field, shown[name])
    return reply


async def _trace_setting(request: Any, inference: Inference) -> Any:
    changes = trace_settings.from_proto(request.settings)
    reply = pb.TraceSettingResponse()
    settings = await inference.administration.trace_settings(request.model_name, changes)
    for name, shown in settings.items():
        reply.settings[name].value.extend([shown] if isinstance(shown, str) else shown)
    return reply


def _check_repository(request: Any) -> None:
    if request.repository_name:
        raise Unsupported("'repository_name' specification is not supported")


def _repository_parameters(request: Any) -> dict[str, Any]:
    return {
        key: getattr(parameter, parameter.WhichOneof("parameter_choice") or "string_param")
        for key, parameter in request.parameters.items()
    }


VERBS: Mapping[str, Handler] = {
    "ServerLive": _server_live,
    "ServerReady": _server_ready,
    "ModelReady": _model_ready,
    "ServerMetadata": _server_metadata,
    "ModelMetadata": _model_metadata,
    "ModelConfig": _model_config,
    INFER: _model_infer,
    "ModelStatistics": _model_statistics,
    "RepositoryIndex": _repository_index,
    "RepositoryModelLoad": _repository_model_load,
    "RepositoryModelUnload": _repository_model_unload,
    "LogSettings": _log_settings,
    "TraceSetting": _trace_setting,
    **grpc_memory.VERBS,
}
# The one that is no single call; see `grpc_stream`.
STREAM = "ModelStreamInfer"


async def handle(verb: str, request: Any, inference: Inference, context: Any = None) -> Any:
    """The answer to any RPC of the service but STREAM. Raises nothing but MantaError. `context` is
    the call's, and has its metadata."""
    try:
        if verb == INFER:
            return await _model_infer(request, inference, context)
        return await VERBS[verb](request, inference)
    except MantaError:
        raise
    except Exception:
        logger.exception("%s failed unexpectedly", verb)
        raise Internal("internal error") from None


def status(error: MantaError) -> tuple[grpc.StatusCode, str]:
    """Code and details of an error."""
    text = _CLOSING if isinstance(error, ShuttingDown) else str(error)
    logger.debug("answered with %s: %s", error.code.value, text)
    short = text.encode(errors="replace")[:MAX_ERROR_BYTES].decode(errors="ignore")
    return grpc.StatusCode[GRPC_STATUS[error.code]], short
