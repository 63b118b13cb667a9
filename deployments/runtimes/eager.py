"""Eager models: an nn.Module class in a .py file, weights beside it.

Owns the import, the weights, `torch.compile` and the call. The file is the repository owner's
code and runs with the replica's rights; weights are never unpickled beyond plain tensors.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import itertools
import logging
import os
import pickle
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from configs.errors import ConfigError
from configs.model import ModelConfig
from configs.parameters import ModelParameters
from deployments.signature import Binding, Signature

from . import Value, devices, faults, hints, place
from .arrangement import Arrangement
from .outputs import pick
from .ragged import bind_all

logger = logging.getLogger("manta.runtimes")

_COMPILE = 'parameters["TORCH_COMPILE_OPTIONAL_PARAMETERS"]'


class Eager:
    label = "eager"

    def __init__(
        self,
        module: torch.nn.Module,
        call: Any,
        config: ModelConfig,
        signature: Signature,
        binding: Binding,
        device: torch.device,
    ) -> None:
        self.module = module
        self._call = call
        self._config = config
        self.signature = signature
        self.binding = binding
        self._arrangement = Arrangement(config, binding, signature.called)
        self.device = device

    def run(self, inputs: Sequence[Value | None]) -> list[object]:
        arguments, keywords = self.arrange(inputs)
        result = self._call(*arguments, **keywords)
        found = pick(result, self._config, self.binding, list_is_tuple=True)
        # The module may return a tensor that it keeps and changes in its next run; a host tensor
        # would be sent from the very same memory.
        return [
            v.clone() if isinstance(v, torch.Tensor) and v.device.type == "cpu" else v
            for v in found
        ]

    def arrange(self, inputs: Sequence[Value | None]) -> tuple[list[Any], dict[str, Any]]:
        """Inputs in config order as the positional and keyword arguments of `forward`."""
        return self._arrangement.pack(inputs)

    def weight_pointer(self) -> int:
        for tensor in itertools.chain(self.module.parameters(), self.module.buffers()):
            return int(tensor.data_ptr())
        return 0


def load(
    path: Path, config: ModelConfig, parameters: ModelParameters, device: str, kind: str
) -> Eager:
    where = place(path, config)
    options = dict(parameters.torch_compile_optional_parameters)
    if not options.get("disable"):
        _check_compiler(options, where)
    module = _construct(_import(path, where), where)
    signature = Signature(None, objects=True, forward=hints.describe(module))
    binding = bind_all(config, signature)
    _load_weights(module, path, config, "cpu" if kind == "KIND_MODEL" else device)
    target = torch.device(device)
    if kind == "KIND_MODEL":
        first = next(module.parameters(), None)
        if first is None:
            reason = "cannot determine the device of a KIND_MODEL model without parameters"
            raise ConfigError(reason, file=where)
        devices.settle(module)
        target = first.device
    else:
        module.to(target)
    module.eval()
    _warn_of_order(module, config)
    return Eager(module, _compiled(module, options, where), config, signature, binding, target)


def _compiled(module: torch.nn.Module, options: dict[str, Any], where: str) -> Any:
    if options == {"disable": True}:
        return module  # as torch.compile would, which first imports its compiler: seconds of CPU
    try:
        return torch.compile(module, **options)
    except (TypeError, RuntimeError, ValueError) as error:
        reason = f"torch.compile refused its parameters: {faults.clean_text(error)}"
        raise ConfigError(reason, file=where, field=_COMPILE) from error


def _warn_of_order(module: torch.nn.Module, config: ModelConfig) -> None:
    """Tensors go by position, as in Triton; names that say another order are worth a line."""
    names = [tensor.name for tensor in config.input]
    arguments = [n for n in inspect.signature(module.forward).parameters if n in names]
    ordinals = [f"INPUT__{index}" for index in range(len(names))]
    for natural in (arguments, ordinals):
        if sorted(natural) == sorted(names) and natural != names:
            logger.warning(
                "inputs of '%s' go to forward by position: %s, although their names say %s",
                config.name,
                ", ".join(names),
                ", ".join(natural),
            )


def _check_compiler(options: dict[str, Any], where: str) -> None:
    """Inductor compiles at the first request; a missing compiler is better said at load."""
    if options.get("backend", "inductor") != "inductor":
        return
    if missing := missing_compiler():
        raise ConfigError(
            f"torch.compile needs {missing}: install g++, or disable compilation with "
            'TORCH_COMPILE_OPTIONAL_PARAMETERS = {"disable": true}',
            file=where,
        )


def missing_compiler() -> str:
    """What Inductor looked for in vain; "" when it finds a C++ compiler."""
    from torch._inductor import config as inductor

    configured = inductor.cpp.cxx
    names = [configured] if isinstance(configured, str) else [n for n in configured if n]
    names = [*dict.fromkeys([*([os.environ["CXX"]] if os.environ.get("CXX") else []), *names])]
    if any(shutil.which(str(name).split()[0]) for name in names):
        return ""
    return (
        "a C++ compiler and none is installed (looked for "
        f"{', '.join(str(name) for name in names)})"
    )


def _import(path: Path, where: str) -> ModuleType:
    """Under a name of its own, so that two models' model.py never meet in sys.modules.

    The file's folder is importable while it runs, so that it may import what lies beside it.
    """
    name = "manta_model_" + hashlib.sha256(os.path.realpath(path).encode()).hexdigest()[:16]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError("this file cannot be imported", file=where)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and torch.compile look their module up there
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        kind = type(error).__name__
        raise ConfigError(
            f"failed to import: {kind}: {faults.clean_text(error)}", file=where
        ) from error
    finally:
        sys.path.remove(str(path.parent))
    return module


def _construct(source: ModuleType, where: str) -> torch.nn.Module:
    """The alphabetically first nn.Module class that the file itself defines.

    Triton counts imported classes too, so that `from torch.nn import Linear` may be served instead
    of `Net`; here they count only when the file defines none.
    """
    classes = {
        name: value
        for name, value in sorted(vars(source).items())
        if isinstance(value, type) and issubclass(value, torch.nn.Module)
    }
    own = [value for value in classes.values() if value.__module__ == source.__name__]
    candidates = own or list(classes.values())
    if not candidates:
        hint = ""
        if hasattr(source, "TritonPythonModel"):
            hint = '; a TritonPythonModel needs backend: "python" in its config.pbtxt'
        raise ConfigError(f"no subclass of torch.nn.Module found{hint}", file=where)
    chosen = candidates[0]
    try:
        return chosen()
    except Exception as error:
        reason = f"{chosen.__name__}() failed, which is called without arguments: "
        raise ConfigError(reason + faults.clean_text(error), file=where) from error


def _load_weights(module: torch.nn.Module, path: Path, config: ModelConfig, device: str) -> None:
    """From what lies beside the file under its name; without, the constructor's own are fine."""
    weights, tensors = path.with_suffix(".pt"), path.with_suffix(".safetensors")
    if weights.is_file() and tensors.is_file():
        raise ConfigError(
            f"there are weights in {weights.name} and in {tensors.name}; keep one of them",
            file=place(tensors, config),
        )
    if tensors.is_file():
        _load_safetensors(module, tensors, config, device)
    elif weights.is_file():
        _load_state_dict(module, weights, config, device)


def _load_safetensors(
    module: torch.nn.Module, tensors: Path, config: ModelConfig, device: str
) -> None:
    where = place(tensors, config)
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        reason = "the package safetensors is missing; install manta-server[safetensors]"
        raise ConfigError(reason, file=where) from error
    try:
        state = load_file(tensors, device=device)
    except (SafetensorError, OSError, ValueError) as error:
        reason = f"this is not a file of safetensors: {_first_line(error)}"
        raise ConfigError(reason, file=where) from error
    try:
        missing, unexpected = module.load_state_dict(state, strict=False)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(faults.clean_text(error), file=where) from error
    own = module.state_dict()
    # The format holds a tensor once, under one of its names: the others are not missing.
    filled = {_memory(own[name]) for name in state if name in own}
    missing = [n for n in missing if n not in own or _memory(own[n]) not in filled]
    wrong = [
        f"{what} key(s) in the weights: {', '.join(map(repr, sorted(names)))}"
        for what, names in (("Missing", missing), ("Unexpected", unexpected))
        if names
    ]
    if wrong:
        name = type(module).__name__
        raise ConfigError(f"the weights do not fit {name}: {'; '.join(wrong)}", file=where)


def _memory(tensor: Any) -> object:
    """What two names of one tensor have in common; what is no tensor is only itself."""
    if not isinstance(tensor, torch.Tensor):
        return id(tensor)
    storage = tensor.untyped_storage()._cdata
    return storage, tensor.storage_offset(), tensor.shape, tensor.stride()


def _load_state_dict(
    module: torch.nn.Module, weights: Path, config: ModelConfig, device: str
) -> None:
    where = place(weights, config)
    try:
        state = torch.load(weights, map_location=device, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, OSError) as error:
        raise ConfigError(
            "this is not a state dict of plain tensors; save it with torch.save("
            f"model.state_dict(), '{weights.name}'): {_first_line(error)}",
            file=where,
        ) from error
    if not isinstance(state, dict):
        raise ConfigError(f"this is a {type(state).__name__}, not a state dict", file=where)
    try:
        module.load_state_dict(state, strict=True)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(faults.clean_text(error), file=where) from error


def _first_line(error: BaseException) -> str:
    return (faults.clean_text(error).splitlines() or [""])[0]
