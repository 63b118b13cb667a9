"""The log of one process: which records become lines, what a line looks like, and where it waits.

Owns Triton's two formats and JSON, and that no text of a client makes a second line or colours a
terminal. Attached by Router, Controller and replicas; the lines meet in the Controller's `logbook`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections import deque
from datetime import datetime, timezone
from typing import TextIO

from .types import LogSettings

MAX_LINES = 1000
MAX_MESSAGE_CHARS = 4096
MAX_TRACE_CHARS = 16384
# What a Python model logs; below Ray Serve's, which writes it to the replica's log file.
MODELS = "ray.serve.model"
_OURS, _SERVES = "manta", "ray.serve"
_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep

# Line ends, terminal escapes and NUL; C1 has the same in one byte; the rest turns text around.
_HIDDEN = (*range(32), *range(127, 160), 0x2028, 0x2029, *range(0x202A, 0x202F))
_HIDDEN += (*range(0x2066, 0x206A), *range(0xD800, 0xE000))
_ESCAPES = {code: repr(chr(code))[1:-1] for code in _HIDDEN}


def aloud(line: str, stream: TextIO | None) -> None:
    """On the process's own output: what Serve puts in its place makes a record of every line, and
    that would come back here. A full disk is no reason to end."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=stream, flush=True)


class Tap(logging.Handler):
    """Records of this process as lines, kept until they are taken.

    `source` stands before each message: which model's replica it is, say. `loud`: warnings are also
    on this process's own output, where nobody else puts them.
    """

    def __init__(self, settings: LogSettings, source: str = "", loud: bool = True) -> None:
        super().__init__(logging.DEBUG)
        self.settings = settings
        self._source = source
        self._loud = loud
        self._kept: deque[str] = deque(maxlen=MAX_LINES)
        self._lost = 0
        self._levels: dict[str, int] = {}

    # --- on and off ------------------------------------------------------------------------------

    def attach(self) -> None:
        for name in (_OURS, _SERVES):
            self._levels[name] = logging.getLogger(name).level
            logging.getLogger(name).addHandler(self)
        self._set_levels()

    def detach(self) -> None:
        """Not `close`, which whoever configures logging (uvicorn) calls on all handlers."""
        for name, level in self._levels.items():
            logging.getLogger(name).removeHandler(self)
            logging.getLogger(name).setLevel(level)
        self._levels = {}

    def follow(self, settings: LogSettings) -> None:
        """The later ones are in force."""
        if settings.changed_ns >= self.settings.changed_ns and settings != self.settings:
            self.settings = settings
            if self._levels:
                self._set_levels()

    def _set_levels(self) -> None:
        """So that what nobody wants costs a comparison. Serve's level stays, but for details."""
        details = self.settings.verbose > 0
        logging.getLogger(_OURS).setLevel(logging.DEBUG if details else logging.INFO)
        logging.getLogger(_SERVES).setLevel(logging.DEBUG if details else self._levels[_SERVES])

    # --- records ---------------------------------------------------------------------------------

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if wanted(record, self.settings):
                line = text(record, self.settings.format, self._source)
                self._keep(line)
                loud = self._loud and record.levelno >= logging.WARNING
                if loud and not record.name.startswith(_SERVES):
                    aloud(line, sys.__stderr__)  # Ray keeps it if this process dies
        except Exception:
            self.handleError(record)

    def _keep(self, line: str) -> None:
        if len(self._kept) == MAX_LINES:
            self._lost += 1
        self._kept.append(line)

    def take(self) -> tuple[str, ...]:
        """What was kept since the last time, as far as there was room."""
        lines = []
        while self._kept:
            lines.append(self._kept.popleft())
        lost, self._lost = self._lost, 0
        if lost:
            place = logging.LogRecord(
                _OURS, logging.WARNING, __file__, 0, "%d lines of the log were lost", (lost,), None
            )
            lines.insert(0, text(place, self.settings.format, self._source))
        return tuple(lines)

    def give_back(self, lines: tuple[str, ...]) -> None:
        """They were not delivered; the oldest go first when there is no room."""
        room = MAX_LINES - len(self._kept)
        self._lost += max(0, len(lines) - room)
        self._kept.extendleft(reversed(lines[max(0, len(lines) - room) :]))


def wanted(record: logging.LogRecord, settings: LogSettings) -> bool:
    """Serve's own records only when something is wrong, or at verbosity 2."""
    if record.levelno >= logging.ERROR:
        return settings.error
    if record.levelno >= logging.WARNING:
        return settings.warning
    own = record.name != _SERVES or record.pathname.startswith(_HERE)
    if not own and settings.verbose < 2:
        return False
    return settings.info if record.levelno >= logging.INFO else settings.verbose > 0


# --- lines ---------------------------------------------------------------------------------------


def clean(value: str, limit: int = MAX_MESSAGE_CHARS) -> str:
    """On one line, of bounded length, with nothing that a terminal would act on."""
    more = len(value) - limit
    shown = value[:limit].translate(_ESCAPES)
    return shown if more <= 0 else f"{shown}... ({more} more characters)"


def text(record: logging.LogRecord, form: str, source: str = "") -> str:
    """One line; with a traceback, more, which are indented and so begin like no record."""
    message, trace = record.getMessage(), _trace(record)
    if form == "json":
        return _json(record, message, trace, source)
    at = datetime.fromtimestamp(record.created, timezone.utc)
    level = _level(record)[0]
    place = f"{record.process} {record.filename}:{record.lineno}] "
    if form == "ISO8601":
        start = f"{at:%Y-%m-%dT%H:%M:%SZ} {level} {place}"
    else:
        start = f"{level}{at:%m%d %H:%M:%S}.{at.microsecond:06d} {place}"
    said = f"{source}: {message}" if source else message
    indented = [f"    {clean(each)}" for each in trace.splitlines()]
    return "\n".join([start + clean(said), *indented])


def _json(record: logging.LogRecord, message: str, trace: str, source: str) -> str:
    at = datetime.fromtimestamp(record.created, timezone.utc)
    fields = {
        "time": f"{at:%Y-%m-%dT%H:%M:%S}.{at.microsecond:06d}Z",
        "level": _level(record),
        "message": clean(message),
        "source": source,
        "pid": record.process,
        "file": record.filename,
        "line": record.lineno,
        "exception": trace,
    }
    return json.dumps({name: value for name, value in fields.items() if value != ""})


def _level(record: logging.LogRecord) -> str:
    """Triton's three; its details are information too."""
    if record.levelno >= logging.ERROR:
        return "ERROR"
    return "WARNING" if record.levelno >= logging.WARNING else "INFO"


def _trace(record: logging.LogRecord) -> str:
    if not record.exc_info:
        return ""
    trace = logging.Formatter().formatException(record.exc_info)
    more = len(trace) - MAX_TRACE_CHARS
    return trace if more <= 0 else f"... ({more} more characters)\n{trace[more:]}"


def announcement(message: str, form: str) -> str:
    """What the server tells of itself, as a line of its log."""
    return text(logging.LogRecord(_OURS, logging.INFO, "manta", 0, message, None, None), form)
