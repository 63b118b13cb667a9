"""Execution for models that are handed whole requests: a batch in, each request's answer out.

The sibling of `execution` for Triton's Python backend: nothing is concatenated, and a response may
be an error for its request alone. What `execute` raises, or a list that is none of responses,
concerns the batch: its members then run once more, each by itself. Called by `instance`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from configs.dtypes import from_config
from configs.model import ModelConfig

from .desk import How, SendAgain
from .errors import Internal, InvalidArgument, MantaError
from .pb_utils import faults as pb_faults
from .pb_utils import tensor as pb_tensor
from .pb_utils.calls import Waiting
from .pb_utils.messages import InferenceRequest, InferenceResponse
from .pb_utils.tensor import Tensor
from .runtimes import faults, strings
from .runtimes.faults import FatalDeviceError
from .runtimes.python_model import PythonModel, describe
from .types import Batch, OutputArray, Part, RequestFacts
from .weights import free_device_memory

logger = logging.getLogger("ray.serve")  # Serve writes this one to the replica's log file

_NO_FACTS = RequestFacts()


class ExecutionByRequest:
    """`trying` is called at the start of every try; `calls` go to other models."""

    def __init__(
        self,
        name: str,
        model: PythonModel,
        config: ModelConfig,
        trying: Callable[[], None],
        calls: Waiting | None = None,
    ) -> None:
        self._name = name
        self._model = model
        self._config = config
        self._trying = trying
        self._calls = calls
        self._outputs = {output.name: output for output in config.output}

    def run(self, batch: Batch, how: How) -> tuple[Part, ...]:
        """Raises FatalDeviceError, and SendAgain for joined inputs that a failed run may have
        changed: sent once more in pieces, `how` says in which the members are run. Or "whole": one
        that fails is not run again in pieces, unless it needs more memory than there is."""
        members = tuple(range(len(batch.rows)))
        whole = how == "whole"
        if (how and not whole) or self._config.max_batch_size == 0:
            return tuple(part for k in members for part in self._attempt(batch, (k,)))
        return tuple(self._attempt(batch, members, whole))

    def _attempt(self, batch: Batch, members: tuple[int, ...], whole: bool = False) -> list[Part]:
        try:
            return self._run_once(batch, members)
        except SystemExit as caught:
            error: Exception = RuntimeError(f"the model called sys.exit({caught.code!r})")
        except Exception as caught:
            error = caught
            logger.debug("instance '%s': execute failed", self._name, exc_info=True)
        # Outside the except clause: the traceback would hold the failed run's memory.
        error.__traceback__ = None
        error.__cause__ = error.__context__ = None
        if faults.is_fatal(error):
            if isinstance(error, FatalDeviceError):
                raise error
            raise FatalDeviceError(faults.clean_text(error))
        if faults.is_out_of_memory(error):
            free_device_memory()
            whole = False
        if len(members) == 1 or whole:
            return [Part(members, {}, self._as_answer(error), run_rows=0)]
        if any(one is not None for one in batch.joined):
            raise SendAgain("singly")
        return [part for k in members for part in self._attempt(batch, (k,))]

    def _as_answer(self, error: Exception) -> MantaError:
        if isinstance(error, MantaError):
            return error
        return Internal(
            f"Failed to process the request(s) for model instance '{self._name}', message: "
            f"{describe(error)}"
        )

    def _run_once(self, batch: Batch, members: tuple[int, ...]) -> list[Part]:
        self._trying()
        if self._calls is not None:
            own = f"{self._config.name}/{self._model.version}"
            self._calls.chain = (*_waiting(batch.facts), own)
        started = time.perf_counter_ns()
        # What a model changes in place is not what a second try would have to start from.
        keep = len(members) > 1
        requests = [self._request(batch, k, keep) for k in members]
        built = time.perf_counter_ns()
        responses = _checked(self._model.execute(requests), len(requests))
        ran = time.perf_counter_ns()
        answers = [
            self._answer(response, request)
            for response, request in zip(responses, requests, strict=True)
        ]
        finished = time.perf_counter_ns()
        uncounted = sum(batch.rows[k] for k in members)
        parts = []
        for k, (outputs, failure) in zip(members, answers, strict=True):
            rows = 0
            if failure is None:
                rows, uncounted = uncounted, 0
            times = (built - started, ran - built, finished - ran)
            parts.append(Part((k,), outputs, failure, *times, run_rows=rows))
        return parts

    # --- in --------------------------------------------------------------------------------------

    def _request(self, batch: Batch, k: int, keep: bool) -> InferenceRequest:
        facts = batch.facts[k] if batch.facts else _NO_FACTS
        inputs = []
        for index, entry in enumerate(self._config.input):
            array = batch.member(index, k)
            if array is None:
                continue
            if entry.data_type == "TYPE_STRING":
                batching = self._config.max_batch_size > 0
                made = strings.decode_objects(entry, array, batch.rows[k], batching)
                inputs.append(Tensor(entry.name, made))
                continue
            joined = bool(batch.joined) and batch.joined[index] is not None
            array = array.copy() if keep and not joined else array
            datatype = from_config(entry.data_type).wire
            inputs.append(pb_tensor.from_wire(entry.name, datatype, array.shape, array))
        return self._model.request.received(
            facts.id,
            inputs,
            facts.outputs or batch.outputs,
            facts.parameters,
            self._config.name,
            self._model.version,
        )

    # --- out -------------------------------------------------------------------------------------

    def _answer(
        self, response: InferenceResponse, request: InferenceRequest
    ) -> tuple[dict[str, OutputArray], MantaError | None]:
        failure = response.error()
        if failure is not None:
            return {}, pb_faults.told(failure)
        given = {one.name(): one for one in response.output_tensors()}
        try:
            return {
                name: self._output(name, given.get(name))
                for name in request.requested_output_names()
            }, None
        except MantaError as error:
            return {}, error
        except Exception as error:  # text that is not UTF-8, a GPU that has no memory left
            faults_text = describe(error)
            if faults.is_fatal(error):
                raise
            return {}, Internal(f"an output of model '{self._config.name}': {faults_text}")

    def _output(self, name: str, found: Tensor | None) -> OutputArray:
        if found is None:
            raise Internal(f"the response of model '{self._config.name}' lacks output '{name}'")
        wanted = self._outputs[name].data_type
        if (provided := pb_tensor.config_type(found)) != wanted:
            raise InvalidArgument(
                f"configuration expects datatype {wanted} for output '{name}', "
                f"model provides {provided}"
            )
        return pb_tensor.to_output(found, wanted)


def _checked(answer: object, count: int) -> list[InferenceResponse]:
    """Raises Internal for what is no list of as many responses as there were requests."""
    rule = "execute must return a list with one pb_utils.InferenceResponse per request"
    if not isinstance(answer, (list, tuple)):
        raise Internal(f"{rule}; it returned {_named(answer)}")
    if len(answer) != count:
        raise Internal(f"{rule}; it returned {len(answer)} for {count}")
    for one in answer:
        if not isinstance(one, InferenceResponse):
            raise Internal(f"{rule}; the list holds {_named(one)}")
    return list(answer)


def _named(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _waiting(facts: Sequence[RequestFacts]) -> tuple[str, ...]:
    """The models that wait for this run: of each as many instances as wait for one of its requests.
    Two requests may come from one run of another model, so that they are not added up."""
    chains = [one.chain for one in facts if one.chain]
    longest: tuple[str, ...] = max(chains, key=len, default=())
    together = [*longest]
    for chain in chains:
        for name in dict.fromkeys(chain):
            together[:0] = [name] * (chain.count(name) - together.count(name))
    return tuple(together)
