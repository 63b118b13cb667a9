"""Names that others give: which can stand for a model, and which path for a file in its folder.

Pure text: where a path leads on a disk is `disk`'s to find out. Called wherever a client's name
comes in, and before anything is looked up or written under it.
"""

from __future__ import annotations

import re

from .errors import InvalidArgument

MAX_NAME_BYTES = 255
MAX_PARTS = 32

_NAME = re.compile(r"[\w.+@~=:,-]+")


def check_model_name(name: str) -> None:
    """Raises InvalidArgument unless a client's model name can name a model directory."""
    if not name.strip():
        raise InvalidArgument("Model name cannot be empty or blank")
    if "/" in name or "\\" in name or name.strip() in (".", ".."):
        raise InvalidArgument("model name must not contain path traversal characters")
    if not _NAME.fullmatch(name):
        raise InvalidArgument("model name must consist of letters, digits and . _ + - @ ~ = : ,")
    if len(name.encode()) > MAX_NAME_BYTES:
        raise InvalidArgument(f"model name must not be longer than {MAX_NAME_BYTES} bytes")


def check_file_path(path: str) -> None:
    """Raises InvalidArgument unless a path names a file below the folder that it is relative to."""
    parts = path.split("/")
    inside = path.isprintable() and "\\" not in path and len(parts) <= MAX_PARTS
    if not inside or any(part.strip() in ("", ".", "..") for part in parts):
        raise InvalidArgument(
            f"file path {path[:128]!r} must be relative and must not leave the model's directory"
        )
    if any(len(part.encode()) > MAX_NAME_BYTES for part in parts):
        raise InvalidArgument(
            f"a name in file path {path[:128]!r} is longer than {MAX_NAME_BYTES} bytes"
        )
