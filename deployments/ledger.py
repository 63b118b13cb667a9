"""What one Router has to tell the Controller: counts, lines of its log, and where calls were lost.

Owns that nothing is lost or told twice, whichever Controller hears it. Called by the Router, every
second and when somebody asks for counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .logs import Tap
from .statistics import Recorder, VersionKey
from .types import TraceChanges


class Ledger:
    """`pending` tells how many requests wait now, and `running` how many batches run; `controller`
    is a handle, whose `push` hears."""

    def __init__(
        self,
        router_id: str,
        controller: Any,
        log: Tap,
        pending: Callable[[], Mapping[VersionKey, int]],
        recorder: Recorder,
        running: Callable[[], Mapping[VersionKey, int]] = dict,
    ) -> None:
        self.recorder = recorder
        self.trace = TraceChanges()  # what this Router has heard of
        self._router_id = router_id
        self._controller = controller
        self._log = log
        self._pending = pending
        self._running = running
        self._lost: set[str] = set()
        self._flushes = 0
        self._epoch = 0

    def lost(self, application: str) -> None:
        """A call to it came to nothing: some replica of it may be gone."""
        self._lost.add(application)

    async def flush(self, asked: bool = False) -> None:
        """`asked`: the Controller waits for it. Raises what the call to it raises; then all is told
        the next time.
        """
        self._flushes += 1
        sequence = self._flushes
        delta = self.recorder.flush(sequence, self._pending(), self._running())
        lost, self._lost = tuple(self._lost), set()
        lines, settings = self._log.take(), self._log.settings
        try:
            epoch, legacy, peers = await self._controller.push.remote(
                self._router_id, delta, lost, lines, settings, asked, self.trace
            )
        except BaseException:
            self._lost.update(lost)
            self._log.give_back(lines)
            raise
        if epoch == self._epoch:
            self.recorder.acknowledge(sequence, legacy, peers)
        else:  # a new one, which knows nothing
            self._epoch = epoch
            self.recorder.resend()
            await self.flush(asked)
