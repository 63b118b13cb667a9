"""The fields of config.pbtxt that the server knows and refuses, by name, as one table.

A field of the official proto is either mirrored in `model.py` or listed here; a test enumerates
the proto to keep it so. Read by `pbtxt.parse`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from google.protobuf.message import Message

from .errors import ConfigError


@dataclass(frozen=True, slots=True)
class Refusal:
    """`path` is refused when it says something; with `when_empty` its mere presence is refused."""

    path: str
    reason: str = "this field is not supported"
    when_empty: bool = False


_QUEUE_POLICY = "priorities and queue policies are not supported"
_TENSORRT = "only TensorRT models have this"
_IGNORED = "this optimization has no effect on PyTorch models and is refused"

REFUSALS: tuple[Refusal, ...] = (
    Refusal("ensemble_scheduling", "ensembles are not supported", when_empty=True),
    Refusal("sequence_batching", "sequence batching is not supported", when_empty=True),
    Refusal("dynamic_batching.default_priority_level", _QUEUE_POLICY),
    Refusal("dynamic_batching.default_queue_policy", _QUEUE_POLICY),
    Refusal("dynamic_batching.priority_levels", _QUEUE_POLICY),
    Refusal("dynamic_batching.priority_queue_policy", _QUEUE_POLICY),
    Refusal("input.is_non_linear_format_io", _TENSORRT),
    Refusal("input.is_shape_tensor", _TENSORRT),
    Refusal("instance_group.profile", "profiles are only supported for TensorRT models"),
    Refusal(
        "instance_group.rate_limiter",
        "the rate limiter is not supported; what limits a model is the count of its instances",
    ),
    Refusal(
        "instance_group.secondary_devices",
        "secondary devices (DLA cores) are not supported; PyTorch does not run on them",
    ),
    Refusal("model_metrics", "it sets histograms of decoupled models, and those are not supported"),
    Refusal("model_operations", "libraries of custom operations are not supported"),
    Refusal("model_repository_agents", "repository agents are not supported"),
    Refusal("model_transaction_policy.decoupled", "decoupled models are not supported"),
    Refusal("optimization.cuda", _IGNORED),
    Refusal("optimization.eager_batching", _IGNORED),
    Refusal("optimization.execution_accelerators", _IGNORED),
    Refusal("optimization.gather_kernel_buffer_threshold", _IGNORED),
    Refusal("optimization.graph", _IGNORED),
    Refusal("optimization.priority", _IGNORED),
    Refusal("output.is_non_linear_format_io", _TENSORRT),
    Refusal("output.is_shape_tensor", _TENSORRT),
    Refusal("response_cache.enable", "the response cache is not supported"),
)


def unsupported(proto: Message) -> Iterator[ConfigError]:
    """An error for each field of an official ModelConfig that says something and is refused."""
    for refusal in REFUSALS:
        for path in _occurrences(proto, refusal.path.split("."), "", refusal.when_empty):
            yield ConfigError(refusal.reason, field=path)


def shared_state(proto: Message) -> Iterator[ConfigError]:
    """Sharing runs several instances over one module: never for a model that keeps state between
    requests, whether or not sequences as such are supported."""
    key = "ENABLE_WEIGHT_SHARING"
    given = proto.parameters[key].string_value if key in proto.parameters else ""  # type: ignore[attr-defined]
    if given.lower() in ("true", "on", "1") and proto.HasField("sequence_batching"):
        yield ConfigError(
            f"{key}: a model that keeps state between requests cannot share its weights",
            field=f'parameters["{key}"]',
        )


def _occurrences(
    message: Message, steps: list[str], prefix: str, when_empty: bool
) -> Iterator[str]:
    """The paths, with indices, under which a field says something."""
    field = message.DESCRIPTOR.fields_by_name[steps[0]]
    path, value = prefix + field.name, getattr(message, field.name)
    if len(steps) > 1:
        children = value if field.is_repeated else [value]
        for index, child in enumerate(children):
            at = f"{path}[{index}]." if field.is_repeated else f"{path}."
            yield from _occurrences(child, steps[1:], at, when_empty)
    elif field.is_repeated:
        if len(value):
            yield path
    elif field.message_type is not None:
        if message.HasField(field.name) and (when_empty or value.ByteSize()):
            yield path
    elif value != field.default_value:
        yield path
