"""Goes through the matrix: stages, rounds, cells, contestants; puts every run into the store.

A stage is one model with one queue delay: its servers are started, checked and stopped together.
Inside it every round visits every cell, and every cell every contestant, in an order that rotates.
While one is measured the others are frozen (see README: idle servers). Called by `bench.py`.
"""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import numpy as np

from benchmarks import limit, load, processes, servers
from benchmarks.contestants import Contestant, Stage
from benchmarks.load import LoadError, Timing
from benchmarks.models import MODELS
from benchmarks.servers import ServerError
from benchmarks.stand import SETTLE_S, Plan, Stand, say
from benchmarks.store import Cell, Run, Store

IN_PROCESS, TORCH = "in-process", "torch"
LIMIT_BATCHES = (1, 32)
ANCHORS = ("manta-", "fastapi")


def is_anchor(name: str) -> bool:
    """Those that the others are compared with: measured again beside whoever comes later."""
    return name.startswith(ANCHORS)


# --- cells ---------------------------------------------------------------------------------------


def cells_of(
    stage: Stage, connections: Sequence[int], plan: Plan, everyone: Sequence[Contestant]
) -> list[Cell]:
    """All that is measured in a stage, torch alone first."""
    found = []
    batches = LIMIT_BATCHES if stage.model.batched else LIMIT_BATCHES[:1]
    for batch in batches:
        found.append(Cell(stage.model.name, IN_PROCESS, batch, 0, "loop"))
    for protocol in plan.protocols:
        generators = {one.generator for one in everyone if not one.lacks(stage.model, protocol)}
        for generator in sorted(generators):
            for count in connections:
                cell = Cell(stage.model.name, protocol, count, stage.delay_us, generator)
                found.append(cell)
    return found


def takes_part(one: Contestant, cell: Cell) -> bool:
    """wrk loads those that need it, and the anchors beside them."""
    if one.lacks(MODELS[cell.model], cell.protocol):
        return False
    return one.generator == cell.generator or is_anchor(one.name)


def rotated(everyone: Sequence[str], by: int) -> list[str]:
    by %= max(1, len(everyone))
    return [*everyone[by:], *everyone[:by]]


def visits(
    cells: Sequence[Cell], wanted: dict[tuple[int, Cell], list[str]], rounds: int, idle: str
) -> Iterator[tuple[int, Cell, str]]:
    """The order of all runs. With "stop" a contestant does all its cells of a round in one go."""
    for number in range(1, rounds + 1):
        if idle != "stop":
            for place, cell in enumerate(cells):
                for name in rotated(wanted[number, cell], number + place):
                    yield number, cell, name
            continue
        everyone = list(dict.fromkeys(name for cell in cells for name in wanted[number, cell]))
        for name in rotated(everyone, number):
            for cell in cells:
                if name in wanted[number, cell]:
                    yield number, cell, name


# --- one run -------------------------------------------------------------------------------------


def measure(
    stand: Stand, one: Contestant, cell: Cell, number: int, plan: Plan, store: Store
) -> Run:
    """One contestant under one load; the server must be awake."""
    server = stand.wake(one.name)
    stage = stand.stage
    port = server.launch.ports[cell.protocol]
    request = one.request(stage, cell.protocol)
    timing = Timing(stage.model.warm_up_s, plan.seconds * stage.model.patience)
    size = stand.answers[one.name, cell.protocol].size if request.one_size else 0
    http_port = server.launch.ports["http"]
    before = servers.statistics(http_port, cell.model) if one.has_statistics else None
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    clock, cpu = time.monotonic(), processes.cpu_seconds(server.root, one.role)
    result = load.run(cell.generator, port, request, cell.connections, timing, size)
    wall_s = time.monotonic() - clock
    used = processes.cpu_by_role(cpu, processes.cpu_seconds(server.root, one.role))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used["client"] = sum(after[:2]) - sum(children[:2])
    counters, counted = None, None
    if before is not None:
        time.sleep(SETTLE_S)
        found = servers.statistics(http_port, cell.model).since(before)
        counters, counted = asdict(found), found.success / result.total
    servers.check(server, request, stage.expected, one.tolerance)  # it is still right
    return Run(
        cell=cell,
        contestant=one.name,
        round=number,
        sitting=store.sitting,
        rows_per_s=result.throughput,
        mean_us=result.mean_us,
        p50_us=result.p50_us,
        p99_us=result.p99_us,
        requests=result.requests,
        failed=result.failed,
        total=result.total,
        wall_s=wall_s,
        cpu_s=used,
        counters=counters,
        counted=counted,
    )


def measure_limit(torch: limit.Limit, cell: Cell, number: int, timing: Timing, sitting: int) -> Run:
    found = torch.run(cell.connections, timing.warm_up_s, timing.seconds)
    return Run(
        cell=cell,
        contestant=TORCH,
        round=number,
        sitting=sitting,
        rows_per_s=found["rows"] / found["seconds"],
        mean_us=found["mean_us"],
        p50_us=found["p50_us"],
        p99_us=found["p99_us"],
        requests=found["calls"],
        failed=0,
        total=found["calls"],
        wall_s=found["seconds"],
    )


# --- one stage -----------------------------------------------------------------------------------


def wanted_in(
    cells: Sequence[Cell], everyone: Sequence[Contestant], rounds: int, store: Store
) -> dict[tuple[int, Cell], list[str]]:
    """Who is still to be measured, by round and cell; torch alone beside anything of its round."""
    wanted: dict[tuple[int, Cell], list[str]] = {}
    for number in range(1, rounds + 1):
        busy = False
        for cell in reversed(cells):  # torch alone comes first in the list
            if cell.protocol == IN_PROCESS:
                done = bool(store.find(cell, TORCH)) and not busy
                wanted[number, cell] = [] if done else [TORCH]
                continue
            names = [one.name for one in everyone if takes_part(one, cell)]
            only_anchors = all(map(is_anchor, names)) and cell.generator == "wrk"
            anchors = [name for name in names if is_anchor(name)]
            todo = [] if only_anchors else store.missing(cell, number, names, anchors)
            wanted[number, cell] = todo
            busy = busy or bool(todo)
    return wanted


def open_needed(
    stand: Stand, cells: Sequence[Cell], everyone: Sequence[Contestant], plan: Plan, store: Store
) -> list[Contestant]:
    """Peers first: the anchors are started only if something is left to measure beside them."""
    alive = list(everyone)
    for anchors in (False, True):
        for one in [one for one in alive if is_anchor(one.name) == anchors]:
            needed = _names(wanted_in(cells, alive, plan.rounds, store))
            if one.name not in needed or not stand.open(one):
                alive.remove(one)
    return alive


def run_stage(
    stage: Stage,
    connections: Sequence[int],
    everyone: Sequence[Contestant],
    plan: Plan,
    store: Store,
) -> None:
    for one in everyone:
        for protocol in set(one.protocols) & set(plan.protocols):
            reason = one.lacks(stage.model, protocol)
            store.problem(f"{stage.name}, {protocol}", one.name, reason or None)
    cells = cells_of(stage, connections, plan, everyone)
    needed = _names(wanted_in(cells, everyone, plan.rounds, store))
    if not needed:
        say(f"{stage.name}: done before")
        return
    say(f"{stage.name}: starting {', '.join(sorted(needed - {TORCH}))}")
    with ExitStack() as stack:
        temporary = tempfile.TemporaryDirectory(prefix="mb.", ignore_cleanup_errors=True)
        folder = Path(stack.enter_context(temporary))
        stand = Stand(stage, plan, store, folder, store.file.parent)
        stack.callback(stand.close)
        alive = open_needed(stand, cells, everyone, plan, store)
        wanted = wanted_in(cells, alive, plan.rounds, store)
        if not _names(wanted):
            return  # all that was missing would not start
        np.save(folder / "row.npy", stage.row)
        torch = limit.Limit(stage.file, folder / "row.npy")
        stack.callback(torch.close)
        by_name = {one.name: one for one in alive}
        for number, cell, name in visits(cells, wanted, plan.rounds, plan.idle):
            if name == TORCH:
                stand.rest()
                timing = Timing(stage.model.warm_up_s, plan.seconds * stage.model.patience)
                run = measure_limit(torch, cell, number, timing, store.sitting)
            else:
                try:
                    run = measure(stand, by_name[name], cell, number, plan, store)
                except (ServerError, LoadError) as error:
                    store.problem(str(cell), name, str(error)[-600:])
                    say(f"  {cell} {name}: {error}")
                    continue
            store.add(run)
            tell(run)
        for name in by_name:
            if plan.idle != "stop":
                stand.note_memory(name)
                note_loads(stand, name, store)


def note_loads(stand: Stand, name: str, store: Store) -> None:
    try:
        stand.note_loads(name)
    except ServerError as error:
        store.problem(f"{stand.stage.name}, load", name, str(error)[-600:])
        say(f"  {name}: {error}")


def _names(wanted: dict[tuple[int, Cell], list[str]]) -> set[str]:
    return {name for names in wanted.values() for name in names}


def tell(run: Run) -> None:
    failed = f", {run.failed} failed" if run.failed else ""
    say(
        f"  round {run.round} {str(run.cell):<32} {run.contestant:<16}"
        f"{run.rows_per_s:>9,.1f}/s  p50 {run.p50_us / 1e3:.2f} ms{failed}"
    )
