"""Router: the ingress. Wires the edges to `inference`, and follows the Controller.

Owns its lines to what runs, this Router's counters, and its listener. Decides nothing about
requests; never imports torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from ray import get_runtime_context, serve
from ray.exceptions import RayTaskError

from configs import metrics, tracing
from configs.server import ServerSettings

from . import applications
from .census import Census, census
from .client import Origin
from .directory import Directory
from .errors import Internal, MantaError, Unavailable
from .gauges import Gauges, sources
from .grpc_services import PROXY_METHODS, GrpcServicer, add_services
from .http import HttpApp
from .http_metrics import MetricsApp
from .inference import Inference
from .ledger import Ledger
from .lines import Lines
from .listener import Listener
from .log_settings import initial
from .logs import Tap
from .overrides import size_bytes
from .statistics import Recorder
from .tracers import Tracers
from .types import InferRequest, InferResponse, Snapshot

logger = logging.getLogger("ray.serve")

FLUSH_S = 1.0
RETRY_S = 0.2
JOIN_S = 5.0
# Questions to the Controller that it answers at once, unless it is being replaced. Its node may be
# lost without a word: then no connection ever breaks, and what is asked of it is never answered.
ANSWER_S = 10.0


class Router:
    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, settings: ServerSettings, controller: Any
    ) -> None:
        context = serve.get_replica_context()
        self._settings = settings
        self._controller = controller
        self._router_id = context.replica_id.unique_id
        self._application = context.app_name
        self._log = Tap(initial(settings))
        self._log.attach()
        self._directory = Directory()
        self._starved = asyncio.Event()
        self._tracers = Tracers(tracing.parse(settings.trace_config))
        recorder = Recorder(summaries=metrics.parse(settings.metrics_config).summary_latencies)
        origin = Origin(
            node_id=get_runtime_context().get_node_id(),
            router_id=self._router_id,
            use_channels=settings.local_channel,
            by_reference_bytes=settings.by_reference_min_bytes,
            limit_s=settings.max_queue_s + settings.max_execution_s,
        )
        self._lines = Lines(
            settings, origin, recorder, self._tracers, self._lost, self._starved.set
        )
        self._ledger = Ledger(
            self._router_id,
            controller,
            self._log,
            self._lines.pending,
            recorder,
            self._lines.running,
        )
        visible = os.environ.get("MANTA_VISIBLE_DEVICES", "")
        self._gauges = Gauges(sources(settings, visible), settings.metrics_interval_ms / 1000)
        self._epoch, self._sequence = 0, -1
        self._past_epochs: set[int] = set()
        self._inference = Inference(self._directory, self, settings)
        self._http = HttpApp(self._inference, settings)
        self.grpc_verbs = GrpcServicer(self._inference)
        self._listener = self._claim(context.app_name)
        self._opened = False
        await self._join(context.app_name)
        loop = asyncio.get_running_loop()
        works = (self._follow(), self._flush_forever(), self._gauges.run())
        self._tasks = [loop.create_task(work) for work in works]

    def _claim(self, app_name: str) -> Listener:
        """The ports, at once: a busy one fails the constructor, and with it the deployment."""
        owner = f"{get_runtime_context().gcs_address} {app_name}"
        return Listener(
            self._settings,
            owner,
            self._http,
            MetricsApp(self._metrics),
            partial(add_services, self.grpc_verbs),
        )

    def __serve_build_asgi_app__(self) -> HttpApp:
        return self._http

    # --- following the Controller ----------------------------------------------------------------

    async def _join(self, application: str) -> None:
        """Where models serve already, this Router does too before another one leaves for it: that
        may be as soon as this one is constructed. Otherwise a first load is not waited for."""
        relieves = await self._relieves(application)
        while True:
            try:
                snapshot = await asyncio.wait_for(_awaited(self._watch), JOIN_S)
            except Exception as error:  # the Controller starts just now; an update replaces it too
                logger.debug("the Controller does not answer yet: %s", error)
                snapshot = None
            if snapshot is not None and snapshot.started:
                await self._take(snapshot)
                return
            if not relieves:  # the Controller is followed later
                return
            await asyncio.sleep(RETRY_S)

    async def _relieves(self, application: str) -> bool:
        """Whether a Router of the same application has its ports open."""
        try:
            if not await asyncio.to_thread(applications.running, application, "Router"):
                return False
            router = serve.get_deployment_handle("Router", application)
            serves: bool = await asyncio.wait_for(
                _awaited(lambda: router.serving.remote()), ANSWER_S
            )
        except Exception as error:  # too busy to say so
            logger.debug("the Router that runs does not answer: %s", error)
            return True
        return serves

    async def serving(self) -> bool:
        """Whether its ports are open; for a Router that begins."""
        return self._opened

    def _watch(self) -> Awaitable[Snapshot | None]:
        watch: Awaitable[Snapshot | None] = self._controller.watch.remote(
            self._router_id, self._epoch, self._sequence, self._lines.in_use()
        )
        return watch

    async def _follow(self) -> None:
        while True:
            try:
                snapshot = await asyncio.wait_for(_awaited(self._watch), ANSWER_S)
                if snapshot is None:
                    await asyncio.wait_for(self._ledger.flush(asked=True), ANSWER_S)
                    continue
            except asyncio.CancelledError:
                raise
            except Exception as error:  # it is being replaced: what is loaded goes on serving
                logger.debug("the Controller does not answer: %s", error)
                await asyncio.sleep(RETRY_S)
                continue
            if self._is_behind(snapshot):
                await asyncio.sleep(RETRY_S)
                continue
            await self._take(snapshot)

    def _is_behind(self, snapshot: Snapshot) -> bool:
        """From a Controller that was replaced, or one that is still finding out what runs.

        Epochs are told apart, not compared: clocks of two nodes need not agree.
        """
        if snapshot.epoch == self._epoch:
            return snapshot.sequence <= self._sequence
        unsure = bool(self._lines) and not snapshot.started
        return unsure or snapshot.epoch in self._past_epochs

    async def _take(self, snapshot: Snapshot) -> None:
        self._apply(snapshot)
        if snapshot.started and not self._opened:
            self._opened = True
            await self._listener.open()
            # What is there by now stays: the collector need not look through it again.
            gc.collect()
            gc.freeze()

    def _apply(self, snapshot: Snapshot) -> None:
        if snapshot.epoch != self._epoch:
            self._past_epochs.add(self._epoch)
        self._epoch, self._sequence = snapshot.epoch, snapshot.sequence
        self._log.follow(snapshot.log)
        self._tracers.follow(snapshot.trace)
        self._ledger.trace = self._tracers.changes
        gone = self._lines.follow(snapshot.versions)
        self._directory.update(snapshot, self._lines.gates())
        for application in gone:
            self._lines.let_go(application)

    def _lost(self, application: str) -> None:
        self._ledger.lost(application)

    # --- counters --------------------------------------------------------------------------------

    async def _flush_forever(self) -> None:
        """Now and then; at once where something waits for a version that has no replica."""
        while True:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._starved.wait(), FLUSH_S)
            self._starved.clear()
            with contextlib.suppress(Exception):
                await asyncio.wait_for(self._ledger.flush(), ANSWER_S)

    async def _metrics(self) -> str:
        await self._ask(self._ledger.flush, ANSWER_S)
        text: str = await self._ask(lambda: self._controller.metrics.remote(), ANSWER_S)
        return text + self._gauges.render()

    async def call(self, verb: str, *args: Any) -> Any:
        """The Control seam of `inference`."""
        if verb == "metrics":
            return await self._metrics()
        if verb in ("statistics", "log_settings", "trace_settings"):
            # A Controller that has just begun knows what Routers tell it, settings as well.
            await self._ask(self._ledger.flush, ANSWER_S)
            ask = getattr(self._controller, verb).remote
            return await self._ask(lambda: ask(*args), ANSWER_S)
        if verb == "on_disk":
            return await self._ask(lambda: self._controller.on_disk.remote(), ANSWER_S)
        tries = self._settings.model_load_retry_count + 1
        limit_s = tries * self._settings.model_load_timeout_s + ANSWER_S
        large = size_bytes(args[1]) >= self._settings.by_reference_min_bytes
        controller = self._controller.options(_by_reference=True) if large else self._controller
        await self._ask(lambda: controller.control.remote(verb, *args), limit_s)

    # --- models that call models -----------------------------------------------------------------

    async def infer_for_model(self, request: InferRequest) -> InferResponse | MantaError:
        """For a model that runs: part of a request that was accepted long ago. An error is
        returned: raised, it would be logged as a failure of the server."""
        try:
            return await self._inference.infer_for_model(request)
        except MantaError as error:
            return error

    async def control_for_model(self, verb: str, *args: Any) -> Any:
        """`ready`, `load` and `unload` of `inference`; errors are returned."""
        inference = self._inference
        try:
            match verb:
                case "ready":
                    return inference.model_ready(*args)
                case "load":
                    return await inference.administration.load(*args)
                case "unload":
                    return await inference.administration.unload(*args)
        except MantaError as error:
            return error
        return Internal(f"unknown verb '{verb}'")

    async def _ask(self, ask: Callable[[], Awaitable[Any]], limit_s: float) -> Any:
        try:
            return await asyncio.wait_for(_awaited(ask), limit_s)
        except RayTaskError as error:
            if isinstance(error.cause, MantaError):
                raise error.cause from None
            logger.exception("the Controller failed")
            raise Internal("the server failed to answer") from None
        except MantaError:
            raise
        except Exception as error:
            raise Unavailable("the server's controller is restarting; try again") from error

    # --- health and the end ----------------------------------------------------------------------

    async def check_health(self) -> None:
        for task in self._tasks:
            if task.done():
                raise RuntimeError("the Router no longer follows the Controller")
        if not self._listener.alive():
            raise RuntimeError("the Router's listener has stopped")

    async def census(self) -> Census:
        return census()

    async def drain(self) -> None:
        """Answer what was accepted and leave the ports; Serve knows nothing of the traffic."""
        self._http.leave()
        self._inference.leave()
        self.grpc_verbs.leave()
        await asyncio.gather(self._listener.drain(), self._give_up())
        await self._lines.drain()

    async def _give_up(self) -> None:
        """The Controller goes with this Router, unless that only makes room for another one."""
        ending = self._directory.snapshot().closing
        if not ending:
            with contextlib.suppress(Exception):  # Serve's controller may be restarting
                question = asyncio.to_thread(applications.is_deleting, self._application)
                ending = await asyncio.wait_for(question, ANSWER_S)
        if ending:
            self._lines.give_up()

    async def __del__(self) -> None:
        tasks = getattr(self, "_tasks", None)
        if tasks is None:
            return  # the constructor failed
        try:
            await asyncio.wait_for(self.drain(), self._settings.exit_timeout_s)
        finally:
            for task in tasks:
                task.cancel()
            with contextlib.suppress(Exception):  # the Controller may be on its way out, too
                await asyncio.wait_for(self._ledger.flush(), FLUSH_S)
            with contextlib.suppress(Exception):  # last: a collector may be mute
                await self._tracers.aclose()
            self._log.detach()


async def _awaited(ask: Callable[[], Awaitable[Any]]) -> Any:
    """A Serve response is awaitable, but no coroutine that could be waited for with a limit."""
    return await ask()


for _verb, _method in PROXY_METHODS.items():
    setattr(Router, _verb, _method)
