"""AOT Inductor packages: compiled models with a fixed call spec.

Owns loading, the checks that a package needs beyond its own, and the call. The compiled code does
not look at its inputs unless AOTI_RUNTIME_CHECK_INPUTS is set before its first run. Loads with the
C++ class alone: torch's Python loader would import the whole compiler, 80 MB and 2 s of it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from configs import checks
from configs.errors import ConfigError
from configs.model import ModelConfig
from configs.offer import Offer, check_batch, check_tensors
from configs.parameters import ModelParameters
from deployments import archives
from deployments.errors import ExecutionFailed, InvalidArgument
from deployments.signature import Binding, Signature, bind

from . import Value, faults, leaves, package, place, probing
from .callspec import parse_call_spec
from .rows import cut, padded

_CHECK = re.compile(r"input_handles\[(\d+)\]: (.+)", re.DOTALL)
_TOO_FEW = re.compile(r"dim value is too small at 0, expected it to be >= (\d+), but got: (\d+)")
_SLOTS = re.compile(r"inputs vector size to be (\d+)")

# What `manta optimize` writes into a package: JSON lists of the configured names, by position, and
# the smallest batch that the code takes.
INPUTS_KEY, OUTPUTS_KEY, FEWEST_KEY = "manta_inputs", "manta_outputs", "manta_fewest_rows"


class Aoti:
    label = "AOT Inductor"

    def __init__(
        self,
        loader: Any,
        config: ModelConfig,
        signature: Signature,
        binding: Binding,
        device: torch.device,
        metadata: Mapping[str, str],
        fewest_rows: int = 1,
    ) -> None:
        self._loader = loader
        self._config = config
        self.signature = signature
        self.binding = binding
        self.device = device
        self._optimised = INPUTS_KEY in metadata
        self._fewest_rows = max(int(metadata.get(FEWEST_KEY, 1)), fewest_rows)
        self._order = [slot.position for slot in binding.inputs]
        self._names = {
            slot.position: tensor.name
            for slot, tensor in zip(binding.inputs, config.input, strict=True)
        }

    def run(self, inputs: Sequence[Value | None]) -> list[object]:
        slots: list[Any] = [None] * len(inputs)
        for position, value in zip(self._order, inputs, strict=True):
            slots[position] = value
        if self._optimised:
            self._check_empty(slots)
        rows = slots[0].shape[0] if self._config.max_batch_size else 0
        if 0 < rows < self._fewest_rows:
            return self._run_padded(slots, rows)
        try:
            found = self._loader.run(slots)
        except RuntimeError as error:
            fewest = self._too_few(error, rows)
            if not fewest:
                raise self._explained(error) from error
            self._fewest_rows = fewest
            return self._run_padded(slots, rows)
        return self._outputs(found)

    def _check_empty(self, slots: Sequence[torch.Tensor]) -> None:
        """Such a package is compiled without a lower bound, so that one row is welcome; of nothing
        at all it was never tried."""
        for position, tensor in enumerate(slots):
            if not tensor.numel():
                name = self._names[position]
                raise InvalidArgument(f"input '{name}' is empty, which the compiled model refuses")

    def _run_padded(self, slots: Sequence[torch.Tensor], rows: int) -> list[object]:
        """torch.export takes a dynamic dimension to be at least 2 unless told otherwise, so that a
        single row fails the package's own check: repeat the last row and cut the results."""
        wanted = self._fewest_rows
        try:
            found = self._loader.run(padded(slots, wanted))
        except RuntimeError as error:
            raise self._explained(error) from error
        return self._outputs(cut(found, rows, wanted))

    def _too_few(self, error: RuntimeError, rows: int) -> int:
        found = _TOO_FEW.search(str(error))
        if not rows or found is None or int(found.group(2)) != rows:
            return 0
        return int(found.group(1))

    def _outputs(self, found: Sequence[Any]) -> list[object]:
        expected = len(self.signature.outputs or ())
        if len(found) != expected:
            raise ExecutionFailed(f"the package returned {len(found)} tensors, not {expected}")
        return [found[slot.position] for slot in self.binding.outputs]

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
    path: Path,
    config: ModelConfig,
    parameters: ModelParameters,
    device: str,
    kind: str,
    where: str = "",
) -> Aoti:
    """`where` is what errors call the file, if not by its place in the repository."""
    where = where or place(path, config)
    archive, target = _admit(path, device, kind, where)
    # Instances that share the package run side by side only with a runner each.
    most = max((group.count for group in config.instance_group), default=1)
    runners = max(1, most) if parameters.enable_weight_sharing else 1
    loader = _open(path, config.name, target, where, runners)
    signature = parse_call_spec(*loader.get_call_spec())
    _check_slots(loader, signature)
    told = package.read(path)
    offer = leaves.offer(signature, told.inputs, None, _own_names(archive.metadata))
    check_batch(config, offer)
    check_tensors(config, offer, config.max_batch_size > 0)
    binding = bind(_by_position(config, archive.metadata), signature)
    if offer.batching is None and config.max_batch_size:
        probing.check_rows(loader, config, binding, target)
    first = leaves.batch(told.inputs.values())
    fewest = first.low if first is not None else 1
    return Aoti(loader, config, signature, binding, target, archive.metadata, fewest)


def offer(path: Path, config: ModelConfig, device: str, kind: str) -> Offer:
    """What a package tells of itself; where the configuration lacks outputs, which no package
    describes, it is run twice on zeros. Raises ConfigError."""
    where = place(path, config)
    archive, target = _admit(path, device, kind, where)
    told = package.read(path)
    lacking = not config.output or any(
        tensor.data_type == "TYPE_INVALID" or not tensor.dims for tensor in config.output
    )
    loader = _open(path, config.name, target, where) if lacking or not told.specs else None
    signature = parse_call_spec(*(loader.get_call_spec() if loader is not None else told.specs))
    unknown = [s.name for s in signature.inputs or () if s.position not in told.inputs]
    if unknown and checks.lacks(config):
        raise ConfigError(
            f"the package does not tell what {', '.join(unknown)} must be, since it was made "
            "without its source: list all inputs and outputs in config.pbtxt",
            file=where,
        )
    outputs = None
    if lacking:
        _check_slots(loader, signature)
        outputs = probing.outputs(loader, told.inputs, target, where)
    return leaves.offer(signature, told.inputs, outputs, _own_names(archive.metadata))


def _admit(path: Path, device: str, kind: str, where: str) -> tuple[archives.Archive, torch.device]:
    """The archive and where it runs; raises ConfigError for what cannot run there."""
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
    reason = reason or _refuse_processor(archive.metadata.get("AOTI_CPU_ISA", ""))
    if reason:
        raise ConfigError(reason, file=where)
    return archive, target


def _open(path: Path, model: str, target: torch.device, where: str, runners: int = 1) -> Any:
    os.environ["AOTI_RUNTIME_CHECK_INPUTS"] = "1"
    c: Any = torch._C
    try:
        return c._aoti.AOTIModelPackageLoader(
            str(path),
            "model",
            False,  # run_single_threaded
            runners,
            (target.index or 0) if target.type == "cuda" else -1,
        )
    except (RuntimeError, ValueError) as error:
        if faults.is_fatal(error):
            raise
        text = f"failed to load model '{model}': {faults.clean_text(error)}"
        raise ConfigError(text, file=where) from error


def _own_names(metadata: Mapping[str, str]) -> tuple[dict[int, str], dict[int, str]]:
    """By position, what an optimised version's tensors were called before."""
    inputs, outputs = (
        dict(enumerate(json.loads(metadata.get(key, "[]")))) for key in (INPUTS_KEY, OUTPUTS_KEY)
    )
    return inputs, outputs


def _refuse_processor(wanted: str) -> str:
    """Why this processor cannot run the code: an unknown instruction would end the process."""
    supported: dict[str, Any] = {
        "AVX2": getattr(torch.cpu, "_is_avx2_supported", None),
        "AVX512": getattr(torch.cpu, "_is_avx512_supported", None),
        "AVX512_VNNI": getattr(torch.cpu, "_is_vnni_supported", None),
        "AMX_TILE": getattr(torch.cpu, "_is_amx_tile_supported", None),
    }
    missing = [w for w in wanted.split() if (check := supported.get(w)) is not None and not check()]
    if not missing:
        return ""
    return (
        f"the package was compiled for a processor with {', '.join(missing)}, which this one has "
        "not; compile it on the kind of machine that it runs on"
    )


def _by_position(config: ModelConfig, metadata: Mapping[str, str]) -> ModelConfig:
    """An optimised version keeps its model's names, which need not be of the packages' grammar:
    the package tells which of them lies where."""

    def renamed(tensors: Any, key: str, word: str) -> tuple[Any, ...]:
        places = {name: place for place, name in enumerate(json.loads(metadata.get(key, "[]")))}
        return tuple(
            t.model_copy(update={"name": f"{word}__{places[t.name]}"}) if t.name in places else t
            for t in tensors
        )

    return config.model_copy(
        update={
            "input": renamed(config.input, INPUTS_KEY, "INPUT"),
            "output": renamed(config.output, OUTPUTS_KEY, "OUTPUT"),
        }
    )


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
