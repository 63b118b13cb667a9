"""The torch half of tensors: members' arrays in, one batch tensor; model outputs out, host arrays.

Owns datatypes, copies and the BYTES wire form as models see it (spec/backend.md §2.8, §4, §7).
Runs on the instance's thread; does not know batches' fate, only values. Called by `instance.py`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from configs import dtypes
from configs.dtypes import DataType
from configs.model import ModelInput, ModelOutput
from deployments.errors import ExecutionFailed, InvalidArgument
from deployments.types import Array, OutputArray

_LENGTH = struct.Struct("<I")
_TORCH_TYPES: dict[torch.dtype, DataType] = {
    getattr(torch, datatype.torch): datatype
    for datatype in dtypes.DATATYPES
    if datatype.torch is not None
}


class _Writable:
    """Read-only memory in a form that torch takes without a warning: the model must not write.

    numpy keeps this object, and so the array, alive for as long as a tensor looks at it.
    """

    def __init__(self, array: Array) -> None:
        self._array = array
        self.__array_interface__ = {
            **array.__array_interface__,
            "data": (array.__array_interface__["data"][0], False),
        }


# --- inputs --------------------------------------------------------------------------------------


def build_tensor(tensor: ModelInput, arrays: Sequence[Array], device: torch.device) -> torch.Tensor:
    """The members' rows in order. One aligned member on the host is not copied."""
    datatype = dtypes.from_config(tensor.data_type)
    wanted = np.dtype(str(datatype.numpy))
    for array in arrays:
        if array.dtype != wanted:
            raise InvalidArgument(
                f"input '{tensor.name}' holds {array.dtype}, and {tensor.data_type} is {wanted}"
            )
    if len(arrays) > 1:
        built = _concatenate(arrays, datatype, device)
    else:
        built = _view(np.ascontiguousarray(arrays[0]).reshape(arrays[0].shape), datatype)
    return built if device.type == "cpu" else built.to(device, non_blocking=built.is_pinned())


def _concatenate(arrays: Sequence[Array], datatype: DataType, device: torch.device) -> torch.Tensor:
    shape = (sum(array.shape[0] for array in arrays), *arrays[0].shape[1:])
    # Pinned memory lets the copy to the device run beside other work of this process.
    target = torch.empty(
        shape, dtype=getattr(torch, str(datatype.torch)), pin_memory=device.type == "cuda"
    )
    np.concatenate(arrays, out=_carrier(target))
    return target


def _view(array: Array, datatype: DataType) -> torch.Tensor:
    if not array.flags.aligned:
        array = array.copy()
    elif not array.flags.writeable:
        array = np.asarray(_Writable(array))
    if datatype.wire == "BF16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _carrier(tensor: torch.Tensor) -> Array:
    """The same memory as an array; numpy knows no BF16, which travels as uint16."""
    if tensor.dtype == torch.bfloat16:
        carried: Array = tensor.view(torch.int16).numpy().view(np.uint16)
        return carried
    plain: Array = tensor.numpy()
    return plain


def decode_strings(tensor: ModelInput, array: Array, rows: int, batching: bool) -> list[str]:
    """One member's BYTES; raises InvalidArgument, which concerns that member alone."""
    data = array.tobytes()
    strings: list[str] = []
    at = 0
    end = len(data)
    while at < end:
        if end - at < _LENGTH.size:
            raise InvalidArgument(f"incomplete string length in input '{tensor.name}'")
        (length,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        if end - at < length:
            raise InvalidArgument(f"incomplete string data in input '{tensor.name}'")
        try:
            strings.append(str(data[at : at + length], "utf-8"))
        except UnicodeDecodeError as error:
            raise InvalidArgument(
                f"element {len(strings)} of input '{tensor.name}' is not UTF-8, which is all that "
                "a PyTorch model takes as a string"
            ) from error
        at += length
    expected = _elements(tensor, rows, batching)
    if expected is not None and len(strings) != expected:
        raise InvalidArgument(
            f"unexpected number of string elements in input '{tensor.name}': "
            f"expected {expected}, got {len(strings)}"
        )
    return strings


def _elements(tensor: ModelInput, rows: int, batching: bool) -> int | None:
    count = rows if batching else 1
    for size in tensor.model_dims:
        if size < 0:
            return None
        count *= size
    return count


# --- outputs -------------------------------------------------------------------------------------


def check_output(output: ModelOutput, value: object) -> None:
    """Raises InvalidArgument or ExecutionFailed; the shape is the model's own affair (§2.8)."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        if output.data_type != "TYPE_STRING":
            raise _mismatch(output, "TYPE_STRING")
        return
    if not isinstance(value, torch.Tensor):
        raise InvalidArgument(
            f"output '{output.name}' must be of type Tensor or List[str], "
            f"the model returned {type(value).__name__}"
        )
    provided = _TORCH_TYPES.get(value.dtype)
    if provided is None or provided.config != output.data_type:
        name = str(value.dtype).removeprefix("torch.")
        raise _mismatch(output, provided.config if provided else f"TYPE_INVALID ({name})")
    if value.dim() == 0:
        raise InvalidArgument(f"output '{output.name}' is a scalar, which is not supported")
    if value.layout != torch.strided:
        raise ExecutionFailed(f"output '{output.name}' is sparse, which is not supported")


def _mismatch(output: ModelOutput, provided: str) -> InvalidArgument:
    return InvalidArgument(
        f"configuration expects datatype {output.data_type} for output '{output.name}', "
        f"model provides {provided}"
    )


def read_output(value: object) -> OutputArray:
    """A checked value as host memory that nobody else writes to."""
    if isinstance(value, list):
        return encode_strings(value)
    assert isinstance(value, torch.Tensor)
    fresh = value.device.type == "cpu" and _is_fresh(value)
    tensor = value.detach().resolve_conj().resolve_neg()
    if tensor.device.type != "cpu":
        tensor = tensor.contiguous().cpu()
    elif not tensor.is_contiguous() or not fresh:
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    return OutputArray(_carrier(tensor))


def _is_fresh(tensor: torch.Tensor) -> bool:
    """Whether only the caller holds this tensor and its memory: a model may return a buffer that
    its next run changes, while this answer is still on its way."""
    try:
        held: Any = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
        uses: Any = tensor._use_count()  # type: ignore[attr-defined]
    except (AttributeError, RuntimeError):
        return False
    return bool(uses == 1 and held <= 2)  # 2: the tensor's and that of the look itself


def encode_strings(strings: Sequence[str]) -> OutputArray:
    try:
        encoded = [text.encode("utf-8") for text in strings]
    except UnicodeEncodeError as error:
        raise ExecutionFailed("the model returned a string that is not UTF-8") from error
    offsets = np.zeros(len(encoded) + 1, np.int64)
    np.cumsum([len(data) + _LENGTH.size for data in encoded], out=offsets[1:])
    wire = b"".join(part for data in encoded for part in (_LENGTH.pack(len(data)), data))
    return OutputArray(np.frombuffer(wire, np.uint8), offsets)
