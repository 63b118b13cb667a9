"""HTTP answers as status, fields and body: what every road over HTTP tells in the same words.

Owns the form of errors, `{"error": ...}` with the status of their code, and
the fields of an infer call's answer. Writes to nobody.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from . import http_coding, http_infer
from .errors import HTTP_STATUS, Code, MantaError, ShuttingDown
from .http_body import BodyRefused, Headers
from .types import InferRequest, InferResponse

Field = tuple[bytes, bytes]

logger = logging.getLogger("manta.http")

MAX_ERROR_CHARS = 4096
JSON: Field = (b"content-type", b"application/json")
BINARY: Field = (b"content-type", b"application/octet-stream")
CLOSE: Field = (b"connection", b"close")


def answer(
    text: bytes, parts: Sequence[memoryview]
) -> tuple[list[Field], list[bytes | memoryview]]:
    """Fields and body of an infer call's answer: its JSON, and the binary parts that follow."""
    if not any(parts):
        return [JSON], [text]
    return [BINARY, (b"inference-header-content-length", b"%d" % len(text))], [text, *parts]


def coded(fields: Sequence[Field], coding: str) -> list[Field]:
    """Fields of an answer whose body has this coding; the length of its JSON stays what it was."""
    return [*fields, (b"content-encoding", coding.encode())]


async def whole(
    request: InferRequest, answered: InferResponse, coding: str
) -> tuple[list[Field], Sequence[bytes | memoryview]]:
    """Fields and body of the answer to a request that `inference` has answered; a large body gets
    its coding on a thread."""
    fields, body = answer(*http_infer.encode(request, answered))
    if not coding:
        return fields, body
    return coded(fields, coding), [await http_coding.pack(body, coding)]


def error_reply(error: Exception, headers: Headers) -> tuple[int, list[Field], bytes]:
    """Status, fields and body. What is not ours is logged here and told without detail."""
    fields = [JSON]
    if isinstance(error, BodyRefused):
        error = error.error
        fields.append(CLOSE)
    if not isinstance(error, MantaError):
        logger.error("a request failed unexpectedly", exc_info=error)
        return 500, fields, error_body("internal error")
    logger.debug("answered with %d: %s", HTTP_STATUS[error.code], error)
    if error.code is Code.UNAVAILABLE:
        fields.append((b"retry-after", b"1"))
    if isinstance(error, ShuttingDown):
        fields.append(CLOSE)
    if error.code is Code.UNSUPPORTED and b"content-encoding" in headers:
        fields.append((b"accept-encoding", http_coding.ACCEPTED))
    return HTTP_STATUS[error.code], fields, error_body(str(error))


def error_body(text: str) -> bytes:
    return http_infer.dump_json({"error": text[:MAX_ERROR_CHARS]})
