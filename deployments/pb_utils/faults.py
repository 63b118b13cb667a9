"""TritonError and TritonModelException, and what they are in the server's own error tree."""

from __future__ import annotations

from typing import ClassVar

from deployments import errors
from deployments.errors import Code, MantaError

MAX_TEXT_BYTES = 4096


class TritonModelException(Exception):
    """What the API raises, and what a model may raise by itself."""

    def message(self) -> str:
        return str(self)


class TritonError:
    """Why there is no answer to one request. The codes count as TRITONSERVER_Error_Code does."""

    UNKNOWN: ClassVar[int] = 0
    INTERNAL: ClassVar[int] = 1
    NOT_FOUND: ClassVar[int] = 2
    INVALID_ARG: ClassVar[int] = 3
    UNAVAILABLE: ClassVar[int] = 4
    UNSUPPORTED: ClassVar[int] = 5
    ALREADY_EXISTS: ClassVar[int] = 6
    CANCELLED: ClassVar[int] = 7

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        if code not in _CLASSES:
            raise TritonModelException(f"{code!r} is not an error code of Triton's")
        self._message = str(message)
        self._code = code

    def message(self) -> str:
        return self._message

    def code(self) -> int:
        return self._code

    def __str__(self) -> str:
        return self._message


_CLASSES: dict[int, type[MantaError]] = {
    TritonError.UNKNOWN: errors.UnknownError,
    TritonError.INTERNAL: errors.Internal,
    TritonError.NOT_FOUND: errors.NotFound,
    TritonError.INVALID_ARG: errors.InvalidArgument,
    TritonError.UNAVAILABLE: errors.Unavailable,
    TritonError.UNSUPPORTED: errors.Unsupported,
    TritonError.ALREADY_EXISTS: errors.AlreadyExists,
    TritonError.CANCELLED: errors.Cancelled,
}
_NUMBERS: dict[Code, int] = {kind.code: number for number, kind in _CLASSES.items()}


def told(error: TritonError) -> MantaError:
    """As the client hears it: in the model's own words."""
    text = error.message().encode(errors="replace")[:MAX_TEXT_BYTES].decode(errors="ignore")
    return _CLASSES[error.code()](text)


def heard(error: MantaError) -> TritonError:
    """As a model hears of another model's failure."""
    return TritonError(str(error), _NUMBERS.get(error.code, TritonError.UNKNOWN))
