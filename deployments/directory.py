"""What this Router can serve: the Controller's last snapshot, laid out for lookups by name.

Owns Triton's rules and texts for names and versions. Changes only as a whole,
in `update`, which the Router calls when the Controller's long poll answers; read per request.
"""

from __future__ import annotations

from asyncio import Future
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from configs.model import ModelConfig

from .contract import Contract
from .errors import InvalidArgument, NoAvailableVersion, NotReady, UnknownModel, UnknownVersion
from .names import check_model_name
from .plans import PlanCache
from .scheduler import Entry
from .tracing import Tracer
from .types import Array, ModelState, RequestFacts, Snapshot, VersionSnapshot

_SERVING = (ModelState.READY, ModelState.LOADING)
_EMPTY = Snapshot(epoch=0, sequence=0, started=False, ready=False, versions=())


class Gate(Protocol):
    """Where an admitted request waits for its batch. The result has `outputs`, by name. With a
    tracer, requests come by way of its Arrivals."""

    tracer: Tracer | None

    def enqueue(
        self,
        waiter: Any,
        rows: int,
        key: Hashable,
        inputs: tuple[Array | None, ...],
        outputs: tuple[str, ...],
        facts: RequestFacts | None = None,
    ) -> Entry: ...

    def withdraw(self, entry: Entry) -> None: ...

    def submit(
        self,
        rows: int,
        key: Hashable,
        inputs: tuple[Array | None, ...],
        outputs: tuple[str, ...],
        facts: RequestFacts | None = None,
        wrap: Any = None,
    ) -> Future[Any]: ...


@dataclass(frozen=True, slots=True)
class Served:
    """One READY version and the way into it.

    The plans are what each protocol's lane has learned of its requests: a description of one is
    none of the other's, even if it is the same bytes.
    """

    snapshot: VersionSnapshot
    config: ModelConfig
    gate: Gate
    contract: Contract
    http_plans: PlanCache = field(default_factory=PlanCache)
    grpc_plans: PlanCache = field(default_factory=PlanCache)


class Directory:
    def __init__(self) -> None:
        self._snapshot = _EMPTY
        self._ready: dict[tuple[str, str], Served] = {}
        self._known: dict[str, set[int]] = {}

    def update(self, snapshot: Snapshot, gates: Mapping[str, Gate]) -> None:
        """Follow a snapshot. `gates` are by application, so that a flip changes both at once."""
        ready: dict[tuple[str, str], Served] = {}
        known: dict[str, set[int]] = {}
        for version in sorted(snapshot.versions, key=lambda each: each.version):
            name = version.model_name
            known.setdefault(name, set()).add(version.version)
            gate = gates.get(version.application)
            # A version that loads anew has its old application until the new one takes over.
            if version.state not in _SERVING or version.config is None or gate is None:
                continue
            served = self._served(version, version.config, gate)
            ready[name, str(version.version)] = served
            ready[name, ""] = served  # ascending order: the newest stays
        self._snapshot, self._ready, self._known = snapshot, ready, known

    def _served(self, version: VersionSnapshot, config: ModelConfig, gate: Gate) -> Served:
        """An application's configuration never changes: what was worked out from it stays."""
        known = self._ready.get((version.model_name, str(version.version)))
        if known is not None and known.gate is gate and known.config == config:
            return replace(known, snapshot=version)
        return Served(version, config, gate, Contract(version.model_name, config))

    def snapshot(self) -> Snapshot:
        return self._snapshot

    def find(self, name: str, version: str) -> Served:
        """`version` "" is the newest ready one. Raises NotFound, NotReady or InvalidArgument."""
        served = self._ready.get((name, version))
        return served if served is not None else self._find_odd(name, version)

    def _find_odd(self, name: str, version: str) -> Served:
        number = version_number(version)
        if name not in self._known:
            check_model_name(name)
            raise UnknownModel(name)
        if number is None:
            raise NoAvailableVersion(name)
        if (served := self._ready.get((name, str(number)))) is not None:
            return served  # written with leading zeros
        if number in self._known[name]:
            raise NotReady(name, number)
        raise UnknownVersion(name, number)


def version_number(version: str) -> int | None:
    """None for ""; raises InvalidArgument unless it is an integer above 0 that fits 64 bits."""
    if not version:
        return None
    digits = version.isascii() and version.isdigit() and len(version) < 20
    if not digits or not 0 < int(version) < 2**63:
        raise InvalidArgument(
            f"failed to get model version from specified version string '{version[:64]}', version "
            "should be an integer > 0"
        )
    return int(version)
