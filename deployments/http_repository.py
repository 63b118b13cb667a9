"""The HTTP form of a load request's parameters: JSON strings, of which files are base64.

Owns Triton's texts on that form; what the parameters may say is in `overrides`. Called by `http`.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from . import http_infer, overrides
from .errors import Internal, InvalidArgument


def load_parameters(given: Mapping[str, Any]) -> dict[str, Any]:
    """`config` as text and `file:<path>` as bytes. What is no string, or known by no name, is 500,
    as in Triton. Takes its time for large files."""
    parameters: dict[str, Any] = {}
    for key in given:
        text = http_infer.member(given, key, str)
        if key.startswith(overrides.FILE):
            parameters[key] = _decode(key, text)
        elif key == overrides.CONFIG:
            parameters[key] = text
        else:
            raise Internal(f"unrecognized load parameter '{key[:128]}'")
    return parameters


def _decode(key: str, text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:  # binascii.Error is one
        raise InvalidArgument(f"load parameter '{key[:128]}' is not base64") from None
