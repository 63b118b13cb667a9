"""What of the log can be changed while the server runs, and what each protocol says of it.

Owns the names of the settings and their values; the Controller keeps those in force, `logs` goes
by them. There is no way to set a file from here: see the first error.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import PurePath
from typing import Any

from configs.server import ServerSettings

from . import http_infer
from .errors import InvalidArgument, Unavailable, Unsupported
from .types import LogSettings

FORMATS = ("default", "ISO8601", "json")
MAX_LEVEL = 2**31 - 1
NO_FILE = "log file location can not be updated through network protocol"

# Name in the protocols, field, field of gRPC's SettingValue, and what Triton calls its type.
_SETTINGS = (
    ("log_info", "info", "bool_param", "boolean"),
    ("log_warning", "warning", "bool_param", "boolean"),
    ("log_error", "error", "bool_param", "boolean"),
    ("log_verbose_level", "verbose", "uint32_param", "int32"),
    ("log_format", "format", "string_param", "string"),
)
_NAMES = {name: field for name, field, _, _ in _SETTINGS}
# Of what clients get: which field of SettingValue holds it.
FIELDS = {"log_file": "string_param", **{name: kind for name, _, kind, _ in _SETTINGS}}


def initial(settings: ServerSettings) -> LogSettings:
    return LogSettings(
        settings.log_info,
        settings.log_warning,
        settings.log_error,
        settings.log_verbose,
        settings.log_format,
    )


def changed(
    current: LogSettings, changes: Mapping[str, Any], now_ns: int | None = None
) -> LogSettings:
    """`changes` by field, as the functions below make them; all of them or, on an error, none."""
    if not changes:
        return current
    later_ns = max(current.changed_ns + 1, time.time_ns() if now_ns is None else now_ns)
    return replace(current, **changes, changed_ns=later_ns)


def shown(current: LogSettings, file: str) -> dict[str, Any]:
    """As clients get it. Of the file its name: where it lies is not theirs to know."""
    values = {name: getattr(current, field) for name, field in _NAMES.items()}
    return {"log_file": PurePath(file).name, **values}


def from_json(document: Mapping[str, Any]) -> dict[str, Any]:
    """null changes nothing. A wrong type is Internal, as wherever JSON is read."""
    given = {name: value for name, value in document.items() if value is not None}
    _check_names(given)
    changes: dict[str, Any] = {}
    for name, field, kind, _ in _SETTINGS:
        if name not in given:
            continue
        value = given[name]
        if kind == "bool_param" and not isinstance(value, bool):
            raise http_infer.wrong_type(name, "boolean")
        if kind == "uint32_param" and not (type(value) is int and 0 <= value <= MAX_LEVEL):
            raise http_infer.wrong_type(name, "unsigned-integer")
        if kind == "string_param" and not isinstance(value, str):
            raise http_infer.wrong_type(name, "string")
        if name == "log_format" and value not in FORMATS:
            raise Unavailable(f"invalid argument for --log_format, got: {value}")
        changes[field] = value
    return changes


def from_proto(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of LogSettingsRequest.settings."""
    _check_names(settings)
    changes: dict[str, Any] = {}
    for name, field, kind, called in _SETTINGS:
        if name not in settings:
            continue
        if settings[name].WhichOneof("parameter_choice") != kind:
            raise InvalidArgument(f"expect {called} for '{name}'")
        value = getattr(settings[name], kind)
        if name == "log_format" and value not in FORMATS:
            raise InvalidArgument(f"invalid argument for log_format, got: {value}")
        if name == "log_verbose_level" and value > MAX_LEVEL:
            raise InvalidArgument(f"expect {called} for '{name}'")
        changes[field] = value
    return changes


def _check_names(given: Mapping[str, Any]) -> None:
    if "log_file" in given:
        raise Unsupported(NO_FILE)
    for name in given:
        if name not in _NAMES:
            raise InvalidArgument(f"unknown log setting '{name[:64]}'")
