"""Fills what a configuration leaves out, as Triton's core does.

Pure: gets the names of the files in the first version directory and whether a GPU exists; what a
loaded model adds comes as plain data. Called by the Controller before a version is placed, and by
whoever completes it from the model; a normalised configuration stays as it is.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal, TypeAlias

from . import checks, ragged
from .errors import ConfigError
from .model import (
    DynamicBatching,
    InstanceGroup,
    ModelConfig,
    Optimization,
    PinnedMemoryBuffer,
    VersionPolicy,
)

RuntimeKind: TypeAlias = Literal["torchscript", "aoti", "eager", "exported", "python"]

DEFAULT_FILES: dict[RuntimeKind, str] = {
    "torchscript": "model.pt",
    "aoti": "model.pt2",
    "eager": checks.PYTHON_RUNTIME,
    "exported": "model.pt2",
    "python": "model.py",
}
_BY_PLATFORM: dict[str, RuntimeKind] = {"torch_aoti": "aoti", "torch_export": "exported"}
DEFAULT_MAX_BATCH_SIZE = 4  # as Triton's default-max-batch-size, for a batch without a bound


def normalise(
    config: ModelConfig, version_files: Sequence[str], has_gpu: bool, partial: bool = False
) -> ModelConfig:
    """The whole configuration, as clients see it; raises ConfigError.

    `version_files` are the regular files of the lexicographically first version directory.
    `partial`: tensors and max_batch_size may be missing until `finish`.
    """
    config = _choose_engine(config, version_files)
    checks.check(config, partial)
    checks.check_strings(config, runtime_kind(config, version_files))
    ragged.check_kind(config, runtime_kind(config, version_files))
    return config.model_copy(
        update={
            "version_policy": config.version_policy or VersionPolicy(latest=1),
            "optimization": _pinned(config.optimization),
            "dynamic_batching": _preferred(config),
            "instance_group": _groups(config, has_gpu, partial),
        }
    )


def finish(
    config: ModelConfig, kind: RuntimeKind, max_batch_size: int | None = None
) -> ModelConfig:
    """A normalised configuration to which the model has added its part; raises ConfigError.

    `max_batch_size` is the model's, None where it has no say. Batches that nobody has asked for
    are made, as in Triton, wherever the model takes them.
    """
    if config.open_batch and max_batch_size is not None:
        dynamic = config.dynamic_batching
        if max_batch_size > 1 and dynamic is None:
            dynamic = DynamicBatching()
        found = {"max_batch_size": max_batch_size, "dynamic_batching": dynamic}
        config = config.model_copy(update=found)
    config = config.model_copy(update={"open_batch": False})
    checks.check(config)
    checks.check_strings(config, kind)
    ragged.check_kind(config, kind)
    return config.model_copy(update={"dynamic_batching": _preferred(config)})


def runtime_kind(config: ModelConfig, version_files: Collection[str] = ()) -> RuntimeKind:
    """Which runtime loads the model.

    `runtime: "model.py"` falls back to a TorchScript model.pt where there is no model.py, so
    that only with `version_files` the answer is exact for it.
    """
    if config.backend == checks.PYTHON_BACKEND:
        return "python"
    if config.runtime == checks.PYTHON_RUNTIME:
        script = artifact_filename(config, version_files).endswith(".py")
        return "eager" if script else "torchscript"
    return _BY_PLATFORM.get(config.platform, "torchscript")


def artifact_filename(
    config: ModelConfig, version_files: Collection[str] = (), capability: str = ""
) -> str:
    """The file in the version directory that is loaded.

    `capability` is the compute capability, such as "9.0", of the device of a KIND_GPU instance;
    instances of other kinds have none and load the default file.
    """
    if capability in config.cc_model_filenames:
        return config.cc_model_filenames[capability]
    if config.default_model_filename:
        return config.default_model_filename
    if config.backend == checks.PYTHON_BACKEND:
        return DEFAULT_FILES["python"]
    if config.runtime == checks.PYTHON_RUNTIME:
        script = DEFAULT_FILES["eager"]
        fallback = DEFAULT_FILES["torchscript"]
        return fallback if script not in version_files and fallback in version_files else script
    return DEFAULT_FILES[_BY_PLATFORM.get(config.platform, "torchscript")]


def normalise_version(
    config: ModelConfig,
    first_files: Sequence[str],
    version_files: Sequence[str],
    has_gpu: bool,
    partial: bool = False,
) -> ModelConfig:
    """The whole configuration of one version; raises ConfigError.

    What a configuration leaves open is sniffed in the first version directory, as Triton does; a
    version that does not have what was found there is sniffed by itself. So versions of several
    kinds stand beside each other, whichever comes first.
    """
    whole = normalise(config, first_files, has_gpu, partial)
    wanted = {artifact_filename(whole, version_files), *whole.cc_model_filenames.values()}
    if not wanted.isdisjoint(version_files):
        return whole
    if _is_open(config) and any(_sniff(version_files)):
        return normalise(config, version_files, has_gpu, partial)
    return of_version(whole, version_files)


def of_version(config: ModelConfig, version_files: Collection[str]) -> ModelConfig:
    """A normalised configuration as one version sees it.

    Where the file that it means is missing and an AOTI package lies there instead, that version is
    the package: so an optimised version stands beside the one that it was made from. Triton finds
    no file to load there.
    """
    if config.backend == checks.PYTHON_BACKEND:
        return config
    package = DEFAULT_FILES["aoti"]
    wanted = artifact_filename(config, version_files)
    own = {wanted, *config.cc_model_filenames.values()}
    if not own.isdisjoint(version_files) or package not in version_files:
        return config
    if wanted not in DEFAULT_FILES.values():  # a name that somebody has chosen is meant
        return config
    return config.model_copy(
        update={
            "platform": "torch_aoti",
            "runtime": "",
            "default_model_filename": package,
            "cc_model_filenames": {},
        }
    )


def artifact_filenames(config: ModelConfig, version_files: Collection[str] = ()) -> list[str]:
    """The files of which one must be there before a version can load: only an instance that knows
    its GPU knows which of them it wants."""
    default = artifact_filename(config, version_files)
    if any(group.kind != "KIND_GPU" for group in config.instance_group):
        return [default]
    return [default, *config.cc_model_filenames.values()]


def of_content(config: ModelConfig, stated: bool, archive: str) -> ModelConfig:
    """A version's configuration once its .pt2 file was looked into: `archive` is what it holds.

    Both kinds have the same name; a platform that the configuration has stated stays.
    """
    if stated or config.platform != "torch_aoti" or archive != "exported":
        return config
    return config.model_copy(update={"platform": "torch_export"})


def _choose_engine(config: ModelConfig, files: Collection[str]) -> ModelConfig:
    backend, platform, runtime = config.backend, config.platform, config.runtime
    filename = config.default_model_filename
    if backend == checks.PYTHON_BACKEND:
        default = filename or DEFAULT_FILES["python"]
        return config.model_copy(update={"default_model_filename": default})
    known_files = (DEFAULT_FILES["torchscript"], DEFAULT_FILES["aoti"])
    if not backend and (runtime or platform in checks.PLATFORMS or filename in known_files):
        backend = checks.BACKEND
    if _is_open(config):
        platform, runtime = _sniff(files)
        backend = checks.BACKEND if platform else backend
    if not backend:
        raise ConfigError(_unknown_engine(config), field="backend")
    if not platform:
        # Triton hands a .pt2 to TorchScript here, which cannot read it.
        platform = "torch_aoti" if filename.endswith(".pt2") and not runtime else "pytorch_libtorch"
    if not filename and not runtime:
        if platform in _BY_PLATFORM:
            filename = DEFAULT_FILES[_BY_PLATFORM[platform]]
        elif config.backend and not config.platform:  # otherwise it stays empty, as in Triton
            filename = DEFAULT_FILES["torchscript"]
    return config.model_copy(
        update={
            "backend": backend,
            "platform": platform,
            "runtime": runtime,
            "default_model_filename": filename,
        }
    )


def _is_open(config: ModelConfig) -> bool:
    """Whether only files can tell the engine."""
    stated = config.platform or config.default_model_filename or config.runtime
    return config.backend in ("", checks.BACKEND) and not stated


def _sniff(files: Collection[str]) -> tuple[str, str]:
    """(platform, runtime) by what lies in the version directory; ("", "") if nothing does."""
    if DEFAULT_FILES["torchscript"] in files:
        return "pytorch_libtorch", ""
    if DEFAULT_FILES["aoti"] in files:
        return "torch_aoti", ""
    if DEFAULT_FILES["eager"] in files:
        return "pytorch_libtorch", checks.PYTHON_RUNTIME
    return "", ""


def _unknown_engine(config: ModelConfig) -> str:
    reason = f"must specify 'backend' or 'platform' for model '{config.name}'"
    if config.default_model_filename:
        return reason
    wanted = ", ".join(dict.fromkeys(DEFAULT_FILES.values()))
    return f"{reason}: its first version directory has none of {wanted}"


def _pinned(optimization: Optimization | None) -> Optimization:
    given = optimization or Optimization()
    on = PinnedMemoryBuffer(enable=True)
    return Optimization(
        input_pinned_memory=given.input_pinned_memory or on,
        output_pinned_memory=given.output_pinned_memory or on,
    )


def _preferred(config: ModelConfig) -> object:
    dynamic = config.dynamic_batching
    if dynamic is None or dynamic.preferred_batch_size or not config.max_batch_size:
        return dynamic
    return dynamic.model_copy(update={"preferred_batch_size": (config.max_batch_size,)})


def _groups(config: ModelConfig, has_gpu: bool, partial: bool) -> tuple[InstanceGroup, ...]:
    given = config.instance_group or (InstanceGroup(name=config.name),)
    groups = tuple(_group(config, k, group, has_gpu) for k, group in enumerate(given))
    # Kinds are known only now.
    checks.check(config.model_copy(update={"instance_group": groups}), partial)
    return groups


def _group(config: ModelConfig, index: int, group: InstanceGroup, has_gpu: bool) -> InstanceGroup:
    """KIND_GPU without `gpus` keeps its empty list: `placement` makes it every GPU."""
    name = group.name or f"{config.name}_{index}"
    kind = group.kind
    if kind == "KIND_AUTO":
        kind = "KIND_GPU" if has_gpu else "KIND_CPU"
    if kind == "KIND_GPU" and not has_gpu:
        raise ConfigError(
            f"instance group '{name}' of model '{config.name}' has kind KIND_GPU "
            "but no GPU is available",
            field=f"instance_group[{index}].kind",
        )
    return group.model_copy(update={"name": name, "kind": kind, "count": max(1, group.count)})
