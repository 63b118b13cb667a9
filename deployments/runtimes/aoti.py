"""AOT Inductor packages: compiled models with a fixed call spec (spec/backend.md §3).

Owns loading, the checks that a package needs beyond its own, and the call. The compiled code does
not look at its inputs unless AOTI_RUNTIME_CHECK_INPUTS is set before its first run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from configs.errors import ConfigError
from configs.model import ModelConfig
from configs.parameters import ModelParameters
from deployments.errors import ExecutionFailed, InvalidArgument
from deployments.signature import Binding, Signature, bind

from . import Value, archives, faults, place
from .callspec import parse_call_spec

_CHECK = re.compile(r"input_handles\[(\d+)\]: (.+)", re.DOTALL)
_TOO_FEW = re.compile(r"dim value is too small at 0, expected it to be >= (\d+), but got: (\d+)")
_SLOTS = re.compile(r"inputs vector size to be (\d+)")


class Aoti:
    label = "AOT Inductor"

    def __init__(
        self,
        loader: Any,
        config: ModelConfig,
        signature: Signature,
        binding: Binding,
        device: torch.device,
    ) -> None:
        self._loader = loader
        self._config = config
        self.signature = signature
        self.binding = binding
        self.device = device
        self._fewest_rows = 1
        self._order = [slot.position for slot in binding.inputs]
        self._names = {
            slot.position: tensor.name
            for slot, tensor in zip(binding.inputs, config.input, strict=True)
        }

    def run(self, inputs: Sequence[Value | None]) -> list[object]:
        slots: list[Any] = [None] * len(inputs)
        for position, value in zip(self._order, inputs, strict=True):
            slots[position] = value
        rows = slots[0].shape[0] if self._config.max_batch_size else 0
        if 0 < rows < self._fewest_rows:
            return self._run_padded(slots, rows)
        try:
            leaves = self._loader.run(slots)
        except RuntimeError as error:
            fewest = self._too_few(error, rows)
            if not fewest:
                raise self._explained(error) from error
            self._fewest_rows = fewest
            return self._run_padded(slots, rows)
        return self._outputs(leaves)

    def _run_padded(self, slots: Sequence[torch.Tensor], rows: int) -> list[object]:
        """torch.export takes a dynamic dimension to be at least 2 unless told otherwise, so that a
        single row fails the package's own check: repeat the last row and cut the results."""
        wanted = self._fewest_rows
        padded = [
            torch.cat([t, t[-1:].expand(wanted - rows, *t.shape[1:])]).contiguous() for t in slots
        ]
        try:
            leaves = self._loader.run(padded)
        except RuntimeError as error:
            raise self._explained(error) from error
        return self._outputs(
            [t[:rows] if t is not None and t.dim() and t.shape[0] == wanted else t for t in leaves]
        )

    def _too_few(self, error: RuntimeError, rows: int) -> int:
        found = _TOO_FEW.search(str(error))
        if not rows or found is None or int(found.group(2)) != rows:
            return 0
        return int(found.group(1))

    def _outputs(self, leaves: Sequence[Any]) -> list[object]:
        expected = len(self.signature.outputs or ())
        if len(leaves) != expected:
            raise ExecutionFailed(f"the package returned {len(leaves)} tensors, not {expected}")
        return [leaves[slot.position] for slot in self.binding.outputs]

    def _explained(self, error: RuntimeError) -> Exception:
        found = _CHECK.search(str(error))
        if found is None or faults.is_fatal(error) or faults.is_out_of_memory(error):
            return error
        name = self._names[int(found.group(1))]
        return InvalidArgument(
            f"input '{name}' does not fit the compiled model: {found.group(2).strip()}"
        )

    def weight_pointer(self) -> int:
        """The loader's own address: a package does not tell where its constants lie."""
        return id(self._loader)


def load(
    path: Path, config: ModelConfig, parameters: ModelParameters, device: str, kind: str
) -> Aoti:
    where = place(path, config)
    archive = archives.inspect(path)
    reason = archives.refuse_aoti(archive)
    target = torch.device(device)
    if kind == "KIND_MODEL" and archive.device == "cuda":
        target = torch.device("cuda:0")
    if not reason and archive.device and archive.device != target.type:
        reason = (
            f"the package was compiled for {archive.device}, and this instance runs on "
            f"{target.type}; compile it for {target.type} or change the instance group"
        )
    if reason:
        raise ConfigError(reason, file=where)
    os.environ["AOTI_RUNTIME_CHECK_INPUTS"] = "1"
    from torch._inductor.package.package import load_package

    # Instances that share the package run side by side only with a runner each.
    runners = max((group.count for group in config.instance_group), default=1)
    try:
        loader = load_package(
            str(path),
            num_runners=max(1, runners) if parameters.enable_weight_sharing else 1,
            device_index=(target.index or 0) if target.type == "cuda" else -1,
        ).loader
    except (RuntimeError, ValueError) as error:
        if faults.is_fatal(error):
            raise
        text = f"failed to load model '{config.name}': {faults.clean_text(error)}"
        raise ConfigError(text, file=where) from error
    specs = loader.get_call_spec()
    signature = parse_call_spec(*specs)
    _check_slots(loader, signature)
    return Aoti(loader, config, signature, bind(config, signature), target)


def _check_slots(loader: Any, signature: Signature) -> None:
    """A bool, int or None among the sample inputs is a leaf of the spec and no input of the code;
    only the refusal of an empty call tells how many the code wants."""
    try:
        loader.run([])
    except RuntimeError as error:
        found = _SLOTS.search(str(error))
        if found is None:
            return
        wanted, named = int(found.group(1)), len(signature.inputs or ())
        if wanted != named:
            raise ConfigError(
                f"the package names {named} inputs and its code takes {wanted}: all leaves must be "
                "tensors; export it without int, bool or None among the sample inputs",
                field="input",
            ) from error
