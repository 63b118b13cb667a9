"""A model's `parameters`, typed, from one table: key, rule, runtimes.

Says what each is set to (`log_lines`) and warns of what has no effect; the effects themselves
are deployments/instance.py, the runtimes and `placement.py`.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from . import autoscaling
from .autoscaling import Autoscaling
from .complete import RuntimeKind, runtime_kind
from .errors import ConfigError
from .model import ModelConfig

_INT_LIMIT = 2**31 - 1
_INT_DIGITS = 10  # of the largest of them
_SHOWN = 100  # characters of a value that an error repeats
_STEP = 0.0001  # Ray counts fractions of a resource in these


class ModelParameters(BaseModel):
    """None means not given: what torch or the server does by itself."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    disable_optimized_execution: bool = False
    inference_mode: bool = True
    disable_cudnn: bool = False
    enable_weight_sharing: bool = False
    enable_cache_cleaning: bool = False
    inter_op_thread_count: int | None = None
    intra_op_thread_count: int | None = None
    enable_jit_executor: bool | None = None
    enable_jit_profiling: bool | None = None
    enable_tensor_fuser: bool | None = None
    enable_freezing: bool = False
    enable_cuda_graphs: bool = False
    compile_on_load: bool = False
    num_threads: int = 1
    num_interop_threads: int = 1
    torch_compile_optional_parameters: dict[str, Any] = {}
    gpu_fraction: float | None = None
    cpu_fraction: float | None = None
    model_gpus: int | None = None
    force_cpu_only_input_tensors: bool = True
    autoscaling: Autoscaling | None = None


# --- rules: the text of a value -> the value, or ValueError with the reason ---------------------


def _bool(text: str) -> bool:
    known = {"true": True, "on": True, "1": True, "false": False, "off": False, "0": False}
    if text.lower() not in known:
        raise ValueError(f"failed to convert '{text[:_SHOWN]}' to boolean")
    return known[text.lower()]


def _leading_int(text: str) -> int:
    """As C++'s stoi: leading blanks and what follows the digits are passed over."""
    match = re.match(r"[ \t\n\v\f\r]*([-+]?)0*([0-9]+)", text)
    reason = f"failed to convert '{text[:_SHOWN]}' to integral number"
    if match is None:
        raise ValueError(reason)
    sign, digits = match.groups()
    value = int(sign + digits[: _INT_DIGITS + 1])
    if not -_INT_LIMIT - 1 <= value <= _INT_LIMIT:
        raise ValueError(f"{reason}: it is out of range")
    return value


def _count(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise ValueError(f"failed to convert '{text[:_SHOWN]}' to integral number") from None
    if not 1 <= value <= _INT_LIMIT:
        raise ValueError(f"{text[:_SHOWN]} must be at least 1 and at most {_INT_LIMIT}")
    return value


def _whole_gpus(text: str) -> int:
    return 0 if text.strip() == "0" else _count(text)


def _fraction(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"failed to convert '{text[:_SHOWN]}' to a number") from None


def _gpu_fraction(text: str) -> float:
    value = _fraction(text)
    if not _STEP <= value <= 1:
        raise ValueError(f"{text} must be greater than 0 (at least {_STEP}) and at most 1")
    return _steps(value)


def _cpu_fraction(text: str) -> float:
    value = _fraction(text)
    if not _STEP <= value < _INT_LIMIT:
        raise ValueError(f"{text} must be greater than 0 (at least {_STEP})")
    return _steps(value)


def _steps(value: float) -> float:
    """Rounded down, so that three thirds still fit on one GPU."""
    return math.floor(value / _STEP + 1e-6) / round(1 / _STEP)


def _compile_options(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"failed to parse as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError("must be a JSON object of keyword arguments of torch.compile")
    if "model" in value:
        raise ValueError("'model' is not an optional parameter of torch.compile")
    return value


def _yes(text: str) -> bool:
    """As Triton's Python backend has it."""
    known = {"yes": True, "no": False}
    if text.lower() not in known:
        raise ValueError(f"'{text}' is neither yes nor no")
    return known[text.lower()]


@dataclass(frozen=True, slots=True)
class _Rule:
    parse: Callable[[str], Any]
    runtimes: tuple[RuntimeKind, ...]


_SCRIPT: tuple[RuntimeKind, ...] = ("torchscript",)
_LIBTORCH: tuple[RuntimeKind, ...] = ("torchscript", "aoti", "exported")
_EAGER: tuple[RuntimeKind, ...] = ("eager",)
_EXPORTED: tuple[RuntimeKind, ...] = ("exported",)
_PYTHON: tuple[RuntimeKind, ...] = ("python",)
_ALL: tuple[RuntimeKind, ...] = ("torchscript", "aoti", "eager", "exported", "python")

RULES: dict[str, _Rule] = {
    "DISABLE_OPTIMIZED_EXECUTION": _Rule(_bool, _SCRIPT),
    "INFERENCE_MODE": _Rule(_bool, _LIBTORCH),
    "DISABLE_CUDNN": _Rule(_bool, _LIBTORCH),
    "ENABLE_WEIGHT_SHARING": _Rule(_bool, _LIBTORCH),
    "ENABLE_CACHE_CLEANING": _Rule(_bool, _LIBTORCH),
    "INTER_OP_THREAD_COUNT": _Rule(_leading_int, _LIBTORCH),
    "INTRA_OP_THREAD_COUNT": _Rule(_leading_int, _LIBTORCH),
    "ENABLE_JIT_EXECUTOR": _Rule(_bool, _SCRIPT),
    "ENABLE_JIT_PROFILING": _Rule(_bool, _SCRIPT),
    "ENABLE_TENSOR_FUSER": _Rule(_bool, _SCRIPT),
    "ENABLE_FREEZING": _Rule(_bool, _SCRIPT),
    "ENABLE_CUDA_GRAPHS": _Rule(_bool, _SCRIPT),
    "COMPILE_ON_LOAD": _Rule(_bool, _EXPORTED),
    "NUM_THREADS": _Rule(_count, _EAGER),
    "NUM_INTEROP_THREADS": _Rule(_count, _EAGER),
    "TORCH_COMPILE_OPTIONAL_PARAMETERS": _Rule(_compile_options, _EAGER),
    "GPU_FRACTION": _Rule(_gpu_fraction, _ALL),
    "CPU_FRACTION": _Rule(_cpu_fraction, _ALL),
    "MODEL_GPUS": _Rule(_whole_gpus, _ALL),
    autoscaling.PARAMETER: _Rule(autoscaling.parse, _ALL),
    # Inputs come from the Router, in host memory: both values give the model the same.
    "FORCE_CPU_ONLY_INPUT_TENSORS": _Rule(_yes, _PYTHON),
}

# Keys that Triton acts on: to pass over them would change what the model does.
REFUSED = {
    "EXECUTION_ENV_PATH": "packed execution environments are not supported",
    "FORCE_CPU_ONLY_INPUT_TENSORS": "this is a parameter of the backend 'python'",
    "MODEL_INIT_LIBRARY": "libraries that initialise a model are not supported",
    "TRITON_BATCH_STRATEGY_PATH": "custom batching libraries are not supported",
}

_REMOVED = {"ENABLE_NVFUSER": "has been removed from PyTorch"}

_TWINS = {
    "NUM_THREADS": "INTRA_OP_THREAD_COUNT",
    "NUM_INTEROP_THREADS": "INTER_OP_THREAD_COUNT",
    "INTRA_OP_THREAD_COUNT": "NUM_THREADS",
    "INTER_OP_THREAD_COUNT": "NUM_INTEROP_THREADS",
}


def parse_parameters(
    config: ModelConfig, version_files: Collection[str] = ()
) -> tuple[ModelParameters, list[str]]:
    """The typed parameters and one warning per parameter that has no effect.

    `version_files` tell a model.py from a model.pt where `runtime` leaves it open. Raises
    ConfigError for a value that does not convert and for a key that is refused.
    """
    kind = runtime_kind(config, version_files)
    values: dict[str, Any] = {}
    warnings: list[str] = []
    for key, text in config.parameters.items():
        field = f'parameters["{key}"]'
        rule = RULES.get(key)
        known = rule is not None and kind in rule.runtimes
        if key in REFUSED and not known:
            raise ConfigError(REFUSED[key], field=field)
        if rule is None or not known:
            if kind != "python":  # there a model reads parameters of its own
                warnings.append(_no_effect(config, key, kind))
            continue
        try:
            values[key.lower()] = rule.parse(text)
        except ValueError as error:
            raise ConfigError(f"{key}: {error}", field=field) from None
    warnings += _idle(config, values)
    if values.get("enable_cuda_graphs") and values.get("enable_weight_sharing"):
        raise ConfigError(
            "ENABLE_CUDA_GRAPHS: a recording belongs to one instance, and with "
            "ENABLE_WEIGHT_SHARING several share one model",
            field='parameters["ENABLE_CUDA_GRAPHS"]',
        )
    scaling = values.get("autoscaling")
    if scaling is not None:
        sharing = values.get("enable_weight_sharing", False)
        autoscaling.check(scaling, config, sharing, by_server=False)
    return ModelParameters(**values), warnings


def _idle(config: ModelConfig, values: dict[str, Any]) -> list[str]:
    """Takes out the thread counts that torch would not take; warns of values without a subject."""
    reasons: dict[str, str] = {}
    for name in ("inter_op_thread_count", "intra_op_thread_count"):
        if values.get(name, 1) <= 0:
            reasons[name] = f"{values.pop(name)} is not a number of threads"
    kinds = {group.kind for group in config.instance_group}
    if kinds and "KIND_AUTO" not in kinds:
        for name, kind in (("gpu_fraction", "KIND_GPU"), ("model_gpus", "KIND_MODEL")):
            if name in values and kind not in kinds:
                reasons[name] = f"no instance group is {kind}"
    return [
        f"parameter '{name.upper()}' of model '{config.name}' has no effect: {reason}"
        for name, reason in reasons.items()
    ]


def _no_effect(config: ModelConfig, key: str, kind: RuntimeKind) -> str:
    usable = [name for name, rule in RULES.items() if kind in rule.runtimes]
    if key in _REMOVED:
        return f"parameter '{key}' of model '{config.name}' {_REMOVED[key]} and is ignored"
    why = "is unknown" if key not in RULES else f"has no effect on the runtime '{kind}'"
    closest = _TWINS.get(key) or next(iter(difflib.get_close_matches(key.upper(), usable, 1)), None)
    hint = f"; did you mean '{closest}'?" if closest else ""
    return f"parameter '{key}' of model '{config.name}' {why} and is ignored{hint}"


# --- what is in force, for the log --------------------------------------------------------------


_SWITCHES = {
    "DISABLE_OPTIMIZED_EXECUTION": "Optimized execution",
    "INFERENCE_MODE": "Inference Mode",
    "DISABLE_CUDNN": "cuDNN",
    "ENABLE_CACHE_CLEANING": "Cache Cleaning",
    "ENABLE_WEIGHT_SHARING": "Weight sharing",
    "ENABLE_JIT_EXECUTOR": "Jit executor",
    "ENABLE_JIT_PROFILING": "Jit profiling",
    "ENABLE_TENSOR_FUSER": "Tensor fuser",
    "ENABLE_FREEZING": "Freezing",
    "ENABLE_CUDA_GRAPHS": "CUDA graphs",
    "COMPILE_ON_LOAD": "Compilation on load",
}
_SILENT = {  # no line unless the configuration has the key
    "ENABLE_WEIGHT_SHARING",
    "ENABLE_JIT_EXECUTOR",
    "ENABLE_JIT_PROFILING",
    "ENABLE_TENSOR_FUSER",
    "ENABLE_FREEZING",
    "ENABLE_CUDA_GRAPHS",
    "COMPILE_ON_LOAD",
}


def log_lines(
    config: ModelConfig, parameters: ModelParameters, version_files: Collection[str] = ()
) -> list[str]:
    """What the parameters are set to, one line each, when a version loads.

    Thread counts are missing: what torch made of them is said where they are set.
    """
    kind = runtime_kind(config, version_files)
    describe = {"eager": _eager_lines, "python": _no_lines}.get(kind, _libtorch_lines)
    ours = {
        "GPU fraction": parameters.gpu_fraction,
        "CPU fraction": parameters.cpu_fraction,
        "Number of GPUs per KIND_MODEL instance": parameters.model_gpus,
    }
    given = [f"{name} is {value}" for name, value in ours.items() if value is not None]
    return describe(config, parameters) + [f"{line} for model '{config.name}'" for line in given]


def _no_lines(config: ModelConfig, parameters: ModelParameters) -> list[str]:
    return []


def _eager_lines(config: ModelConfig, parameters: ModelParameters) -> list[str]:
    return [
        f"Torch parallelism settings for '{config.name}': "
        f"NUM_THREADS = {parameters.num_threads}; "
        f"NUM_INTEROP_THREADS = {parameters.num_interop_threads};",
        f"'torch.compile' optional parameter(s) for '{config.name}': "
        f"{parameters.torch_compile_optional_parameters}",
    ]


def _libtorch_lines(config: ModelConfig, parameters: ModelParameters) -> list[str]:
    kind = runtime_kind(config)
    lines = []
    for key, name in _SWITCHES.items():
        value = getattr(parameters, key.lower())
        if kind in RULES[key].runtimes and (key not in _SILENT or key in config.parameters):
            on = not value if key.startswith("DISABLE_") else value
            lines.append(f"{name} is {'enabled' if on else 'disabled'}")
    return [f"{line} for model '{config.name}'" for line in lines]
