"""The models that the benchmark serves: TorchScript files, their shapes, one row for each.

Every server gets the very same file. Weights come from a seed, so that a rebuilt file is the same
model. Nothing here knows of servers or of load. Used by `matrix.py`, `wire.py` and `limit.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

INPUT, OUTPUT = "INPUT__0", "OUTPUT__0"
VOCABULARY, TOKENS, WIDTH = 1000, 128, 256
MAX_BATCH = 32
NUMPY = {"FP32": np.float32, "INT64": np.int64}


@dataclass(frozen=True, slots=True)
class Model:
    """Shapes are those of one row. `patience` stretches a measurement: a batch of 32 may take
    seconds. `batched` is False where merging requests costs a copy and gains nothing; `quick`: one
    call takes less than the queue delay, so that the delay shows at one connection."""

    name: str
    build: Callable[[], nn.Module]
    row: tuple[int, ...]
    output: tuple[int, ...]
    datatype: str = "FP32"
    connections: tuple[int, ...] = (1, 8, 32, 64)
    batched: bool = True
    quick: bool = False
    warm_up_s: float = 0.7
    patience: float = 1.0

    def config(self, delay_us: int, instances: int = 1) -> str:
        """Its config.pbtxt, for any server that reads one; the backend's line is the caller's."""
        batch = MAX_BATCH if self.batched else 1
        dims = ", ".join(map(str, self.row))
        out = ", ".join(map(str, self.output))
        lines = [
            f'name: "{self.name}"',
            f"max_batch_size: {batch}",
            f'input [ {{ name: "{INPUT}" data_type: TYPE_{self.datatype} dims: [ {dims} ] }} ]',
            f'output [ {{ name: "{OUTPUT}" data_type: TYPE_FP32 dims: [ {out} ] }} ]',
            f"instance_group [ {{ kind: KIND_CPU count: {instances} }} ]",
        ]
        if self.batched:
            lines += [f"dynamic_batching {{ max_queue_delay_microseconds: {delay_us} }}"]
        return "\n".join(lines) + "\n"

    def one_row(self, seed: int = 1) -> np.ndarray:
        """[1, *row], the input of every request."""
        generator = np.random.default_rng(seed)
        if self.datatype == "INT64":
            return generator.integers(0, VOCABULARY, (1, *self.row))
        return generator.standard_normal((1, *self.row), np.float32)


# --- networks ------------------------------------------------------------------------------------


class Double(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + x


class RowSum(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sum(dim=1, keepdim=True)


def mlp() -> nn.Module:
    widths = (512, 1024, 1024, 256)
    layers: list[nn.Module] = []
    for before, after in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Block(nn.Module):
    """Two 3 x 3 convolutions around a shortcut; a 1 x 1 one where the shape changes."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(after)
        self.second = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(after)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            conv = nn.Conv2d(before, after, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(after))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu(self.first_norm(self.first(x)))
        return functional.relu(self.second_norm(self.second(y)) + self.shortcut(x))


def resnet18() -> nn.Module:
    """The 18-layer residual net for 224 x 224 images and 1000 classes, with random weights."""
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    layers: list[nn.Module] = [*stem, nn.MaxPool2d(3, 2, 1)]
    before = 64
    for after in (64, 128, 256, 512):
        layers += [Block(before, after, 1 if after == 64 else 2), Block(after, after, 1)]
        before = after
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


class EncoderLayer(nn.Module):
    """Self-attention with four heads, then two linear layers; each normed before, added after."""

    def __init__(self) -> None:
        super().__init__()
        # TorchScript sees attributes and no globals.
        self.tokens, self.width = TOKENS, WIDTH
        self.norm, self.second_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mix, self.join = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.widen, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = self.mix(self.norm(x))
        mixed = mixed.reshape(-1, self.tokens, 3, 4, self.width // 4)
        query, key, value = mixed.permute(2, 0, 3, 1, 4).unbind(0)
        seen = functional.scaled_dot_product_attention(query, key, value)
        x = x + self.join(seen.transpose(1, 2).reshape(-1, self.tokens, self.width))
        wide = functional.gelu(self.widen(self.second_norm(x)))
        result: torch.Tensor = x + self.narrow(wide)
        return result


class Encoder(nn.Module):
    """Token ids -> the mean of the last layer over the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.places = nn.Parameter(torch.randn(TOKENS, WIDTH))
        self.layers = nn.Sequential(*(EncoderLayer() for _ in range(4)))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.layers(self.words(tokens) + self.places).mean(dim=1)
        return result


# --- the list ------------------------------------------------------------------------------------

MODELS = {
    model.name: model
    for model in (
        Model("tiny", Double, (16,), (16,), quick=True),
        Model("mlp", mlp, (512,), (256,), quick=True),
        Model(
            "resnet18",
            resnet18,
            (3, 224, 224),
            (1000,),
            connections=(8, 32),
            warm_up_s=3.0,
            patience=4.0,
        ),
        Model(
            "encoder", Encoder, (TOKENS,), (WIDTH,), datatype="INT64", warm_up_s=1.5, patience=1.5
        ),
        Model("large4", RowSum, (1 << 20,), (1,), connections=(8,), batched=False),
        Model("large20", RowSum, (5 << 20,), (1,), connections=(8,), batched=False),
    )
}


def network(model: Model) -> nn.Module:
    """Its weights are the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model.build().eval()


def build(model: Model, folder: Path) -> Path:
    """Writes `folder`/<name>.pt and returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{model.name}.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is what is measured, deprecated or not
        torch.jit.script(network(model)).save(str(file))
    return file


def expected(model: Model, file: Path, row: np.ndarray) -> np.ndarray:
    """Torch's own answer to `row`."""
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        result: np.ndarray = torch.jit.load(str(file))(torch.from_numpy(row)).numpy()
    return result
