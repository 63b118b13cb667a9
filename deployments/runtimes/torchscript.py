"""TorchScript: `torch.jit` modules, scripted, traced or frozen.

Owns loading and the call; what `forward` takes is read by `schema.py`. Thread and process settings
are elsewhere.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from configs.errors import ConfigError
from configs.model import ModelConfig
from configs.parameters import ModelParameters
from deployments import archives
from deployments.signature import Binding, Signature

from . import Value, devices, faults, place, schema
from .arrangement import Arrangement
from .outputs import pick
from .ragged import bind_all


class TorchScript:
    label = "TorchScript"

    def __init__(
        self,
        module: Any,
        config: ModelConfig,
        signature: Signature,
        binding: Binding,
        device: torch.device,
        frozen: bool = False,
    ) -> None:
        self.module = module
        self._config = config
        self.signature = signature
        self.binding = binding
        self.device = device
        self._frozen = frozen
        self._arrangement = Arrangement(config, binding, signature.called)

    def run(self, inputs: Sequence[Value | None]) -> list[object]:
        result = self.module(*self.arrange(inputs))
        return pick(result, self._config, self.binding, list_is_tuple=False)

    def arrange(self, inputs: Sequence[Value | None]) -> list[Any]:
        """Inputs in config order as the arguments of `forward`."""
        return self._arrangement.pack(inputs)[0]  # a loaded module takes all by position

    def weight_pointer(self) -> int:
        for tensor in itertools.chain(self.module.parameters(), self.module.buffers()):
            return int(tensor.data_ptr())
        return id(self.module) if self._frozen else 0  # its weights are constants of the code


def load(
    path: Path, config: ModelConfig, parameters: ModelParameters, device: str, kind: str
) -> TorchScript:
    where = place(path, config)
    module, inputs_at = read(path, config.name, device, kind, where)
    signature = schema.describe(module, config.name, schema.named_fields(path))
    if parameters.enable_freezing:
        module = _freeze(module, where)
    binding = bind_all(config, signature)
    return TorchScript(module, config, signature, binding, inputs_at, parameters.enable_freezing)


def read(path: Path, model: str, device: str, kind: str, where: str) -> tuple[Any, torch.device]:
    """The module and where its inputs belong; raises ConfigError."""
    reason = archives.refuse_torchscript(archives.inspect(path))
    if reason:
        raise ConfigError(reason, file=where)
    # KIND_MODEL respects the devices that the file names.
    target = None if kind == "KIND_MODEL" else torch.device(device)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)
            module: Any = torch.jit.load(str(path), map_location=target)  # type: ignore[no-untyped-call]
            module.eval()
    except (RuntimeError, ValueError, NotImplementedError) as error:
        if faults.is_fatal(error):
            raise
        text = f"failed to load model '{model}': {faults.clean_text(error)}"
        raise ConfigError(text, file=where) from error
    # KIND_MODEL: inputs stay on the host, unless the model names no device and there is a GPU.
    return module, target or torch.device("cuda:0" if devices.settle(module) else "cpu")


def _freeze(module: Any, where: str) -> Any:
    """Weights become constants, batch norms part of the convolutions before them, and on the host
    convolutions get their weights in oneDNN's own layout. Answers differ in their last digits."""
    optimize: Any = torch.jit.optimize_for_inference
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)
            return optimize(module)
    except RuntimeError as error:
        if faults.is_fatal(error):
            raise
        text = f"ENABLE_FREEZING: failed to freeze the model: {faults.clean_text(error)}"
        raise ConfigError(text, file=where, field='parameters["ENABLE_FREEZING"]') from error
