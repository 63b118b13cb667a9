"""What of tracing can be changed while the server runs, and what each protocol says of it.

Owns the names of the settings, their values and how a model's stand over those of all; the
Controller keeps what was changed, `tracing` goes by it. There is no way to set a file from here:
see the first error.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from configs.tracing import INT32_MAX, LEVELS, OFF, UINT32_MAX, TraceConfig, invalid

from . import http_infer
from .errors import InvalidArgument, Unsupported
from .types import TraceChanges, TraceScope, TraceSettings

NO_FILE = "trace file location can not be updated through network protocol"
NO_MODE = "trace mode can not be updated through network protocol"
EVERYWHERE = ""

_FIELDS = {
    "trace_level": "level",
    "trace_rate": "rate",
    "trace_count": "count",
    "log_frequency": "log_frequency",
}
_FIXED = {"trace_file": NO_FILE, "trace_mode": NO_MODE}


def of(config: TraceConfig, changes: TraceChanges, model: str = EVERYWHERE) -> TraceSettings:
    """What is in force for a model: its own, else those of all, else those of the start."""
    values: dict[str, Any] = {
        "level": config.level,
        "rate": config.rate,
        "count": config.count,
        "log_frequency": config.log_frequency,
    }
    for scope in (EVERYWHERE, model):
        if scope in changes.scopes:
            values.update(changes.scopes[scope].values)
    return TraceSettings(**values)


def changed(
    config: TraceConfig,
    current: TraceChanges,
    model: str,
    changes: Mapping[str, Any],
    now_ns: int | None = None,
) -> TraceChanges:
    """`changes` by field, as the functions below make them, None to clear; `model` "" is all.

    All of them or, on an error, none. Raises InvalidArgument for what does not go together.
    """
    if not changes:
        return current
    later_ns = max(current.changed_ns + 1, time.time_ns() if now_ns is None else now_ns)
    scopes = dict(current.scopes)
    before = scopes.pop(model).values if model in scopes else {}
    values = {name: value for name, value in {**before, **changes}.items() if value is not None}
    if values:
        scopes[model] = TraceScope(values, later_ns)
    result = TraceChanges(scopes, later_ns)
    settings = of(config, result, model)
    reason = invalid(config.mode, config.file, settings.level, settings.rate)
    if reason:
        raise InvalidArgument(f"Attempting to set invalid trace setting :{reason}")
    return result


def shown(config: TraceConfig, changes: TraceChanges, model: str) -> dict[str, Any]:
    """As clients get it. Of the file its name: where it lies is not theirs to know."""
    settings = of(config, changes, model)
    return {
        "trace_level": list(settings.level) or [OFF],
        "trace_rate": str(settings.rate),
        "trace_count": str(settings.count),
        "log_frequency": str(settings.log_frequency),
        "trace_file": PurePath(config.file).name,
        "trace_mode": config.mode,
    }


# --- what clients send ---------------------------------------------------------------------------


def from_json(document: Mapping[str, Any]) -> dict[str, Any]:
    """null clears. A wrong type is Internal, as wherever JSON is read."""
    _check_names(document)
    changes: dict[str, Any] = {}
    for name, field in _FIELDS.items():
        if name not in document:
            continue
        value = document[name]
        if value is None:
            changes[field] = None
        elif name == "trace_level":
            if not isinstance(value, list):
                raise http_infer.wrong_type(name, "array")
            if not all(isinstance(level, str) for level in value):
                raise http_infer.wrong_type(name, "string")
            changes[field] = _levels(value)
        elif not isinstance(value, str):
            raise http_infer.wrong_type(name, "string")
        else:
            changes[field] = _number(name, value)
    return changes


def from_proto(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of TraceSettingRequest.settings; no value clears."""
    _check_names(settings)
    changes: dict[str, Any] = {}
    for name, field in _FIELDS.items():
        if name not in settings:
            continue
        values = list(settings[name].value)
        if not values:
            changes[field] = None
        elif name == "trace_level":
            changes[field] = _levels(values)
        elif len(values) > 1:
            raise InvalidArgument(f"expect only 1 value for '{name}'")
        else:
            changes[field] = _number(name, values[0])
    return changes


def _check_names(given: Mapping[str, Any]) -> None:
    for name, text in _FIXED.items():
        if name in given:
            raise Unsupported(text)
    for name in given:
        if name not in _FIELDS:
            raise InvalidArgument(f"unknown trace setting '{name[:64]}'")


def _levels(given: Sequence[str]) -> tuple[str, ...]:
    """In one order; without OFF, which is no level."""
    for level in given:
        if level != OFF and level not in LEVELS:
            raise InvalidArgument(f"unknown trace level '{level[:64]}'")
    if OFF in given and len(given) > 1:
        raise InvalidArgument("Expect only one trace level 'OFF' is specified")
    if not given:
        raise InvalidArgument("expect at least one trace level")
    return tuple(level for level in LEVELS if level in given)


def _number(name: str, text: str) -> int:
    shown = text[:64]
    if not re.fullmatch(r"[+-]?[0-9]+", text):
        raise InvalidArgument(f"Unable to parse '{name}', got: {shown}")
    # Longer ones are out of range, and python would refuse to read them.
    value = int(text) if len(text) < 32 else UINT32_MAX + 1
    if name != "trace_count":
        if not 0 <= value <= UINT32_MAX:
            raise _out_of_range(name, 0, UINT32_MAX, shown)
    elif value > INT32_MAX:
        raise _out_of_range(name, -1, INT32_MAX, shown)
    elif value < -1:
        raise InvalidArgument(f"Unable to parse '{name}'. Expecting value >= -1, got: {shown}")
    return value


def _out_of_range(name: str, least: int, most: int, shown: str) -> InvalidArgument:
    return InvalidArgument(
        f"Unable to parse '{name}', value is out of range [ {least}, {most} ], got: {shown}"
    )
