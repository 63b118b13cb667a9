"""A model repository on disk for the tests of `manta optimize`."""

from __future__ import annotations

from pathlib import Path

import torch

from tests import models

MLP = """\
platform: "pytorch_libtorch"
max_batch_size: 8
input [ { name: "x" data_type: TYPE_FP32 dims: [ 8 ] } ]
output [ { name: "y" data_type: TYPE_FP32 dims: [ 4 ] } ]
instance_group [ { kind: KIND_CPU count: 1 } ]
"""

EAGER = """\
import torch


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 4)

    def forward(self, x):
        return self.linear(x)
"""

THREADS: set[int] = set()
TELLS_THREADS = EAGER.replace(
    "        return",
    "        from tests.unit.cluster.optimize import repositories\n\n"
    "        repositories.THREADS.add(torch.get_num_threads())\n"
    "        return",
)


def scripted(
    root: Path, module: torch.nn.Module | None = None, name: str = "mlp", text: str = MLP
) -> Path:
    """A model with one TorchScript version; returns its directory."""
    models.save_torchscript(models.mlp() if module is None else module, root, name)
    (root / name / "config.pbtxt").write_text(text)
    return root / name


def eager(root: Path, name: str = "net", code: str = EAGER) -> Path:
    models.save_eager(code, root, name)
    text = MLP.replace('platform: "pytorch_libtorch"', 'runtime: "model.py"\nbackend: "pytorch"')
    (root / name / "config.pbtxt").write_text(text)
    return root / name
