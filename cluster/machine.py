"""A cluster of like nodes, as the Planner asks for it, for commands that run without Ray."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from configs.placement import gpu_resource


@dataclass(frozen=True, slots=True)
class Machine:
    """`gpus` of one node, all of them known by index."""

    gpus: int

    def gpu_count(self) -> int:
        return self.gpus

    def resources(self) -> Collection[str]:
        return [gpu_resource(index) for index in range(self.gpus)]
