"""What users may say of traces: `--trace-config` as tritonserver takes it.

Owns its form and what goes together. The server's settings call it; `trace_settings`, `tracing`
and what they write with, in deployments/, act on it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit

TRITON, OPENTELEMETRY = "triton", "opentelemetry"
LEVELS = ("TIMESTAMPS", "TENSORS")
OFF = "OFF"
UINT32_MAX = 2**32 - 1
INT32_MAX = 2**31 - 1
DEFAULT_URL = "http://localhost:4318/v1/traces"
EXPORTER = "opentelemetry.exporter.otlp.proto.http"
_BSP = ("bsp_max_queue_size", "bsp_schedule_delay", "bsp_max_export_batch_size")
# Names of levels on the command line: Triton's, and those that it has had.
_LEVEL_NAMES: Mapping[str, str] = {
    **dict.fromkeys(("false", "off"), OFF),
    **dict.fromkeys(("true", "on", "min", "max", "timestamps"), "TIMESTAMPS"),
    "tensors": "TENSORS",
}
KNOWN: tuple[str, ...] = ("level", "rate", "count", "mode", "triton,file", "triton,log-frequency")
KNOWN += ("opentelemetry,url", "opentelemetry,resource", *(f"opentelemetry,{key}" for key in _BSP))


@dataclass(frozen=True, slots=True)
class TraceConfig:
    """`level` is empty for OFF. Of `rate` requests one is traced, `count` of them at most, or all
    for -1. `file` and `log_frequency` are of mode triton, the rest of mode opentelemetry: `bsp` are
    the options of its batch span processor, by name."""

    mode: str = TRITON
    level: tuple[str, ...] = ()
    rate: int = 1000
    count: int = -1
    file: str = ""
    log_frequency: int = 0
    url: str = DEFAULT_URL
    resource: Mapping[str, str] = field(default_factory=dict)
    bsp: Mapping[str, int] = field(default_factory=dict)


def parse(entries: Iterable[str]) -> TraceConfig:
    """Levels and resources add up; of any other key the last entry counts. Raises ValueError, which
    names the entry."""
    config = TraceConfig()
    for entry in entries:
        key, equals, value = entry.partition("=")
        if not equals or key not in KNOWN:
            raise ValueError(f"trace_config: unknown '{entry}'; there are {', '.join(KNOWN)}")
        config = replace(config, **_given(config, key, value))
    if OFF in config.level:
        if len(config.level) > 1:
            raise ValueError("trace_config: level OFF stands alone")
        config = replace(config, level=())
    if reason := invalid(config.mode, config.file, config.level, config.rate):
        raise ValueError(f"trace_config: {reason}")
    # Clients hear of levels in one order.
    return replace(config, level=tuple(level for level in LEVELS if level in config.level))


def _given(config: TraceConfig, key: str, value: str) -> dict[str, Any]:
    match key:
        case "level":
            name = _LEVEL_NAMES.get(value.lower())
            if name is None:
                raise ValueError(f"trace_config: invalid value for trace level option: {value}")
            return {"level": tuple(dict.fromkeys((*config.level, name)))}
        case "mode":
            if value not in (TRITON, OPENTELEMETRY):
                raise ValueError(f"trace_config: mode is triton or opentelemetry, not '{value}'")
            return {"mode": value}
        case "rate":
            return {"rate": _number(key, value, 0, UINT32_MAX)}
        case "count":
            return {"count": _number(key, value, -1, INT32_MAX)}
        case "triton,file":
            return {"file": value}
        case "triton,log-frequency":
            return {"log_frequency": _number(key, value, 0, UINT32_MAX)}
        case "opentelemetry,url":
            return {"url": _url(value)}
        case "opentelemetry,resource":
            name, equals, text = value.partition("=")
            if not equals or not name:
                raise ValueError(f"trace_config: {key} is KEY=VALUE, not '{value}'")
            return {"resource": {**config.resource, name: text}}
        case _:
            number = _number(key, value, 1, INT32_MAX)
            return {"bsp": {**config.bsp, key.partition(",")[2]: number}}


def _number(key: str, text: str, least: int, most: int) -> int:
    if not re.fullmatch(r"-?[0-9]{1,12}", text) or not least <= int(text) <= most:
        raise ValueError(f"trace_config: {key} is a number from {least} to {most}, not '{text}'")
    return int(text)


def _url(text: str) -> str:
    try:
        parts = urlsplit(text)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        good = False
    if not good:
        raise ValueError("trace_config: opentelemetry,url is no URL of http or https")
    return text


def invalid(mode: str, file: str, level: tuple[str, ...], rate: int) -> str:
    """Why these do not go together, "" if they do. Where nothing is traced, anything does."""
    if not level:
        return ""
    if mode == TRITON and rate == 0:
        return "sample rate must be non-zero"
    if mode == TRITON and not file:
        return "trace file name is not given"
    if mode == OPENTELEMETRY and "TENSORS" in level:
        return "level TENSORS is not supported by mode opentelemetry"
    return ""


def check(config: TraceConfig) -> None:
    """Raises ValueError where the options of a mode contradict each other, and where what mode
    opentelemetry needs is not installed."""
    if config.mode != OPENTELEMETRY:
        return
    queue = config.bsp.get("bsp_max_queue_size", 2048)
    if config.bsp.get("bsp_max_export_batch_size", 512) > queue:
        raise ValueError("trace_config: bsp_max_export_batch_size is above bsp_max_queue_size")
    if not _installed(EXPORTER):
        raise ValueError(
            "trace_config: mode opentelemetry needs the extra 'otel': "
            "pip install 'manta-server[otel]'"
        )


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of a package above it
        return False
