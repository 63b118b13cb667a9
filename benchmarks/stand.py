"""The servers of one stage: started, checked, and at most one of them awake.

Owns what an idle server may cost the one that is measured: nothing (frozen or stopped), or what it
takes (left running). Used by `matrix.py`.
"""

from __future__ import annotations

import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import processes, servers
from benchmarks.contestants import Contestant, Stage
from benchmarks.servers import Answer, Server, ServerError
from benchmarks.store import Store

SETTLE_S = 0.3


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True, slots=True)
class Plan:
    """How much of what: the options that the matrix needs."""

    protocols: tuple[str, ...]
    rounds: int
    seconds: float
    idle: str  # "freeze", "run" or "stop"


class Stand:
    """The servers of one stage, of which at most one is awake (unless the plan lets them run)."""

    def __init__(self, stage: Stage, plan: Plan, store: Store, folder: Path, logs: Path) -> None:
        self.stage, self._plan, self._store = stage, plan, store
        self._folder, self._logs = folder, logs
        self._everyone: dict[str, Contestant] = {}
        self._servers: dict[str, Server] = {}
        self.answers: dict[tuple[str, str], Answer] = {}
        self._awake: str | None = None

    def open(self, one: Contestant) -> bool:
        """Starts and checks it; False, with the reason in the store, where that fails."""
        self._everyone[one.name] = one
        try:
            self._start(one)
        except ServerError as error:
            self._store.problem(self.stage.name, one.name, str(error)[-600:])
            say(f"  {one.name}: {str(error).splitlines()[0]}")
            self._drop(one.name)
            return False
        self._store.problem(self.stage.name, one.name, None)
        if self._plan.idle == "stop":
            self._drop(one.name)
        elif self._plan.idle == "freeze":
            processes.freeze(self._servers[one.name].root)
        return True

    def _start(self, one: Contestant) -> None:
        requests = {
            protocol: one.request(self.stage, protocol)
            for protocol in self._plan.protocols
            if not one.lacks(self.stage.model, protocol)
        }
        begin = time.monotonic()
        folder = Path(tempfile.mkdtemp(prefix=f"{one.name}.", dir=self._folder))
        log = self._logs / f"{self.stage.name}-{one.name}.log"
        server = servers.start(one.name, one.launch(self.stage, folder), log)
        self._servers[one.name] = server
        for protocol, request in requests.items():
            answer = servers.check(server, request, self.stage.expected, one.tolerance)
            self.answers[one.name, protocol] = answer
        say(f"  {one.name}: up and right after {time.monotonic() - begin:.1f} s")

    def wake(self, name: str) -> Server:
        """The server, ready, with the others at rest. Raises ServerError."""
        if self._awake != name:
            self.rest()
        self._awake = name
        if name not in self._servers:
            self._start(self._everyone[name])
        elif self._plan.idle == "freeze":
            server = self._servers[name]
            processes.thaw(server.root)
            time.sleep(SETTLE_S)  # timers that came due meanwhile
            servers.wait_ready(server)
        return self._servers[name]

    def rest(self) -> None:
        """Nobody is awake, unless the plan lets them run."""
        name, self._awake = self._awake, None
        if name is None or name not in self._servers:
            return
        if self._plan.idle == "freeze":
            processes.freeze(self._servers[name].root)
        elif self._plan.idle == "stop":
            self._drop(name)

    def note_memory(self, name: str) -> None:
        server, one = self._servers[name], self._everyone[name]
        entries = [asdict(entry) for entry in processes.memory(server.root, one.role)]
        self._store.memory(self.stage.name, name, entries)

    def note_loads(self, name: str) -> None:
        """Last of all: the server has another replica afterwards. Raises ServerError."""
        entry = self._everyone[name].loads(self.stage, self.wake(name))
        if entry:
            self._store.loads(self.stage.name, name, entry)

    def _drop(self, name: str) -> None:
        server = self._servers.pop(name, None)
        if server is not None:
            servers.stop(server)

    def close(self) -> None:
        """All at once: the slow ones take ten seconds."""
        with ThreadPoolExecutor() as pool:
            list(pool.map(servers.stop, self._servers.values()))
        self._servers.clear()
