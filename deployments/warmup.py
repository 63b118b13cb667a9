"""Warmup: the samples of `model_warmup` as requests, run on an instance before it is reported.

Owns the samples' data, in which batches and how often they run, and what a failure says. Clients'
statistics never see these runs: Routers count, and none is asked. Called by `replica.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from configs import dtypes, warmup
from configs.complete import RuntimeKind
from configs.errors import ConfigError
from configs.model import ModelConfig, ModelWarmup, WarmupInput

from .contract import Contract, Work
from .errors import MantaError
from .types import Array, Batch, BatchReply, InferRequest, RequestFacts, Tensor

logger = logging.getLogger("ray.serve")  # Serve writes this one to the replica's log file

# TorchScript's profiling executor only watches the first run with a shape and optimises in the
# next, so that the third is the first at full speed.
LEAST_RUNS: dict[RuntimeKind, int] = {"torchscript": 3}


class Warmed(Protocol):
    """What runs a batch as part of its load: an instance."""

    name: str

    def warm(self, batch: Batch) -> BatchReply: ...


@dataclass(frozen=True, slots=True)
class Sample:
    """One row as an admitted request; each of `sizes` is how many of it make a batch. `facts` are
    for a model that is handed whole requests."""

    name: str
    row: Work
    facts: tuple[RequestFacts, ...]
    sizes: tuple[int, ...]
    runs: int


def prepare(
    config: ModelConfig, kind: RuntimeKind, find: Callable[[str], Path]
) -> tuple[Sample, ...]:
    """The samples that run. `find`: a path in the model's folder -> where it is on this node.

    Raises ConfigError for a file that is too short, and for a sample that is no request.
    """
    for sample in config.model_warmup:
        if not sample.batch_size:
            logger.info("Skipping batch 0 warmup sample '%s'", sample.name)
    contract = Contract(config.name, config)
    return tuple(_sample(config, kind, contract, one, find) for _, one in warmup.samples(config))


def run(instance: Warmed, samples: tuple[Sample, ...], model: str) -> None:
    """Blocks until all have run; raises ConfigError for the first that fails."""
    for sample in samples:
        logger.info(
            "model '%s', instance '%s' is running warmup sample '%s' (batch size %s, %d x each)",
            model,
            instance.name,
            sample.name,
            ", ".join(map(str, sample.sizes)),
            sample.runs,
        )
        for size in sample.sizes:
            for _ in range(sample.runs):
                for part in instance.warm(_batch(sample, size)).parts:
                    if part.error is not None:
                        raise failed(sample.name, f"{part.error}; batch size {size}")


def failed(name: str, reason: str) -> ConfigError:
    return ConfigError(f"failed to run warmup sample '{name}': {reason}")


def _sample(
    config: ModelConfig,
    kind: RuntimeKind,
    contract: Contract,
    sample: ModelWarmup,
    find: Callable[[str], Path],
) -> Sample:
    random = np.random.default_rng(0)  # the same data at each load, on each node
    batch = (1,) if config.max_batch_size else ()
    tensors = tuple(
        Tensor(
            name=name,
            datatype=dtypes.from_config(given.data_type).wire,
            shape=(*batch, *given.dims),
            data=data(name, given, (*batch, *given.dims), random, find),
        )
        for name, given in sample.inputs.items()
    )
    try:
        row = contract.admit(InferRequest(config.name, "", "", tensors))
    except MantaError as error:
        raise failed(sample.name, str(error)) from None
    dynamic = config.dynamic_batching
    preferred = dynamic.preferred_batch_size if dynamic and config.max_batch_size else ()
    sizes = tuple(dict.fromkeys((sample.batch_size, *sorted(preferred))))
    facts = (RequestFacts(outputs=row.outputs),) if kind == "python" else ()
    return Sample(sample.name, row, facts, sizes, max(sample.count, LEAST_RUNS.get(kind, 1)))


def _batch(sample: Sample, size: int) -> Batch:
    """Each member with arrays of its own, as requests have them: a model may write to its input."""
    row = sample.row
    inputs = tuple(
        tuple(None if array is None else array.copy() for _ in range(size)) for array in row.inputs
    )
    return Batch((row.rows,) * size, inputs, row.outputs, facts=sample.facts * size)


# --- a sample's data -----------------------------------------------------------------------------


def data(
    name: str,
    given: WarmupInput,
    shape: tuple[int, ...],
    random: np.random.Generator,
    find: Callable[[str], Path],
) -> Array:
    """One row in the form that a request has: BYTES flat and in wire form."""
    kind = dtypes.from_config(given.data_type)
    if given.input_data_file is not None:
        return _read(name, given, shape, find(f"{warmup.FOLDER}/{given.input_data_file}"))
    if kind.numpy is None:  # empty strings, also for random_data, as in Triton
        return np.zeros(4 * int(np.prod(shape)), np.uint8)
    dtype = np.dtype(kind.numpy)
    if given.random_data is None:
        return np.zeros(shape, dtype)
    if kind.wire == "BF16":
        bits: Array = random.random(shape, np.float32).view(np.uint32) >> 16
        return bits.astype(dtype)
    if dtype.kind == "f":
        return random.random(shape, np.float32).astype(dtype)
    # Numbers that an index into any table may be: one out of range would fail the load.
    return random.integers(0, 2, shape).astype(dtype)


def _read(name: str, given: WarmupInput, shape: tuple[int, ...], path: Path) -> Array:
    expected = warmup.size_bytes(given)
    kind = dtypes.from_config(given.data_type)
    raw = np.fromfile(path, np.uint8, count=-1 if kind.numpy is None else expected)
    if kind.numpy is None:
        return raw
    if raw.size < expected:  # it was changed since the configuration was read
        raise ConfigError(warmup.too_short(name, given, raw.size))
    if path.stat().st_size > expected:
        logger.warning(
            "warmup input '%s': %s has %d bytes, of which the first %d are one row and are used",
            name,
            given.input_data_file,
            path.stat().st_size,
            expected,
        )
    return raw.view(np.dtype(kind.numpy)).reshape(shape)
