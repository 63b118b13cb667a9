"""The repository index: every version that has a state, and every model on disk that has none.

Pure: versions as the Controller tells them, names as the disk has them. Called by `inference`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .types import ModelState, VersionSnapshot

Entry = dict[str, str]


def entries(
    versions: Iterable[VersionSnapshot], on_disk: Mapping[str, str] | None, ready_only: bool
) -> list[Entry]:
    """By name and version. `on_disk` gives each model directory and why it can be no model; None
    where that is not known, and then what was found at the start stands in."""
    if ready_only:
        return [_entry(one) for one in versions if one.state is ModelState.READY]
    refused = {name: reason for name, reason in (on_disk or {}).items() if reason}
    listed = [
        one
        for one in versions
        if (on_disk is None or not _untouched(one))
        and (one.model_name not in refused or one.state is ModelState.READY)
    ]
    keyed = [((one.model_name, one.version), _entry(one)) for one in listed]
    keyed += [((name, 0), _refused(name, reason)) for name, reason in refused.items()]
    known = {one.model_name for one in listed}
    keyed += [((n, 0), {"name": n}) for n in on_disk or () if n not in known and n not in refused]
    return [entry for _, entry in sorted(keyed, key=lambda one: one[0])]


def _untouched(one: VersionSnapshot) -> bool:
    return not one.version and one.state is ModelState.UNKNOWN


def _refused(name: str, reason: str) -> Entry:
    return {"name": name, "state": ModelState.UNAVAILABLE.value, "reason": reason}


def _entry(one: VersionSnapshot) -> Entry:
    entry = {"name": one.model_name}
    if one.version:
        entry["version"] = str(one.version)
    if not _untouched(one):
        entry["state"] = one.state.value
    if one.reason:
        entry["reason"] = one.reason
    return entry
