"""Runtimes: one file per kind of model; each loads an artifact, describes it and runs it.

`load` is the door: it picks the kind. Called by `instance.py`, on the instance's own thread.
What a process or thread must be set to first is `settings.py`; errors' text is `faults.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, TypeAlias

import torch

from configs.complete import artifact_filename, runtime_kind
from configs.errors import ConfigError
from configs.model import ModelConfig
from configs.parameters import ModelParameters
from deployments.signature import Binding, Signature
from deployments.types import Array

Value: TypeAlias = "torch.Tensor | list[str] | Array"  # strings: a list, or an object array


class Runtime(Protocol):
    """A loaded model. `device` is where inputs belong; `label` names the kind in the log."""

    signature: Signature
    binding: Binding
    device: torch.device
    label: str

    def run(self, inputs: Sequence[Value | None]) -> list[object]:
        """Inputs and outputs in config order. What comes out is not checked yet."""
        ...

    def weight_pointer(self) -> int:
        """The address of the first weight, the same for all who share it; 0 without weights."""
        ...


def load(
    path: Path, config: ModelConfig, parameters: ModelParameters, device: str, kind: str
) -> Runtime:
    """Raises ConfigError, whose file is relative to the model repository."""
    from . import aoti, eager, exported, torchscript

    if not path.is_file():
        raise ConfigError("cannot find the file for model instance", file=place(path, config))
    chosen = runtime_kind(config, (path.name,))
    if chosen == "aoti":
        return aoti.load(path, config, parameters, device, kind)
    if chosen == "exported":
        return exported.load(path, config, parameters, device, kind)
    if chosen == "eager":
        return eager.load(path, config, parameters, device, kind)
    loaded = torchscript.load(path, config, parameters, device, kind)
    if parameters.enable_cuda_graphs and loaded.device.type == "cuda":
        from . import graphs

        return graphs.Graphed(loaded)
    return loaded


def place(path: Path, config: ModelConfig) -> str:
    """`model/1/model.pt`: what of a path may be told to clients."""
    folder = version_folder(path, config)
    within = path.relative_to(folder).parts
    return "/".join((config.name or folder.parent.name, folder.name, *within))


def version_folder(path: Path, config: ModelConfig) -> Path:
    """The version's directory, in which an artifact may lie deeper, and its weights beside it."""
    for name in (artifact_filename(config), *config.cc_model_filenames.values()):
        between = Path(name).parts[:-1]
        if between and path.parent.parts[-len(between) :] == between:
            return path.parents[len(between)]
    return path.parent
