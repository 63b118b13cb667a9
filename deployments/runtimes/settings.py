"""What torch must be set to before a model runs: per process and per thread.

A replica process serves one model version, so that what is global in torch is that model's own.
Called by `instance.py` on the instance's thread; parsing the values is configs/parameters.py.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from configs.complete import RuntimeKind
from configs.model import ModelConfig
from configs.parameters import ModelParameters

logger = logging.getLogger("manta.runtimes")


def apply_process(parameters: ModelParameters, kind: RuntimeKind) -> None:
    """Switches that are one per process. Unset JIT switches leave torch's own default; a model of
    the Python backend sets them itself."""
    if kind == "python":
        return
    if kind == "eager":
        _set_interop(parameters.num_interop_threads)
        return
    torch.backends.cudnn.enabled = not parameters.disable_cudnn
    if parameters.inter_op_thread_count is not None:
        _set_interop(parameters.inter_op_thread_count)
    if kind == "torchscript":
        c: Any = torch._C
        if parameters.enable_jit_executor is not None:
            c._jit_set_profiling_executor(parameters.enable_jit_executor)
        if parameters.enable_jit_profiling is not None:
            c._jit_set_profiling_mode(parameters.enable_jit_profiling)
        if parameters.enable_tensor_fuser is not None:
            c._jit_set_texpr_fuser_enabled(parameters.enable_tensor_fuser)


def apply_thread(parameters: ModelParameters, kind: RuntimeKind, threads: int | None) -> None:
    """OpenMP and the JIT keep these per thread. `threads`: intra-op count when none is given."""
    chosen = threads
    if kind == "eager":
        # NUM_THREADS is 1 unless given, whatever the machine has.
        chosen = parameters.num_threads
    elif parameters.intra_op_thread_count is not None:
        chosen = parameters.intra_op_thread_count
    if chosen is not None:
        torch.set_num_threads(chosen)
    if kind == "torchscript":
        c: Any = torch._C
        c._set_graph_executor_optimize(not parameters.disable_optimized_execution)


def in_force(parameters: ModelParameters, kind: RuntimeKind) -> dict[str, str]:
    """What torch says of itself on this thread, after both were applied.

    Of the JIT's two switches that it does not tell it is only known what they were set to.
    """
    c: Any = torch._C
    found: dict[str, object] = {
        "intra_op_threads": torch.get_num_threads(),
        "inter_op_threads": torch.get_num_interop_threads(),
        "cudnn": torch.backends.cudnn.enabled,
        "optimized_execution": c._get_graph_executor_optimize(),
        "tensor_fuser": c._jit_texpr_fuser_enabled(),
    }
    if kind == "torchscript":
        executor, profiling = parameters.enable_jit_executor, parameters.enable_jit_profiling
        if executor is not None:
            found["jit_executor"] = c._jit_set_profiling_executor(executor)
        if profiling is not None:
            found["jit_profiling"] = c._jit_set_profiling_mode(profiling)
    return {name: str(value) for name, value in found.items()}


def thread_lines(
    config: ModelConfig, parameters: ModelParameters, force: Mapping[str, str]
) -> list[str]:
    """For the log: what is in force, which is not always what was asked for."""
    asked = {
        "Inter op": (parameters.inter_op_thread_count, "inter_op_threads"),
        "Intra op": (parameters.intra_op_thread_count, "intra_op_threads"),
    }
    return [
        f"{name} thread count is set to {force[key]} for model '{config.name}'"
        for name, (count, key) in asked.items()
        if count is not None
    ]


def guard(parameters: ModelParameters, kind: RuntimeKind) -> AbstractContextManager[Any]:
    """Around load and every execution: autograd is off either way. A model of the Python
    backend decides for itself."""
    if kind == "python":
        return nullcontext()
    if kind == "eager" or parameters.inference_mode:
        return torch.inference_mode()
    return torch.no_grad()


def _set_interop(count: int) -> None:
    if torch.get_num_interop_threads() == count:
        return
    try:
        torch.set_num_interop_threads(count)
    except RuntimeError:  # torch takes it once per process, before its pool first works
        logger.warning(
            "inter-op threads stay at %d, %d wanted: torch's pool has started already",
            torch.get_num_interop_threads(),
            count,
        )
