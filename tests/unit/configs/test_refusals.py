"""Every field of the official proto is either mirrored or refused by name."""

from __future__ import annotations

import pytest
from google.protobuf import text_format
from pydantic import BaseModel
from tritonclient.grpc import model_config_pb2 as pb

from configs import model
from configs.errors import ConfigError
from configs.refusals import REFUSALS, unsupported

MIRRORS: dict[str, type[BaseModel]] = {
    "": model.ModelConfig,
    "input": model.ModelInput,
    "output": model.ModelOutput,
    "batch_input": model.BatchInput,
    "batch_output": model.BatchOutput,
    "input.reshape": model.Reshape,
    "output.reshape": model.Reshape,
    "instance_group": model.InstanceGroup,
    "dynamic_batching": model.DynamicBatching,
    "model_warmup": model.ModelWarmup,
    "model_warmup.inputs.value": model.WarmupInput,
    "optimization": model.Optimization,
    "optimization.input_pinned_memory": model.PinnedMemoryBuffer,
    "optimization.output_pinned_memory": model.PinnedMemoryBuffer,
}
SPECIAL = {"version_policy", "parameters", "model_transaction_policy", "response_cache"}


def refuse_unsupported(proto):
    for error in unsupported(proto):
        raise error


SETTINGS = {
    "ensemble_scheduling": "ensemble_scheduling { }",
    "sequence_batching": "sequence_batching { }",
    "dynamic_batching.default_priority_level": "dynamic_batching { default_priority_level: 1 }",
    "dynamic_batching.default_queue_policy": (
        "dynamic_batching { default_queue_policy { max_queue_size: 4 } }"
    ),
    "dynamic_batching.priority_levels": "dynamic_batching { priority_levels: 2 }",
    "dynamic_batching.priority_queue_policy": (
        "dynamic_batching { priority_queue_policy { key: 1 value { } } }"
    ),
    "input.is_non_linear_format_io": "input { is_non_linear_format_io: true }",
    "input.is_shape_tensor": "input { is_shape_tensor: true }",
    "instance_group.profile": "instance_group { profile: '0' }",
    "instance_group.rate_limiter": "instance_group { rate_limiter { priority: 1 } }",
    "instance_group.secondary_devices": "instance_group { secondary_devices { device_id: 1 } }",
    "model_metrics": "model_metrics { metric_control { } }",
    "model_operations": "model_operations { op_library_filename: 'x.so' }",
    "model_repository_agents": "model_repository_agents { agents { name: 'sum' } }",
    "model_transaction_policy.decoupled": "model_transaction_policy { decoupled: true }",
    "optimization.cuda": "optimization { cuda { graphs: true } }",
    "optimization.eager_batching": "optimization { eager_batching: true }",
    "optimization.execution_accelerators": (
        "optimization { execution_accelerators { gpu_execution_accelerator { name: 'x' } } }"
    ),
    "optimization.gather_kernel_buffer_threshold": (
        "optimization { gather_kernel_buffer_threshold: 1 }"
    ),
    "optimization.graph": "optimization { graph { level: 1 } }",
    "optimization.priority": "optimization { priority: PRIORITY_MAX }",
    "output.is_non_linear_format_io": "output { is_non_linear_format_io: true }",
    "output.is_shape_tensor": "output { is_shape_tensor: true }",
    "response_cache.enable": "response_cache { enable: true }",
}


def _proto(text):
    return text_format.Parse(text, pb.ModelConfig())


def _fields(descriptor, prefix=""):
    for field in descriptor.fields:
        path = prefix + field.name
        yield path
        if path == "model_warmup.inputs":  # a map: its values are what is mirrored
            path, field = f"{path}.value", field.message_type.fields_by_name["value"]
        if path in MIRRORS or path in ("model_transaction_policy", "response_cache"):
            yield from _fields(field.message_type, path + ".")


def test_no_field_of_the_proto_is_passed_over():
    refused = {refusal.path for refusal in REFUSALS}
    for path in _fields(pb.ModelConfig.DESCRIPTOR):
        parent, _, name = path.rpartition(".")
        mirrored = parent in MIRRORS and name in MIRRORS[parent].model_fields
        assert mirrored or path in refused or path in SPECIAL, path


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda r: r.path)
def test_each_is_refused_by_name(refusal):
    with pytest.raises(ConfigError) as caught:
        refuse_unsupported(_proto(SETTINGS[refusal.path]))
    field = str(caught.value.args[2])
    assert field.replace("[0]", "") == refusal.path
    assert refusal.reason in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "model_transaction_policy { decoupled: false }",
        "response_cache { enable: false }",
        "optimization { graph { level: 0 } input_pinned_memory { enable: true } }",
        "optimization { priority: PRIORITY_DEFAULT cuda { graphs: false } }",
        "dynamic_batching { default_queue_policy { } preserve_ordering: true }",
        "input { optional: false } input { optional: true }",
    ],
)
def test_what_says_nothing_is_accepted(text):
    refuse_unsupported(_proto(text))
