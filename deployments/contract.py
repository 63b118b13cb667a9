"""What a request to one model version must look like, and how its answer looks to the client.

Owns the checks that Triton's core makes, their texts and their order, and
reshape in both directions. Built once per version by the directory; pure, no I/O, no clock.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

from configs import dtypes
from configs.checks import PYTHON_BACKEND
from configs.model import ModelConfig, ModelInput, ModelOutput

from . import classification
from .errors import Internal, InvalidArgument, Unsupported
from .tensors import check_strings, decode_bytes, join_shape
from .types import (
    Array,
    InferRequest,
    OutputArray,
    ParameterValue,
    RequestedOutput,
    RequestFacts,
    Tensor,
)

Shape = tuple[int, ...]

_BATCH_NOTE = (
    ". NOTE: Setting a non-zero max_batch_size in the model config requires a batch dimension to "
    "be prepended to each input shape. If you want to specify the full shape including the batch "
    "dim in your input dims config, try setting max_batch_size to zero. See the model "
    "configuration docs for more info on max_batch_size."
)
# Known to the protocol, and a request that sets one would otherwise be answered as if it had not.
_NOT_YET = ("sequence_id", "sequence_start", "sequence_end", "priority", "timeout")
# What a request's parameters say to the server, and not to the model.
PROTOCOL_PARAMETERS = (*_NOT_YET, "binary_data_output")


@dataclass(frozen=True, slots=True)
class Work:
    """An admitted request in the model's view; requests with equal keys may share a batch."""

    rows: int
    key: Hashable
    inputs: tuple[Array | None, ...]
    outputs: tuple[str, ...]
    facts: RequestFacts | None = None


class Contract:
    def __init__(self, model: str, config: ModelConfig) -> None:
        self._model = model
        self._max_rows = config.max_batch_size
        self._inputs = tuple(_Input(entry) for entry in config.input)
        self._names = frozenset(entry.name for entry in config.input)
        self._outputs = {entry.name: entry for entry in config.output}
        self._all_outputs = tuple(sorted(self._outputs))
        self._required = frozenset(entry.name for entry in config.input if not entry.optional)
        self._all_required = len(self._required) == len(self._names)
        self._one_shape = self._all_required and all(
            entry.fixed or entry.ragged for entry in self._inputs
        )
        # Models of the Python backend are handed requests, and not tensors alone.
        self._tells = config.backend == PYTHON_BACKEND

    def admit(self, request: InferRequest) -> Work:
        """Raises InvalidArgument or Unsupported; what it lets through, any batch can take."""
        refuse_parameters(request.parameters)
        outputs = self._admit_outputs(request.outputs)
        tensors = self._by_name(request.inputs)
        rows = self._rows(request.inputs) if self._max_rows else 1
        arrays: tuple[Array | None, ...]
        if self._all_required:
            arrays = tuple(self._view(entry, tensors[entry.name]) for entry in self._inputs)
        else:
            arrays = self._present_views(tensors)
        facts = _facts(request, outputs) if self._tells else None
        return Work(rows, () if self._one_shape else self._key(tensors), arrays, outputs, facts)

    def answer(
        self, outputs: Iterable[str], results: Mapping[str, OutputArray]
    ) -> tuple[Tensor, ...]:
        """The outputs asked for, in the client's view, in the order that `admit` gave them."""
        return tuple(self._client_view(self._outputs[name], results[name]) for name in outputs)

    # --- what is asked ---------------------------------------------------------------------------

    def _admit_outputs(self, requested: tuple[RequestedOutput, ...]) -> tuple[str, ...]:
        if not requested:
            return self._all_outputs
        names: set[str] = set()
        for output in requested:
            if output.name in names:
                raise InvalidArgument(f"output '{output.name}' already exists in request")
            if output.name not in self._outputs:
                raise InvalidArgument(
                    f"unexpected inference output '{output.name}' for model '{self._model}'"
                )
            if output.classification:
                data_type = self._outputs[output.name].data_type
                classification.check(output, dtypes.from_config(data_type).wire)
            names.add(output.name)
        return tuple(sorted(names))

    def _by_name(self, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        tensors = {tensor.name: tensor for tensor in inputs}
        if len(tensors) != len(inputs):
            names = [tensor.name for tensor in inputs]
            twice = next(name for name in names if names.count(name) > 1)
            raise InvalidArgument(f"input '{twice}' already exists in request")
        if not self._all_required:
            self._check_required(tensors)
        elif len(tensors) != len(self._names):
            missing = [entry.name for entry in self._inputs if entry.name not in tensors]
            raise InvalidArgument(
                f"expected {len(self._names)} inputs but got {len(tensors)} inputs for model "
                f"'{self._model}'. Got input(s) {_listed(tensors)}, but missing required input(s) "
                f"{_listed(missing)}. Please provide all required input(s)."
            )
        for name in tensors:
            if name not in self._names:
                raise InvalidArgument(
                    f"unexpected inference input '{name}' for model '{self._model}'"
                )
        return tensors

    def _check_required(self, tensors: Mapping[str, Tensor]) -> None:
        names = [entry.name for entry in self._inputs]
        missing = [name for name in names if name in self._required and name not in tensors]
        if missing or len(tensors) > len(self._names):
            raise InvalidArgument(
                f"expected number of inputs between {len(self._required)} and {len(self._names)} "
                f"but got {len(tensors)} inputs for model '{self._model}'. Got input(s) "
                f"{_listed(tensors)}, but missing required input(s) {_listed(missing)}. Please "
                "provide all required input(s)."
            )

    def _rows(self, inputs: tuple[Tensor, ...]) -> int:
        rows = -1
        for tensor in inputs:
            if not tensor.shape:
                raise InvalidArgument(
                    f"input '{tensor.name}' has no shape but model requires batch dimension for "
                    f"'{self._model}'"
                )
            if rows not in (-1, tensor.shape[0]):
                raise InvalidArgument(
                    f"input '{tensor.name}' batch size does not match other inputs for "
                    f"'{self._model}'"
                )
            rows = tensor.shape[0]
        if not 1 <= rows <= self._max_rows:
            bound = f"<= {self._max_rows}" if rows > 0 else ">= 1"
            raise InvalidArgument(
                f"inference request batch-size must be {bound} for '{self._model}'"
            )
        return rows

    # --- the model's view ------------------------------------------------------------------------

    def _view(self, entry: _Input, tensor: Tensor) -> Array:
        if tensor.datatype != entry.datatype:
            raise InvalidArgument(
                f"inference input '{entry.name}' data-type is '{tensor.datatype}', but model "
                f"'{self._model}' expects '{entry.datatype}'"
            )
        shape = tensor.shape[1:] if self._max_rows else tensor.shape
        if not entry.fits(shape):
            expected = (-1, *entry.dims) if self._max_rows else entry.dims
            note = _BATCH_NOTE if self._max_rows else ""
            raise InvalidArgument(
                f"unexpected shape for input '{entry.name}' for model '{self._model}'. Expected "
                f"{_dims(expected)}, got {_dims(tensor.shape)}{note}"
            )
        if entry.datatype == "BYTES":
            count = 1
            for size in tensor.shape:
                count *= size
            check_strings(entry.name, tensor.data, count, self._model)
            if entry.carries_shape:
                return join_shape(self._model_shape(entry, tensor.shape), tensor.data)
        elif entry.reshape is not None:
            return tensor.data.reshape(self._model_shape(entry, tensor.shape))
        return tensor.data

    def _present_views(self, tensors: Mapping[str, Tensor]) -> tuple[Array | None, ...]:
        return tuple(
            self._view(entry, tensors[entry.name]) if entry.name in tensors else None
            for entry in self._inputs
        )

    def _model_shape(self, entry: _Input, shape: Shape) -> Shape:
        if entry.reshape is None:
            return shape
        skip = 1 if self._max_rows else 0
        return (*shape[:skip], *_fill(entry.reshape, entry.dims, shape[skip:]))

    def _key(self, tensors: Mapping[str, Tensor]) -> Hashable:
        skip = 1 if self._max_rows else 0
        if self._all_required:
            return tuple(
                tensors[entry.name].shape[skip:] for entry in self._inputs if not entry.ragged
            )
        # Only requests that leave out the same inputs share a batch.
        return tuple(
            None
            if entry.name not in tensors
            else ()
            if entry.ragged
            else tensors[entry.name].shape[skip:]
            for entry in self._inputs
        )

    # --- the client's view -----------------------------------------------------------------------

    def _client_view(self, output: ModelOutput, result: OutputArray) -> Tensor:
        datatype = dtypes.from_config(output.data_type).wire
        shape, data = result.data.shape, result.data
        if datatype == "BYTES":
            shape = result.shape or (_elements(output.name, result),)
        if output.reshape is None:
            return Tensor(output.name, datatype, shape, data)
        batch = shape[:1] if self._max_rows else ()
        rest = shape[len(batch) :]
        seen = (*batch, *_fill(output.dims, output.reshape.shape, rest))
        if -1 in seen or _product(seen) != _product(shape):
            raise Internal(
                f"output '{output.name}' of model '{self._model}' has shape {_dims(shape)}, which "
                f"cannot be given the configured dims {_dims(output.dims)}"
            )
        return Tensor(
            output.name, datatype, seen, data if datatype == "BYTES" else data.reshape(seen)
        )


class _Input:
    """One configured input, with what every request needs worked out once."""

    def __init__(self, entry: ModelInput) -> None:
        self.name = entry.name
        self.datatype = dtypes.from_config(entry.data_type).wire
        self.dims = entry.dims
        self.reshape = None if entry.reshape is None else entry.reshape.shape
        self.fixed = -1 not in entry.dims
        self.carries_shape = entry.carries_shape
        self.ragged = entry.allow_ragged_batch

    def fits(self, shape: Shape) -> bool:
        if self.fixed:
            return shape == self.dims
        return len(shape) == len(self.dims) and all(
            want in (-1, size) for want, size in zip(self.dims, shape, strict=True)
        )


def _facts(request: InferRequest, outputs: tuple[str, ...]) -> RequestFacts:
    own = {
        key: value for key, value in request.parameters.items() if key not in PROTOCOL_PARAMETERS
    }
    return RequestFacts(request.id, json.dumps(own) if own else "{}", outputs, request.chain)


# --- shared with the edges ------------------------------------------------------------------------


def refuse_parameters(parameters: Mapping[str, ParameterValue]) -> None:
    """Request parameters that are reserved, or asked for and not done here. Of several the same
    one is named whatever their order, which gRPC's messages do not keep."""
    if not parameters:
        return
    reserved = [key for key in parameters if key.startswith("triton_")]
    if reserved:
        raise InvalidArgument(f"parameter '{min(reserved)}' is reserved for Triton usage")
    for key in _NOT_YET:
        if parameters.get(key):
            raise Unsupported(f"request parameter '{key}' is not supported")


def _fill(target: Shape, source: Shape, sizes: Shape) -> Shape:
    """`target` with its -1s replaced, in order, by the sizes that stand where `source` has -1."""
    variable = iter([size for want, size in zip(source, sizes, strict=False) if want == -1])
    return tuple(next(variable, -1) if want == -1 else want for want in target)


def _elements(name: str, result: OutputArray) -> int:
    if result.offsets is not None:
        return len(result.offsets) - 1
    return len(decode_bytes(name, result.data))


def _product(shape: Shape) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _dims(shape: Shape) -> str:
    return "[" + ",".join(map(str, shape)) + "]"


def _listed(names: Iterable[str]) -> str:
    return "[" + ",".join(f"'{name}'" for name in names) + "]"
