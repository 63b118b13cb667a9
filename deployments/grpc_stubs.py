"""The official protobuf stubs, importable and picklable in the proxy and in every replica.

Owns nothing of the protocol. Triton's messages claim to live in top-level modules that no package
has, so pickling them fails until those names are registered here.
"""

from __future__ import annotations

import sys
from typing import Any

import grpc
from grpc_health.v1 import health_pb2
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc
from tritonclient.grpc.service_pb2_grpc import add_GRPCInferenceServiceServicer_to_server

sys.modules.setdefault("grpc_service_pb2", service_pb2)
sys.modules.setdefault("model_config_pb2", model_config_pb2)

INFERENCE = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"]


def add_health_to_server(servicer: Any, server: Any) -> None:
    """`Check` alone, as Triton has it; the official function would also want Watch."""
    check = grpc.unary_unary_rpc_method_handler(
        servicer.Check,
        request_deserializer=health_pb2.HealthCheckRequest.FromString,
        response_serializer=health_pb2.HealthCheckResponse.SerializeToString,
    )
    handler = grpc.method_handlers_generic_handler(HEALTH.full_name, {"Check": check})
    server.add_generic_rpc_handlers((handler,))


__all__ = [
    "HEALTH",
    "INFERENCE",
    "add_GRPCInferenceServiceServicer_to_server",
    "add_health_to_server",
    "health_pb2",
    "model_config_pb2",
    "service_pb2",
    "service_pb2_grpc",
]
