"""The protocol's verbs, free of any protocol: what HTTP and gRPC both answer, decided once.

Owns who may be answered and when; a version's own rules are its `Contract`. Reads the directory and
hands admitted work to the version's gate. Verbs that ask the Controller are its `administration`'s.
Called by the edges.
"""

from __future__ import annotations

import asyncio
import contextlib
from asyncio import Future
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from configs import dtypes
from configs.model import ModelConfig, ModelInput, ModelOutput
from configs.server import ServerSettings

from . import extras
from .administration import Administration, Control, Versions
from .contract import Work
from .directory import Served
from .errors import (
    AlreadyExists,
    Cancelled,
    Code,
    Internal,
    InvalidArgument,
    MantaError,
    NotFound,
    ShuttingDown,
    Unavailable,
    UnknownError,
    Unsupported,
)
from .regions import DISABLED, Regions
from .tracing import Arrival
from .types import InferRequest, InferResponse

# Only what is done here: a client may ask for whatever this list names.
EXTENSIONS = (
    "classification",
    "model_repository",
    "model_repository(unload_dependents)",
    "model_configuration",
    "binary_tensor_data",
    "parameters",
    "statistics",
    "trace",
    "logging",
)

# So many largest requests may have copies of their inputs in shared memory at a time.
COPIED_BODIES = 4

_PLAIN: Mapping[Code, type[MantaError]] = {
    Code.INVALID_ARG: InvalidArgument,
    Code.NOT_FOUND: NotFound,
    Code.UNAVAILABLE: Unavailable,
    Code.UNSUPPORTED: Unsupported,
    Code.INTERNAL: Internal,
    Code.ALREADY_EXISTS: AlreadyExists,
    Code.CANCELLED: Cancelled,
}


@dataclass(frozen=True, slots=True)
class Ticket:
    """A request that waits for its batch. Cancelling `future` withdraws it.

    Without `work` the future has the whole response: the request asks for more than tensors.
    """

    request: InferRequest
    served: Served
    work: Work | None
    future: Future[Any]


class Inference:
    def __init__(self, versions: Versions, control: Control, settings: ServerSettings) -> None:
        self._versions = versions
        self.settings = settings
        self.administration = Administration(versions, control, settings)
        self._leaving = False
        self._regions = Regions(COPIED_BODIES * settings.max_body_bytes)

    # --- health ----------------------------------------------------------------------------------

    def leave(self) -> None:
        """Not ready from now on; the others of this server serve on, and so does this Router."""
        self._leaving = True

    def check_open(self) -> None:
        """Once the whole server ends, new work is refused; what was accepted is answered."""
        self.administration.check_open()

    def live(self) -> bool:
        self.check_open()
        return True

    def ready(self) -> bool:
        self.check_open()
        if self._leaving:
            raise ShuttingDown()
        snapshot = self._versions.snapshot()
        return snapshot.started and snapshot.ready

    def model_ready(self, name: str, version: str) -> bool:
        """False, and no error, for what is not there."""
        self.check_open()
        try:
            served = self._versions.find(name, version)
        except (NotFound, Unavailable):
            return False
        known = served.snapshot
        return known.resting or any(target.slots for target in known.targets)

    # --- metadata --------------------------------------------------------------------------------

    def server_metadata(self) -> dict[str, Any]:
        extensions = list(EXTENSIONS)
        if self.settings.allow_client_shm:
            extensions.insert(extensions.index("binary_tensor_data"), "system_shared_memory")
        return {
            "name": self.settings.id,
            "version": _server_version(),
            "extensions": extensions,
        }

    def model_metadata(self, name: str, version: str) -> dict[str, Any]:
        config = self._versions.find(name, version).config
        return {
            "name": name,
            "versions": [version] if version else self.administration.ready_versions(name),
            "platform": config.platform or config.backend,
            "inputs": [_tensor_metadata(config, entry) for entry in config.input],
            "outputs": [_tensor_metadata(config, entry) for entry in config.output],
        }

    def model_config(self, name: str, version: str) -> ModelConfig:
        return self._versions.find(name, version).config

    def loaded(self) -> Iterator[tuple[str, str, ModelConfig]]:
        """Name, version and configuration of all that answers: also of what loads anew."""
        for each in self._versions.snapshot().versions:
            if each.version:
                with contextlib.suppress(NotFound, Unavailable):
                    version = str(each.version)
                    yield each.model_name, version, self.model_config(each.model_name, version)

    # --- infer -----------------------------------------------------------------------------------

    def find(self, name: str, version: str) -> Served:
        """Before a request's body is read: is there anything that could answer it?"""
        self.check_open()
        return self._versions.find(name, version)

    def submit(
        self, request: InferRequest, accepted: bool = False, arrival: Arrival | None = None
    ) -> Ticket:
        """Check a request and queue it. Raises what is wrong with it; never waits.

        `accepted`: it belongs to one that is being answered, also while the server ends. `arrival`:
        it may be traced.
        """
        find = self._versions.find if accepted else self.find
        served = find(request.model_name, request.model_version)
        if request.extra:
            work = self._infer_extra(served, request, arrival)
            return Ticket(request, served, None, asyncio.get_running_loop().create_task(work))
        return self._queue(served, request, arrival)

    def _queue(self, served: Served, request: InferRequest, arrival: Arrival | None) -> Ticket:
        try:
            work = served.contract.admit(request)
            asked = (work.rows, work.key, work.inputs, work.outputs, work.facts)
            if arrival is None:
                future = served.gate.submit(*asked)
            else:
                trace = partial(arrival.at, request_id=request.id, direct=False)
                future = served.gate.submit(*asked, wrap=trace)
        except MantaError as error:
            raise told(request.id, error) from error
        return Ticket(request, served, work, future)

    def answer(self, ticket: Ticket) -> InferResponse:
        """The response to a ticket whose future is done."""
        if ticket.work is None:
            response: InferResponse = ticket.future.result()
            return response
        try:
            outputs = ticket.future.result().outputs
            tensors = ticket.served.contract.answer(ticket.work.outputs, outputs)
        except MantaError as error:
            raise told(ticket.request.id, error) from error
        snapshot = ticket.served.snapshot
        return InferResponse(snapshot.model_name, str(snapshot.version), ticket.request.id, tensors)

    async def infer_for_model(self, request: InferRequest) -> InferResponse:
        """For a model that runs, and for those that wait for it.

        Each of them keeps an instance. One that would have to wait for an instance of its own
        version when all are kept so would wait until its time is over.
        """
        if request.chain:
            served = self._versions.find(request.model_name, request.model_version).snapshot
            asked = f"{served.model_name}/{served.version}"
            kept = request.chain.count(asked)
            if kept and kept >= sum(target.slots for target in served.targets):
                raise Unavailable(
                    f"model '{served.model_name}' is called by itself "
                    f"({' -> '.join((*request.chain, asked))}) and has no instance left that could "
                    "answer"
                )
        return await self.infer(request, accepted=True)

    async def infer(
        self, request: InferRequest, accepted: bool = False, arrival: Arrival | None = None
    ) -> InferResponse:
        return await self.result(self.submit(request, accepted, arrival))

    async def result(self, ticket: Ticket) -> InferResponse:
        """The response to a ticket, which is withdrawn when the caller is cancelled."""
        try:
            await ticket.future
        except MantaError:
            pass  # `answer` raises it, with the request's id
        return self.answer(ticket)

    async def _infer_extra(
        self, served: Served, request: InferRequest, arrival: Arrival | None
    ) -> InferResponse:
        """One that asks for more than tensors in and tensors out."""
        with self._regions.held(extras.ranges(request)) as regions:
            with self._regions.copying(extras.copied_bytes(request, self.settings)):
                request = await extras.fetch(request, regions, self.settings.max_tensor_rank)
                response = await self.result(self._queue(served, request, arrival))
            labels, batched = served.snapshot.labels, served.config.max_batch_size > 0
            outputs = await extras.finish(request, response.outputs, labels, batched, regions)
            return replace(response, outputs=outputs)

    @property
    def memory(self) -> Regions:
        """What clients have registered; raises Unsupported where they may not."""
        self.check_open()
        if not self.settings.allow_client_shm:
            raise Unsupported(DISABLED)
        return self._regions


def told(request_id: str, error: MantaError) -> MantaError:
    """The error as Triton tells it once a request exists."""
    prefix = f"[request id: {request_id or '<id_unknown>'}] "
    return _PLAIN.get(error.code, UnknownError)(prefix + str(error))


def _tensor_metadata(config: ModelConfig, entry: ModelInput | ModelOutput) -> dict[str, Any]:
    """`shape` is the client's view, whatever the model's reshape says."""
    return {
        "name": entry.name,
        "datatype": dtypes.from_config(entry.data_type).wire,
        "shape": [-1, *entry.dims] if config.max_batch_size else list(entry.dims),
    }


def _server_version() -> str:
    try:
        return version("manta-server")
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "0.0.0"
