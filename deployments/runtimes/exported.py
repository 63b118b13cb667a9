"""Programs of torch.export.save: run as modules, or compiled with AOT Inductor when they load.

Owns loading, the bounds that a program was exported with, and the call; names are those of AOTI
packages. Archives are vetted before torch unpickles any of them (`vetting.py`).
"""

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from configs.errors import ConfigError
from configs.model import ModelConfig
from configs.offer import Offer, check_batch, check_tensors
from configs.parameters import ModelParameters
from deployments import archives
from deployments.errors import ExecutionFailed, InvalidArgument
from deployments.signature import Binding, bind

from . import Value, aoti, compiling, faults, leaves, place, program, vetting
from .leaves import Leaf
from .program import Program
from .rows import cut, padded

logger = logging.getLogger("manta.runtimes")


class Exported:
    label = "exported program"

    def __init__(
        self,
        module: Any,
        in_spec: Any,
        config: ModelConfig,
        found: Program,
        binding: Binding,
        device: torch.device,
    ) -> None:
        self.module = module
        self._in_spec = in_spec
        self._batching = config.max_batch_size > 0
        self.signature = found.signature
        self.binding = binding
        self.device = device
        self._leaves: list[Any] = [found.constants.get(k) for k in range(found.count)]
        self._results = len(found.signature.outputs or ())
        self._checks = [
            (slot.position, tensor.name, found.inputs[slot.position])
            for slot, tensor in zip(binding.inputs, config.input, strict=True)
        ]
        first = leaves.batch(found.inputs.values())
        self._fewest_rows = 1 if first is None else first.fewest

    def run(self, inputs: Sequence[Value | None]) -> list[object]:
        tensors: list[Any] = [*inputs]
        given = tensors[0].shape[0] if self._batching else 0
        wanted = self._fewest_rows
        if 0 < given < wanted:
            return cut(self._call(padded(tensors, wanted)), given, wanted)
        return self._call(tensors)

    def _call(self, inputs: Sequence[torch.Tensor]) -> list[object]:
        slots = list(self._leaves)
        for (position, name, leaf), tensor in zip(self._checks, inputs, strict=True):
            reason = _misfit(leaf, tensor)
            if reason:
                raise InvalidArgument(f"input '{name}' does not fit the exported program: {reason}")
            slots[position] = tensor
        arguments, keywords = pytree.tree_unflatten(slots, self._in_spec)
        try:
            result = self.module(*arguments, **keywords)
        except AssertionError as error:  # a guard: sizes that the program was not exported for
            text = str(error).removeprefix("Guard failed: ")
            raise InvalidArgument(
                f"the inputs do not fit the exported program, which needs {text}"
            ) from error
        found = pytree.tree_leaves(result)
        if len(found) != self._results:
            raise ExecutionFailed(f"the program returned {len(found)} values, not {self._results}")
        return [found[slot.position] for slot in self.binding.outputs]

    def weight_pointer(self) -> int:
        for tensor in itertools.chain(self.module.parameters(), self.module.buffers()):
            return int(tensor.data_ptr())
        return 0


def _misfit(leaf: Leaf, tensor: torch.Tensor) -> str:
    found = str(tensor.dtype).removeprefix("torch.")
    if found != leaf.torch_type:
        return f"unmatched dtype, expected: {leaf.torch_type}, but got: {found}"
    sizes = leaf.sizes or ()
    if tensor.dim() != len(sizes):
        return f"unmatched rank, expected: {len(sizes)}, but got: {tensor.dim()}"
    for axis, (size, given) in enumerate(zip(sizes, tensor.shape, strict=True)):
        if reason := size.misfit(given):
            return f"unmatched dim value at {axis}, {reason}"
    return ""


def describe(path: Path, where: str) -> tuple[Program, Offer]:
    """What the archive says of itself; raises ConfigError. Runs and unpickles nothing."""
    reason = archives.refuse_exported(archives.inspect(path))
    if reason:
        raise ConfigError(reason, file=where)
    found = program.read(path, where)
    return found, leaves.offer(found.signature, found.inputs, found.outputs)


def load(
    path: Path, config: ModelConfig, parameters: ModelParameters, device: str, kind: str
) -> Exported | aoti.Aoti:
    where = place(path, config)
    found, offer = describe(path, where)
    check_batch(config, offer)
    check_tensors(config, offer, config.max_batch_size > 0)
    binding = bind(config, found.signature)
    if parameters.enable_weight_sharing and found.updates:
        raise ConfigError(
            f"ENABLE_WEIGHT_SHARING: the program changes its own state while it runs "
            f"({', '.join(found.updates)}), which instances must not share",
            file=where,
            field='parameters["ENABLE_WEIGHT_SHARING"]',
        )
    target = torch.device(device)
    if kind == "KIND_MODEL" and torch.cuda.is_available():
        target = torch.device("cuda:0")
    vetting.check(path, where)
    if parameters.compile_on_load:
        if found.constants:
            raise ConfigError(
                "COMPILE_ON_LOAD: the program has inputs that are no tensors, which compiled code "
                "does not take",
                file=where,
                field='parameters["COMPILE_ON_LOAD"]',
            )
        package = compiling.package(path, found.device, target, where)
        return aoti.load(package, config, parameters, device, kind, where)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Outside inference mode: a program's own buffers must stay ordinary tensors.
            with torch.inference_mode(False), torch.no_grad():
                loaded = torch.export.load(str(path))
                if found.device != target.type:
                    loaded = moved(loaded, target)
                module = loaded.module()
    except Exception as error:
        if faults.is_fatal(error):
            raise
        text = f"failed to load model '{config.name}': {faults.clean_text(error)}"
        raise ConfigError(text, file=where) from error
    return Exported(module, loaded.call_spec.in_spec, config, found, binding, target)


def moved(loaded: Any, target: torch.device) -> Any:
    """The program on another device than that on which it was exported."""
    from torch.export.passes import move_to_device_pass

    return move_to_device_pass(loaded, str(target))
