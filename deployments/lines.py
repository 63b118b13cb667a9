"""The ways from a Router to what runs: one line per application, which comes and goes as the
Controller says.

Owns their queues and places, and the drain of what is let go. Knows nothing of the Controller
itself; called by the Router, on its event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from configs.model import ModelConfig
from configs.server import ServerSettings

from .batcher import Batcher, Collect, serve_collect
from .client import Origin, Reach
from .errors import NoActiveInstance, NoReplica, ShuttingDown, Unavailable
from .gate import Gate
from .places import Places
from .scatter import Scatter
from .scheduler import policy
from .statistics import Recorder, VersionKey
from .tracers import Tracers
from .types import ModelState, VersionSnapshot

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True, slots=True)
class Line:
    """The way to one running application: its queue, and the places where its batches run."""

    key: VersionKey
    config: ModelConfig
    gate: Gate
    places: Places

    def takes_over_from(self, other: Line) -> bool:
        """The same version loaded anew, for the very same requests."""
        mine, theirs = self.config, other.config
        return (
            not mine.passive
            and self.key[:2] == other.key[:2]
            and (
                (mine.input, mine.output, mine.max_batch_size)
                == (theirs.input, theirs.output, theirs.max_batch_size)
            )
        )


class Lines:
    """`lost` is told of an application where a call was lost; `starved` is called when something
    waits for one that has no replica."""

    def __init__(
        self,
        settings: ServerSettings,
        origin: Origin,
        recorder: Recorder,
        tracers: Tracers,
        lost: Callable[[str], None],
        starved: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._origin = origin
        self._recorder = recorder
        self._tracers = tracers
        self._lost = lost
        self._starved = starved
        self._collect: Collect | None = serve_collect() if settings.batching == "serve" else None
        self._lines: dict[str, Line] = {}
        self._draining: dict[str, asyncio.Task[None]] = {}

    def __len__(self) -> int:
        return len(self._lines)

    def in_use(self) -> tuple[str, ...]:
        """Applications that still have requests, or may get some."""
        return (*self._lines, *self._draining)

    def gates(self) -> dict[str, Gate]:
        return {application: line.gate for application, line in self._lines.items()}

    def pending(self) -> dict[VersionKey, int]:
        """Requests that wait."""
        return {line.key: line.gate.pending for line in self._lines.values()}

    def running(self) -> dict[VersionKey, int]:
        """Batches that run or are sent ahead."""
        return {line.key: line.gate.in_flight for line in self._lines.values()}

    def follow(self, versions: Iterable[VersionSnapshot]) -> list[str]:
        """The applications that serve now; those that no longer do, for `let_go`."""
        wanted = {v.application: v for v in versions if v.application and v.config}
        for application, version in wanted.items():
            try:
                line = self._lines.get(application) or self._line(version)
            except Exception:  # one model's trouble is not the others'
                logger.exception("application %s cannot be reached", application)
                continue
            self._lines[application] = line
            line.places.follow(version.targets)
            if version.state is ModelState.UNAVAILABLE:  # nobody comes to answer what waits
                line.gate.refuse(NoReplica(version.model_name, version.version, version.reason))
            self._trace(line)
            line.gate.pump()
        return [application for application in self._lines if application not in wanted]

    def _line(self, version: VersionSnapshot) -> Line:
        config, application = version.config, version.application
        assert config is not None  # `follow` takes only versions that have one
        reach = Reach(
            self._origin, version.model_name, application, partial(self._lost, application)
        )
        # Called from a later tick at the earliest, when there is a gate.
        places = Places(reach, lambda: gate.pump(), self._starved)
        batcher = Batcher(
            version.model_name, config.max_batch_size > 0, self._collect, Scatter(config)
        )
        key = VersionKey(version.model_name, str(version.version), application)
        gate = Gate(
            version.model_name,
            policy(config, self._settings),
            batcher.run,
            places,
            counters=self._recorder.counters(key),
        )
        if config.passive:
            gate.close(NoActiveInstance(version.model_name))
        return Line(key, config, gate, places)

    def _trace(self, line: Line) -> None:
        key, gate = line.key, line.gate
        gate.trace(self._tracers.tracer(key.model, key.version, line.config, gate.tracer))

    def let_go(self, application: str) -> None:
        """No new requests reach it; what it has is answered, then the Controller may delete it.

        What still waits goes to the line that takes over: the old replicas may be gone already.
        Without one and without a replica it fails: none comes to what is unloaded.
        """
        line = self._lines.pop(application)
        for successor in self._lines.values():
            if successor.takes_over_from(line):
                line.gate.hand_over(successor.gate)
        if line.places.vacant:
            line.gate.close(_unloaded(line))
        task = asyncio.get_running_loop().create_task(self._drain_line(application, line))
        self._draining[application] = task

    async def _drain_line(self, application: str, line: Line) -> None:
        settings = self._settings
        try:
            await asyncio.wait_for(
                line.gate.drain(), settings.max_queue_s + settings.max_execution_s
            )
        except asyncio.TimeoutError:
            line.gate.close(_unloaded(line))
        finally:
            await line.places.aclose()
            self._recorder.discard(line.key)
            self._draining.pop(application, None)

    def give_up(self) -> None:
        """The server ends, and nobody tells of new replicas: where there is none, what waits for
        one fails."""
        for line in self._lines.values():
            if line.places.vacant:
                line.gate.close(ShuttingDown())

    async def drain(self) -> None:
        """What was accepted is answered."""
        for line in self._lines.values():
            await line.gate.drain()


def _unloaded(line: Line) -> Unavailable:
    return Unavailable(f"model '{line.key.model}' was unloaded")
