"""Exported programs compiled to AOTI packages once, and kept on disk by what they were made from.

Owns the cache: its folder, its keys, and that concurrent loads compile once. Compiles in a process
of its own, which `python -m` of this module is, so that a replica does not keep the compiler.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import stat
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from configs.errors import ConfigError

from . import faults

logger = logging.getLogger("manta.runtimes")

FOLDER = "MANTA_COMPILE_CACHE"
_CHUNK_BYTES = 1 << 20
_FORM = "1"  # of what is kept: another one is compiled anew
_FIELD = 'parameters["COMPILE_ON_LOAD"]'
_ROOT = Path(__file__).parents[2]


def folder(environment: Mapping[str, str]) -> Path:
    """Where packages are kept: $MANTA_COMPILE_CACHE, or a folder in the user's cache."""
    given = environment.get(FOLDER)
    if given:
        return Path(given)
    home = environment.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "manta" / "compiled"


def package(path: Path, exported_on: str, device: torch.device, where: str) -> Path:
    """The package of a program, compiled unless it is there; takes tens of seconds then. Raises
    ConfigError, which names a compiler that is missing."""
    try:
        place = _private(folder(os.environ))
        kept = place / f"{key(path, device)}.pt2"
        if kept.is_file():
            logger.info("compiled package of '%s' taken from the cache", where)
            return kept
        from .eager import missing_compiler

        if missing := missing_compiler():
            raise ConfigError(f"COMPILE_ON_LOAD needs {missing}", file=where, field=_FIELD)
        done = subprocess.run(
            [sys.executable, "-m", __name__, str(path), str(kept), exported_on, str(device)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(_ROOT), *_python_path()])},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except OSError as error:
        reason = f"COMPILE_ON_LOAD: the cache of compiled packages cannot be used: {error.strerror}"
        raise ConfigError(reason, file=where, field=_FIELD) from error
    if done.returncode or not kept.is_file():
        logger.error("compilation of %s failed: %s", where, done.stderr[-4000:])
        last = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
        text = faults.clean_text(RuntimeError(last))
        raise ConfigError(f"COMPILE_ON_LOAD: it does not compile: {text}", file=where, field=_FIELD)
    logger.info("'%s' is compiled", where)
    return kept


def key(path: Path, device: torch.device) -> str:
    """Of all that decides what comes out: the program, torch, the processor and the device."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    facts = [_FORM, torch.__version__, device.type, torch.backends.cpu.get_cpu_capability()]
    facts.append(_processor())
    if device.type == "cuda":
        facts.append(f"{torch.cuda.get_device_name(device)} {torch.version.cuda}")
        facts.append(str(torch.cuda.get_device_capability(device)))
    facts += sorted(f"{k}={v}" for k, v in os.environ.items() if k.startswith("TORCHINDUCTOR_"))
    digest.update("\0".join(facts).encode(errors="replace"))
    return digest.hexdigest()[:40]


def _processor() -> str:
    """The code is compiled for the very processor: its model, as Linux names it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "CPU part")):
                return line
    return ""


def _python_path() -> list[str]:
    return [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]


def _private(place: Path) -> Path:
    """Packages are code: nobody else may put one there. Raises OSError."""
    place.mkdir(parents=True, exist_ok=True, mode=0o700)
    facts = place.stat()
    if facts.st_uid != os.geteuid() or stat.S_IMODE(facts.st_mode) & 0o022:
        raise PermissionError(1, "its folder belongs to, or can be written by, another user")
    return place


@contextlib.contextmanager
def _alone(kept: Path) -> Iterator[None]:
    """While it lasts, nobody else compiles the same."""
    with open(kept.with_suffix(".lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(path: Path, kept: Path, exported_on: str, device: str) -> None:
    with _alone(kept):
        if kept.is_file():  # another process has been faster
            return
        with tempfile.TemporaryDirectory(dir=kept.parent, prefix="building-") as building:
            made = Path(building) / "model.pt2"
            _write(path, made, exported_on, torch.device(device))
            os.replace(made, kept)


def _write(path: Path, made: Path, exported_on: str, device: torch.device) -> None:
    from .exported import moved

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.export.load(str(path))
        if exported_on != device.type:
            program = moved(program, device)
        torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(made),
            # Otherwise the code runs on as many threads as this process has now.
            inductor_configs={"cpp.dynamic_threads": True},
        )


if __name__ == "__main__":
    _compile(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4])
