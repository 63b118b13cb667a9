"""The patterns that choose request headers: --http-header-forward-pattern and its gRPC twin.

Owns their rules, which are Triton's: searched and not anchored, whatever the case, unless they
begin with (?-i). Called by `server` at start, and by `deployments.forwarding`.
"""

from __future__ import annotations

import re

CASE_COUNTS = "(?-i)"


def header_pattern(text: str) -> re.Pattern[str] | None:
    """None for no pattern. Raises ValueError, which tells what is wrong with it."""
    if not text:
        return None
    flags = 0 if text.startswith(CASE_COUNTS) else re.IGNORECASE
    try:
        return re.compile(text.removeprefix(CASE_COUNTS), flags)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"'{text}' is no regular expression: {error}") from None
