"""ModelReplica: the process that holds the instances of one group on one device.

Owns admission to its instances, their health, and what the Controller hears of them. Does not
queue beyond one prefetched batch per instance. Called by Routers through `client.py`, by Serve for
health and shutdown. Imports torch only after the environment that torch reads is set.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING

from ray import get_runtime_context, serve

from configs.errors import ConfigError
from configs.parameters import log_lines, parse_parameters

from .errors import MantaError
from .repository import Repository
from .types import Batch, BatchReply, ReplicaReport, ReplicaSpec

if TYPE_CHECKING:
    from .instance import Instance

logger = logging.getLogger("ray.serve")  # Serve writes this one to the replica's log file
MAX_LOG_LINES = 200

HEARTBEAT_S = 1.0
# An idle instance that has not run a no-op for this long does not move any more.
IDLE_LIMIT_S = 30.0
# A model that does not load is the Controller's to remove. A replica that stands in for a dead one
# has nobody who would: after this long Serve may try again.
ERROR_LIMIT_S = 15.0


class ModelReplica:
    """Loads its instances in the constructor and answers `execute` with one batch each.

    A model that does not load is no exception here: Serve would build the replica three times over.
    The reason travels to the Controller in the report.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, spec: ReplicaSpec, *_siblings: object
    ) -> None:
        self._spec = spec
        self._instances: list[Instance] = []
        self._free: asyncio.Queue[Instance] = asyncio.Queue()
        self._waiting = 0
        self._error = ""
        self._log = _LoadLog()
        self._draining = False
        self._load_duration_s = 0.0
        context = get_runtime_context()
        self._node_id = context.get_node_id()
        self._replica_id = serve.get_replica_context().replica_id.unique_id
        self._controller = serve.get_deployment_handle("Controller", spec.controller_application)
        _set_environment(spec)
        started = time.monotonic()
        try:
            with self._log:
                await self._load()
        except (ConfigError, MantaError) as error:
            self._error = str(error)
        except Exception as error:
            logger.exception("model %s did not load", spec.model_name)
            self._error = f"failed to load model '{spec.model_name}': {_without_paths(error, spec)}"
        self._loaded_s = time.monotonic()
        self._load_duration_s = self._loaded_s - started
        for instance in self._instances:
            self._free.put_nowait(instance)
        self._heart = asyncio.get_running_loop().create_task(self._heartbeat())

    async def _load(self) -> None:
        from .instance import Instance
        from .weights import WeightCache

        spec = self._spec
        repository = Repository((spec.repository,))
        found = repository.find(spec.model_name)
        digest = await asyncio.to_thread(repository.content_hash, found, spec.version, spec.config)
        if digest != spec.content_hash:
            raise ConfigError(
                f"version {spec.version} on this node differs from what the Controller read",
                file=f"{spec.model_name}/{spec.version}",
            )
        artifact = repository.artifact(found, spec.version, spec.config)
        files = (artifact.name,)
        parameters, warnings = parse_parameters(spec.config, files)
        for line in [*warnings, *log_lines(spec.config, parameters, files)]:
            logger.info("%s", line)
        cache = WeightCache() if parameters.enable_weight_sharing else None
        self._instances = [
            Instance(
                name=f"{spec.model_name}_{spec.version}_{spec.deployment}_{k}",
                artifact=artifact,
                config=spec.config,
                parameters=parameters,
                device=_device(spec),
                kind=spec.kind,
                cache=cache,
                threads=spec.threads,
            )
            for k in range(spec.instances)
        ]
        results = await asyncio.gather(
            *(asyncio.to_thread(instance.load) for instance in self._instances),
            return_exceptions=True,
        )
        errors = [result for result in results if isinstance(result, BaseException)]
        if errors:
            for instance in self._instances:
                instance.close()
            self._instances = []
            raise errors[0]

    # --- data path -------------------------------------------------------------------------------

    async def execute(self, batch: Batch) -> BatchReply:
        """Run one batch on a free instance.

        Refuses when every instance runs and as many batches wait already: that happens only when
        several Routers offer more than there is, and the Router keeps the batch in its queue.
        """
        if self._draining or self._error or not self._instances:
            return BatchReply(parts=(), refused=True)
        if self._free.empty() and self._waiting >= len(self._instances):
            return BatchReply(parts=(), refused=True)
        arrived_ns = time.perf_counter_ns()
        self._waiting += 1
        try:
            instance = await self._free.get()
        finally:
            self._waiting -= 1
        waited_ns = time.perf_counter_ns() - arrived_ns
        future = instance.submit(batch)
        loop = asyncio.get_running_loop()
        # The instance is free when its thread is, whatever has become of the caller by then.
        future.add_done_callback(lambda done: self._finished(loop, instance, done))
        reply = await asyncio.shield(asyncio.wrap_future(future))
        return replace(reply, waited_ns=waited_ns)

    def _finished(
        self, loop: asyncio.AbstractEventLoop, instance: Instance, done: Future[BatchReply]
    ) -> None:
        error = None if done.cancelled() else done.exception()
        if error is not None and _is_fatal(error):
            logger.critical("fatal device error, this process ends: %s", error)
            os._exit(1)
        loop.call_soon_threadsafe(self._free.put_nowait, instance)

    # --- health ----------------------------------------------------------------------------------

    async def check_health(self) -> None:
        """Serve's health check: raises when an instance no longer moves (design: Health)."""
        stuck = self._stuck()
        if stuck:
            raise RuntimeError(stuck)
        if self._error and time.monotonic() - self._loaded_s > ERROR_LIMIT_S:
            raise RuntimeError(self._error)

    def _stuck(self) -> str:
        now_ns = time.monotonic_ns()
        for instance in self._instances:
            progress = instance.progress()
            if progress.running_since_ns is not None:
                ran_s = (now_ns - progress.running_since_ns) / 1e9
                if ran_s > self._spec.max_execution_s:
                    return f"instance {instance.name} has run one batch for {ran_s:.0f} s"
            elif progress.state == "idle":
                asked_ns = progress.asked_since_ns
                if asked_ns is not None and (now_ns - asked_ns) / 1e9 > IDLE_LIMIT_S:
                    return f"instance {instance.name} is idle and does not answer"
                instance.beat()
            elif progress.state == "stopped" and not self._draining:
                return f"instance {instance.name} has stopped"
        return ""

    async def _heartbeat(self) -> None:
        while True:
            stuck = self._stuck()
            try:
                await asyncio.wait_for(self._tell(), HEARTBEAT_S if stuck else HEARTBEAT_S * 10)
            except asyncio.CancelledError:
                raise
            except Exception as error:  # the Controller may be restarting; it hears the next one
                logger.debug("report not delivered: %s", error)
            if stuck:
                # Nothing but the process's end frees a thread that hangs. Serve would first wait
                # out its grace for the very request that hangs; so its client hears of it now.
                logger.critical("%s, this process ends", stuck)
                os._exit(1)
            await asyncio.sleep(HEARTBEAT_S)

    async def _tell(self) -> None:
        await self._controller.report.remote(self._report())

    def _report(self) -> ReplicaReport:
        spec = self._spec
        return ReplicaReport(
            application=spec.application,
            deployment=spec.deployment,
            replica_id=self._replica_id,
            node_id=self._node_id,
            pid=os.getpid(),
            instances=len(self._instances),
            device=_device(spec),
            fingerprint=spec.fingerprint,
            config=spec.config,
            error=self._error,
            loaded=not self._error,
            healthy=not self._stuck(),
            draining=self._draining,
            load_duration_s=self._load_duration_s,
            weight_pointers=tuple(instance.weight_pointer() for instance in self._instances),
            log=tuple(self._log.lines),
            details={
                "gpu": "" if spec.gpu is None else str(spec.gpu),
                "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
                "cuda_launch_blocking": os.environ.get("CUDA_LAUNCH_BLOCKING", ""),
            },
        )

    # --- the end ---------------------------------------------------------------------------------

    async def __del__(self) -> None:
        """Serve calls this once no request is ongoing; the process ends afterwards."""
        self._draining = True
        heart = getattr(self, "_heart", None)
        if heart is not None:
            heart.cancel()
            with contextlib.suppress(Exception):
                await asyncio.wait_for(self._tell(), HEARTBEAT_S)
        for instance in self._instances:
            await asyncio.to_thread(instance.close)


class _LoadLog(logging.Handler):
    """Keeps what is logged while the model loads: the profile buffers log files for long."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if len(self.lines) < MAX_LOG_LINES:
            self.lines.append(record.getMessage())

    def __enter__(self) -> None:
        for name in ("ray.serve", "manta"):
            logging.getLogger(name).addHandler(self)
        logging.getLogger("manta").setLevel(logging.INFO)

    def __exit__(self, *_: object) -> None:
        for name in ("ray.serve", "manta"):
            logging.getLogger(name).removeHandler(self)


def _set_environment(spec: ReplicaSpec) -> None:
    """What torch and CUDA read when they start; must come before the first import of torch."""
    os.environ.update(spec.environment)
    if spec.gpu is not None and not spec.logical_gpus:
        # Ray packs fractions and may have named another device; the listed index decides.
        visible = os.environ.get("MANTA_VISIBLE_DEVICES", "")
        devices = [device for device in visible.split(",") if device]
        own = devices[spec.gpu] if spec.gpu < len(devices) else str(spec.gpu)
        os.environ["CUDA_VISIBLE_DEVICES"] = own


def _device(spec: ReplicaSpec) -> str:
    if spec.kind == "KIND_GPU" and not spec.logical_gpus:
        return "cuda:0"
    return "cpu"


def _is_fatal(error: BaseException) -> bool:
    from .instance import FatalDeviceError

    return isinstance(error, FatalDeviceError)


def _without_paths(error: BaseException, spec: ReplicaSpec) -> str:
    """The error's own words, with places on this host taken out."""
    from .runtimes.faults import clean_text

    text = clean_text(error)
    return text.replace(os.path.realpath(spec.repository), "").replace(spec.repository, "")
