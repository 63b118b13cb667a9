"""The processes of one server: CPU and memory by role, and holding them while another is measured.

A server is a tree under one process id. Knows nothing of what the processes do: a server's `role`
function names them. Used by `servers.py` and `matrix.py`.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import psutil

MIB = 1 << 20
STOP_LIMIT_S = 2.0
GONE = (psutil.NoSuchProcess, psutil.AccessDenied)

# (name of the executable, command line or title) -> role
Role = Callable[[str, str], str]


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident memory of one process; `pss` counts what is shared by its share."""

    role: str
    pid: int
    title: str
    rss_mib: float
    pss_mib: float


def tree(root: int) -> list[psutil.Process]:
    """Parents before children."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(root)
        return [parent, *parent.children(recursive=True)]
    return []


def cpu_seconds(root: int, role: Role) -> dict[tuple[str, int], float]:
    """CPU time so far, by (role, process id)."""
    found = {}
    for process in tree(root):
        with contextlib.suppress(*GONE):
            times = process.cpu_times()
            name = role(process.name(), " ".join(process.cmdline()))
            found[name, process.pid] = times.user + times.system
    return found


def cpu_by_role(
    before: Mapping[tuple[str, int], float], after: Mapping[tuple[str, int], float]
) -> dict[str, float]:
    """Seconds by role between two readings; a process that is new counts from zero."""
    total: dict[str, float] = defaultdict(float)
    for (role, pid), seconds in after.items():
        total[role] += seconds - before.get((role, pid), 0.0)
    return dict(total)


def memory(root: int, role: Role) -> list[Memory]:
    found = []
    for process in tree(root):
        with contextlib.suppress(*GONE):
            title = " ".join(process.cmdline()).strip()
            full = process.memory_full_info()
            sizes = (full.rss / MIB, full.pss / MIB)
            found.append(Memory(role(process.name(), title), process.pid, title[:80], *sizes))
    return sorted(found, key=lambda one: (one.role, one.pid))


def gone(process: psutil.Process) -> bool:
    """Ended; a zombie is, whoever should have waited for it."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_gone(found: Sequence[psutil.Process], limit_s: float) -> None:
    _wait(gone, found, limit_s)


def _wait(
    done: Callable[[psutil.Process], bool], found: Sequence[psutil.Process], limit_s: float
) -> None:
    deadline = time.monotonic() + limit_s
    while not all(map(done, found)) and time.monotonic() < deadline:
        time.sleep(0.005)


def freeze(root: int) -> None:
    """Stops the whole tree, parents first, until nothing new appears in it."""
    stopped: set[int] = set()
    while fresh := [process for process in tree(root) if process.pid not in stopped]:
        for process in fresh:
            stopped.add(process.pid)
            with contextlib.suppress(*GONE):
                process.send_signal(signal.SIGSTOP)
        _wait(_still, fresh, STOP_LIMIT_S)


def _still(process: psutil.Process) -> bool:
    return gone(process) or process.status() == psutil.STATUS_STOPPED


def thaw(root: int) -> None:
    """Children first: a parent that wakes finds them answering."""
    for process in reversed(tree(root)):
        with contextlib.suppress(*GONE):
            process.send_signal(signal.SIGCONT)
