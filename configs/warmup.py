"""What must hold for the samples of `model_warmup`, and how large their data is.

Knows no files: deployments/repository.py finds them, deployments/warmup.py makes batches of them.
Called by `checks.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from .dtypes import from_config
from .errors import ConfigError
from .model import ModelConfig, ModelInput, ModelWarmup, WarmupInput

FOLDER = "warmup"


def samples(config: ModelConfig) -> Iterator[tuple[str, ModelWarmup]]:
    """(field path, sample) for those that run: a batch size of 0 leaves a sample out."""
    for index, sample in enumerate(config.model_warmup):
        if sample.batch_size:
            yield f"model_warmup[{index}]", sample


def data_files(config: ModelConfig) -> Iterator[tuple[str, str, str, WarmupInput]]:
    """(field path, path in the model's folder, input's name, input) for data from files."""
    for path, sample in samples(config):
        for name, given in sample.inputs.items():
            if given.input_data_file is not None:
                field = f'{path}.inputs["{name}"].input_data_file'
                yield field, f"{FOLDER}/{given.input_data_file}", name, given


def size_bytes(given: WarmupInput) -> int:
    """Of one row; 0 for strings, whose size only their data tells."""
    return prod(given.dims) * from_config(given.data_type).size_bytes


def too_short(name: str, given: WarmupInput, found_bytes: int) -> str:
    """The reason when a file does not hold one row."""
    return (
        f"warmup setting expects {size_bytes(given)} bytes for input '{name}', but the data "
        f"provided from {given.input_data_file} only has {found_bytes} bytes"
    )


def check_warmup(config: ModelConfig) -> None:
    """Raise ConfigError for the first sample that could not be run."""
    inputs = {tensor.name: tensor for tensor in config.input}
    limit = max(1, config.max_batch_size)
    for path, sample in samples(config):
        if sample.batch_size > limit and not config.open_batch:
            raise ConfigError(
                f"batch size {sample.batch_size} of warmup sample '{sample.name}' must be at most "
                f"{limit}",
                field=f"{path}.batch_size",
            )
        for name, given in sample.inputs.items():
            at = f'{path}.inputs["{name}"]'
            _check_given(name, given, at)
            if inputs:  # else they are yet to be completed, perhaps from this very sample
                _check_against(sample, name, given, inputs, at)
        _check_complete(config, sample, path)


def _check_given(name: str, given: WarmupInput, at: str) -> None:
    if given.data_type == "TYPE_INVALID":
        raise ConfigError(
            f"warmup setting expects input '{name}' to have data_type set", field=f"{at}.data_type"
        )
    for index, size in enumerate(given.dims):
        if size == -1:
            raise ConfigError(
                "warmup setting expects all variable-size dimensions are specified for input "
                f"'{name}'",
                field=f"{at}.dims[{index}]",
            )
        if size < 0:
            raise ConfigError(f"{size} must be 0 or greater", field=f"{at}.dims[{index}]")
    if prod(size for size in given.dims if size) * 8 >= 2**63:
        raise ConfigError(f"input '{name}' has too many elements", field=f"{at}.dims")
    sources = (given.zero_data, given.random_data, given.input_data_file)
    if all(source is None for source in sources):
        raise ConfigError(
            f"warmup setting expects input '{name}' to have input_data_type set: zero_data, "
            "random_data or input_data_file",
            field=at,
        )
    file = given.input_data_file
    if file is not None:
        parts = file.replace("\\", "/").split("/")
        if not file or parts[0] == "" or ".." in parts or not file.isprintable():
            raise ConfigError(
                f"file name {file!r} must be relative and must not leave the folder '{FOLDER}'",
                field=f"{at}.input_data_file",
            )


def _check_against(
    sample: ModelWarmup, name: str, given: WarmupInput, inputs: dict[str, ModelInput], at: str
) -> None:
    tensor = inputs.get(name)
    if tensor is None:
        known = ", ".join(f"'{one}'" for one in inputs)
        raise ConfigError(
            f"warmup sample '{sample.name}' has an unexpected input '{name}'; the model has "
            f"{known}",
            field=at,
        )
    if tensor.data_type not in ("TYPE_INVALID", given.data_type):
        raise ConfigError(
            f"warmup sample '{sample.name}' has {given.data_type} for input '{name}', which is "
            f"{tensor.data_type}",
            field=f"{at}.data_type",
        )
    fits = len(given.dims) == len(tensor.dims) and all(
        want in (-1, size) for want, size in zip(tensor.dims, given.dims, strict=True)
    )
    if tensor.dims and not fits:
        raise ConfigError(
            f"warmup sample '{sample.name}' has the shape {list(given.dims)} for input '{name}', "
            f"whose dims are {list(tensor.dims)}; the batch dimension is left out",
            field=f"{at}.dims",
        )


def _check_complete(config: ModelConfig, sample: ModelWarmup, path: str) -> None:
    for tensor in config.input:
        if tensor.name not in sample.inputs and not tensor.optional:
            raise ConfigError(
                f"warmup sample '{sample.name}' lacks input '{tensor.name}'",
                field=f"{path}.inputs",
            )
