"""Scatter: an output of a ragged batch cut by the shapes of the members' own inputs.

Owns `batch_output`: which elements of a flat output are whose, and in what
shape. Views only, and nothing of rows, which are the `batcher`'s, who calls it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from configs import ragged
from configs.model import ModelConfig

from .errors import Unsupported
from .scheduler import Group
from .types import OutputArray, Part


@dataclass(frozen=True, slots=True)
class Piece:
    """A member's elements of one output."""

    start: int
    end: int
    shape: tuple[int, ...]


Pieces: TypeAlias = "Mapping[tuple[str, int], Piece]"  # by output and member


class Scatter:
    """The scattered outputs of one model version; false where there are none."""

    def __init__(self, config: ModelConfig) -> None:
        self._outputs: Mapping[str, tuple[int, tuple[int, ...]]] = ragged.scattered(config)

    def __bool__(self) -> bool:
        return bool(self._outputs)

    def pieces(self, group: Group, part: Part) -> Pieces:
        """Of one part, whose members' elements follow one another."""
        found = {}
        for name, (source, template) in self._outputs.items():
            start = 0
            for index in part.members:
                array = group.members[index].inputs[source]
                given = () if array is None else array.shape
                shape = tuple(
                    given[place] if size == -1 else size for place, size in enumerate(template)
                )
                end = start + math.prod(shape)
                found[name, index] = Piece(start, end, shape)
                start = end
        return found


def cut(name: str, whole: OutputArray, piece: Piece) -> OutputArray | Unsupported:
    flat = whole.data.reshape(-1)
    if flat.size < piece.end:
        return Unsupported(
            f"failed to split the output tensor '{name}' into responses: expected at least "
            f"{piece.end} elements, got {flat.size}"
        )
    return OutputArray(flat[piece.start : piece.end].reshape(piece.shape))
