"""A model that takes and returns everything at once: nested, named, strings and defaults.

No postponed annotations here: TorchScript cannot read those of a named tuple.
"""

from typing import NamedTuple

import torch


class Point(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


class Structured(torch.nn.Module):
    def forward(
        self,
        x: torch.Tensor,
        xs: list[torch.Tensor],
        named: dict[str, list[torch.Tensor]],
        point: Point,
        words: list[str],
        bias: torch.Tensor | None = None,
        scale: float = 2.0,
        last: torch.Tensor | None = None,
    ) -> tuple[Point, dict[str, list[torch.Tensor]], list[str], torch.Tensor]:
        total = x * scale
        if bias is not None:
            total = total + bias
        if last is not None:
            total = total - last
        rest = [xs[0] - xs[1], named["k"][0]]
        return Point(point.right, point.left), {"rest": rest, "none": []}, words, total


class MaybeWords(torch.nn.Module):
    def forward(self, x: torch.Tensor, words: list[str] | None = None) -> torch.Tensor:
        return x if words is None else x + len(words)
