"""The model that the benchmark serves, its repository, and one request for it in wire form.

512-1024-1024-256 on [1, 512] FP32, as TorchScript, on one CPU instance with one thread. Used by
`bench.py`; `baseline.py` loads the very same file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

WIDTHS = (512, 1024, 1024, 256)
HEADER = "Inference-Header-Content-Length"
PATH = "/v2/models/mlp/infer"
CONFIG = """\
name: "mlp"
platform: "pytorch_libtorch"
max_batch_size: 32
input [ {{ name: "INPUT__0" data_type: TYPE_FP32 dims: [ {first} ] }} ]
output [ {{ name: "OUTPUT__0" data_type: TYPE_FP32 dims: [ {last} ] }} ]
instance_group [ {{ kind: KIND_CPU count: 1 }} ]
dynamic_batching {{ max_queue_delay_microseconds: {delay_us} }}
parameters: {{ key: "INTRA_OP_THREAD_COUNT" value: {{ string_value: "1" }} }}
"""


@dataclass(frozen=True, slots=True)
class Request:
    """A whole v2 body: `header_bytes` of JSON, then the tensor. `expected` is torch's answer."""

    body: bytes
    header_bytes: int
    expected: np.ndarray


def build_repository(folder: Path, delay_us: int, seed: int = 0) -> Path:
    """Writes `folder`/mlp and returns the model's file."""
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for before, after in zip(WIDTHS, WIDTHS[1:], strict=False):
        linear = nn.Linear(before, after)
        with torch.no_grad():
            linear.weight.copy_(torch.randn(after, before, generator=generator) / before**0.5)
            linear.bias.zero_()
        layers += [linear, nn.ReLU()]
    version = folder / "mlp" / "1"
    version.mkdir(parents=True, exist_ok=True)
    config = CONFIG.format(first=WIDTHS[0], last=WIDTHS[-1], delay_us=delay_us)
    (folder / "mlp" / "config.pbtxt").write_text(config)
    torch.jit.script(nn.Sequential(*layers[:-1]).eval()).save(str(version / "model.pt"))
    return version / "model.pt"


def make_request(model_file: Path, seed: int = 1) -> Request:
    tensor = torch.randn(1, WIDTHS[0], generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        expected = torch.jit.load(model_file)(tensor).numpy()
    raw = tensor.numpy().tobytes()
    head = {
        "inputs": [
            {
                "name": "INPUT__0",
                "shape": [1, WIDTHS[0]],
                "datatype": "FP32",
                "parameters": {"binary_data_size": len(raw)},
            }
        ],
        "outputs": [{"name": "OUTPUT__0", "parameters": {"binary_data": True}}],
    }
    header = json.dumps(head, separators=(",", ":")).encode()
    return Request(header + raw, len(header), expected)


def read_answer(body: bytes, header_bytes: int) -> np.ndarray:
    """OUTPUT__0 of a binary v2 response."""
    (output,) = json.loads(body[:header_bytes])["outputs"]
    return np.frombuffer(body, np.float32, offset=header_bytes).reshape(output["shape"])
