"""/openapi.json: the HTTP routes, and the infer calls of what is loaded, as OpenAPI 3.1.

Puts the document together: routes from `http_routes`, what they take and answer from
`openapi_operations`, schemas from `openapi_schemas` and `openapi_settings`, models from
`inference`. Called by `http`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from urllib.parse import quote

from configs.model import ModelConfig

from . import openapi_schemas, openapi_settings
from .documents import Document, document
from .http_infer import dump_json
from .http_routes import MODEL, MODEL_ROUTES, ROUTES, UNSUPPORTED
from .inference import Inference
from .openapi_operations import COMMON, JSON, OPERATIONS, TAGS, Content, Operation, json
from .openapi_schemas import SCHEMAS, Schema, ref

# What a client sees of each status; 304 and those that are no error are plain.
STATUSES: Mapping[int, str] = {
    200: "Done.",
    304: "What the client has is what there is.",
    400: "The request is wrong, or the answer is no.",
    403: "This API is restricted, or a web page of another site asks.",
    404: "There is no such model, version or path.",
    431: "The headers are too large.",
    500: "The JSON is malformed or of the wrong type, or the model or the server failed.",
    501: "Known to the protocol, and not done by this server or for this model.",
    503: "Not now: not ready, too much to do, or about to end.",
}
_PARAMETERS: Mapping[str, Schema] = {
    "model": {"type": "string", "minLength": 1},
    "version": {"type": "string", "pattern": "^[0-9]+$"},
}
_HEADERS: Mapping[str, Schema] = {
    "Inference-Header-Content-Length": {
        "description": "Bytes of the JSON, where binary tensors follow it; 0 where the body is "
        "the one tensor of a model with one input.",
        "schema": {"type": "integer", "minimum": 0},
    },
}

# The tags of what is refused by name, by a part of its path.
_PLACES: Mapping[str, str] = {
    "/generate": "inference",
    "/logging": "logging",
    "sharedmemory": "shared-memory",
    "/repository": "model-repository",
}


@dataclass(frozen=True, slots=True)
class Loaded:
    """A version that answers."""

    name: str
    version: str
    config: ModelConfig


class OpenApi:
    """The document, made anew when what is loaded has changed."""

    def __init__(self, inference: Inference) -> None:
        self._inference = inference
        self._loaded: tuple[Loaded, ...] = ()
        self._document: Document | None = None

    def document(self) -> Document:
        loaded = tuple(Loaded(*facts) for facts in self._inference.loaded())
        if self._document is None or loaded != self._loaded:
            described = dump_json(describe(self._inference, loaded))
            self._loaded, self._document = loaded, document(described, b"application/json")
        return self._document


def describe(inference: Inference, loaded: Iterable[Loaded]) -> Schema:
    server = inference.server_metadata()
    paths: dict[str, Schema] = {}
    for method, path, operation in routes():
        item = paths.setdefault(path, _item(path))
        item[method.lower()] = _operation(_id(method, path), method, path, operation)
    schemas = {**SCHEMAS, **openapi_settings.SCHEMAS}
    for operation_id, path, operation in _models(inference, loaded, schemas):
        paths[path] = {"post": _operation(operation_id, "POST", path, operation)}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": f"Manta ({server['name']})",
            "version": server["version"],
            "description": "Triton's HTTP protocol, with the infer calls of the models that are "
            "loaded. Extensions: " + ", ".join(server["extensions"]) + ".",
        },
        "tags": [{"name": name, "description": text} for name, text in TAGS.items()],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "responses": {f"Error{status}": _error(status) for status in STATUSES if status >= 400},
        },
    }


# --- routes --------------------------------------------------------------------------------------


def routes() -> Iterator[tuple[str, str, Operation]]:
    """Method, path and operation of each route of the table."""
    table = [(methods, path, OPERATIONS[name]) for methods, path, name in ROUTES]
    for methods, path, name in MODEL_ROUTES:
        table += [(methods, model + path, OPERATIONS[name]) for model in MODEL]
    table += [(methods, path, _refused(path, text)) for methods, path, text in UNSUPPORTED]
    for methods, path, operation in table:
        for method in methods.split():
            yield method, plain(path), operation


def plain(path: str) -> str:
    """Without the converters of Starlette's routes: `{rest:path}` is `{rest}`."""
    return re.sub(r":\w+}", "}", path)


def _refused(path: str, text: str) -> Operation:
    tag = next((tag for part, tag in _PLACES.items() if part in path), "manta")
    return Operation(tag, f"Refused: {text}", {}, errors=(501,))


def _item(path: str) -> Schema:
    names = re.findall(r"{(\w+)}", path)
    parameters = [
        {
            "name": name,
            "in": "path",
            "required": True,
            "schema": _PARAMETERS.get(name, {"type": "string", "minLength": 1}),
        }
        for name in names
    ]
    return {"parameters": parameters} if parameters else {}


def _operation(operation_id: str, method: str, path: str, operation: Operation) -> Schema:
    # A path with a parameter does not match every value of it.
    errors = {*COMMON, *operation.errors, *((404,) if "{" in path else ())}
    responses = {
        str(status): {"description": STATUSES[status], **_content(content)}
        for status, content in operation.answers.items()
    }
    for status in sorted(errors - set(operation.answers)):
        responses[str(status)] = _told(status, operation.errors_as)
    described: Schema = {
        "operationId": operation_id,
        "tags": [operation.tag],
        "summary": operation.summary,
        "responses": responses,
    }
    if method == "POST" and operation.body is not None:
        described["requestBody"] = {
            "required": operation.body_required,
            **_content(operation.body),
        }
    if operation.headers:
        described["parameters"] = [
            {"name": name, "in": "header", **_HEADERS[name]} for name in operation.headers
        ]
    return described


def _id(method: str, path: str) -> str:
    """`get_v2_models_model_stats`: of method and path, which are there once."""
    return "_".join([method.lower(), *re.findall(r"[\w.%-]+", path)])


def _content(content: Content) -> Schema:
    media = {kind: {"schema": ref(name)} if name else {} for kind, name in content.items()}
    return {"content": media} if media else {}


def _told(status: int, kinds: Sequence[str]) -> Schema:
    if kinds == JSON:
        return {"$ref": f"#/components/responses/Error{status}"}
    content = dict.fromkeys((*JSON, *kinds), "Error")
    return {"description": STATUSES[status], **_content(content)}


def _error(status: int) -> Schema:
    return {"description": STATUSES[status], **_content(json("Error"))}


# --- models --------------------------------------------------------------------------------------


def _models(
    inference: Inference, loaded: Iterable[Loaded], schemas: dict[str, Schema]
) -> Iterator[tuple[str, str, Operation]]:
    """Id, path and operation of the infer calls of each version that is loaded, and of the newest
    of each model; adds their schemas to `schemas`."""
    newest: dict[str, tuple[int, str, Operation]] = {}
    for each in loaded:
        metadata = inference.model_metadata(each.name, each.version)
        key = _key(each, schemas)
        inputs, outputs = metadata["inputs"], metadata["outputs"]
        schemas[f"{key}.request"] = openapi_schemas.request(each.config, inputs, outputs)
        schemas[f"{key}.response"] = openapi_schemas.response(each.name, each.version, outputs)
        operation = _infer(each, key)
        number, path = int(each.version), f"/v2/models/{quote(each.name, safe='')}"
        if path not in newest or number > newest[path][0]:
            newest[path] = (number, key, operation)
        yield f"infer.{key}", f"{path}/versions/{number}/infer", operation
    for path, (_, key, operation) in newest.items():
        yield f"infer_newest.{key}", f"{path}/infer", operation


def _key(loaded: Loaded, schemas: Mapping[str, Schema]) -> str:
    """A name for its schemas, of the few characters that such a name may have."""
    stem = re.sub(r"[^A-Za-z0-9._-]", "_", f"{loaded.name}.{loaded.version}")
    key, count = stem, 1
    while f"{key}.request" in schemas or f"{key}.response" in schemas:
        count += 1
        key = f"{stem}.{count}"
    return key


def _infer(loaded: Loaded, key: str) -> Operation:
    general = OPERATIONS["infer_elsewhere"]
    return replace(
        general,
        summary=f"Run {loaded.name}, version {loaded.version}",
        answers={200: {**general.answers[200], **json(f"{key}.response")}},
        body={**(general.body or {}), **json(f"{key}.request")},
    )
