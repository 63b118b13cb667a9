"""What becomes a line of the log, and what a line looks like, whatever clients write."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import weakref
from contextlib import suppress
from dataclasses import replace

import pytest

from deployments.logs import (
    MAX_LINES,
    MAX_MESSAGE_CHARS,
    MODELS,
    Tap,
    aloud,
    announcement,
    clean,
    text,
)
from deployments.types import LogSettings

OURS = logging.getLogger("manta.test")
SERVES = logging.getLogger("ray.serve")
DEFAULT = re.compile(
    rf"([IWE])\d{{4}} \d\d:\d\d:\d\d\.\d{{6}} {os.getpid()} test_logs\.py:\d+\] (.*)", re.DOTALL
)
ISO = re.compile(
    rf"\d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\dZ ([IWE]) {os.getpid()} test_logs\.py:\d+\] (.*)", re.DOTALL
)


@pytest.fixture
def tap():
    one = Tap(LogSettings())
    one.attach()
    yield one
    one.detach()


def follow(tap, **changes):
    settings = replace(tap.settings, changed_ns=tap.settings.changed_ns + 1, **changes)
    tap.follow(settings)


def at_all_levels():
    OURS.debug("details")
    OURS.info("info")
    OURS.warning("warning")
    OURS.error("error")


def messages(tap):
    return [line.partition("] ")[2] for line in tap.take()]


# --- which records -------------------------------------------------------------------------------


def test_by_default_all_but_details(tap):
    at_all_levels()
    assert messages(tap) == ["info", "warning", "error"]


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"info": False}, ["warning", "error"]),
        ({"warning": False}, ["info", "error"]),
        ({"error": False}, ["info", "warning"]),
        ({"verbose": 1}, ["details", "info", "warning", "error"]),
        ({"verbose": 1, "info": False}, ["details", "warning", "error"]),
        ({"info": False, "warning": False, "error": False}, []),
    ],
)
def test_each_level_has_a_switch_of_its_own(tap, changes, wanted):
    follow(tap, **changes)
    at_all_levels()
    assert messages(tap) == wanted


def test_the_later_settings_are_in_force(tap):
    follow(tap, verbose=1)
    tap.follow(LogSettings(info=False))  # of a Controller that has just begun
    at_all_levels()
    assert messages(tap)[0] == "details"


def test_serves_own_records_are_there_when_something_is_wrong_or_at_verbosity_two(tap):
    def elsewhere(level, message):
        SERVES.handle(
            logging.LogRecord("ray.serve", level, "/ray/serve/x.py", 1, message, None, None)
        )

    def both():
        elsewhere(logging.INFO, "serve's info")
        elsewhere(logging.WARNING, "serve's warning")
        return messages(tap)

    assert both() == ["serve's warning"]
    follow(tap, verbose=1)
    assert both() == ["serve's warning"]
    follow(tap, verbose=2)
    assert both() == ["serve's info", "serve's warning"]


def test_what_a_model_logs_is_ours(tap):
    logging.getLogger(MODELS).warning("from a model")
    assert messages(tap) == ["from a model"]


def test_levels_are_given_back():
    before = OURS.getEffectiveLevel(), SERVES.level, list(SERVES.handlers)
    one = Tap(LogSettings(verbose=1))
    one.attach()
    assert OURS.isEnabledFor(logging.DEBUG)
    one.detach()
    assert (OURS.getEffectiveLevel(), SERVES.level, list(SERVES.handlers)) == before


def test_errors_are_also_on_this_process_s_own_output(tap, capfd, monkeypatch):
    """Ray keeps that, should the process die before its lines are taken."""
    monkeypatch.setattr(sys, "stderr", None)  # Serve's, which would make records of it
    OURS.info("not this")
    OURS.error("but this")
    err = capfd.readouterr().err
    assert "but this" in err and "not this" not in err


def test_one_whose_lines_are_told_by_another_is_not_loud(capfd):
    one = Tap(LogSettings(), loud=False)
    one.attach()
    OURS.error("not this")
    one.detach()
    assert messages(one) == ["not this"] and capfd.readouterr().err == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_is_no_reason_to_end():
    survived = False
    with suppress(OSError), open("/dev/full", "w", buffering=1) as full:  # it cannot be closed
        with pytest.raises(OSError):
            print("the control", file=full, flush=True)
        aloud("a line", full)
        survived = True
    assert survived


# --- how they look -------------------------------------------------------------------------------


def test_the_default_form(tap):
    at_all_levels()
    found = [DEFAULT.fullmatch(line) for line in tap.take()]
    assert [match.groups() for match in found if match] == [
        ("I", "info"),
        ("W", "warning"),
        ("E", "error"),
    ]


def test_the_iso_form(tap):
    follow(tap, format="ISO8601")
    at_all_levels()
    found = [ISO.fullmatch(line) for line in tap.take()]
    assert [match[1] for match in found if match] == ["I", "W", "E"]


def test_json(tap):
    follow(tap, format="json")
    at_all_levels()
    lines = [json.loads(line) for line in tap.take()]
    assert [(line["level"], line["message"]) for line in lines] == [
        ("INFO", "info"),
        ("WARNING", "warning"),
        ("ERROR", "error"),
    ]
    assert set(lines[0]) == {"time", "level", "message", "pid", "file", "line"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", lines[0]["time"])
    assert (lines[0]["pid"], lines[0]["file"]) == (os.getpid(), "test_logs.py")


@pytest.mark.parametrize("form", ["default", "json"])
def test_the_source_is_told(form):
    one = Tap(LogSettings(format=form), "model 'm' version 1")
    one.attach()
    OURS.warning("slow")
    one.detach()
    (line,) = one.take()
    if form == "json":
        assert json.loads(line)["source"] == "model 'm' version 1"
    else:
        assert line.endswith("] model 'm' version 1: slow")


def test_a_traceback_is_indented_or_a_field():
    for form in ("default", "json"):
        one = Tap(LogSettings(format=form))
        one.attach()
        try:
            raise ZeroDivisionError("forged\nE1125 00:00:00.000000 1 x.py:1] a line")
        except ZeroDivisionError:
            OURS.exception("it failed")
        one.detach()
        (line,) = one.take()
        if form == "json":
            assert "Traceback" in json.loads(line)["exception"] and "\n" not in line
        else:
            first, *rest = line.splitlines()
            assert first.endswith("] it failed")
            assert len(rest) > 2 and all(each.startswith("    ") for each in rest)


HOSTILE = [
    "a\r\nE1125 00:00:00.000000 1 x.py:1] forged",
    "a\x1b[2J\x1b[31mred",
    "nul \x00 bell \x07 delete \x7f",
    "one byte escape \x9b31m next line \x85",
    "line\u2028paragraph\u2029 turned \u202e around \u2066",
    "half \ud800 pair",
]


@pytest.mark.parametrize("hostile", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("form", ["default", "ISO8601", "json"])
def test_one_record_is_one_line_that_a_terminal_only_prints(form, hostile, monkeypatch):
    # One has no form in UTF-8: what pytest keeps of it would not get from one process to another.
    monkeypatch.setattr(logging.getLogger("manta"), "propagate", False)
    one = Tap(LogSettings(format=form), hostile)
    one.attach()
    OURS.warning("unknown model '%s'", hostile)
    one.detach()
    (line,) = one.take()
    line.encode()
    assert len(line.splitlines()) == 1
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]", line)
    assert "unknown model 'a" in line or hostile[0] != "a"


def test_what_is_escaped_can_still_be_read():
    assert clean("a\r\nb\x1b[m\x00\tc\u2028") == r"a\r\nb\x1b[m\x00\tc\u2028"
    assert clean("héllo 世界 \\n") == "héllo 世界 \\n"


@pytest.mark.parametrize("form", ["default", "json"])
def test_a_line_is_of_bounded_length(form):
    record = logging.LogRecord("manta", logging.INFO, "x.py", 1, "%s", ("x" * 10**6,), None)
    line = text(record, form)
    assert MAX_MESSAGE_CHARS < len(line) < MAX_MESSAGE_CHARS + 300
    assert f"({10**6 - MAX_MESSAGE_CHARS} more characters)" in line


def test_a_record_that_cannot_be_told_ends_nothing(tap, capsys):
    # Not through the logger: pytest has a handler of its own there, which raises.
    tap.handle(logging.LogRecord("manta", logging.INFO, "x.py", 1, "%d", ("no number",), None))
    OURS.info("next")
    assert messages(tap) == ["next"]
    assert "no number" in capsys.readouterr().err


def test_announcements():
    assert json.loads(announcement("ready on 100%", "json"))["message"] == "ready on 100%"
    assert announcement("ready", "default").endswith("] ready")


# --- what waits ----------------------------------------------------------------------------------


def test_lines_are_taken_once(tap):
    OURS.info("one")
    assert len(tap.take()) == 1
    assert tap.take() == ()


def test_what_does_not_fit_is_counted(tap):
    for number in range(MAX_LINES + 5):
        OURS.info("%d", number)
    first, *rest = messages(tap)
    assert first == "5 lines of the log were lost"
    assert rest[0] == "5" and rest[-1] == str(MAX_LINES + 4)
    assert tap.take() == ()


def test_what_was_not_delivered_comes_first_the_next_time(tap):
    OURS.info("one")
    OURS.info("two")
    lines = tap.take()
    OURS.info("three")
    tap.give_back(lines)
    assert messages(tap) == ["one", "two", "three"]


def test_given_back_there_is_no_more_room_than_before(tap):
    for number in range(MAX_LINES):
        OURS.info("old %d", number)
    lines = tap.take()
    for number in range(10):
        OURS.info("new %d", number)
    tap.give_back(lines)
    told = messages(tap)
    assert told[0] == "10 lines of the log were lost"
    assert told[1] == "old 10" and told[-1] == "new 9" and len(told) == MAX_LINES + 1


def test_who_configures_logging_anew_closes_handlers_and_the_lines_go_on(tap):
    """As uvicorn's Config does, by logging.config.dictConfig."""
    logging.shutdown([weakref.ref(tap)])
    follow(tap, verbose=1)
    at_all_levels()
    assert messages(tap) == ["details", "info", "warning", "error"]
