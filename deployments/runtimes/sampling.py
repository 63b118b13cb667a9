"""What a TorchScript model offers: names from `forward`, the rest from a run on a sample.

Owns which sample is taken and what its run tells of datatypes, dims and batches. The model that is
run here is thrown away, so that one with state starts anew. Called by `autocomplete.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from configs.errors import ConfigError
from configs.model import ModelConfig, ModelInput
from configs.offer import Offer, Offered
from deployments.repository import SAMPLE
from deployments.signature import Binding, Signature, bind_inputs
from deployments.structure import canonical

from . import Value, faults, place, sample, schema, torchscript
from .arrangement import Arrangement
from .leaves import BY_TORCH
from .outputs import is_strings

Result = tuple[str, Value]


def offer(path: Path, config: ModelConfig, device: str, kind: str) -> Offer:
    """Raises ConfigError where there is no sample, or the model does not run on it."""
    where = place(path, config)
    module, inputs_at = torchscript.read(path, config.name, device, kind, where)
    signature = schema.describe(module, config.name, schema.named_fields(path))
    failure: ConfigError | None = None
    for values, source in _samples(path, config, signature):
        try:
            return _try(module, inputs_at, signature, config, values, source)
        except ConfigError as error:
            failure = failure or error
    if failure is not None:
        raise failure
    takes = ", ".join(f"{one.name} ({one.structure.text})" for one in signature.called.arguments)
    raise ConfigError(
        f"forward takes {takes}, and TorchScript does not tell datatypes and dims: write them in "
        f"config.pbtxt, or put a sample of the inputs beside it as {SAMPLE} (numpy.savez)",
        file=where,
    )


def _try(
    module: Any,
    inputs_at: torch.device,
    signature: Signature,
    config: ModelConfig,
    values: Mapping[str, Value],
    source: str,
) -> Offer:
    """What one sample tells; raises ConfigError where the model does not run on it."""
    inputs = tuple(ModelInput(name=name, data_type=_type(value)) for name, value in values.items())
    probe = config.model_copy(update={"input": inputs, "output": ()})
    try:
        slots = bind_inputs(probe, signature)
        arrange = Arrangement(probe, Binding(slots, ()), signature.called)
    except ConfigError as error:
        raise ConfigError(error.reason, file=source) from None

    def run(given: Sequence[Value]) -> list[Result]:
        moved = [v.to(inputs_at) if isinstance(v, torch.Tensor) else v for v in given]
        with torch.no_grad():
            if signature.dict_input:
                return list(_results(module(dict(zip(values, moved, strict=True)))))
            arguments, _ = arrange.pack(moved)
            return list(_results(module(*arguments)))

    given = list(values.values())
    try:
        found = run(given)
    except RuntimeError as error:
        if faults.is_fatal(error):
            raise
        text = f"the model does not run on it: {faults.clean_text(error)}"
        raise ConfigError(text, file=source) from error
    batching = _takes_batches(run, given, found)
    return Offer(
        inputs=tuple(
            _offered((name, slot.name, f"INPUT__{slot.position}"), value, batching)
            for (name, value), slot in zip(values.items(), slots, strict=True)
        ),
        outputs=tuple(_offered((name,), value, batching) for name, value in _named(found)),
        batching=batching or None,
        by_order=True,
    )


def _samples(
    path: Path, config: ModelConfig, signature: Signature
) -> Iterator[tuple[Mapping[str, Value], str]]:
    """Values by input name, and what errors call their source: the file, or else what the
    configuration says. Where that does not say whether there are batches, both ways."""
    where = place(path, config)
    found = sample.read(path, config)
    if found is not None:
        source, arrays = found
        arguments = [one.name for one in signature.called.arguments]
        yield sample.named(arrays, arguments, source), source
        return
    for batched in (True, False) if config.open_batch else (config.max_batch_size > 0,):
        warm = sample.from_warmup(config, path, batched)
        if warm is not None:
            yield warm, f"{where} on the sample of model_warmup"
        elif (zeros := sample.from_config(config, batched)) is not None:
            yield zeros, f"{where} on zeros as its inputs are configured"


def _results(result: Any, at: tuple[str | int, ...] = ("RESULT",)) -> Iterator[Result]:
    """What a configuration can name of a result, by its way there."""
    if isinstance(result, torch.Tensor) or (is_strings(result) and result):
        yield canonical(at), result
    elif isinstance(result, Mapping):
        for key, item in result.items():
            yield from _results(item, (*at, key))
    elif isinstance(result, tuple | list):
        for index, item in enumerate(result):
            yield from _results(item, (*at, index))


def _named(found: Sequence[Result]) -> list[Result]:
    """By number, as TorchScript's outputs are called in Triton, where each is one of the tuple."""
    places = [f"RESULT[{index}]" for index in range(len(found))]
    if [name for name, _ in found] in (["RESULT"], places):
        return [(f"OUTPUT__{index}", value) for index, (_, value) in enumerate(found)]
    return list(found)


def _takes_batches(run: Any, given: Sequence[Value], found: Sequence[Result]) -> bool:
    """Whether rows may be put together: two of the sample one after the other give the answers of
    one, and as many rows more."""
    rows = {_rows(value) for value in (*given, *(value for _, value in found))}
    if len(rows) != 1 or not all(rows):
        return False
    (count,) = rows
    try:
        both = run([_twice(value) for value in given])
    except RuntimeError as error:
        if faults.is_fatal(error):
            raise
        return False
    if [name for name, _ in both] != [name for name, _ in found]:
        return False
    return all(
        _rows(value) == 2 * count and _same(value[:count], alone)
        for (_, value), (_, alone) in zip(both, found, strict=True)
    )


def _rows(value: Value) -> int:
    if isinstance(value, torch.Tensor):
        return value.shape[0] if value.dim() else 0
    return len(value)


def _twice(value: Value) -> Value:
    """The rows, and behind them the same in another order: a model that mixes rows shows it."""
    if isinstance(value, torch.Tensor):
        return torch.cat([value, value.flip(0)])
    return [*value, *reversed(value)]


def _same(one: Value, other: Value) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.shape != other.shape or one.dtype != other.dtype:
            return False
        return bool(torch.allclose(one.double(), other.double(), 1e-3, 1e-4, equal_nan=True))
    return one == other


def _offered(names: tuple[str, ...], value: Value, batching: bool) -> Offered:
    if not isinstance(value, torch.Tensor):  # one string a row, or any number of them
        return Offered(names, "TYPE_STRING", (-1,), batching)
    shape = tuple(value.shape)
    return Offered(names, _type(value), (-1, *shape[1:]) if batching else shape, batching)


def _type(value: Value) -> str:
    if not isinstance(value, torch.Tensor):
        return "TYPE_STRING"
    return BY_TORCH.get(str(value.dtype).removeprefix("torch."), "TYPE_INVALID")
