"""The torch half of tensors: members' arrays in, one batch tensor; model outputs out, host arrays.

Owns datatypes and copies; strings are `strings`. Runs on the instance's
thread; does not know batches' fate, only values. Called by `execution`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from configs import dtypes
from configs.dtypes import DataType
from configs.model import ModelInput, ModelOutput
from deployments.errors import ExecutionFailed, InvalidArgument
from deployments.types import Array, OutputArray

from . import strings

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


# --- outputs -------------------------------------------------------------------------------------


def check_output(output: ModelOutput, value: object) -> None:
    """Raises InvalidArgument or ExecutionFailed; the shape is the model's own affair."""
    if not isinstance(value, torch.Tensor) and strings.is_text(value):
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


def read_output(output: ModelOutput, value: object) -> OutputArray:
    """A checked value as host memory that nobody else writes to."""
    if not isinstance(value, torch.Tensor):
        return strings.encode(output.name, value)
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
