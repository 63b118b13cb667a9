"""What load requests give instead of what is on disk: a configuration, and files.

Owns the rules for such parameters, the folders of given files, and which override is in force for a
model. What is in them the Repository reads. `check` is the verbs', the rest the lifecycle's.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.server import ServerSettings

from .errors import Internal, InvalidArgument, Unavailable, Unsupported
from .names import check_file_path
from .repository import MAX_CONFIG_BYTES
from .types import Override

logger = logging.getLogger("ray.serve")

CONFIG = "config"
FILE = "file:"
MAX_FILES = 1024
DISABLED = (
    "File overrides are disabled. Start the server with '--allow-file-override=true' to enable."
)

_PREFIX = "manta-override-"


def check(name: str, parameters: Mapping[str, Any], settings: ServerSettings) -> None:
    """Raises what is wrong with the parameters of a request to load a model."""
    files = {key: value for key, value in parameters.items() if key.startswith(FILE)}
    for key in parameters:
        if key != CONFIG and key not in files:
            raise InvalidArgument(f"unrecognized load parameter '{key[:128]}'")
    if files and not settings.allow_file_override:
        raise Unsupported(DISABLED)
    for key, value in files.items():
        if not isinstance(value, bytes):
            raise InvalidArgument(
                f"invalid value type for load parameter '{key[:128]}', expected bytes_param."
            )
        check_file_path(key.removeprefix(FILE))
    if CONFIG not in parameters:
        if files:  # Triton's text, and why
            raise Internal(
                f"failed to load '{name}', failed to poll from model repository: files need the "
                "model's configuration in the parameter 'config'"
            )
        return
    config = parameters[CONFIG]
    if not isinstance(config, str):
        raise InvalidArgument(
            "invalid value type for load parameter 'config', expected string_param."
        )
    if len(config) > MAX_CONFIG_BYTES:
        raise InvalidArgument(f"config is larger than {MAX_CONFIG_BYTES} bytes")
    _check_size(files, settings.max_file_override_bytes)


def _check_size(files: Mapping[str, bytes], limit: int) -> None:
    if len(files) > MAX_FILES:
        raise InvalidArgument(f"at most {MAX_FILES} files are allowed, got {len(files)}")
    total = size_bytes(files)
    if total > limit:
        raise InvalidArgument(
            f"files of {total} bytes exceed the maximum allowed value of {limit} bytes. Use "
            "--max-file-override-bytes to increase the limit."
        )


def size_bytes(parameters: Mapping[str, Any]) -> int:
    """What the parameters of a load request weigh."""
    return sum(len(value) for value in parameters.values() if isinstance(value, (str, bytes)))


class Overrides:
    """Those in force, by model. A folder lives as long as somebody holds it: the override in force,
    a generation that was made of it, or the load that has written it.

    `directory` is where folders are made, "" for the system's temporary one.
    """

    def __init__(self, directory: str) -> None:
        self._directory = directory or None
        self._in_force: dict[str, Override] = {}
        self._holders: Counter[str] = Counter()

    def of(self, name: str) -> Override | None:
        return self._in_force.get(name)

    async def make(self, name: str, parameters: Mapping[str, Any]) -> Override:
        """What `check` has found good, its files written and held; `release` the folder."""
        files = {k.removeprefix(FILE): v for k, v in parameters.items() if k.startswith(FILE)}
        folder = await asyncio.to_thread(_write, self._directory, name, files) if files else ""
        self.hold(folder)
        return Override(parameters[CONFIG], folder)

    async def put(self, name: str, override: Override | None) -> None:
        """In force from now on, for plain loads, too; None is what is on disk."""
        before = self._in_force.pop(name, None)
        if override is not None:
            self._in_force[name] = override
            self.hold(override.folder)
        if before is not None:
            await self.release(before.folder)

    def hold(self, folder: str) -> None:
        if folder:
            self._holders[folder] += 1

    async def release(self, folder: str) -> None:
        """Removes the folder with its last holder."""
        if not folder:
            return
        self._holders[folder] -= 1
        if self._holders[folder] <= 0:
            del self._holders[folder]
            await asyncio.to_thread(_remove, folder)

    async def close(self) -> None:
        """For the server's end: all folders go, whoever holds them."""
        for folder in list(self._holders):
            await asyncio.to_thread(_remove, folder)


def _write(directory: str | None, name: str, files: Mapping[str, bytes]) -> str:
    """A new folder, of mode 0700, which has the model's folder with these files in it.

    Nobody else can have put a link there, and a file that is there already is not written again.
    """
    try:
        folder = tempfile.mkdtemp(prefix=_PREFIX, dir=directory)
    except OSError as error:
        raise _unwritable(error) from None
    try:
        for relative, data in files.items():
            check_file_path(relative)
            path = Path(folder, name, relative)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as file:
                file.write(data)
    except (FileExistsError, NotADirectoryError, IsADirectoryError):
        _remove(folder)
        raise InvalidArgument("of the given files, one has the path of another's folder") from None
    except OSError as error:
        _remove(folder)
        raise _unwritable(error) from None
    except BaseException:
        _remove(folder)
        raise
    return folder


def _unwritable(error: OSError) -> Unavailable:
    logger.error("given files cannot be written: %s", error)
    return Unavailable(f"the server cannot write the given files: {error.strerror}")


def _remove(folder: str) -> None:
    if os.path.basename(folder).startswith(_PREFIX):  # a report of a replica has said so
        shutil.rmtree(folder, ignore_errors=True)
