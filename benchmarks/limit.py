"""The limit: what torch gives in a process of its own, with no server around it.

    python benchmarks/limit.py --model mlp.pt --row row.npy

Reads lines of "batch warm-up seconds" and answers each with one line of JSON, so that it can stay
loaded between rounds and costs nothing while it waits. Also holds the side that drives it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

Model = Callable[[torch.Tensor], torch.Tensor]


def measure(model: Model, batch: torch.Tensor, warm_up_s: float, seconds: float) -> dict[str, Any]:
    """Calls one after another. At least one after the warm-up, however long it takes."""
    clock = time.perf_counter
    end = clock() + warm_up_s
    model(batch)
    while clock() < end:
        model(batch)
    took: list[float] = []
    begin = before = clock()
    while not took or before - begin < seconds:
        model(batch)
        now = clock()
        took.append(now - before)
        before = now
    calls_us = np.array(took) * 1e6
    return {
        "calls": len(took),
        "rows": len(took) * batch.shape[0],
        "seconds": before - begin,
        "mean_us": float(calls_us.mean()),
        "p50_us": float(np.percentile(calls_us, 50)),
        "p99_us": float(np.percentile(calls_us, 99)),
    }


class Limit:
    """The program below as a child process: one model, one thread."""

    def __init__(self, file: Path, row: Path) -> None:
        command = [sys.executable, __file__, f"--model={file}", f"--row={row}"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, batch: int, warm_up_s: float, seconds: float) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{batch} {warm_up_s} {seconds}\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def close(self) -> None:
        self._process.communicate()  # the end of its input is the end of it


def main() -> None:
    parser = argparse.ArgumentParser(description="Torch in-process, as fast as it goes.")
    parser.add_argument("--model", type=Path, required=True, help="a TorchScript file")
    parser.add_argument("--row", type=Path, required=True, help="one row, saved by numpy")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model = torch.jit.load(str(options.model)).eval()
    row = torch.from_numpy(np.load(options.row))
    with torch.inference_mode():
        for line in sys.stdin:
            batch, warm_up_s, seconds = line.split()
            rows = row.expand(int(batch), *row.shape[1:]).contiguous()
            result = measure(model, rows, float(warm_up_s), float(seconds))
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
