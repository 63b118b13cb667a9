"""The same network, weights and all, as the file of each runtime.

Compiled and exported files are made once and kept beside the TorchScript file, under a name that
changes with torch, the processor and the networks' source. Used by `contestants.py`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import models
from benchmarks.models import MAX_BATCH, Model

RUNTIMES = ("torchscript", "aoti", "eager", "exported")

# The class is in the networks' own file, which lies beside it. Its weights are in model.pt.
SOURCE = """\
import torch

import networks


class Served(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = networks.MODELS["{name}"].build()

    def forward(self, x):
        return self.inner(x)
"""
# Any batch with one compilation; a batch of one is another, and both are done before it is ready.
COMPILED = """\
parameters: {{
  key: "TORCH_COMPILE_OPTIONAL_PARAMETERS" value: {{ string_value: "{{\\"dynamic\\": true}}" }}
}}
model_warmup [ {{
  name: "one row" batch_size: 1
  inputs {{
    key: "INPUT__0" value: {{ data_type: TYPE_{datatype} dims: [ {dims} ] zero_data: true }}
  }}
}} ]
"""
SCRIPT_THREADS = 'parameters: { key: "INTRA_OP_THREAD_COUNT" value: { string_value: "1" } }\n'


def write(runtime: str, model: Model, script: Path, version: Path) -> str:
    """Puts the model into a version directory; returns what config.pbtxt must say of the runtime.

    `script` is its TorchScript file. One intra-op thread in all of them.
    """
    if runtime == "eager":
        state = models.network(model).state_dict()
        torch.save({f"inner.{name}": value for name, value in state.items()}, version / "model.pt")
        (version / "model.py").write_text(SOURCE.format(name=model.name))
        shutil.copy(models.__file__, version / "networks.py")
        dims = ", ".join(map(str, model.row))
        engine = 'backend: "pytorch"\nruntime: "model.py"\n'
        return engine + COMPILED.format(datatype=model.datatype, dims=dims)
    if runtime == "torchscript":
        shutil.copy(script, version / "model.pt")
        return 'platform: "pytorch_libtorch"\n' + SCRIPT_THREADS
    make = _compile if runtime == "aoti" else _export
    shutil.copy(_kept(model, script.parent, runtime, make), version / "model.pt2")
    platform = "torch_aoti" if runtime == "aoti" else "torch_export"
    return f'platform: "{platform}"\n' + SCRIPT_THREADS


def _kept(model: Model, folder: Path, runtime: str, make: Callable[[Model, Path], None]) -> Path:
    facts = f"{torch.__version__} {torch.backends.cpu.get_cpu_capability()}".encode()
    source = Path(models.__file__).read_bytes() + Path(__file__).read_bytes()
    digest = hashlib.sha256(facts + source).hexdigest()[:12]
    file = folder / f"{model.name}-{runtime}-{digest}.pt2"
    if not file.exists():
        part = folder / f"{model.name}-{runtime}-{os.getpid()}.pt2"
        make(model, part)
        part.replace(file)  # whole or not there
    return file


def program(model: Model) -> Any:
    """torch.export's program; the batch is any from 1 to 32."""
    from torch.fx.experimental import _config as fx_config

    row = torch.from_numpy(model.one_row())
    sample = row.expand(4, *model.row).contiguous()
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    # Otherwise export takes a dynamic dimension to be at least 2.
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with fx_config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
            net = models.network(model)
            return torch.export.export(net, (sample,), dynamic_shapes=({0: batch},), strict=False)


def _compile(model: Model, file: Path) -> None:
    from torch._inductor import aoti_compile_and_package
    from torch.fx.experimental import _config as fx_config

    made = program(model)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with fx_config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
            aoti_compile_and_package(made, package_path=str(file))


def _export(model: Model, file: Path) -> None:
    torch.export.save(program(model), file)
