"""The verbs that ask the Controller, free of any protocol: counts, settings, the index of the
repository, load and unload.

Says who may ask for what, and what is wrong with a question. Belongs to `inference`; called by the
edges.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, Protocol

from configs.server import ServerSettings

from . import index, overrides
from .directory import Served
from .errors import (
    ControlDisabled,
    InvalidArgument,
    MantaError,
    NotFound,
    ShuttingDown,
    Unavailable,
)
from .names import check_model_name
from .types import ModelState, Snapshot


class Versions(Protocol):
    """The directory, as the verbs see it."""

    def find(self, name: str, version: str) -> Served: ...

    def snapshot(self) -> Snapshot: ...


class Control(Protocol):
    """The Controller: `load` and `unload` (name, parameters), `statistics` (name, version),
    `on_disk`, `metrics`, `log_settings` (changes), `trace_settings` (model, changes)."""

    async def call(self, verb: str, *args: Any) -> Any: ...


class Administration:
    def __init__(self, versions: Versions, control: Control, settings: ServerSettings) -> None:
        self._versions = versions
        self._control = control
        self._settings = settings

    def check_open(self) -> None:
        """Raises ShuttingDown once the whole server ends."""
        if self._versions.snapshot().closing:
            raise ShuttingDown()

    def ready_versions(self, name: str) -> list[str]:
        return [
            str(each.version)
            for each in self._versions.snapshot().versions
            if each.model_name == name and each.state is ModelState.READY
        ]

    async def statistics(self, name: str, version: str) -> dict[str, Any]:
        """Of one model, of one of its versions, or with "" of every ready model."""
        if name:
            self._check_counted(name, version)
        asked = (name, version) if name else ("", "")
        return {"model_stats": await self._control.call("statistics", *asked)}

    async def metrics(self) -> str:
        text: str = await self._control.call("metrics")
        return text

    async def log_settings(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """As they are after the changes, by the names that clients know."""
        shown: dict[str, Any] = await self._control.call("log_settings", dict(changes))
        return shown

    async def trace_settings(self, model: str, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Of one model or, for "", of all: as they are after the changes."""
        if model:
            try:
                self._versions.find(model, "")
            except (NotFound, Unavailable, InvalidArgument):
                raise InvalidArgument(f"Request for unknown model : {model[:256]}") from None
        shown: dict[str, Any] = await self._control.call("trace_settings", model, dict(changes))
        return shown

    async def index(self, ready_only: bool) -> list[dict[str, str]]:
        """What the repository holds: only the name of a model that was never touched."""
        on_disk = None
        if not ready_only:
            with contextlib.suppress(MantaError):  # without a Controller, what is known has to do
                on_disk = await self._control.call("on_disk")
        return index.entries(self._versions.snapshot().versions, on_disk, ready_only)

    async def load(self, name: str, parameters: Mapping[str, Any]) -> None:
        """`parameters`: `config` as text, `file:<path>` as bytes."""
        self._check_control()
        check_model_name(name)
        overrides.check(name, parameters, self._settings)
        await self._control.call("load", name, dict(parameters))

    async def unload(self, name: str, parameters: Mapping[str, Any]) -> None:
        self._check_control()
        for key, value in parameters.items():
            if key != "unload_dependents":
                raise InvalidArgument(f"unrecognized unload parameter '{key}'")
            if not isinstance(value, bool):
                raise InvalidArgument("invalid value for 'unload_dependents': expected a boolean")
        check_model_name(name)
        await self._control.call("unload", name, dict(parameters))

    def _check_control(self) -> None:
        self.check_open()
        if self._settings.model_control_mode != "explicit":
            raise ControlDisabled()

    def _check_counted(self, name: str, version: str) -> None:
        try:
            self._versions.find(name, version)
        except (NotFound, Unavailable):
            if version and self.ready_versions(name):
                raise InvalidArgument(
                    f"requested model version is not available for model '{name}'"
                ) from None
            raise InvalidArgument(f"requested model '{name}' is not available") from None
