"""config.pbtxt -> the official proto -> ModelConfig, and back to proto and JSON.

Grammar, field names and enum values are protobuf's own. Every error names file, line and field
as far as the text shows them. Called by deployments/repository.py and by the edges.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from google.protobuf import json_format, text_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from tritonclient.grpc import model_config_pb2 as pb

from . import checks, ragged
from .complete import runtime_kind
from .errors import ConfigError
from .lines import Token, field_before, field_lines, line_of, tokens
from .model import (
    BatchInput,
    BatchOutput,
    DynamicBatching,
    InstanceGroup,
    ModelConfig,
    ModelInput,
    ModelOutput,
    ModelWarmup,
    Optimization,
    PinnedMemoryBuffer,
    Reshape,
    VersionPolicy,
    WarmupInput,
)
from .refusals import shared_state, unsupported

logger = logging.getLogger("manta.configs")

_ALIAS, _FIELD = "default_model_name", "default_model_filename"
_WIDE = (FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_UINT64)
_REASON_LENGTH, _FIELD_LENGTH = 500, 200  # text_format quotes the whole line


def parse(text: str, file: str, directory_name: str, partial: bool = False) -> ModelConfig:
    """Raises ConfigError; `file` is what errors call the text, relative to the repository.

    `partial`: tensors and max_batch_size may be missing, for the model to complete.
    """
    config, errors = examine(text, file, directory_name, partial)
    if errors or config is None:
        raise errors[0]
    return config


def examine(
    text: str, file: str, directory_name: str, partial: bool = False
) -> tuple[ModelConfig | None, list[ConfigError]]:
    """The configuration, None where the text cannot be read, and all that is wrong with it."""
    proto = pb.ModelConfig()
    try:
        _parse_text(_without_alias(text, file), proto)
    except ConfigError as error:
        return None, [locate(error, text, file)]
    open_batch = partial and "max_batch_size" not in _top_level(text)
    config, found = examine_proto(proto, directory_name, partial, open_batch)
    return config, [locate(error, text, file) for error in found]


def examine_proto(
    proto: Any, directory_name: str, partial: bool, open_batch: bool
) -> tuple[ModelConfig, list[ConfigError]]:
    """The same of what was read, however it was written; `open_batch`: it says no
    max_batch_size, so that the model may."""
    found = [*unsupported(proto), *shared_state(proto), *_misnamed(proto, directory_name)]
    proto.name = directory_name
    config = from_proto(proto)
    if open_batch:
        config = config.model_copy(update={"open_batch": True})
    found += checks.errors(config, partial)
    if config.platform and not config.runtime:  # else the files decide, in `normalise`
        try:
            checks.check_strings(config, runtime_kind(config))
            ragged.check_kind(config, runtime_kind(config))
        except ConfigError as error:
            found.append(error)
    return config, found


def _misnamed(proto: Any, directory_name: str) -> Iterator[ConfigError]:
    if proto.name not in ("", directory_name):
        yield ConfigError(
            f"the name '{proto.name}' must be left out or equal the directory's name "
            f"'{directory_name}'",
            field="name",
        )


def locate(error: ConfigError, text: str, file: str) -> ConfigError:
    """The same error with its file and, from its field, its line in the text."""
    _, own_file, field, line = error.args
    if own_file not in (None, file):
        return error
    return error.located(file, line or line_of(field_lines(text, pb.ModelConfig.DESCRIPTOR), field))


def _parse_text(text: str, proto: Any) -> None:
    try:
        text_format.Parse(text, proto)
    except text_format.ParseError as error:
        line, column = error.GetLine(), error.GetColumn()
        reason = str(error).removeprefix(f"{line}:{column} : ")
        field = None
        if line is not None and column is not None:
            field = field_before(text, pb.ModelConfig.DESCRIPTOR, line, column)
        shown = None if field is None else field[:_FIELD_LENGTH]
        raise ConfigError(reason[:_REASON_LENGTH], field=shown, line=line) from None


def _without_alias(text: str, file: str) -> str:
    """`default_model_name` becomes `default_model_filename`; every line stays where it was.

    The upstream README calls the field so, though the proto never had it.
    """
    fields = _top_level(text)
    if _ALIAS not in fields:
        return text
    name, last = fields[_ALIAS][0], fields[_ALIAS][-1]
    logger.warning("%s:%d: %s is taken as %s", file, name.line, _ALIAS, _FIELD)
    if _FIELD not in fields:
        return text[: name.start] + _FIELD + text[name.start + len(_ALIAS) :]
    if _literal(fields[_ALIAS]) != _literal(fields[_FIELD]):
        raise ConfigError(f"differs from {_FIELD}; give one of them", field=_ALIAS, line=name.line)
    end = last.start + len(last.text)
    blank = "".join("\n" if char == "\n" else " " for char in text[name.start : end])
    return text[: name.start] + blank + text[end:]


def _literal(field: list[Token]) -> str:
    return "".join(token.text[1:-1] for token in field if token.kind == "string")


def _top_level(text: str) -> dict[str, list[Token]]:
    """Top-level `name: "value"` fields and their tokens."""
    fields: dict[str, list[Token]] = {}
    depth, current, previous = 0, list[Token](), ""
    for token in tokens(text):
        depth += {"{": 1, "[": 1, "<": 1, "}": -1, "]": -1, ">": -1}.get(token.text, 0)
        if depth == 0 and token.kind == "name" and previous != ":":
            current = fields.setdefault(token.text, [token])
        elif depth == 0 and (token.text == ":" or token.kind == "string"):
            current.append(token)
        previous = token.text
    return fields


# --- proto <-> ModelConfig ----------------------------------------------------------------------


def from_proto(proto: Any) -> ModelConfig:
    """Takes over what the server acts on; `refusals` has looked at the rest."""
    dynamic = proto.dynamic_batching
    return ModelConfig(
        name=proto.name,
        platform=proto.platform,
        backend=proto.backend,
        runtime=proto.runtime,
        version_policy=_version_policy(proto),
        max_batch_size=proto.max_batch_size,
        input=tuple(map(_input, proto.input)),
        output=tuple(map(_output, proto.output)),
        batch_input=tuple(
            BatchInput(
                kind=pb.BatchInput.Kind.Name(b.kind),
                target_name=tuple(b.target_name),
                data_type=pb.DataType.Name(b.data_type),
                source_input=tuple(b.source_input),
            )
            for b in proto.batch_input
        ),
        batch_output=tuple(
            BatchOutput(
                target_name=tuple(b.target_name),
                kind=pb.BatchOutput.Kind.Name(b.kind),
                source_input=tuple(b.source_input),
            )
            for b in proto.batch_output
        ),
        optimization=_optimization(proto),
        instance_group=tuple(map(_group, proto.instance_group)),
        default_model_filename=proto.default_model_filename,
        cc_model_filenames=dict(proto.cc_model_filenames),
        metric_tags=dict(proto.metric_tags),
        dynamic_batching=DynamicBatching(
            preferred_batch_size=tuple(dynamic.preferred_batch_size),
            max_queue_delay_microseconds=dynamic.max_queue_delay_microseconds,
            preserve_ordering=dynamic.preserve_ordering,
        )
        if proto.HasField("dynamic_batching")
        else None,
        parameters={key: value.string_value for key, value in proto.parameters.items()},
        model_warmup=tuple(
            ModelWarmup(
                name=w.name,
                batch_size=w.batch_size,
                inputs={name: _warmup_input(w.inputs[name]) for name in w.inputs},
                count=w.count,
            )
            for w in proto.model_warmup
        ),
    )


def _input(proto: Any) -> ModelInput:
    return ModelInput(
        name=proto.name,
        data_type=pb.DataType.Name(proto.data_type),
        format=pb.ModelInput.Format.Name(proto.format),
        dims=tuple(proto.dims),
        reshape=_reshape(proto),
        optional=proto.optional,
        allow_ragged_batch=proto.allow_ragged_batch,
    )


def _output(proto: Any) -> ModelOutput:
    return ModelOutput(
        name=proto.name,
        data_type=pb.DataType.Name(proto.data_type),
        dims=tuple(proto.dims),
        reshape=_reshape(proto),
        label_filename=proto.label_filename,
    )


def _group(proto: Any) -> InstanceGroup:
    return InstanceGroup(
        name=proto.name,
        kind=pb.ModelInstanceGroup.Kind.Name(proto.kind),
        count=proto.count,
        gpus=tuple(proto.gpus),
        passive=proto.passive,
        host_policy=proto.host_policy,
    )


def _version_policy(proto: Any) -> VersionPolicy | None:
    policy = proto.version_policy
    match policy.WhichOneof("policy_choice"):
        case "latest":
            return VersionPolicy(latest=policy.latest.num_versions)
        case "all":
            return VersionPolicy(all=True)
        case "specific":
            return VersionPolicy(specific=tuple(policy.specific.versions))
    return None


def _warmup_input(proto: Any) -> WarmupInput:
    source = proto.WhichOneof("input_data_type")
    return WarmupInput(
        data_type=pb.DataType.Name(proto.data_type),
        dims=tuple(proto.dims),
        **({} if source is None else {source: getattr(proto, source)}),
    )


def _reshape(tensor: Any) -> Reshape | None:
    return Reshape(shape=tuple(tensor.reshape.shape)) if tensor.HasField("reshape") else None


def _optimization(proto: Any) -> Optimization | None:
    if not proto.HasField("optimization"):
        return None
    buffers = ("input_pinned_memory", "output_pinned_memory")
    return Optimization(
        **{
            name: PinnedMemoryBuffer(enable=getattr(proto.optimization, name).enable)
            for name in buffers
            if proto.optimization.HasField(name)
        }
    )


def to_proto(config: ModelConfig) -> Any:
    """The official proto with the same content."""
    fields = config.model_dump(exclude_none=True, exclude={"version_policy", "parameters"})
    proto = json_format.ParseDict(fields, pb.ModelConfig())
    for key, value in config.parameters.items():
        proto.parameters[key].string_value = value
    policy = config.version_policy
    if policy is not None and policy.all:
        proto.version_policy.all.SetInParent()
    elif policy is not None and policy.specific is not None:
        proto.version_policy.specific.SetInParent()
        proto.version_policy.specific.versions.extend(policy.specific)
    elif policy is not None and policy.latest is not None:
        proto.version_policy.latest.num_versions = policy.latest
    return proto


def to_text(config: ModelConfig) -> str:
    """As config.pbtxt; `parse` makes the same of it."""
    text: str = text_format.MessageToString(to_proto(config))
    return text


def to_json(config: ModelConfig) -> dict[str, Any]:
    """As /v2/models/{model}/config shows it: every scalar, maps as objects, numbers as numbers."""
    data: dict[str, Any] = json_format.MessageToDict(
        to_proto(config),
        preserving_proto_field_name=True,
        always_print_fields_with_no_presence=True,
    )
    _restore_numbers(data, pb.ModelConfig.DESCRIPTOR)
    return data


def from_json(fields: dict[str, Any]) -> ModelConfig:
    """What `to_json` made, or a part of it. Raises ValueError, in protobuf's words."""
    proto = pb.ModelConfig()
    try:
        json_format.ParseDict(fields, proto)
    except json_format.ParseError as error:
        raise ValueError(str(error)) from None
    return from_proto(proto)


def _restore_numbers(data: dict[str, Any], descriptor: Descriptor) -> None:
    """protobuf's JSON writes 64-bit integers as strings; Triton's writes numbers."""
    for field in descriptor.fields:
        value = data.get(field.name)
        if value is None:
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            inner = field.message_type.fields_by_name["value"].message_type
            if inner is not None:
                for child in value.values():
                    _restore_numbers(child, inner)
        elif field.message_type is not None:
            for child in value if isinstance(value, list) else [value]:
                _restore_numbers(child, field.message_type)
        elif field.cpp_type in _WIDE:
            data[field.name] = [int(v) for v in value] if isinstance(value, list) else int(value)
