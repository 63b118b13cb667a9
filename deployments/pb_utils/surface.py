"""The module `triton_python_backend_utils` of one replica: what models import, put together.

Owns its public names, and that they can be imported in this process. Called by
`runtimes/python_model` before it imports the model's file.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any, ClassVar

from deployments.errors import MantaError
from deployments.logs import MODELS

from . import datatypes, messages
from .calls import Calls
from .faults import TritonError, TritonModelException
from .messages import InferenceRequest, InferenceResponse, PreferredMemory
from .model_config import ModelConfig
from .tensor import Tensor

NAME = "triton_python_backend_utils"

logger = logging.getLogger(MODELS)


# --- lookups -------------------------------------------------------------------------------------


def get_input_tensor_by_name(inference_request: InferenceRequest, name: str) -> Tensor | None:
    return _by_name(inference_request.inputs(), name)


def get_output_tensor_by_name(inference_response: InferenceResponse, name: str) -> Tensor | None:
    return _by_name(inference_response.output_tensors(), name)


def _by_name(listed: list[Tensor], name: str) -> Tensor | None:
    return next((one for one in listed if one.name() == name), None)


def get_input_config_by_name(model_config: Mapping[str, Any], name: str) -> Any:
    return _config_by_name(model_config.get("input", ()), name)


def get_output_config_by_name(model_config: Mapping[str, Any], name: str) -> Any:
    return _config_by_name(model_config.get("output", ()), name)


def _config_by_name(listed: Any, name: str) -> Any:
    return next((one for one in listed if one["name"] == name), None)


def using_decoupled_model_transaction_policy(model_config: Mapping[str, Any]) -> bool:
    return bool(model_config.get("model_transaction_policy", {}).get("decoupled", False))


# --- log and metrics -----------------------------------------------------------------------------


class Logger:
    """Lines go to the server's log, with the place in the model that wrote them."""

    INFO: ClassVar[int] = logging.INFO
    WARNING: ClassVar[int] = logging.WARNING
    ERROR: ClassVar[int] = logging.ERROR
    VERBOSE: ClassVar[int] = logging.DEBUG

    @staticmethod
    def log(message: str, level: int = logging.INFO) -> None:
        logger.log(level, "%s", message, stacklevel=2)

    @staticmethod
    def log_info(message: str) -> None:
        logger.info("%s", message, stacklevel=2)

    @staticmethod
    def log_warn(message: str) -> None:
        logger.warning("%s", message, stacklevel=2)

    @staticmethod
    def log_error(message: str) -> None:
        logger.error("%s", message, stacklevel=2)

    @staticmethod
    def log_verbose(message: str) -> None:
        logger.debug("%s", message, stacklevel=2)


class MetricFamily:
    """Refused by name."""

    COUNTER: ClassVar[int] = 0
    GAUGE: ClassVar[int] = 1
    HISTOGRAM: ClassVar[int] = 2

    def __init__(self, *_: object, **__: object) -> None:
        raise TritonModelException("metrics of a model's own (MetricFamily) are not supported")


# --- put together --------------------------------------------------------------------------------


def install(calls: Calls | None, model_dir: str) -> ModuleType:
    """Makes the module importable in this process; `model_dir` is the version's folder."""
    made = build(calls, model_dir)
    sys.modules[NAME] = made
    return made


def build(calls: Calls | None, model_dir: str) -> ModuleType:
    made = ModuleType(NAME, "Triton's Python backend, as this server has it.")
    request = type("InferenceRequest", (InferenceRequest,), {"calls": calls})
    for one in (
        *(InferenceResponse, ModelConfig, PreferredMemory, Tensor, TritonError),
        *(TritonModelException, Logger, MetricFamily, request),
        *(get_input_tensor_by_name, get_output_tensor_by_name, get_input_config_by_name),
        *(get_output_config_by_name, using_decoupled_model_transaction_policy),
        *(datatypes.triton_string_to_numpy, datatypes.triton_to_numpy_type),
        *(datatypes.numpy_to_triton_type, datatypes.serialize_byte_tensor),
        datatypes.deserialize_bytes_tensor,
    ):
        setattr(made, one.__name__, one)
    made.__dict__.update(
        TRITON_STRING_TO_NUMPY=datatypes.TRITON_STRING_TO_NUMPY,
        TRITONSERVER_MEMORY_CPU=messages.MEMORY_CPU,
        TRITONSERVER_MEMORY_GPU=messages.MEMORY_GPU,
        TRITONSERVER_REQUEST_FLAG_SEQUENCE_START=1,
        TRITONSERVER_REQUEST_FLAG_SEQUENCE_END=2,
        TRITONSERVER_RESPONSE_COMPLETE_FINAL=1,
        TRITONSERVER_REQUEST_RELEASE_ALL=messages.RELEASE_ALL,
        TRITONSERVER_REQUEST_RELEASE_RESCHEDULE=messages.RELEASE_RESCHEDULE,
        get_model_dir=lambda: model_dir,
        **_model_verbs(calls),
    )
    return made


def _model_verbs(calls: Calls | None) -> dict[str, Any]:
    def ask(verb: str, *args: Any) -> Any:
        if calls is None:
            raise TritonModelException("other models cannot be reached from here")
        answer = calls.control(verb, *args).result()
        if isinstance(answer, MantaError):
            raise TritonModelException(str(answer))
        return answer

    def is_model_ready(model_name: str, model_version: str = "") -> bool:
        return bool(ask("ready", model_name, str(model_version)))

    def load_model(
        model_name: str, files: Mapping[str, bytes] | None = None, config: str = ""
    ) -> None:
        """In explicit mode. `files` and `config` are the server's to refuse."""
        parameters: dict[str, Any] = {**(files or {})}
        if config:
            parameters["config"] = config
        ask("load", model_name, parameters)

    def unload_model(model_name: str, unload_dependents: bool = False) -> None:
        ask("unload", model_name, {"unload_dependents": unload_dependents})

    return {
        "is_model_ready": is_model_ready,
        "load_model": load_model,
        "unload_model": unload_model,
    }
