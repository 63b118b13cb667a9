"""Every error that a client can see, and the two tables that give it a status.

MantaError
├── InvalidArgument      the request is wrong; sending it again will not help
├── NotFound             UnknownModel, UnknownVersion, NoAvailableVersion
├── Unavailable          NotReady, NoReplica, QueueFull, QueueTimeout, NoActiveInstance,
│                        ReplicaLost, ShuttingDown, ControlDisabled
├── Unsupported          known to the protocol, not done here
├── Internal             LoadFailed, ExecutionFailed; also malformed JSON, as Triton has it
├── AlreadyExists
├── Cancelled
├── Restricted           a header that the operator wants is not there
├── MethodNotAllowed     HTTP only
├── ForeignOrigin        HTTP only: a page of another site asks
└── UnknownError

An error carries facts as its args and makes its text in __str__, so it survives pickling between
processes. Texts are Triton's.
"""

from __future__ import annotations

from enum import Enum
from typing import ClassVar


class Code(Enum):
    """Triton's error classes."""

    INVALID_ARG = "INVALID_ARG"
    NOT_FOUND = "NOT_FOUND"
    UNAVAILABLE = "UNAVAILABLE"
    UNSUPPORTED = "UNSUPPORTED"
    INTERNAL = "INTERNAL"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    CANCELLED = "CANCELLED"
    RESTRICTED = "RESTRICTED"
    METHOD_NOT_ALLOWED = "METHOD_NOT_ALLOWED"
    FORBIDDEN = "FORBIDDEN"
    UNKNOWN = "UNKNOWN"


HTTP_STATUS: dict[Code, int] = {
    Code.INVALID_ARG: 400,
    Code.NOT_FOUND: 404,
    Code.UNAVAILABLE: 503,
    Code.UNSUPPORTED: 501,
    Code.INTERNAL: 500,
    Code.ALREADY_EXISTS: 400,
    Code.CANCELLED: 400,
    Code.RESTRICTED: 403,
    Code.METHOD_NOT_ALLOWED: 405,
    Code.FORBIDDEN: 403,
    Code.UNKNOWN: 400,
}

GRPC_STATUS: dict[Code, str] = {  # names of grpc.StatusCode, so that this leaf imports no grpc
    Code.INVALID_ARG: "INVALID_ARGUMENT",
    Code.NOT_FOUND: "NOT_FOUND",
    Code.UNAVAILABLE: "UNAVAILABLE",
    Code.UNSUPPORTED: "UNIMPLEMENTED",
    Code.INTERNAL: "INTERNAL",
    Code.ALREADY_EXISTS: "ALREADY_EXISTS",
    Code.CANCELLED: "CANCELLED",
    Code.RESTRICTED: "UNAVAILABLE",
    Code.METHOD_NOT_ALLOWED: "UNIMPLEMENTED",
    Code.FORBIDDEN: "PERMISSION_DENIED",
    Code.UNKNOWN: "UNKNOWN",
}


class MantaError(Exception):
    """Base of the tree. `text` is a format string over the facts in `args`."""

    code: ClassVar[Code] = Code.UNKNOWN
    text: ClassVar[str] = "{0}"

    def __str__(self) -> str:
        return self.text.format(*self.args)


class InvalidArgument(MantaError):
    code = Code.INVALID_ARG


class NotFound(MantaError):
    code = Code.NOT_FOUND


class UnknownModel(NotFound):
    """Facts: model name."""

    text = "Request for unknown model: '{0}' is not found"


class UnknownVersion(NotFound):
    """Facts: model name, version."""

    text = "Request for unknown model: '{0}' version {1} is not found"


class NoAvailableVersion(NotFound):
    """Facts: model name."""

    text = "Request for unknown model: '{0}' has no available versions"


class Unavailable(MantaError):
    code = Code.UNAVAILABLE


class NotReady(Unavailable):
    """Facts: model name, version."""

    text = "Request for unknown model: '{0}' version {1} is not at ready state"


class NoReplica(Unavailable):
    """Facts: model name, version, why. None of its replicas loads any more."""

    text = "model '{0}' version {1} is not at ready state: {2}"


class QueueFull(Unavailable):
    """Facts: model name, limit in requests."""

    text = "Exceeds maximum queue size: {1} requests wait for model '{0}'"


class QueueTimeout(Unavailable):
    """Facts: model name."""

    text = "Request timeout expired: model '{0}' had no free instance in time"


class NoActiveInstance(Unavailable):
    """Facts: model name."""

    text = "model '{0}' has no active instances: all its instance groups are passive"


class ReplicaLost(Unavailable):
    """Facts: model name. The replica ended while it ran this request."""

    text = "The instance of model '{0}' that ran this request has ended; send the request again"


class ShuttingDown(Unavailable):
    text = "Server exiting"

    def __str__(self) -> str:
        return self.text


class ControlDisabled(Unavailable):
    text = "explicit model load / unload is not allowed if polling is enabled"

    def __str__(self) -> str:
        return self.text


class Unsupported(MantaError):
    code = Code.UNSUPPORTED


class Internal(MantaError):
    code = Code.INTERNAL


class LoadFailed(MantaError):
    """Facts: model name, the versions' reasons. A load request that did not succeed."""

    code = Code.INVALID_ARG
    text = "load failed for model '{0}': {1}"


class ExecutionFailed(Internal):
    """Facts: what the model raised, cleared of paths and tracebacks."""

    text = "PyTorch execute failure: {0}"


class AlreadyExists(MantaError):
    code = Code.ALREADY_EXISTS


class Cancelled(MantaError):
    code = Code.CANCELLED


class Restricted(MantaError):
    """Facts: the header that must come along."""

    code = Code.RESTRICTED
    text = "This API is restricted, expecting header '{0}'"


class MethodNotAllowed(MantaError):
    code = Code.METHOD_NOT_ALLOWED
    text = "Method Not Allowed"

    def __str__(self) -> str:
        return self.text


class ForeignOrigin(MantaError):
    """Facts: the Origin that the browser named."""

    code = Code.FORBIDDEN
    text = (
        "web pages of '{0}' may not change this server; open them under an address of the server, "
        "or under a name of --http-control-host"
    )


class UnknownError(MantaError):
    code = Code.UNKNOWN
