"""What has been measured: one entry per run, kept in a file by key, so that a run goes on later.

A key is cell, contestant, round and sitting. A sitting is one execution of the program: only runs
of one sitting are compared, since minutes lie between them and not days. Decides what is still to
do; measures nothing. Used by `matrix.py`, `report.py` and `targets.py`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, order=True)
class Cell:
    """What is compared. `protocol` is "in-process" for torch alone; `connections` is then rows."""

    model: str
    protocol: str
    connections: int
    delay_us: int
    generator: str

    def __str__(self) -> str:
        parts = (self.model, self.protocol, self.connections, f"{self.delay_us}us", self.generator)
        return "/".join(map(str, parts))


@dataclass(frozen=True, slots=True)
class Run:
    """One contestant under one load. `cpu_s` by role, warm-up included, as `total` is.

    `rows_per_s` is what is compared: requests of one row each. `counters` are the server's own,
    where it has them; `counted` is the share of the client's requests that they show.
    """

    cell: Cell
    contestant: str
    round: int
    sitting: int
    rows_per_s: float
    mean_us: float
    p50_us: float
    p99_us: float
    requests: int
    failed: int
    total: int
    wall_s: float
    cpu_s: dict[str, float] = field(default_factory=dict)
    counters: dict[str, int] | None = None
    counted: float | None = None

    @property
    def key(self) -> str:
        return f"{self.cell}/{self.contestant}/r{self.round}/s{self.sitting}"

    def cpu_us(self) -> dict[str, float]:
        """CPU per request by role, in microseconds."""
        return {role: seconds / self.total * 1e6 for role, seconds in self.cpu_s.items()}


class Store:
    """The file, and questions about what is in it. Entries of other settings stay out of sight."""

    def __init__(self, file: Path, settings: dict[str, Any], fresh: bool = False) -> None:
        self.file, self.settings = file, settings
        self._document: dict[str, Any] = {"runs": {}, "problems": {}, "memory": {}}
        if file.is_file() and not fresh:
            self._document |= json.loads(file.read_text())
        self._runs = {
            key: _run_from(entry)
            for key, entry in self._document["runs"].items()
            if _same(entry["settings"], settings)
        }
        self.sitting = 1 + max((run.sitting for run in self._all()), default=0)

    def _all(self) -> Iterator[Run]:
        return map(_run_from, self._document["runs"].values())

    @property
    def hidden(self) -> int:
        """Entries that were measured with other settings or other code."""
        return len(self._document["runs"]) - len(self._runs)

    @property
    def runs(self) -> list[Run]:
        return list(self._runs.values())

    def add(self, run: Run) -> None:
        self._runs[run.key] = run
        self._document["runs"][run.key] = asdict(run) | {"settings": self.settings}
        self.problem(str(run.cell), run.contestant, None)

    def problem(self, place: str, contestant: str, reason: str | None) -> None:
        """Why something has no figure; None takes it back."""
        problems = self._document["problems"].setdefault(contestant, {})
        if reason is None:
            problems.pop(place, None)
        else:
            problems[place] = reason
        self.save()

    @property
    def problems(self) -> dict[str, dict[str, str]]:
        return {name: found for name, found in self._document["problems"].items() if found}

    def memory(self, stage: str, contestant: str, entries: Sequence[dict[str, Any]]) -> None:
        self._document["memory"][f"{stage}/{contestant}"] = list(entries)
        self.save()

    @property
    def memories(self) -> dict[str, list[dict[str, Any]]]:
        found: dict[str, list[dict[str, Any]]] = self._document["memory"]
        return found

    def loads(self, stage: str, contestant: str, entry: dict[str, float]) -> None:
        """Seconds that loading took, and the first answer after it."""
        self._document.setdefault("loads", {})[f"{stage}/{contestant}"] = entry
        self.save()

    def note(self, name: str, value: Any) -> None:
        self._document[name] = value
        self.save()

    def noted(self, name: str, default: Any) -> Any:
        return self._document.get(name, default)

    def save(self) -> None:
        """Whole or not at all: a run may be ended at any time."""
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps(self._document, indent=1))
        os.replace(part, self.file)

    # --- what is there ---------------------------------------------------------------------------

    def find(self, cell: Cell, contestant: str) -> list[Run]:
        """One run a round, of the latest sitting that has it, by round."""
        latest: dict[int, Run] = {}
        for run in self._runs.values():
            if (run.cell, run.contestant) == (cell, contestant):
                before = latest.get(run.round)
                if before is None or run.sitting > before.sitting:
                    latest[run.round] = run
        return [latest[number] for number in sorted(latest)]

    def pairs(self, ours: tuple[Cell, str], theirs: tuple[Cell, str]) -> list[tuple[Run, Run]]:
        """Runs of both in one round of one sitting, the latest such sitting for each round."""
        first = self._by_round(*ours)
        second = self._by_round(*theirs)
        best: dict[int, int] = {}
        for number, sitting in first.keys() & second.keys():
            best[number] = max(sitting, best.get(number, 0))
        return [(first[entry], second[entry]) for entry in sorted(best.items())]

    def _by_round(self, cell: Cell, contestant: str) -> dict[tuple[int, int], Run]:
        return {
            (run.round, run.sitting): run
            for run in self._runs.values()
            if (run.cell, run.contestant) == (cell, contestant)
        }

    def missing(
        self, cell: Cell, number: int, wanted: Iterable[str], anchors: Iterable[str]
    ) -> list[str]:
        """Who is still to be measured in this round of this cell.

        A contestant is done when one sitting has it and all the anchors it is compared with; so
        whoever comes later brings the anchors along.
        """
        present: dict[int, set[str]] = {}
        for run in self._runs.values():
            if (run.cell, run.round) == (cell, number):
                present.setdefault(run.sitting, set()).add(run.contestant)
        names = list(wanted)
        needed = {name for name in anchors if name in names}
        complete = [found for found in present.values() if needed <= found]
        todo = {name for name in names if not any(name in found for found in complete)}
        if not todo:
            return []
        return [name for name in names if name in todo | needed]


def _same(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Equal, where "any" among the wanted ones equals everything."""
    return all(value in ("any", found.get(name)) for name, value in wanted.items())


def _run_from(entry: dict[str, Any]) -> Run:
    values = {name: value for name, value in entry.items() if name != "settings"}
    return Run(**values | {"cell": Cell(**values["cell"])})
