"""Loads a version and warms it up in a fork of this process, which may crash or hang.

This process has imported torch, has started no thread and has opened no device, so that a fork is
quick and sound. Called by `verdicts`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import logging
import os
import select
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from configs.complete import runtime_kind
from configs.errors import ConfigError
from configs.model import ModelConfig
from configs.parameters import ModelParameters
from deployments import archives, runtimes, warmup
from deployments.errors import MantaError
from deployments.instance import Instance
from deployments.planner import available_cpus
from deployments.runtimes import autocomplete, faults

_POLL_S = 0.02
_COUNT_LIMIT_S = 60.0
_TAIL_LINES, _TAIL_BYTES = 5, 8192
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# What a model says that wants a GPU where there is none.
_WANTS_CUDA = ("cuda", "nvidia")


@dataclass(frozen=True, slots=True)
class Subject:
    """A version as one instance group would load it. `gpu` is the index that the group lists."""

    artifact: Path
    config: ModelConfig
    parameters: ModelParameters
    kind: str
    gpu: int | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """`error` is a ConfigError as long as the model's process could tell; `notes` say what could
    not be checked here. `compiler`: the load has imported torch's compiler."""

    seconds: float
    error: ConfigError | str | None = None
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    compiler: bool = False


def gpu_count() -> int:
    """GPUs of this machine; asked in a fork, since asking may open them."""
    told, _ = fork(lambda: {"count": torch.cuda.device_count()}, _COUNT_LIMIT_S)
    return int(told["count"]) if told else 0


def load(subject: Subject, limit_s: float) -> Outcome:
    started = time.monotonic()
    told, end = fork(lambda: _load(subject), limit_s)
    seconds = time.monotonic() - started
    if told is None:
        return Outcome(seconds, error=f"failed to load model '{subject.config.name}': {end}")
    error = told.get("error")
    if isinstance(error, list):
        error = ConfigError(*error)
    warnings, notes = tuple(told["warnings"]), tuple(told["notes"])
    return Outcome(seconds, error, warnings, notes, bool(told.get("compiler")))


@functools.cache
def import_compiler() -> None:
    """Once here and not in each fork, where it takes seconds; compiles nothing."""
    torch.compile(torch.nn.Identity())


# --- in the fork ---------------------------------------------------------------------------------


def _load(subject: Subject) -> dict[str, Any]:
    told: dict[str, Any] = {"error": None, "warnings": [], "notes": []}
    cuda = torch.cuda.is_available()
    missing = subject.kind in ("KIND_GPU", "KIND_MODEL") and not cuda
    if missing and subject.artifact.suffix == ".pt2":
        if archives.inspect(subject.artifact).device == "cuda":
            return told | {"notes": ["not loaded: it was compiled for cuda, and no GPU is here"]}
    for name in ("manta", "ray.serve"):
        logging.getLogger(name).addHandler(_Told(told["warnings"]))
    told["error"] = _try(subject, cuda)
    told["compiler"] = "torch._inductor" in sys.modules
    if missing and any(word in str(told["error"]).lower() for word in _WANTS_CUDA):
        note = f"not loaded: no GPU is here ({_first_line(told['error'])})"
        return told | {"error": None, "notes": [note]}
    if missing and subject.kind == "KIND_GPU" and told["error"] is None:
        told["notes"] = ["loaded on the CPU for KIND_GPU, since no GPU is here"]
    return told


def _try(subject: Subject, cuda: bool) -> list[Any] | str | None:
    """Why it does not load: what a ConfigError holds, or a text."""
    artifact, parameters, kind = subject.artifact, subject.parameters, subject.kind
    device = f"cuda:{subject.gpu or 0}" if cuda and kind == "KIND_GPU" else "cpu"
    try:
        config = autocomplete.complete(artifact, subject.config, parameters, device, kind)
        runtime = runtime_kind(config, (artifact.name,))
        instance = Instance(
            name=config.name,
            artifact=artifact,
            config=config,
            parameters=parameters,
            device=device,
            kind=kind,
            threads=available_cpus(),
        )
        instance.load()
        # The planner has looked for the samples' files.
        folder = runtimes.version_folder(artifact, config).parent
        samples = warmup.prepare(config, runtime, folder.joinpath)
        warmup.run(instance, samples, config.name)
    except ConfigError as error:
        return list(error.args)
    except MantaError as error:
        return str(error)
    except Exception as error:
        return f"failed to load model '{subject.config.name}': {faults.clean_text(error)}"
    return None


def _first_line(error: Any) -> str:
    text = str(error[0]) if isinstance(error, list) else str(error)
    return (text.splitlines() or [""])[0][:200]


class _Told(logging.Handler):
    def __init__(self, texts: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._texts = texts

    def emit(self, record: logging.LogRecord) -> None:
        self._texts.append(record.getMessage())


# --- forks ---------------------------------------------------------------------------------------


def fork(work: Callable[[], dict[str, Any]], limit_s: float) -> tuple[dict[str, Any] | None, str]:
    """What `work` returns in a fork, or None and how the fork ended instead."""
    readable, writable = os.pipe()
    with tempfile.TemporaryFile() as output, open(readable, "rb", buffering=0) as answer:
        pid = os.fork()
        if pid == 0:
            _become_child(output, writable, work)
        os.close(writable)
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)  # whichever of the two does it first
        status, data = _wait(pid, answer, limit_s)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)  # what the model has left behind
        if status is None:
            os.waitpid(pid, 0)
            return None, f"it did not load within {limit_s:g} s"
        with contextlib.suppress(ValueError):
            return json.loads(data), ""
        return None, _ending(status, output)


def _become_child(output: IO[bytes], writable: int, work: Callable[[], dict[str, Any]]) -> None:
    """Never returns."""
    code = 1
    try:
        with contextlib.suppress(OSError):
            os.setpgid(0, 0)
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        data = json.dumps(work()).encode()
        while data:
            data = data[os.write(writable, data) :]
        code = 0
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode(errors="replace"))
    finally:
        os._exit(code)


def _wait(pid: int, answer: IO[bytes], limit_s: float) -> tuple[int | None, bytes]:
    """The fork's status, None when it hangs, and what it told. A process that the model has left
    behind may hold the pipe open, so that the end of the fork counts and not that of the pipe."""
    end_s = time.monotonic() + limit_s
    data = b""
    while time.monotonic() < end_s:
        ended, status = os.waitpid(pid, os.WNOHANG)  # first: then all that it told is in the pipe
        ready, _, _ = select.select([answer], [], [], 0 if ended else _POLL_S)
        while ready:
            piece = answer.read(1 << 16)
            data += piece or b""
            if not piece:
                if not ended:
                    time.sleep(_POLL_S)
                break
            ready, _, _ = select.select([answer], [], [], 0)
        if ended:
            return status, data
    return None, data


def _ending(status: int, output: IO[bytes]) -> str:
    code = os.waitstatus_to_exitcode(status)
    how = f"with exit code {code}"
    if code < 0:
        with contextlib.suppress(ValueError):
            how = f"by {signal.Signals(-code).name}"
    output.seek(max(0, output.seek(0, os.SEEK_END) - _TAIL_BYTES))
    lines = output.read().decode(errors="replace").strip().splitlines()[-_TAIL_LINES:]
    said = f"; it said: {' | '.join(line.strip() for line in lines)}" if lines else ""
    return f"its process ended {how}{said}"
