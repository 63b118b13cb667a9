"""What a Router traces of each model: the settings in force, the samplers, and where traces go.

One per Router, which tells it what the Controller says and asks it for each version's tracer. The
file or the exporter begins with the first tracer and ends with the Router.
"""

from __future__ import annotations

import asyncio
import itertools
import logging

from configs.model import ModelConfig
from configs.tracing import OPENTELEMETRY, TraceConfig

from . import trace_settings
from .trace_file import TraceFile
from .tracing import Sampler, Sink, Tracer
from .types import TraceChanges, TraceSettings

logger = logging.getLogger("manta.trace")

CLOSE_S = 3.0


class Tracers:
    """`sink` takes the traces instead of what `config` says."""

    def __init__(self, config: TraceConfig, sink: Sink | None = None) -> None:
        self._config = config
        self._sink = sink
        self._failed = False
        self.changes = TraceChanges()
        self._numbers = itertools.count(1)
        # By scope: what it was made of, and the sampler; one of all models' for those without.
        self._samplers: dict[str, tuple[TraceSettings, int, Sampler]] = {}

    def follow(self, changes: TraceChanges) -> None:
        """The later ones are in force."""
        if changes.changed_ns <= self.changes.changed_ns:
            return
        self.changes = changes
        for scope in [each for each in self._samplers if each and each not in changes.scopes]:
            del self._samplers[scope]

    def tracer(
        self, model: str, version: str, config: ModelConfig, before: Tracer | None
    ) -> Tracer | None:
        """None where nothing of it is traced; `before` where nothing has changed."""
        settings = trace_settings.of(self._config, self.changes, model)
        if not settings.level or not self._open():
            return None
        sampler = self._sampler(model if model in self.changes.scopes else "", settings)
        if before is not None and before.sampler is sampler:
            return before
        assert self._sink is not None  # it is open
        return Tracer(model, version, config, settings, sampler, self._sink, self._numbers)

    def _sampler(self, scope: str, settings: TraceSettings) -> Sampler:
        """Counts anew when it was set anew."""
        given = self.changes.scopes.get(scope)
        changed_ns = 0 if given is None else given.changed_ns
        known = self._samplers.get(scope)
        if known is None or known[:2] != (settings, changed_ns):
            known = (settings, changed_ns, Sampler(settings))
            self._samplers[scope] = known
        return known[2]

    def _open(self) -> bool:
        """Whether there is somewhere for traces to go. What a node lacks for that costs traces and
        never a Router, and is told of once."""
        if self._sink is None and not self._failed:
            try:
                self._sink = _sink(self._config)
            except Exception:
                self._failed = True
                logger.exception("nothing can be traced")
        return self._sink is not None

    async def aclose(self) -> None:
        """What was traced is written, or sent, within a limit."""
        close = getattr(self._sink, "close", None)
        if close is not None:
            await asyncio.to_thread(close, CLOSE_S)


def _sink(config: TraceConfig) -> Sink:
    if config.mode != OPENTELEMETRY:
        return TraceFile(config.file)
    from . import spans  # it needs packages that no other mode does

    return spans.otlp(config)
