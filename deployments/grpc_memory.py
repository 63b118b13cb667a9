"""Shared memory over gRPC: the six RPCs for regions, and errors in the parameters of tensors.

Owns Triton's texts on that form; the rules for regions are those of `regions`. Called by `grpc`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from .errors import InvalidArgument
from .grpc_stubs import service_pb2 as pb
from .inference import Inference


def wrong_type(tensor: str, key: str, wanted: type) -> InvalidArgument:
    field = "int64_param" if wanted is int else "string_param"
    return InvalidArgument(
        f"invalid value type for '{key}' parameter for tensor '{tensor}', expected {field}."
    )


async def _system_status(request: Any, inference: Inference) -> Any:
    status = pb.SystemSharedMemoryStatusResponse
    regions = inference.memory.status("system", request.name)
    return status(regions={each["name"]: status.RegionStatus(**each) for each in regions})


async def _system_register(request: Any, inference: Inference) -> Any:
    inference.memory.register(request.name, request.key, request.offset, request.byte_size)
    return pb.SystemSharedMemoryRegisterResponse()


async def _system_unregister(request: Any, inference: Inference) -> Any:
    inference.memory.unregister("system", request.name)
    return pb.SystemSharedMemoryUnregisterResponse()


async def _cuda_status(request: Any, inference: Inference) -> Any:
    inference.memory.status("cuda", request.name)  # raises for any one
    return pb.CudaSharedMemoryStatusResponse()


async def _cuda_register(request: Any, inference: Inference) -> Any:
    inference.memory.register_cuda(request.name)


async def _cuda_unregister(request: Any, inference: Inference) -> Any:
    inference.memory.unregister("cuda", request.name)
    return pb.CudaSharedMemoryUnregisterResponse()


VERBS: Mapping[str, Callable[[Any, Inference], Awaitable[Any]]] = {
    "SystemSharedMemoryStatus": _system_status,
    "SystemSharedMemoryRegister": _system_register,
    "SystemSharedMemoryUnregister": _system_unregister,
    "CudaSharedMemoryStatus": _cuda_status,
    "CudaSharedMemoryRegister": _cuda_register,
    "CudaSharedMemoryUnregister": _cuda_unregister,
}
