"""The official protobuf stubs, importable and picklable in the proxy and in every replica.

Owns nothing of the protocol. The messages claim to live in top-level modules that no package has,
so pickling them fails until those names are registered here.
"""

from __future__ import annotations

import sys

from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc
from tritonclient.grpc.service_pb2_grpc import add_GRPCInferenceServiceServicer_to_server

sys.modules.setdefault("grpc_service_pb2", service_pb2)
sys.modules.setdefault("model_config_pb2", model_config_pb2)

__all__ = [
    "add_GRPCInferenceServiceServicer_to_server",
    "model_config_pb2",
    "service_pb2",
    "service_pb2_grpc",
]
