"""A model with one input and one output of every numeric datatype, for each runtime; each output is
its input with the first column moved to the end."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch

from configs.dtypes import DATATYPES, DataType

NUMERIC = tuple(one for one in DATATYPES if one.torch is not None)
TYPED = tuple(one for one in NUMERIC if one.wire not in ("FP16", "BF16"))  # JSON has these
WIDTH = 3

Array = npt.NDArray[Any]


def source(kinds: Sequence[DataType]) -> str:
    names = [f"x_{one.wire.lower()}" for one in kinds]
    moved = ", ".join(f"torch.cat([{name}[:, 1:], {name}[:, :1]], 1)" for name in names)
    return (
        "import torch\nclass Every(torch.nn.Module):\n"
        f"    def forward(self, {', '.join(names)}):\n        return ({moved},)\n"
    )


def module(kinds: Sequence[DataType]) -> torch.nn.Module:
    namespace: dict[str, Any] = {}
    exec(source(kinds), namespace)
    made: torch.nn.Module = namespace["Every"]().eval()
    return made


def samples(kinds: Sequence[DataType]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.ones(2, WIDTH, dtype=getattr(torch, str(one.torch))) for one in kinds)


def save_traced(kinds: Sequence[DataType], path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(module(kinds), samples(kinds), check_trace=False)
        torch.jit.save(traced, str(path))


def compile_package(path: Path) -> None:
    """An AOTI package of all of them; takes a compiler and some 20 seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {0: torch.export.Dim("rows", min=1, max=8)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(
            module(NUMERIC), samples(NUMERIC), dynamic_shapes=(rows,) * len(NUMERIC)
        )
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(path), inductor_configs={"cpp.simdlen": 1}
        )


def values(kind: DataType, rows: int, width: int = WIDTH, seed: int = 0) -> Array:
    """The datatype's extremes and what lies between; BF16 as stock clients take and give it."""
    draw = np.random.default_rng(seed)
    shape = (rows, width)
    if kind.wire == "BOOL":
        return draw.integers(0, 2, shape).astype(bool)
    if kind.wire == "BF16":
        return draw.standard_normal(shape).astype(ml_dtypes.bfloat16)
    dtype = np.dtype(str(kind.numpy))
    if dtype.kind == "f":
        return draw.standard_normal(shape).astype(dtype)
    limits = np.iinfo(dtype)
    made = draw.integers(limits.min, limits.max, shape, dtype, endpoint=True)
    if made.size > 1:
        made.flat[0], made.flat[-1] = limits.min, limits.max
    return made


def wire(kind: DataType, array: Array) -> Array:
    """As the server carries it."""
    return array.view(np.uint16) if kind.wire == "BF16" else array


def direct(kinds: Sequence[DataType], arrays: Sequence[Array]) -> list[Array]:
    """The same call in this process."""
    given = [
        torch.from_numpy(wire(kind, array)).view(getattr(torch, str(kind.torch)))
        for kind, array in zip(kinds, arrays, strict=True)
    ]
    results = module(kinds)(*given)
    return [
        result.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        if kind.wire == "BF16"
        else result.numpy()
        for kind, result in zip(kinds, results, strict=True)
    ]
