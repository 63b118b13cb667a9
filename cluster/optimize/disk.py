"""The file system, for what must be there whole or not at all.

Owns syncing and the move that replaces nothing. Called by `target`, which knows what is written.
"""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

_AT_FDCWD, _RENAME_NOREPLACE = -100, 1  # linux/fcntl.h, linux/fs.h
_UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP}


def move_new(source: Path, target: Path) -> None:
    """Renames a folder. Raises FileExistsError where there is anything: a plain rename takes the
    place of an empty folder, which somebody else may be about to fill."""
    code = _rename_new(source, target)
    if not code:
        return
    if code not in _UNSUPPORTED:
        raise OSError(code, os.strerror(code), str(target))
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    source.rename(target)


def _rename_new(source: Path, target: Path) -> int:
    """0 or an error number; ENOSYS where the C library has no such call."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return errno.ENOSYS
    old, new = os.fsencode(source), os.fsencode(target)
    if rename(_AT_FDCWD, old, _AT_FDCWD, new, _RENAME_NOREPLACE) == 0:
        return 0
    return ctypes.get_errno()


def sync(path: Path) -> None:
    """A file or folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
