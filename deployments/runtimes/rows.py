"""Batches that are smaller than what a model was exported for: filled up, and cut again.

The last row is repeated, since a row of zeros may be none that the model takes. Called by `aoti.py`
and `exported.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def padded(inputs: Sequence[torch.Tensor], wanted: int) -> list[torch.Tensor]:
    return [
        torch.cat([t, t[-1:].expand(wanted - t.shape[0], *t.shape[1:])]).contiguous()
        for t in inputs
    ]


def cut(outputs: Sequence[Any], given: int, wanted: int) -> list[Any]:
    return [
        o[:given] if isinstance(o, torch.Tensor) and o.dim() and o.shape[0] == wanted else o
        for o in outputs
    ]
