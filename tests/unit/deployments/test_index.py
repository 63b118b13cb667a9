"""The repository index: states, reasons, and models that nobody has touched."""

from __future__ import annotations

from deployments.index import entries
from deployments.repository import DUPLICATE
from deployments.types import ModelState, VersionSnapshot

READY, GONE = ModelState.READY, ModelState.UNAVAILABLE
VERSIONS = (
    VersionSnapshot("m", 10, READY),
    VersionSnapshot("m", 2, GONE, "unloaded"),
    VersionSnapshot("broken", 0, GONE, "config.pbtxt: line 3"),
    VersionSnapshot("loading", 1, ModelState.LOADING),
    VersionSnapshot("leaving", 1, ModelState.UNLOADING),
    VersionSnapshot("untouched", 0, ModelState.UNKNOWN),
)
M2 = {"name": "m", "version": "2", "state": "UNAVAILABLE", "reason": "unloaded"}
M10 = {"name": "m", "version": "10", "state": "READY"}
OTHERS = [
    {"name": "broken", "state": "UNAVAILABLE", "reason": "config.pbtxt: line 3"},
    {"name": "leaving", "version": "1", "state": "UNLOADING"},
    {"name": "loading", "version": "1", "state": "LOADING"},
]


def test_without_the_disk_what_is_known_is_told():
    assert entries(VERSIONS, None, False) == [*OTHERS, M2, M10, {"name": "untouched"}]


def test_the_disk_tells_who_was_never_touched():
    on_disk = {"m": "", "broken": "", "new": ""}
    assert entries(VERSIONS, on_disk, False) == [*OTHERS, M2, M10, {"name": "new"}]


def test_a_model_in_two_repositories_is_unavailable_and_has_no_version():
    duplicate = {"name": "m", "state": "UNAVAILABLE", "reason": DUPLICATE}
    on_disk = {"m": DUPLICATE, "broken": ""}
    assert entries(VERSIONS, on_disk, False) == [*OTHERS, duplicate, M10]  # as long as it serves
    assert entries(VERSIONS[1:], on_disk, False) == [*OTHERS, duplicate]
    assert entries((), {"n": DUPLICATE}, False) == [
        {"name": "n", "state": "UNAVAILABLE", "reason": DUPLICATE}
    ]


def test_ready_only():
    assert entries(VERSIONS, {"new": ""}, True) == [M10]
