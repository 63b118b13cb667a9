"""Eager models: an nn.Module class in a .py file, weights beside it (spec/backend.md §1.4).

Owns the import, the state dict, `torch.compile` and the call. The file is the repository owner's
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
from deployments.signature import Binding, Signature, bind

from . import Value, faults, place
from .outputs import pick

logger = logging.getLogger("manta.runtimes")

_COMPILE = 'parameters["TORCH_COMPILE_OPTIONAL_PARAMETERS"]'


class Eager:
    label = "eager"

    def __init__(
        self,
        module: torch.nn.Module,
        call: Any,
        config: ModelConfig,
        binding: Binding,
        device: torch.device,
    ) -> None:
        self.module = module
        self._call = call
        self._config = config
        self.signature = Signature(None, strings=False)
        self.binding = binding
        self.device = device

    def run(self, inputs: Sequence[Value | None]) -> list[object]:
        arguments, keywords = arrange(self.binding, inputs)
        result = self._call(*arguments, **keywords)
        found = pick(result, self._config, self.binding, list_is_tuple=True)
        # The module may return a tensor that it keeps and changes in its next run; a host tensor
        # would be sent from the very same memory.
        return [
            v.clone() if isinstance(v, torch.Tensor) and v.device.type == "cpu" else v
            for v in found
        ]

    def weight_pointer(self) -> int:
        for tensor in itertools.chain(self.module.parameters(), self.module.buffers()):
            return int(tensor.data_ptr())
        return 0


def arrange(binding: Binding, inputs: Sequence[Value | None]) -> tuple[list[Any], dict[str, Any]]:
    """Puts each input where its path says; what lies deeper than one step is a dict or a tuple."""
    positional: dict[Any, Any] = {}
    keywords: dict[Any, Any] = {}
    for slot, value in zip(binding.inputs, inputs, strict=True):
        node = positional if slot.path[0] == "ARGS" else keywords
        for step in slot.path[1:-1]:
            node = node.setdefault(step, {})
        node[slot.path[-1]] = value
    arguments = [_container(positional[i]) for i in range(len(positional))]
    return arguments, {str(key): _container(value) for key, value in keywords.items()}


def _container(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    built = {key: _container(value) for key, value in node.items()}
    if all(isinstance(key, int) for key in built) and sorted(built) == [*range(len(built))]:
        return tuple(built[key] for key in range(len(built)))
    return built


def load(
    path: Path, config: ModelConfig, parameters: ModelParameters, device: str, kind: str
) -> Eager:
    where = place(path, config)
    options = dict(parameters.torch_compile_optional_parameters)
    if not options.get("disable"):
        _check_compiler(options, where)
    binding = bind(config, Signature(None, strings=False))
    module = _construct(_import(path, where), where)
    _load_weights(module, path, config, "cpu" if kind == "KIND_MODEL" else device)
    target = torch.device(device)
    if kind == "KIND_MODEL":
        first = next(module.parameters(), None)
        if first is None:
            reason = "cannot determine the device of a KIND_MODEL model without parameters"
            raise ConfigError(reason, file=where)
        target = first.device
    else:
        module.to(target)
    module.eval()
    _warn_of_order(module, config)
    try:
        call = torch.compile(module, **options)
    except (TypeError, RuntimeError, ValueError) as error:
        reason = f"torch.compile refused its parameters: {faults.clean_text(error)}"
        raise ConfigError(reason, file=where, field=_COMPILE) from error
    return Eager(module, call, config, binding, target)


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
        raise ConfigError("no subclass of torch.nn.Module found", file=where)
    chosen = candidates[0]
    try:
        return chosen()
    except Exception as error:
        reason = f"{chosen.__name__}() failed, which is called without arguments: "
        raise ConfigError(reason + faults.clean_text(error), file=where) from error


def _load_weights(module: torch.nn.Module, path: Path, config: ModelConfig, device: str) -> None:
    weights = path.with_suffix(".pt")
    if not weights.is_file():
        return  # Fine: the constructor's own weights (§1.4)
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
