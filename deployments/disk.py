"""The file system, carefully: nothing that is read may lie outside of the model repository.

Knows folders and files, and what of them is a model; what they mean is the Repository's, which
calls it. Texts name paths relative to the repository.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

from configs.errors import ConfigError

from .errors import Internal

logger = logging.getLogger("manta.repository")

CONFIG = "config.pbtxt"
CONFIGS = "configs"  # files of other names, of which --model-config-name chooses one

_VERSION = re.compile(r"[1-9][0-9]{0,17}")  # fits the proto's int64
# Where `manta optimize` keeps a model until it is whole.
WORKSHOP = ".optimizing."
_OTHER_FOLDERS = {CONFIGS, "warmup", "initial_state", "__pycache__"}

# By path: size, times and inode, whatever a link leads to.
Signature: TypeAlias = tuple[tuple[str, int, int, int, int], ...]


def contained(model: Path, relative: str) -> Path:
    """The resolved path of something in a model directory; ConfigError if it is elsewhere.

    A link may point anywhere inside the same repository: config maps are mounted so.
    """
    root = os.path.realpath(model.parent)
    path = os.path.realpath(model / relative)
    if os.path.commonpath([root, path]) != root or path == root:
        shown = f"{model.name}/{relative}".rstrip("/")
        raise ConfigError(f"'{shown}' leads out of the model repository")
    return Path(path)


def read(model: Path, relative: str, limit_bytes: int) -> bytes | None:
    path = contained(model, relative)
    shown = f"{model.name}/{relative}"
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            data = file.read(limit_bytes + 1)
    except OSError as error:
        raise ConfigError(f"unable to read the file: {error.strerror}", file=shown) from None
    if len(data) > limit_bytes:
        raise ConfigError(f"the file is larger than {limit_bytes} bytes", file=shown)
    return data


def models(root: Path) -> Iterator[str]:
    """Names of the model directories of a repository. Raises Internal where it cannot be read."""
    yield from (entry for entry in _folders(root) if _is_model(root / entry))


def _folders(root: Path) -> Iterator[str]:
    try:
        with os.scandir(root) as entries:
            yield from [entry.name for entry in entries if entry.is_dir()]
    except OSError as error:
        logger.error("model repository '%s' cannot be read: %s", root, error.strerror)
        raise Internal("a model repository cannot be read") from None


def _is_model(path: Path) -> bool:
    """Folders of other programs, such as .git, are no models unless they look like one; what
    `manta optimize` is making is none yet."""
    if path.name.startswith(WORKSHOP):
        return False
    if not path.name.startswith(".") and path.name not in _OTHER_FOLDERS:
        return True
    return (path / CONFIG).is_file() or any(_VERSION.fullmatch(name) for name in _folders(path))


def versions(model: Path) -> tuple[int, ...]:
    found = []
    for name in _folders(model):
        if _VERSION.fullmatch(name):
            found.append(int(name))
        elif not name.startswith(".") and name not in _OTHER_FOLDERS:
            logger.warning(
                "model %r: ignoring version directory %r: not a positive integer "
                "without leading zeros",
                model.name,
                name,
            )
    return tuple(sorted(found))


def walk(folder: Path, model: Path) -> list[str]:
    """Files below a version directory, relative to the model, sorted.

    Compiled Python is left out: importing a model.py writes it.
    """
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name != "__pycache__"]
        found += [os.path.relpath(os.path.join(parent, name), model) for name in files]
    return sorted(found)


def signature(model: Path) -> Signature:
    """What tells, without reading them, that files of a model directory may have changed.

    A folder in it that is a link is followed, one below that is not: it could lead in a circle.
    What vanishes meanwhile is left out; the next signature is another one.
    """
    found = []
    try:
        entries = [(entry.name, entry.is_dir()) for entry in os.scandir(model)]
    except OSError:
        return ()
    for name, is_folder in entries:
        if name == "__pycache__":
            continue
        files = walk(model / name, model) if is_folder else [name]
        for relative in [name, *files] if is_folder else files:
            try:
                one = os.stat(model / relative)
            except OSError:
                continue
            # Of a folder, what it is: its times change when Python writes what it has compiled.
            times = (0, 0, 0) if relative == name and is_folder else _facts(one)
            found.append((relative, *times, one.st_ino))
    return tuple(sorted(found))


def _facts(one: os.stat_result) -> tuple[int, int, int]:
    """ctime, too: no program can set it back."""
    return one.st_size, one.st_mtime_ns, one.st_ctime_ns
