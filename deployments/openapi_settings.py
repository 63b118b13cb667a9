"""JSON schemas of what `log_settings` and `trace_settings` read and show.

Pure. Read by `openapi`.
"""

from __future__ import annotations

from collections.abc import Mapping

from .openapi_schemas import COUNT, FLAG, TEXT, Schema, listed, record

_CLEARED: Schema = {"type": ["string", "null"]}
_TRACE_LEVEL: Schema = {"type": "string", "enum": ["OFF", "TIMESTAMPS", "TENSORS"]}

SCHEMAS: Mapping[str, Schema] = {
    "LogSettings": record(
        log_file=TEXT,
        log_info=FLAG,
        log_warning=FLAG,
        log_error=FLAG,
        log_verbose_level=COUNT,
        log_format={"type": "string", "enum": ["default", "ISO8601", "json"]},
    ),
    "TraceSettings": record(
        trace_level=listed(_TRACE_LEVEL),
        trace_rate={**TEXT, "description": "A number: one of so many requests is traced."},
        trace_count={**TEXT, "description": "A number: so many at most, -1 for all."},
        log_frequency={**TEXT, "description": "A number: so many traces per file, 0 for all."},
        trace_file={**TEXT, "description": "Its name."},
        trace_mode={"type": "string", "enum": ["triton", "opentelemetry"]},
    ),
    "TraceChanges": {
        **record(
            trace_level={
                "type": ["array", "null"],
                "items": _TRACE_LEVEL,
                "description": "OFF stands alone.",
            },
            trace_rate=_CLEARED,
            trace_count=_CLEARED,
            log_frequency=_CLEARED,
        ),
        "description": "null brings back what holds for all models, or what the server began with.",
    },
}
