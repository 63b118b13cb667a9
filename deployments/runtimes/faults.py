"""What torch raised: out of memory, a lost device, or the model's own error; and its clean text.

No host path, address or traceback leaves here. Used by runtimes and `instance.py`.
"""

from __future__ import annotations

import re

import torch

TEXT_LIMIT_BYTES = 4096

_FATAL = re.compile(
    r"illegal memory access|unspecified launch failure|launch failure|launch timed out"
    r"|device-side assert|illegal instruction|misaligned address|invalid address space"
    r"|invalid program counter|hardware stack error|uncorrectable (ECC|NVLink) error|ECC error"
    r"|context is destroyed|driver shutting down|CUDA-capable device\(s\) is/are busy"
    r"|CUDA error: unknown error|fallen off the bus|GPU is lost"
    r"|(CUBLAS|CUDNN)_STATUS_(EXECUTION_FAILED|INTERNAL_ERROR|MAPPING_ERROR)",
    re.IGNORECASE,
)
# cudaError_t values after which every later call on the device fails too.
_FATAL_CODES = frozenset((4, 214, 220, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 999))
_MEMORY = re.compile(
    r"out of memory|can't allocate memory|not enough memory|CUBLAS_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)
_NOISE = re.compile(
    r"^\s*(Traceback|File \"|frame #\d|Exception raised from|C\+\+ CapturedTraceback|<--- HERE"
    r"|from user code:|Set TORCH|You can suppress|For debugging consider|Compile with `TORCH"
    r"|CUDA kernel errors might|Device-side assertion tracking|Search for `cuda)"
)
_RAISED = re.compile(r"^(?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*(?:Error|Exception)\b", re.MULTILINE)
_DIRECTORIES = re.compile(r"(?:(?<=[\s'\"(=:,])|^)(?:/[\w.+@\-]+)+/(?=[\w.+@\-])", re.MULTILINE)
_ADDRESS = re.compile(r"0x[0-9a-fA-F]{6,}")


class FatalDeviceError(Exception):
    """The device is lost to this process, which must end. Facts: the clean text."""


def is_fatal(error: BaseException) -> bool:
    if isinstance(error, FatalDeviceError):
        return True
    if is_out_of_memory(error) or not isinstance(error, RuntimeError):
        return False
    if isinstance(error, torch.AcceleratorError):
        code = getattr(error, "error_code", None)
        if code in _FATAL_CODES:
            return True
    return _FATAL.search(str(error)) is not None


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and _MEMORY.search(str(error)) is not None


def clean_text(error: BaseException) -> str:
    """The error's own words: without traceback, directories and addresses, at most 4 kB."""
    text = str(error)
    if "<--- HERE" in text:  # TorchScript: the words follow the quoted source
        text = text.rpartition("<--- HERE")[2]
        words = _RAISED.search(text)
        text = text[words.start() :] if words else text
    elif "Traceback (most recent call last)" in text:
        text = _after_traceback(text)
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    text = "\n".join(line for line in lines if not _NOISE.match(line)).strip()
    text = text.removeprefix("builtins.")
    text = _ADDRESS.sub("0x?", _DIRECTORIES.sub("", text))
    encoded = (text or type(error).__name__).encode("utf-8", "replace")
    return encoded[:TEXT_LIMIT_BYTES].decode("utf-8", "ignore")


def _after_traceback(text: str) -> str:
    """Python's own form: the words are the lines after the last indented one."""
    head, _, tail = text.rpartition("Traceback (most recent call last)")
    lines = tail.splitlines()
    last = max((i for i, line in enumerate(lines) if line.startswith((" ", "\t"))), default=0)
    return "\n".join([head, *lines[last + 1 :]])
