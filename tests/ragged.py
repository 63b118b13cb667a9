"""A model of ragged input that takes every kind of batch input, for both ends of a batch."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.model import BatchInput, BatchOutput, ModelConfig, ModelInput, ModelOutput
from tests.models import config

KINDS = {
    "counts": ("BATCH_ELEMENT_COUNT", "TYPE_INT32"),
    "sums": ("BATCH_ACCUMULATED_ELEMENT_COUNT", "TYPE_FP32"),
    "starts": ("BATCH_ACCUMULATED_ELEMENT_COUNT_WITH_ZERO", "TYPE_INT32"),
    "most": ("BATCH_MAX_ELEMENT_COUNT_AS_SHAPE", "TYPE_FP32"),
    "items": ("BATCH_ITEM_SHAPE", "TYPE_INT32"),
    "flat": ("BATCH_ITEM_SHAPE_FLATTEN", "TYPE_FP32"),
}

# `double` is as flat as `x`; `seen` tells every row of the batch what there was beside it; `id`
# comes with rows and goes with rows. A negative value is an error.
SOURCE = """
import torch
from typing import Tuple

class Packed(torch.nn.Module):
    def forward(
        self,
        x: torch.Tensor,
        id: torch.Tensor,
        counts: torch.Tensor,
        sums: torch.Tensor,
        starts: torch.Tensor,
        most: torch.Tensor,
        items: torch.Tensor,
        flat: torch.Tensor,
    ) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if bool((x < 0).any()):
            raise ValueError("negative value")
        told = torch.cat(
            [
                counts.float(),
                sums,
                starts.float(),
                torch.ones(1) * most.shape[0],
                items.float().flatten(),
                flat,
            ]
        )
        return x * 2, told.unsqueeze(0).repeat(items.shape[0], 1), id
"""


def packed(path: Path) -> Any:
    """The module; TorchScript wants its source in a file."""
    path.write_text(SOURCE)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Packed().eval()


def packed_config(rank: int = 1, max_batch_size: int = 8, **fields: Any) -> ModelConfig:
    """`x` and `double` have that many variable sizes beside the rows."""
    x = ModelInput(name="x", data_type="TYPE_FP32", dims=(-1,) * rank, allow_ragged_batch=True)
    outputs = [
        ModelOutput(name="OUTPUT__0", data_type="TYPE_FP32", dims=(-1,) * rank),
        ModelOutput(name="OUTPUT__1", data_type="TYPE_FP32", dims=(-1,)),
        ModelOutput(name="OUTPUT__2", data_type="TYPE_INT32", dims=(1,)),
    ]
    made = tuple(
        BatchInput(kind=kind, target_name=(name,), data_type=data_type, source_input=("x",))
        for name, (kind, data_type) in KINDS.items()
    )
    return config(
        [x, ModelInput(name="id", data_type="TYPE_INT32", dims=(1,))],
        outputs,
        max_batch_size=max_batch_size,
        batch_input=made,
        batch_output=(BatchOutput(target_name=("OUTPUT__0",), source_input=("x",)),),
        **fields,
    )


def told(shapes: Sequence[tuple[int, ...]]) -> list[float]:
    """What every row of a batch of these shapes is told, worked out in another way."""
    counts, items = [], []
    for shape in shapes:
        count = 1
        for size in shape:
            count *= size
        counts.append(count)
        items += list(shape[1:]) * shape[0]
    sums = [sum(counts[: k + 1]) for k in range(len(counts))]
    return [*map(float, (*counts, *sums, 0, *sums, max(counts), *items, *items))]
