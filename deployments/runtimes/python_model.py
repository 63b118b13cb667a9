"""Models of Triton's Python backend: a TritonPythonModel in a model.py, handed whole requests.

Owns the import, the arguments of `initialize`, and what may go wrong in the model's own code. The
file is the repository owner's and runs with the replica's rights. What the model imports is
`deployments/pb_utils`; what a batch means is `execution_by_request`. Called by `instance`.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import inspect
import json
import logging
import os
import sys
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from configs import pbtxt
from configs.errors import ConfigError
from configs.model import ModelConfig
from deployments.pb_utils import surface
from deployments.pb_utils.calls import Calls
from deployments.pb_utils.messages import InferenceRequest
from deployments.pb_utils.model_config import ModelConfig as AutoConfig

from . import faults, place, version_folder

logger = logging.getLogger("ray.serve")  # Serve writes this one to the replica's log file

CLASS = "TritonPythonModel"
_COMPLETE = "auto_complete_config"
_COMPLETED = ("input", "output", "max_batch_size", "dynamic_batching")


class PythonModel:
    """A loaded model, on the instance's thread only.

    `request` is the class of the requests that it is handed: they can call other models.
    """

    label = "python"

    def __init__(
        self, model: Any, request: type[InferenceRequest], version: int, folders: list[str]
    ) -> None:
        self._model = model
        self._folders = folders
        self._loop: asyncio.AbstractEventLoop | None = None
        self.request = request
        self.version = version

    def execute(self, requests: list[InferenceRequest]) -> object:
        """What `execute` returns, or what it returns when awaited; it raises what it raises."""
        answer = self._model.execute(requests)
        return self._await(answer) if inspect.isawaitable(answer) else answer

    def _await(self, answer: Awaitable[object]) -> object:
        async def whole() -> object:
            return await answer

        if self._loop is None:
            self._loop = asyncio.new_event_loop()
        try:
            return self._loop.run_until_complete(whole())
        except asyncio.CancelledError:  # no Exception: it would end the instance's thread
            raise RuntimeError("execute was cancelled by the model's own code") from None

    def finalize(self) -> None:
        """Once. What it raises is logged: the model goes either way."""
        try:
            if hasattr(self._model, "finalize"):
                self._model.finalize()
        except (Exception, SystemExit):
            logger.exception("finalize of the model failed")
        if self._loop is not None:
            self._loop.close()
        _forget(self._folders)


def load(
    path: Path,
    config: ModelConfig,
    device: str,
    kind: str,
    instance_name: str,
    calls: Calls | None = None,
) -> PythonModel:
    """Raises ConfigError, whose file is relative to the model repository."""
    where = place(path, config)
    if not path.is_file():
        raise ConfigError("cannot find the file for model instance", file=where)
    folder = version_folder(path, config)
    module = surface.install(calls, str(folder))
    folders = [str(folder), str(folder.parent)]
    # Models import what lies beside them, also long after they were imported themselves.
    sys.path[:0] = folders
    try:
        model = _construct(_import(path, where), where)
        initialize = getattr(model, "initialize", None)
        if initialize is not None:
            with _explained("initialize", where):
                initialize(_arguments(folder, config, device, kind, instance_name))
    except BaseException:
        _forget(folders)
        raise
    return PythonModel(model, module.InferenceRequest, int(folder.name), folders)


def _forget(folders: list[str]) -> None:
    for one in folders:
        with suppress(ValueError):  # the model's own code may have changed the list
            sys.path.remove(one)


def completes(path: Path) -> bool:
    """Whether the file speaks of auto_complete_config at all: what does not need not be run."""
    return _COMPLETE.encode() in path.read_bytes()


def completed(path: Path, config: ModelConfig) -> ModelConfig:
    """What the model's auto_complete_config makes of a configuration that may lack tensors.

    It may add inputs, outputs, max_batch_size and dynamic batching, and contradict nothing. The
    file is imported for this alone, and anew when the model is loaded. Raises ConfigError.
    """
    where = place(path, config)
    folder = version_folder(path, config)
    surface.install(None, str(folder))
    folders = [str(folder), str(folder.parent)]
    sys.path[:0] = folders
    try:
        complete = getattr(_class_of(_import(path, where), where), _COMPLETE, None)
        if complete is None:
            return config
        given = AutoConfig(json.dumps(pbtxt.to_json(config)))
        with _explained(_COMPLETE, where):
            answer = complete(given)
    finally:
        _forget(folders)
    if not isinstance(answer, AutoConfig):
        kind = type(answer).__name__
        reason = f"{_COMPLETE} must return the pb_utils.ModelConfig, and returned {kind}"
        raise ConfigError(reason, file=where)
    return _taken(config, answer.as_dict(), where)


def _taken(config: ModelConfig, fields: dict[str, Any], where: str) -> ModelConfig:
    try:
        found = pbtxt.from_json({key: fields[key] for key in _COMPLETED if key in fields})
    except ValueError as error:
        raise ConfigError(f"{_COMPLETE}: {error}", file=where) from error
    return config.model_copy(update={key: getattr(found, key) for key in _COMPLETED})


def _arguments(
    folder: Path, config: ModelConfig, device: str, kind: str, instance_name: str
) -> dict[str, str]:
    """As Triton gives them: strings, all of them."""
    if kind == "KIND_MODEL":
        kind = "MODEL"
    else:
        kind = "CPU" if device == "cpu" else "GPU"
    return {
        "model_config": json.dumps(pbtxt.to_json(config)),
        "model_instance_kind": kind,
        "model_instance_name": instance_name,
        # A replica sees the one GPU that it is placed on, and there it is number 0.
        "model_instance_device_id": device.partition(":")[2] or "0",
        "model_repository": str(folder.parent),
        "model_version": folder.name,
        "model_name": config.name,
    }


@contextmanager
def _explained(what: str, where: str) -> Iterator[None]:
    """What the model's own code raises while it loads, as the reason why it does not."""
    try:
        yield
    except (Exception, SystemExit) as error:
        logger.exception("%s failed", what)
        raise ConfigError(f"{what} failed: {describe(error)}", file=where) from error


def describe(error: BaseException) -> str:
    """`ValueError: its own words`."""
    if isinstance(error, SystemExit):
        return f"the model called sys.exit({error.code!r})"
    kind, text = type(error).__name__, faults.clean_text(error)
    return text if text == kind else f"{kind}: {text}"


def _import(path: Path, where: str) -> ModuleType:
    """Under a name of its own, so that two models' model.py never meet in sys.modules."""
    name = "manta_python_" + hashlib.sha256(os.path.realpath(path).encode()).hexdigest()[:16]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError("this file cannot be imported", file=where)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up there
    try:
        with _explained("import", where):
            spec.loader.exec_module(module)
    except ConfigError:
        del sys.modules[name]
        raise
    return module


def _class_of(module: ModuleType, where: str) -> Any:
    found = getattr(module, CLASS, None)
    if not isinstance(found, type):
        raise ConfigError(f"no class {CLASS} found, which backend 'python' needs", file=where)
    if not callable(getattr(found, "execute", None)):
        raise ConfigError(f"class {CLASS} has no method execute", file=where)
    return found


def _construct(module: ModuleType, where: str) -> Any:
    chosen = _class_of(module, where)
    with _explained(f"{CLASS}()", where):
        return chosen()
