"""The sample input that a model's owner may put beside it: sample_input.npz, by numpy.savez.

Owns the file's form and which array is which input; nothing of it is unpickled. Called by
`sampling.py`.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configs import dtypes, warmup
from configs.errors import ConfigError
from configs.model import ModelConfig
from deployments import archives
from deployments import warmup as warming
from deployments.repository import SAMPLE
from deployments.types import Array

from . import Value, version_folder

_LIMIT_BYTES = 1 << 30
_ROWS = 2  # of a sample that is made from what the configuration says


def read(artifact: Path, config: ModelConfig) -> tuple[str, Mapping[str, Array]] | None:
    """Its place and arrays, from the version's directory or the model's; None where neither has
    one. Raises ConfigError."""
    version = version_folder(artifact, config)
    for folder, parts in ((version, [config.name, version.name]), (version.parent, [config.name])):
        path = folder / SAMPLE
        if path.is_file():
            where = "/".join([*parts, SAMPLE])
            return where, _arrays(path, where)
    return None


def _arrays(path: Path, where: str) -> dict[str, Array]:
    if path.stat().st_size > _LIMIT_BYTES:
        raise ConfigError(f"a sample must not be larger than {_LIMIT_BYTES} bytes", file=where)
    try:
        with zipfile.ZipFile(path) as archive:  # what it inflates to is not its size
            if sum(info.file_size for info in archive.infolist()) > _LIMIT_BYTES:
                raise ValueError("it inflates beyond the limit")
        with np.load(path, allow_pickle=False) as found:
            arrays = {name: found[name] for name in found.files}
            if others := [n for n, one in arrays.items() if not isinstance(one, np.ndarray)]:
                raise ValueError(f"{others[0]} is none")
            return arrays
    except (OSError, KeyError, *archives.UNREADABLE) as error:
        raise ConfigError(
            f"this is no file of plain arrays by numpy.savez: {error}", file=where
        ) from error


def named(arrays: Mapping[str, Array], arguments: Sequence[str], where: str) -> dict[str, Value]:
    """Values by input name; arr_0, arr_1, as numpy counts what has no name, go by position."""
    ordinals = {f"arr_{place}": name for place, name in enumerate(arguments)}
    by_order = all(name in ordinals for name in arrays)
    return {
        ordinals[name] if by_order else name: value(array, where) for name, array in arrays.items()
    }


def value(array: Array, where: str = SAMPLE) -> Value:
    if array.dtype.kind in "US":
        try:
            return [one.decode() if isinstance(one, bytes) else str(one) for one in array.ravel()]
        except UnicodeDecodeError as error:
            raise ConfigError("its strings must be UTF-8", file=where) from error
    try:
        native = array.astype(array.dtype.newbyteorder("="), order="C")
        tensor: torch.Tensor = torch.from_numpy(native)
    except TypeError as error:
        raise ConfigError(f"torch has no type for {array.dtype}", file=where) from error
    return tensor


def from_warmup(config: ModelConfig, artifact: Path, batched: bool) -> dict[str, Value] | None:
    """The first sample of `model_warmup`, None where there is none of tensors."""
    model = version_folder(artifact, config).parent
    random = np.random.default_rng(0)
    for _, found in warmup.samples(config):
        values: dict[str, Value] = {}
        for name, given in found.inputs.items():
            kind = dtypes.from_config(given.data_type)
            if kind.torch is None:
                return None
            row = warming.data(name, given, given.dims, random, model.joinpath)
            rows = np.stack([row] * _ROWS) if batched else row
            tensor = torch.from_numpy(rows.view(np.int16) if kind.wire == "BF16" else rows)
            values[name] = tensor.view(getattr(torch, kind.torch))
        return values or None
    return None


def from_config(config: ModelConfig, batched: bool) -> dict[str, Value] | None:
    """Zeros as the configured inputs are, None where they do not say enough."""
    values: dict[str, Value] = {}
    for tensor in config.input:
        if tensor.data_type in ("TYPE_INVALID", "TYPE_STRING") or not tensor.dims:
            return None
        if min(tensor.model_dims, default=1) < 0:
            return None
        rows: tuple[int, ...] = (_ROWS,) if batched else ()
        dtype: Any = getattr(torch, str(dtypes.from_config(tensor.data_type).torch))
        values[tensor.name] = torch.zeros(rows + tensor.model_dims, dtype=dtype)
    return values or None
