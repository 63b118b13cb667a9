"""What a client may ask of each endpoint of the HTTP route table, and what it hears, as data.

An endpoint is described once, whatever its paths; those that are refused by name describe
themselves in the table. Read by `openapi`, which makes the document; a test holds this and the
table together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

# Schemas of `openapi_schemas` by content type; "" is a body that no schema describes.
Content: TypeAlias = Mapping[str, str]

EMPTY: Content = {}
JSON = ("application/json",)
BINARY = "application/octet-stream"


@dataclass(frozen=True, slots=True)
class Operation:
    """`answers` are the statuses that are no error, `errors` those with a text, in JSON and in what
    `errors_as` has beside it; what any endpoint may answer is not listed. `body` is of POST,
    `headers` are the request's own.
    """

    tag: str
    summary: str
    answers: Mapping[int, Content]
    errors: tuple[int, ...] = ()
    body: Content | None = None
    body_required: bool = False
    headers: tuple[str, ...] = ()
    errors_as: tuple[str, ...] = JSON


def json(schema: str) -> Content:
    return {"application/json": schema}


# Tags are Triton's names for what may be restricted, and one for what it does not have.
TAGS: Mapping[str, str] = {
    "health": "Whether the server and its models are live and ready.",
    "metadata": "What the server is, and which tensors its models take and give.",
    "inference": "Running models.",
    "shared-memory": "Regions that clients share with the server.",
    "model-config": "A model's configuration as the server uses it.",
    "model-repository": "What is loaded; loading and unloading.",
    "statistics": "What was counted since a version was loaded.",
    "trace": "Settings of traces.",
    "logging": "Settings of the log.",
    "manta": "Not of the protocol: the page, this document, and what Ray Serve's probes ask.",
}

# Errors that any endpoint may answer with: the API is restricted, the headers are too large.
COMMON = (403, 431)
# A body that cannot be read: too large, of an unknown encoding, no JSON.
_BODY = (400, 500, 501)

OPERATIONS: Mapping[str, Operation] = {
    "page": Operation(
        "manta", "A page to look at models and to try them", {200: {"text/html": ""}, 304: EMPTY}
    ),
    "openapi": Operation("manta", "This document", {200: json("OpenApi"), 304: EMPTY}),
    "server_metadata": Operation(
        "metadata", "The server's name, version and extensions", {200: json("ServerMetadata")}
    ),
    "live": Operation(
        "health", "Whether the server is live", {200: EMPTY, 400: EMPTY}, errors=(503,)
    ),
    "ready": Operation(
        "health", "Whether the server is ready", {200: EMPTY, 400: EMPTY}, errors=(503,)
    ),
    "model_metadata": Operation(
        "metadata",
        "A model's versions, inputs and outputs",
        {200: json("ModelMetadata")},
        errors=(400, 404, 503),
    ),
    "model_ready": Operation(
        "health", "Whether a model version is ready", {200: EMPTY}, errors=(400, 503)
    ),
    "model_config": Operation(
        "model-config",
        "A model's configuration, with what was filled in",
        {200: json("ModelConfig")},
        errors=(400, 404, 503),
    ),
    "statistics": Operation(
        "statistics",
        "Counts and durations of a model's versions, or of all that are ready",
        {200: json("Statistics")},
        errors=(400, 500, 503),
    ),
    "infer_elsewhere": Operation(
        "inference",
        "Run a model on the inputs of one request",
        {200: {**json("InferResponse"), BINARY: ""}},
        errors=(*_BODY, 404, 503),
        body={**json("InferRequest"), BINARY: ""},
        body_required=True,
        headers=("Inference-Header-Content-Length",),
    ),
    "generate": Operation(
        "inference",
        "Run a model on one request in plain JSON",
        {200: json("GenerateResponse")},
        errors=(*_BODY, 404, 503),
        body=json("GenerateRequest"),
        body_required=True,
    ),
    "generate_stream": Operation(
        "inference",
        "The same, with the answer as server-sent events",
        {200: {"text/event-stream": "Text"}},
        errors=(*_BODY, 404, 503),
        body=json("GenerateRequest"),
        body_required=True,
        errors_as=("text/event-stream",),
    ),
    "index": Operation(
        "model-repository",
        "Models of the repositories and the states of their versions",
        {200: json("RepositoryIndex")},
        errors=_BODY,
        body=json("RepositoryIndexRequest"),
    ),
    "load": Operation(
        "model-repository",
        "Load a model, or load it anew",
        {200: EMPTY},
        errors=(*_BODY, 503),
        body=json("RepositoryModelLoadRequest"),
    ),
    "unload": Operation(
        "model-repository",
        "Unload all versions of a model",
        {200: EMPTY},
        errors=(*_BODY, 503),
        body=json("RepositoryModelUnloadRequest"),
    ),
    "memory_status": Operation(
        "shared-memory",
        "Regions that are registered, or one of them",
        {200: json("SharedMemoryStatus")},
        errors=(400, 404, 501, 503),
    ),
    "memory_register": Operation(
        "shared-memory",
        "Register a region under a name",
        {200: EMPTY},
        errors=(*_BODY, 404, 503),
        body=json("SharedMemoryRegisterRequest"),
    ),
    "memory_unregister": Operation(
        "shared-memory", "Unregister one region, or all", {200: EMPTY}, errors=(400, 404, 501, 503)
    ),
    "logging": Operation(
        "logging",
        "Settings of the log, after the changes of the body",
        {200: json("LogSettings")},
        errors=(*_BODY, 503),
        body=json("LogSettings"),
    ),
    "trace": Operation(
        "trace",
        "Settings of traces, of all models or of one, after the changes of the body",
        {200: json("TraceSettings")},
        errors=(*_BODY, 503),
        body=json("TraceChanges"),
    ),
    "metrics": Operation(
        "manta",
        "Metrics in Prometheus's text form, as on the port of their own",
        {200: {"text/plain": "Text"}},
        errors=(404, 500, 503),
    ),
    "healthz": Operation(
        "manta", "Whether this Router is live", {200: {"text/plain": "Text"}}, errors=(503,)
    ),
    "routes": Operation("manta", "Ray Serve's applications by route", {200: json("ServeRoutes")}),
}
