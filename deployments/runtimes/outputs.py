"""Finds the configured outputs in whatever a model returned.

For TorchScript and eager models, whose result is known only once they ran.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from configs.model import ModelConfig
from deployments.errors import ExecutionFailed, InvalidArgument
from deployments.signature import Binding

from .strings import is_text


def pick(result: Any, config: ModelConfig, binding: Binding, list_is_tuple: bool) -> list[object]:
    """One value per configured output. `list_is_tuple`: whether a list of tensors has positions."""
    leaves: Sequence[Any] | None = None
    found: list[object] = []
    for output, slot in zip(config.output, binding.outputs, strict=True):
        if slot.position < 0:
            found.append(_walk(result, slot.path, output.name))
            continue
        if leaves is None:
            alone = len(config.output) == 1 and output.data_type == "TYPE_STRING"
            if list_is_tuple and alone and isinstance(result, list) and is_text(result):
                leaves = [result]  # nested lists of strings are one tensor of strings
            else:
                leaves = _positions(result, output.data_type, list_is_tuple)
        if slot.position >= len(leaves):
            raise InvalidArgument(
                f"The output {output.name} in the model configuration refers to an output index "
                f"which doesn't exist. This model has {len(leaves)} outputs"
            )
        value = leaves[slot.position]
        if not (isinstance(value, torch.Tensor) or is_strings(value) or list_is_tuple):
            _refuse(value, f" at index {slot.position}")
        found.append(value)
    return found


def is_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _positions(result: Any, data_type: str, list_is_tuple: bool) -> Sequence[Any]:
    if isinstance(result, tuple):
        return result
    if isinstance(result, torch.Tensor):
        return [result]
    if is_strings(result) and (result or not list_is_tuple or data_type == "TYPE_STRING"):
        return [result]
    if isinstance(result, list) and list_is_tuple:
        return result
    if list_is_tuple and not isinstance(result, Mapping):
        return [result]  # a scalar or None is refused by its output's own check
    _refuse(result, "")
    return []


def _walk(result: Any, path: tuple[str | int, ...], name: str) -> object:
    value = result
    for step in path:
        try:
            if isinstance(value, Mapping):
                value = value[step] if step in value else value[str(step)]
            elif isinstance(value, (tuple, list)) and isinstance(step, int):
                value = value[step]
            elif step in _fields(value):
                value = getattr(value, str(step))
            else:
                raise KeyError(step)
        except (KeyError, IndexError):
            raise InvalidArgument(
                f"The output {name} in the model configuration refers to an output which doesn't "
                f"exist. This model returned {_shape(result)}"
            ) from None
    return value


def _fields(value: Any) -> Sequence[str]:
    """Of a named tuple or a dataclass."""
    if isinstance(value, tuple):
        return getattr(value, "_fields", ())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [field.name for field in dataclasses.fields(value)]
    return ()


def _refuse(value: Any, where: str) -> None:
    raise ExecutionFailed(
        "output must be of type Tensor, List[str] or Tuple containing one of these two types. "
        f"Got type {_shape(value)}{where}; name outputs RESULT[..] to reach inside"
    )


def _shape(value: Any, depth: int = 0) -> str:
    """A result in a few words: `dict(AAA: Tensor, BBB: tuple(Tensor, Tensor))`."""
    if isinstance(value, torch.Tensor):
        return "Tensor"
    inner: list[str] = []
    if depth < 3 and isinstance(value, Mapping):
        inner = [f"{key}: {_shape(item, depth + 1)}" for key, item in list(value.items())[:16]]
    elif depth < 3 and isinstance(value, (tuple, list)):
        inner = [_shape(item, depth + 1) for item in list(value)[:16]]
    name = type(value).__name__
    return f"{name}({', '.join(inner)})" if inner else name
