"""What the user of `manta optimize` asked for. Imports nothing of ours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    repository: Path
    model: str
    version: int | None = None
    precision: str = "fp32"
    tolerance: float | None = None
    batch_sizes: tuple[int, ...] = ()
    threads: int | None = None
    min_speedup: float = 1.05
    min_each: float = 0.8
    samples: Path | None = None
    output: str | None = None
    rounds: int = 7
    dry_run: bool = False
