"""What clients say of their shared memory over HTTP: a region's registration, from JSON.

Owns Triton's texts on that form; the rules for regions are those of `regions`. Pure. Called by
`http`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from .errors import InvalidArgument
from .http_infer import member, wrong_type


class Registration(NamedTuple):
    key: str
    offset: int
    byte_size: int


def registration(document: dict[str, Any]) -> Registration:
    """Of a region of system shared memory."""
    for field in ("key", "byte_size"):
        if field not in document:
            raise InvalidArgument(f"Shared memory register request has no '{field}' field")
    key = member(document, "key", str)
    return Registration(key, _unsigned(document, "offset"), _unsigned(document, "byte_size"))


def _unsigned(document: dict[str, Any], field: str) -> int:
    value: int = document.get(field, 0)
    if type(value) is not int or value < 0:
        raise wrong_type(field, "unsigned-integer")
    return value
