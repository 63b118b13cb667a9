"""ModelReplica: the process that holds the instances of one group on one device.

Owns the choice of an instance for a batch that comes through Serve, their health, and what the
Controller hears of them; how many batches an instance has is its own affair (`slots`). Routers of
this node come through its `doorway`, others call `execute`. Imports torch only after the
environment that torch reads is set.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ray import get_runtime_context, serve

from configs.complete import runtime_kind
from configs.errors import ConfigError
from configs.model import ModelConfig
from configs.parameters import ModelParameters, log_lines, parse_parameters

from . import draining, warmup
from .doorway import Doorway
from .errors import MantaError
from .logs import Tap
from .neighbours import Neighbours
from .repository import Repository
from .types import Batch, BatchReply, ChannelAddress, ReplicaReport, ReplicaSpec

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
# A batch that comes through Serve takes its turn among the Routers' for this long, and only so many
# do at an instance: then the Router keeps it.
TURN_S = 0.25
MAX_TURNS = 2


class ModelReplica:
    """Loads its instances in the constructor and answers `execute` with one batch each.

    A model that does not load is no exception here: Serve would build the replica three times over.
    The reason travels to the Controller in the report.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, spec: ReplicaSpec, *_siblings: object
    ) -> None:
        self._spec = spec
        self._config = spec.config
        self._instances: list[Instance] = []
        self._doorway: Doorway | None = None
        self._channel: ChannelAddress | None = None
        self._error = ""
        self._log = _LoadLog()
        self._tap = Tap(spec.logging, f"model '{spec.model_name}' version {spec.version}")
        self._draining = False
        self._load_duration_s = 0.0
        context = get_runtime_context()
        self._node_id = context.get_node_id()
        self._replica_id = serve.get_replica_context().replica_id.unique_id
        self._controller = serve.get_deployment_handle("Controller", spec.controller_application)
        _set_environment(spec)
        started = time.monotonic()
        try:
            await self._load_telling()
        except (ConfigError, MantaError) as error:
            self._error = str(error)
        except Exception as error:
            logger.exception("model %s did not load", spec.model_name)
            self._error = f"failed to load model '{spec.model_name}': {_without_paths(error, spec)}"
        self._loaded_s = time.monotonic()
        self._load_duration_s = self._loaded_s - started
        if self._instances:
            self._doorway = Doorway(len(self._instances), self._admit)
            self._channel = self._doorway.open()
        self._heart = asyncio.get_running_loop().create_task(self._heartbeat())

    async def _load_telling(self) -> None:
        """While it loads the report's `log` has the lines, once for all replicas; then the tap."""
        try:
            with self._log:
                await self._load()
        finally:
            self._tap.attach()

    async def _load(self) -> None:
        from .instance import Instance
        from .weights import WeightCache

        spec = self._spec
        repository = Repository((spec.repository,), spec.config_name)
        found = repository.find(spec.model_name)
        if spec.override is not None:
            found = replace(found, given=spec.override.config)
        digest = await asyncio.to_thread(repository.content_hash, found, spec.version, spec.config)
        if digest != spec.content_hash:
            raise ConfigError(
                f"version {spec.version} on this node differs from what the Controller read",
                file=f"{spec.model_name}/{spec.version}",
            )
        capability = _capability(spec)
        artifact = repository.artifact(found, spec.version, spec.config, capability)
        files = (artifact.name,)
        parameters, warnings = parse_parameters(spec.config, files)
        for line in warnings:
            logger.warning("%s", line)
        for line in log_lines(spec.config, parameters, files):
            logger.info("%s", line)
        if capability:
            logger.info("Using '%s' for compute capability %s", artifact.name, capability)
        if spec.complete:
            try:
                self._config = await self._completed(artifact, parameters)
            except ConfigError as error:
                raise repository.explain(found, error) from None
        samples = await asyncio.to_thread(
            warmup.prepare,
            self._config,
            runtime_kind(self._config, files),
            repository.warmup_files(found, self._config).__getitem__,
        )
        cache = WeightCache() if parameters.enable_weight_sharing else None
        calls: Neighbours | None = None
        if runtime_kind(spec.config, files) == "python":
            calls = Neighbours(
                spec.controller_application, spec.call_limit_s, spec.by_reference_bytes
            )
        self._instances = [
            Instance(
                name=f"{spec.model_name}_{spec.version}_{spec.deployment}_{k}",
                artifact=artifact,
                config=self._config,
                parameters=parameters,
                device=_device(spec),
                kind=spec.kind,
                cache=cache,
                threads=spec.threads,
                on_fatal=self._end,
                calls=calls,
            )
            for k in range(spec.instances)
        ]
        failure = await self._bring_up(samples)
        if isinstance(failure, ConfigError):
            raise repository.explain(found, failure)
        if failure is not None:
            raise failure

    async def _completed(self, artifact: Path, parameters: ModelParameters) -> ModelConfig:
        """With what the configuration leaves for the model to tell. Raises ConfigError."""
        from .runtimes import autocomplete

        spec = self._spec
        work = partial(autocomplete.complete, artifact, spec.config, parameters)
        return await asyncio.to_thread(work, _device(spec), spec.kind)

    async def _bring_up(self, samples: tuple[warmup.Sample, ...]) -> Exception | None:
        """All instances at once, or none of them: the first one's error."""
        results = await asyncio.gather(
            *(asyncio.to_thread(_bring_up, one, samples, self._spec) for one in self._instances),
            return_exceptions=True,
        )
        errors = [result for result in results if isinstance(result, BaseException)]
        if not errors:
            return None
        instances, self._instances = self._instances, []
        # On threads: a model's finalize may call others, which takes this loop.
        await asyncio.gather(*(asyncio.to_thread(one.close) for one in instances))
        first = errors[0]
        if isinstance(first, Exception):
            return first
        # A model's, and Serve would take it for its own.
        raise ConfigError(f"the model raised {type(first).__name__} while it was loaded")

    # --- data path -------------------------------------------------------------------------------

    async def execute(self, batch: Batch, replica_id: str = "") -> BatchReply:
        """Run one batch that comes through Serve, which reads `replica_id`. One of no members asks
        whether that replica is there."""
        if self._draining or self._error or not self._instances:
            return BatchReply(parts=(), refused=True)
        if not batch.rows:
            return BatchReply(parts=(), refused=replica_id != self._replica_id)
        return await _run_on(self._instances, batch)

    def _admit(self, instance: int, sock: socket.socket, router_id: str) -> None:
        if self._draining:
            sock.close()
        else:
            self._instances[instance].attach(sock, router_id)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve's hook for a deployment's own load figure: it does not see the channel's work."""
        return {"batches": float(sum(instance.slots.held for instance in self._instances))}

    # --- health ----------------------------------------------------------------------------------

    async def check_health(self) -> None:
        """Serve's health check: raises when an instance no longer moves."""
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
                self._end(stuck)
            await asyncio.sleep(HEARTBEAT_S)

    def _end(self, reason: object) -> None:
        """Now, and on any thread: the device is lost, or a thread hangs."""
        logger.critical("%s, this process ends", reason)
        if self._doorway is not None:
            self._doorway.remove()
        os._exit(1)

    async def _tell(self) -> None:
        lines = self._tap.take()
        try:
            self._tap.follow(await self._controller.report.remote(self._report(lines)))
        except BaseException:
            self._tap.give_back(lines)
            raise

    def _report(self, lines: tuple[str, ...]) -> ReplicaReport:
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
            config=self._config,
            error=self._error,
            loaded=not self._error,
            healthy=not self._stuck(),
            draining=self._draining,
            load_duration_s=self._load_duration_s,
            weight_pointers=tuple(instance.weight_pointer() for instance in self._instances),
            channel=self._channel,
            log=tuple(self._log.lines),
            fresh=lines,
            passive=spec.passive,
            override=spec.override,
            details={
                "gpu": "" if spec.gpu is None else str(spec.gpu),
                "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
                **(self._instances[0].in_force if self._instances else {}),
                "cache_cleanings": str(sum(one.cleanings for one in self._instances)),
                **self._traffic(),
                "cuda_launch_blocking": os.environ.get("CUDA_LAUNCH_BLOCKING", ""),
            },
        )

    def _traffic(self) -> dict[str, str]:
        """How batches came, over all instances; `peak_held` and `routers` are those of the one that
        has the most."""
        slots = [instance.slots for instance in self._instances]
        return {
            "peak_held": str(max((one.peak_held for one in slots), default=0)),
            "routers": str(max((one.parties for one in slots), default=0)),
            "by_channel": str(sum(one.by_channel for one in slots)),
            "by_serve": str(sum(one.by_serve for one in slots)),
        }

    # --- the end ---------------------------------------------------------------------------------

    async def __del__(self) -> None:
        """Serve calls this once no request of its own is ongoing, and kills the process afterwards,
        or after `draining.grace_s`."""
        self._draining = True
        doorway = getattr(self, "_doorway", None)
        if doorway is not None:
            doorway.close()
        for instance in self._instances:
            instance.drain()
        heart = getattr(self, "_heart", None)
        if heart is not None:  # it goes on: it tells whoever has not heard, and ends what hangs
            with contextlib.suppress(Exception):
                await asyncio.wait_for(self._tell(), HEARTBEAT_S)
        await draining.answered(self._instances, self._spec.max_execution_s)
        if heart is not None:
            heart.cancel()
        await asyncio.gather(*(asyncio.to_thread(one.close) for one in self._instances))


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


def _capability(spec: ReplicaSpec) -> str:
    """What the choice of a file needs to know; "" where there is nothing to choose."""
    if not spec.config.cc_model_filenames or _device(spec) != "cuda:0":
        return ""
    from .runtimes.devices import compute_capability

    return compute_capability(_device(spec))


def _bring_up(instance: Instance, samples: tuple[warmup.Sample, ...], spec: ReplicaSpec) -> None:
    """To where it may be reported: loaded, and all samples run. Blocks.

    As in Triton, passive instances are not warmed.
    """
    instance.load()
    if not spec.passive:
        warmup.run(instance, samples, spec.model_name)


async def _run_on(instances: Sequence[Instance], batch: Batch) -> BatchReply:
    """On the instance that has least to do.

    Refuses when its turn does not come soon: that happens only when several Routers offer more
    than there is, and the Router keeps the batch in its queue.
    """
    instance = min(instances, key=_busyness)
    offered = instance.offer(batch)
    if offered is not None:  # it runs, whatever becomes of the caller
        return await asyncio.shield(asyncio.wrap_future(offered))
    if instance.slots.waiting >= MAX_TURNS:
        return BatchReply(parts=(), refused=True)
    queued = instance.queue(batch)
    reply = asyncio.wrap_future(queued)
    try:
        await asyncio.wait({reply}, timeout=TURN_S)
    except asyncio.CancelledError:
        queued.cancel()
        raise
    if queued.cancel():
        return BatchReply(parts=(), refused=True)
    return await asyncio.shield(reply)


def _busyness(instance: Instance) -> tuple[int, int]:
    """By batches; among equals, one that has just begun a run moves, and one that hangs is last."""
    return instance.slots.held, -(instance.progress().running_since_ns or 0)


def _without_paths(error: BaseException, spec: ReplicaSpec) -> str:
    """The error's own words, with places on this host taken out."""
    from .runtimes.faults import clean_text

    text = clean_text(error)
    return text.replace(os.path.realpath(spec.repository), "").replace(spec.repository, "")
