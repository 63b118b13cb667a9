"""Ragged batches: inputs of unequal shapes in one batch, and what is generated and cut for them.

Owns what must hold of `allow_ragged_batch`, `batch_input` and `batch_output`, as
data. Called by `checks`, `complete`, and the two ends of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator

from .errors import ConfigError
from .model import BatchInput, ModelConfig, ModelInput, ModelOutput

DATATYPES = ("TYPE_INT32", "TYPE_FP32")
ITEM_KINDS = ("BATCH_ITEM_SHAPE", "BATCH_ITEM_SHAPE_FLATTEN")
KINDS = ("torchscript", "eager")  # runtime kinds that do all of it
MERGING = ("python",)  # those that see each request's own tensors, whatever their shapes


def check(config: ModelConfig) -> None:
    """Raise ConfigError for the first thing that is wrong."""
    taken = {tensor.name for tensor in config.input}
    for index, one in enumerate(config.batch_input):
        path = f"batch_input[{index}]"
        target = _single(one.target_name, f"{path}.target_name", "target")
        if target in taken:
            raise ConfigError(
                f"'{target}' is already an input or a target", field=f"{path}.target_name"
            )
        taken.add(target)
        if one.data_type not in DATATYPES:
            raise ConfigError(
                f"batch input '{target}' must be {' or '.join(DATATYPES)}, not {one.data_type}",
                field=f"{path}.data_type",
            )
        _source(config, one.source_input, f"{path}.source_input")
        if one.kind in ITEM_KINDS and not config.max_batch_size:
            raise ConfigError(f"{one.kind} needs a batch dimension", field=f"{path}.kind")
    _check_outputs(config)


def check_kind(config: ModelConfig, kind: str) -> None:
    """What a runtime of this kind does not do; called once the kind is known."""
    if kind in KINDS:
        return
    for field in _fields(config):
        if kind in MERGING and field.endswith("allow_ragged_batch"):
            continue
        raise ConfigError(
            "ragged batches, batch inputs and batch outputs are for TorchScript and eager models",
            field=field,
        )


def widened(config: ModelConfig) -> ModelConfig:
    """The configuration as the model sees it: what is generated follows the inputs."""
    made = tuple(_input(one) for one in config.batch_input)
    return config.model_copy(update={"input": config.input + made}) if made else config


def sources(config: ModelConfig) -> tuple[int, ...]:
    """The index of the input that each batch input is made from."""
    names = [tensor.name for tensor in config.input]
    return tuple(names.index(one.source_input[0]) for one in config.batch_input)


def scattered(config: ModelConfig) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Outputs that are cut by the shape of an input: that input's index, and the configured shape,
    in which -1 stands for the size that the input has in the same place."""
    names = [tensor.name for tensor in config.input]
    outputs = {tensor.name: tensor for tensor in config.output}
    return {
        one.target_name[0]: (
            names.index(one.source_input[0]),
            _with_rows(config, outputs[one.target_name[0]]),
        )
        for one in config.batch_output
    }


def _check_outputs(config: ModelConfig) -> None:
    outputs = {tensor.name: tensor for tensor in config.output}
    seen: set[str] = set()
    for index, one in enumerate(config.batch_output):
        path = f"batch_output[{index}]"
        target = _single(one.target_name, f"{path}.target_name", "target")
        if target not in outputs or target in seen:
            reason = "is scattered already" if target in seen else "is not an output of the model"
            raise ConfigError(f"'{target}' {reason}", field=f"{path}.target_name")
        seen.add(target)
        source = _source(config, one.source_input, f"{path}.source_input")
        for name, data_type in (
            (target, outputs[target].data_type),
            (source.name, source.data_type),
        ):
            if data_type == "TYPE_STRING":
                reason = f"'{name}' is TYPE_STRING, and strings are not scattered"
                raise ConfigError(reason, field=f"{path}.target_name")
        shape, given = _with_rows(config, outputs[target]), _with_rows(config, source)
        if any(size == -1 and place >= len(given) for place, size in enumerate(shape)):
            raise ConfigError(
                f"output '{target}' has a variable size where input '{source.name}' has no "
                "dimension",
                field=f"{path}.source_input",
            )


def _single(names: tuple[str, ...], field: str, what: str) -> str:
    if len(names) != 1 or not names[0].strip():
        raise ConfigError(f"must name exactly one {what}", field=field)
    return names[0]


def _source(config: ModelConfig, names: tuple[str, ...], field: str) -> ModelInput:
    name = _single(names, field, "source input")
    for tensor in config.input:
        if tensor.name != name:
            continue
        if tensor.optional:
            raise ConfigError(f"'{name}' is optional and cannot be a source", field=field)
        return tensor
    listed = ", ".join(f"'{tensor.name}'" for tensor in config.input)
    raise ConfigError(f"unknown source input '{name}'; the inputs are {listed}", field=field)


def _with_rows(config: ModelConfig, tensor: ModelInput | ModelOutput) -> tuple[int, ...]:
    return (-1, *tensor.model_dims) if config.max_batch_size else tensor.model_dims


def _fields(config: ModelConfig) -> Iterator[str]:
    for index, tensor in enumerate(config.input):
        if tensor.allow_ragged_batch:
            yield f"input[{index}].allow_ragged_batch"
    if config.batch_input:
        yield "batch_input"
    if config.batch_output:
        yield "batch_output"


def _input(one: BatchInput) -> ModelInput:
    dims = (-1, -1) if one.kind == "BATCH_ITEM_SHAPE" else (-1,)
    return ModelInput(name=one.target_name[0], data_type=one.data_type, dims=dims)
