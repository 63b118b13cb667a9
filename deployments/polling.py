"""Poll mode: which models have changed on disk, told by two equal looks in a row.

Owns what was seen and what was acted on; a look reads names, sizes, times and inodes. Whether a
change is one, the load that it leads to finds out, by content. Run by the Controller.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from .disk import Signature
from .errors import MantaError
from .repository import DUPLICATE, Repository

logger = logging.getLogger("ray.serve")

# By model, one signature for each repository that has it.
Looks: TypeAlias = Mapping[str, tuple[Signature, ...]]


class Loading(Protocol):
    """The lifecycle, as seen from here."""

    def reload(self, name: str) -> None: ...

    def withdraw(self, name: str, reason: str = "") -> None: ...


@dataclass(frozen=True)
class Changes:
    changed: tuple[str, ...] = ()
    duplicate: tuple[str, ...] = ()
    gone: tuple[str, ...] = ()


class Watch:
    """What was seen at the last look, and what was last acted on; no disk and no clock of its own.

    Files that are being written look otherwise from one look to the next. A change counts once two
    looks in a row agree on it, so that nothing is loaded that somebody is still copying.
    """

    def __init__(self, now: Looks) -> None:
        self._seen = dict(now)
        self._acted = dict(now)

    def look(self, now: Looks) -> Changes:
        """What is to be done now. It counts as done: what fails is tried again when it changes."""
        before, self._seen = self._seen, dict(now)
        settled = {name: one for name, one in now.items() if before.get(name) == one}
        news = [name for name, one in settled.items() if self._acted.get(name) != one]
        gone = [name for name in self._acted if name not in now and name not in before]
        self._acted.update((name, settled[name]) for name in news)
        for name in gone:
            del self._acted[name]
        return Changes(
            changed=tuple(name for name in news if len(settled[name]) == 1),
            duplicate=tuple(name for name in news if len(settled[name]) > 1),
            gone=tuple(gone),
        )


class Poller:
    def __init__(self, repository: Repository, loading: Loading, interval_s: float) -> None:
        self._repository = repository
        self._loading = loading
        self._interval_s = interval_s
        self._watch: Watch | None = None

    async def begin(self) -> None:
        """Before the first pass, which acts on what is there now."""
        self._watch = Watch(await asyncio.to_thread(self._repository.signatures))

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            try:
                await self.look()
            except MantaError as error:  # a file system that is away takes no model along
                logger.warning("the model repository is not polled: %s", error)
            except Exception:
                logger.exception("the model repository is not polled")

    async def look(self) -> None:
        assert self._watch is not None  # `begin` comes first
        changes = self._watch.look(await asyncio.to_thread(self._repository.signatures))
        for name in changes.changed:
            self._loading.reload(name)
        for name in changes.duplicate:
            self._loading.withdraw(name, DUPLICATE)
        for name in changes.gone:
            self._loading.withdraw(name)
