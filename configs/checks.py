"""What must hold inside one model's configuration, with Triton's texts where it has one.

Each check looks at one aspect and raises ConfigError with the field's path. Knows no files and
no hardware: those are `complete.py`, `placement.py` and deployments/repository.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from math import prod

from . import ragged
from .errors import ConfigError
from .metrics import check_tags
from .model import ModelConfig, ModelInput, ModelOutput
from .warmup import check_warmup

PLATFORMS = ("pytorch_libtorch", "torch_aoti", "torch_export")
BACKEND = "pytorch"
PYTHON_RUNTIME = "model.py"
PYTHON_BACKEND = "python"  # Triton's, whose model.py holds a TritonPythonModel
TENSORS_ONLY = ("aoti", "exported")  # runtime kinds that cannot do with strings


def check(config: ModelConfig, partial: bool = False) -> None:
    """Raise ConfigError for the first thing that is wrong.

    `partial`: what is missing may come from the model; it is looked at once it is there.
    """
    for error in errors(config, partial):
        raise error


def errors(config: ModelConfig, partial: bool = False) -> Iterator[ConfigError]:
    """What is wrong: the first error of each aspect."""
    for one in _PARTIAL if partial and lacks(config) else _CHECKS:
        if one is _batching and config.open_batch:
            continue
        try:
            one(config)
        except ConfigError as error:
            yield error


def lacks(config: ModelConfig) -> bool:
    """Whether some tensor, or its datatype or dims, is missing."""
    every = [tensor for _, _, tensor in tensors(config)]
    known = all(tensor.data_type != "TYPE_INVALID" and tensor.dims for tensor in every)
    return not (config.input and config.output and known)


def tensors(config: ModelConfig) -> Iterator[tuple[str, str, ModelInput | ModelOutput]]:
    """(`input` or `output`, field path, tensor) for all of them."""
    for index, tensor in enumerate(config.input):
        yield "input", f"input[{index}]", tensor
    for index, result in enumerate(config.output):
        yield "output", f"output[{index}]", result


def _engine(config: ModelConfig) -> None:
    if config.platform == "ensemble":
        raise ConfigError("ensembles are not supported", field="platform")
    if config.backend not in ("", BACKEND, PYTHON_BACKEND):
        raise ConfigError(
            f"backend '{config.backend}' is not supported; this server has '{BACKEND}' and "
            f"'{PYTHON_BACKEND}'",
            field="backend",
        )
    if config.backend == PYTHON_BACKEND:
        for field in ("platform", "runtime"):
            if value := getattr(config, field):
                raise ConfigError(
                    f"{field} '{value}' does not go with backend '{PYTHON_BACKEND}'; leave it out",
                    field=field,
                )
        return
    if config.platform and config.platform not in PLATFORMS:
        known = ", ".join(f"'{platform}'" for platform in PLATFORMS)
        raise ConfigError(
            f"unexpected platform '{config.platform}' for backend '{BACKEND}'; it has {known}",
            field="platform",
        )
    if config.runtime not in ("", PYTHON_RUNTIME):
        raise ConfigError(
            f"runtime '{config.runtime}' is not supported; leave it out or say '{PYTHON_RUNTIME}'",
            field="runtime",
        )
    if config.runtime and config.platform in ("torch_aoti", "torch_export"):
        raise ConfigError(
            f"runtime '{config.runtime}' does not run platform '{config.platform}'",
            field="runtime",
        )
    if config.runtime and config.default_model_filename.endswith(".pt2"):
        raise ConfigError(
            f"runtime '{config.runtime}' does not load .pt2 files", field="default_model_filename"
        )


def _counts(config: ModelConfig) -> None:
    if config.max_batch_size < 0:
        raise ConfigError("must be 0 or greater", field="max_batch_size")
    for name, listed in (("input", config.input), ("output", config.output)):
        if not listed:
            raise ConfigError(
                f"model configuration must contain at least one {name}, none were specified",
                field=name,
            )


def _names(config: ModelConfig) -> None:
    seen: set[tuple[str, str]] = set()
    for kind, path, tensor in tensors(config):
        if not tensor.name.strip():
            raise ConfigError(f"model {kind} must specify 'name'", field=f"{path}.name")
        if (kind, tensor.name) in seen:
            raise ConfigError(
                f"{kind} '{tensor.name}' is listed more than once", field=f"{path}.name"
            )
        seen.add((kind, tensor.name))


def _datatypes(config: ModelConfig) -> None:
    for kind, path, tensor in tensors(config):
        if tensor.data_type == "TYPE_INVALID":
            raise ConfigError(
                f"model {kind} '{tensor.name}' must specify 'data_type'", field=f"{path}.data_type"
            )


def check_strings(config: ModelConfig, kind: str) -> None:
    """What a runtime of this kind does not do with strings; called once the kind is known."""
    for side, path, tensor in tensors(config):
        if tensor.data_type != "TYPE_STRING":
            continue
        if kind in TENSORS_ONLY:
            raise ConfigError(
                f"unsupported datatype {tensor.data_type} for {side} '{tensor.name}' "
                f"for model '{config.name}'",
                field=f"{path}.data_type",
            )
        if kind == "torchscript" and len(tensor.model_dims) + (config.max_batch_size > 0) > 1:
            raise ConfigError(
                f"only 1-dimensional List of String is supported as {side} for '{tensor.name}'",
                field=f"{path}.dims",
            )


def _dims(config: ModelConfig) -> None:
    for kind, path, tensor in tensors(config):
        if not tensor.dims:
            raise ConfigError(
                f"model {kind} '{tensor.name}' must specify 'dims'", field=f"{path}.dims"
            )
        _check_sizes(tensor.dims, f"{path}.dims")
        if tensor.reshape is not None:
            _check_sizes(tensor.reshape.shape, f"{path}.reshape.shape")
            _check_reshape(config, path, tensor.dims, tensor.reshape.shape)


def _check_sizes(sizes: tuple[int, ...], path: str) -> None:
    for index, size in enumerate(sizes):
        if size < 1 and size != -1:
            raise ConfigError(
                f"{size} must be at least 1, or -1 for a variable size", field=f"{path}[{index}]"
            )


def _check_reshape(
    config: ModelConfig, path: str, dims: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    field = f"{path}.reshape"
    if not shape and not (config.max_batch_size and _segments(dims) == [1]):
        raise ConfigError("an empty reshape needs batching and dims of one element", field=field)
    if _segments(dims) != _segments(shape):
        raise ConfigError(
            f"dims {list(dims)} and reshape {list(shape)} must have the same number of elements "
            "before, between and after their variable sizes",
            field=field,
        )


def _segments(dims: tuple[int, ...]) -> list[int]:
    """Element counts between the variable sizes: [2, -1, 3, 4] -> [2, 12]."""
    cuts = [-1, *(i for i, size in enumerate(dims) if size == -1), len(dims)]
    return [prod(dims[a + 1 : b]) for a, b in zip(cuts, cuts[1:], strict=False)]


def _formats(config: ModelConfig) -> None:
    for index, tensor in enumerate(config.input):
        if tensor.format != "FORMAT_NONE" and len(tensor.dims) != 3:
            raise ConfigError(
                f"{tensor.format} needs exactly 3 dims", field=f"input[{index}].format"
            )


def _versions(config: ModelConfig) -> None:
    policy = config.version_policy
    if policy is None:
        return
    if policy.latest is not None and policy.latest < 1:
        raise ConfigError("must be at least 1", field="version_policy.latest.num_versions")
    if policy.specific is not None:
        field = "version_policy.specific.versions"
        if not policy.specific:
            raise ConfigError("must name at least one version", field="version_policy.specific")
        for index, version in enumerate(policy.specific):
            if version < 1:
                raise ConfigError(f"{version} must be at least 1", field=f"{field}[{index}]")


def _batching(config: ModelConfig) -> None:
    if config.dynamic_batching is None:
        return
    for index, size in enumerate(config.dynamic_batching.preferred_batch_size):
        field = f"dynamic_batching.preferred_batch_size[{index}]"
        if size < 1:
            raise ConfigError("dynamic batching preferred size must be positive", field=field)
        if size > config.max_batch_size:
            raise ConfigError(
                f"dynamic batching preferred size must be <= max batch size "
                f"{config.max_batch_size}",
                field=field,
            )


def _groups(config: ModelConfig) -> None:
    names: set[str] = set()
    for index, group in enumerate(config.instance_group):
        path = f"instance_group[{index}]"
        name = group.name or f"{config.name}_{index}"
        if name in names:
            raise ConfigError(f"instance group '{name}' is listed more than once", field=path)
        names.add(name)
        if group.gpus and group.kind in ("KIND_CPU", "KIND_MODEL"):
            raise ConfigError(
                f"instance group '{name}' of model '{config.name}' has kind {group.kind} but "
                "specifies one or more GPUs",
                field=f"{path}.gpus",
            )
        if len(set(group.gpus)) != len(group.gpus) or min(group.gpus, default=0) < 0:
            raise ConfigError(
                f"instance group '{name}' must list each gpu once, by an index from 0",
                field=f"{path}.gpus",
            )


def _host_policies(config: ModelConfig) -> None:
    """Triton's own names say nothing until a server defines a policy, which this one cannot."""
    defaults = {"KIND_CPU": "cpu", "KIND_GPU": r"gpu_\d+", "KIND_MODEL": "model"}
    for index, group in enumerate(config.instance_group):
        usual = defaults.get(group.kind, "cpu|model|" + defaults["KIND_GPU"])
        if group.host_policy and not re.fullmatch(usual, group.host_policy):
            raise ConfigError(
                f"host policy '{group.host_policy}' is not supported; leave it out, or give the "
                "default of the group's kind: 'cpu', 'model' or 'gpu_' and a number",
                field=f"instance_group[{index}].host_policy",
            )


def _files_by_capability(config: ModelConfig) -> None:
    """Triton passes over keys that no GPU has, and over all of them outside the C++ backend."""
    if config.cc_model_filenames and (config.runtime or config.backend not in ("", BACKEND)):
        raise ConfigError(
            "only TorchScript and AOT Inductor models have files per compute capability",
            field="cc_model_filenames",
        )
    for capability, name in config.cc_model_filenames.items():
        field = f'cc_model_filenames["{capability}"]'
        if not re.fullmatch(r"[1-9]\d*\.\d", capability, re.ASCII):
            raise ConfigError(
                f"'{capability}' is no compute capability, such as \"9.0\"", field=field
            )
        if not name:
            raise ConfigError("must name a file", field=field)
        _check_file(name, field)


def _file_names(config: ModelConfig) -> None:
    _check_file(config.default_model_filename, "default_model_filename")
    for index, result in enumerate(config.output):
        _check_file(result.label_filename, f"output[{index}].label_filename")


def _check_file(name: str, field: str) -> None:
    if not name:
        return
    parts = name.replace("\\", "/").split("/")
    if name.startswith(("/", "\\")) or ".." in parts or not name.isprintable():
        raise ConfigError(
            f"file name {name!r} must be relative and must not leave the model's directory",
            field=field,
        )


_CHECKS: tuple[Callable[[ModelConfig], None], ...] = (
    _engine,
    _counts,
    _names,
    _datatypes,
    _dims,
    _formats,
    _versions,
    _batching,
    _groups,
    _host_policies,
    _file_names,
    _files_by_capability,
    ragged.check,
    check_warmup,
    check_tags,
)
# What holds whatever the model will add.
_PARTIAL: tuple[Callable[[ModelConfig], None], ...] = (
    _engine,
    _names,
    _versions,
    _groups,
    _file_names,
    check_warmup,
    check_tags,
)
