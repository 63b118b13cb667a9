"""pb_utils.Tensor: a named array, or a torch tensor on whatever device, and the way between them.

Owns DLPack and the wire form of both directions. Made by models and by `execution_by_request`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from configs.dtypes import DATATYPES
from deployments import tensors
from deployments.errors import InvalidArgument
from deployments.types import Array, OutputArray
from deployments.types import Tensor as WireTensor

from .datatypes import BF16, BYTES, NUMBERS, WIRE, numpy_to_triton_type
from .faults import TritonModelException

_TORCH_NUMBERS = {f"torch.{one.torch}": NUMBERS[one.config] for one in DATATYPES if one.torch}


class Tensor:
    """Immutable but for its elements. Arrays are C-contiguous; BYTES are arrays of objects."""

    __slots__ = ("_array", "_name", "_number", "_torch")

    def __init__(self, name: str, numpy_array: npt.NDArray[Any]) -> None:
        if not isinstance(numpy_array, np.ndarray):
            kind = type(numpy_array).__name__
            raise TritonModelException(
                f"tensor '{name}' must be made of a numpy array and not of {kind}; what has "
                "__dlpack__ goes through Tensor.from_dlpack"
            )
        number = numpy_to_triton_type(numpy_array.dtype)
        if number is None:
            raise TritonModelException(
                f"tensor '{name}' has elements of numpy type {numpy_array.dtype}, which is not "
                "supported; use np.object_ for strings and bytes"
            )
        self._name = name
        self._number = number
        self._array: Array | None = _tidy(numpy_array, number)
        self._torch: Any = None

    @classmethod
    def _of_torch(cls, name: str, value: Any) -> Tensor:
        number = _TORCH_NUMBERS.get(str(value.dtype))
        if number is None:
            raise TritonModelException(f"tensor '{name}': {value.dtype} is none of Triton's types")
        if not value.is_contiguous():
            raise TritonModelException(
                f"tensor '{name}' is not contiguous; only tensors that lie in C order are supported"
            )
        made = cls.__new__(cls)
        made._name, made._number = name, number
        made._array, made._torch = None, value
        return made

    # --- what models ask -------------------------------------------------------------------------

    def name(self) -> str:
        return self._name

    def triton_dtype(self) -> int:
        """The number of the datatype; see triton_to_numpy_type."""
        return self._number

    def shape(self) -> list[int]:
        return list(self._torch.shape if self._array is None else self._array.shape)

    def is_cpu(self) -> bool:
        return self._array is not None or bool(self._torch.device.type == "cpu")

    def as_numpy(self) -> npt.NDArray[Any]:
        """The elements, not copied. Raises TritonModelException for a GPU's, and for BF16."""
        if self._array is None:
            if self._number == BF16:
                raise TritonModelException(
                    f"tensor '{self._name}' is BF16, which numpy has not; use to_dlpack"
                )
            if not self.is_cpu():
                raise TritonModelException(
                    f"tensor '{self._name}' is in GPU memory and has no numpy form; use to_dlpack"
                )
            self._array = self._torch.detach().numpy()
        return self._array

    # --- DLPack ----------------------------------------------------------------------------------

    @staticmethod
    def from_dlpack(name: str, tensor: Any) -> Tensor:
        """From a DLPack capsule, or from anything that has __dlpack__; not copied."""
        import torch

        if isinstance(tensor, torch.Tensor):
            return Tensor._of_torch(name, tensor.detach())
        try:
            return Tensor._of_torch(name, torch.utils.dlpack.from_dlpack(tensor))
        except (RuntimeError, TypeError, AttributeError, BufferError) as error:
            raise TritonModelException(f"tensor '{name}' is no DLPack tensor: {error}") from error

    def to_dlpack(self) -> Any:
        """A capsule, for the from_dlpack of another library; not copied."""
        import torch

        return torch.utils.dlpack.to_dlpack(self._as_torch())  # type: ignore[attr-defined]

    def __dlpack__(self, **options: Any) -> Any:
        return self._as_torch().__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._as_torch().__dlpack_device__()

    def _as_torch(self) -> Any:
        import torch

        if self._number == BYTES:
            raise TritonModelException(f"tensor '{self._name}' is BYTES, which DLPack has not")
        if self._torch is None:
            assert self._array is not None
            if not self._array.flags.writeable:
                self._array = self._array.copy()
            self._torch = torch.from_numpy(self._array)
        return self._torch

    def to_device(self, device: str) -> Tensor:
        """A copy on `device` (torch's word for it); this one where it is there already."""
        if self._number == BYTES:
            return self
        moved = self._as_torch().to(device)
        return self if moved is self._torch else Tensor._of_torch(self._name, moved)


def _tidy(array: npt.NDArray[Any], number: int) -> Array:
    if number == BYTES:
        return array.astype(np.object_) if array.dtype.type is np.bytes_ else array
    native = array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
    return np.ascontiguousarray(native).reshape(array.shape)


# --- as the server carries it --------------------------------------------------------------------


def from_wire(name: str, datatype: str, shape: tuple[int, ...], data: Array) -> Tensor:
    """`data` as in types.Tensor; copied only where it could not be written to."""
    if datatype == "BYTES":
        made = np.empty(shape, np.object_)
        made.reshape(-1)[:] = tensors.decode_bytes(name, data)
        return Tensor(name, made)
    whole = data if data.flags.writeable and data.flags.aligned else data.copy()
    if datatype == "BF16":
        import torch

        carried = torch.from_numpy(np.ascontiguousarray(whole).view(np.int16).reshape(shape))
        return Tensor._of_torch(name, carried.view(torch.bfloat16))
    return Tensor(name, whole.reshape(shape))


def to_output(tensor: Tensor, data_type: str) -> OutputArray:
    """As host memory that nobody else writes to; `data_type` is the configuration's, and its own.

    The model may keep what it has returned and change it in its next run.
    """
    if not tensor.shape():
        raise InvalidArgument(f"output '{tensor.name()}' is a scalar, which is not supported")
    if data_type == "TYPE_STRING":
        return _strings(tensor)
    return OutputArray(_host(tensor).copy())


def to_wire(tensor: Tensor) -> WireTensor:
    """As an input of a request to another model; not copied where it is in host memory."""
    datatype, shape = WIRE[tensor.triton_dtype()], tuple(tensor.shape())
    if datatype == "BYTES":
        return WireTensor(tensor.name(), datatype, shape, _strings(tensor).data)
    return WireTensor(tensor.name(), datatype, shape, _host(tensor))


def _host(tensor: Tensor) -> Array:
    if tensor.triton_dtype() != BF16:
        return tensor.as_numpy() if tensor.is_cpu() else tensor.to_device("cpu").as_numpy()
    import torch

    carried: Array = tensor._as_torch().cpu().view(torch.int16).numpy().view(np.uint16)
    return carried


def _strings(tensor: Tensor) -> OutputArray:
    elements = tensor.as_numpy().ravel().tolist()
    encoded = [one if isinstance(one, bytes) else str(one).encode() for one in elements]
    offsets = np.zeros(len(encoded) + 1, np.int64)
    np.cumsum([len(one) + 4 for one in encoded], out=offsets[1:])
    shape = tuple(tensor.shape())
    return OutputArray(tensors.encode_bytes(encoded), offsets, None if len(shape) == 1 else shape)


def config_type(tensor: Tensor) -> str:
    """`TYPE_FP32` and the like."""
    number = tensor.triton_dtype()
    return next(one.config for one in DATATYPES if NUMBERS[one.config] == number)
