"""What a file of traces holds."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any


def events(path: Path) -> list[dict[str, Any]]:
    """None if it is not there, or is being written to, which a reader cannot see otherwise."""
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        found: list[dict[str, Any]] = json.loads(path.read_text())
        return found
    return []
