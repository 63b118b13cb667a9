"""HTTP: the infer call beside a route table for everything else.

Translates only: bodies and paths to the verbs of `inference` and back. An
ASGI app; the listener and Serve both call it. Most infer calls never get here: see `http_lane`.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from configs import pbtxt
from configs.server import ServerSettings

from . import (
    forwarding,
    http_coding,
    http_generate,
    http_infer,
    http_replies,
    http_repository,
    http_send,
    log_settings,
    page,
    trace_settings,
)
from .documents import Document
from .errors import Internal, InvalidArgument, MethodNotAllowed, Unsupported
from .http_body import (
    ClientGone,
    Headers,
    Message,
    Receive,
    body_limit,
    fold,
    read_within,
    until_done,
)
from .http_guard import OPEN, check_origin
from .http_memory import registration
from .http_replies import CLOSE, JSON, Field, error_body, error_reply
from .http_routes import MODEL, MODEL_ROUTES, ROUTES, UNSUPPORTED
from .http_send import Send
from .inference import Inference
from .openapi import OpenApi
from .regions import Kind
from .restricted import Guard, Guards, headers
from .tracing import HTTP, carrier
from .types import InferRequest

Scope = Message
Endpoint = Callable[[Request], Awaitable[Response]]

_VERSION = re.compile(r"[0-9]+")


class HttpApp:
    """The ASGI callable. `application` is the Serve application's name, for /-/routes."""

    def __init__(
        self, inference: Inference, settings: ServerSettings, application: str = "manta"
    ) -> None:
        self.inference = inference
        self._settings = settings
        self._application = application
        self._forwarding = forwarding.forwarding(
            settings.http_header_forward_pattern, headers(settings.http_restricted_api)
        )
        self.leaving = False
        self._page = page.read()
        self._openapi = OpenApi(inference)
        self._guards = Guards(settings.http_restricted_api)
        self._infer_guard = self._guards.of("infer")
        self._router = Starlette(
            routes=list(self._routes()), exception_handlers={HTTPException: _on_http_exception}
        )
        self._router.router.redirect_slashes = False

    def leave(self) -> None:
        """Go on answering, not ready, and tell every client to close its connection."""
        self.leaving = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._router(scope, receive, send)
            return
        if self.leaving:
            send = http_send.closing(send)
        if scope["method"] == "HEAD":
            send = http_send.without_body(send)
        size = len(scope.get("raw_path") or b"") + len(scope.get("query_string") or b"")
        size += sum(len(name) + len(value) for name, value in scope["headers"])
        if size > self._settings.http_max_header_bytes:
            body = error_body(f"request headers of {size} bytes exceed the maximum allowed")
            await http_send.reply(send, 431, [JSON, CLOSE], body)
        elif scope["method"] == "POST" and (match := http_infer.PATH.fullmatch(_path(scope))):
            await self._infer(match[1], match[2] or "", scope, receive, send)
        else:
            await self._router(scope, receive, send)

    # --- the infer call --------------------------------------------------------------------------

    async def _infer(
        self, model: str, version: str, scope: Scope, receive: Receive, send: Send
    ) -> None:
        headers = fold(scope["headers"])
        try:
            status, fields, body = 200, *await self._answer(model, version, headers, scope, receive)
        except ClientGone:
            return
        except Exception as error:
            status, fields, body = error_reply(error, headers)
        await http_send.reply(send, status, fields, body)

    async def _answer(
        self, model: str, version: str, headers: Headers, scope: Scope, receive: Receive
    ) -> tuple[list[Field], bytes]:
        if self._infer_guard is not None:
            self._infer_guard.check(headers)
        served = self.inference.find(model, version)  # a 404 comes before the body
        announced = headers.get(b"inference-header-content-length")
        body = await self._body(headers, receive, announced)
        json_bytes = http_infer.header_length(announced, len(body))
        tracer = served.gate.tracer
        arrival = None if tracer is None else tracer.arrive(HTTP, carrier(headers))
        request = http_infer.decode(served.config, version, body, json_bytes, self._settings)
        request = self._with_headers(request, scope)
        ticket = self.inference.submit(request, arrival=arrival)
        if not ticket.future.done():
            await until_done(ticket.future, receive)
        coding = http_coding.of_reply(headers.get(b"accept-encoding"))
        fields, pieces = await http_replies.whole(request, self.inference.answer(ticket), coding)
        return fields, b"".join(pieces)

    async def _body(
        self, headers: Headers, receive: Receive, announced: bytes | None = None
    ) -> bytes:
        limit = body_limit(announced, self._settings)
        return await read_within(headers, receive, limit, self._settings)

    def _with_headers(self, request: InferRequest, scope: Scope) -> InferRequest:
        if self._forwarding is None:
            return request
        return forwarding.add(request, self._forwarding.of_http(forwarding.as_sent(scope)))

    # --- generate --------------------------------------------------------------------------------

    async def generate(self, request: Request) -> Response:
        return await self._generate(request, in_events=False)

    async def generate_stream(self, request: Request) -> Response:
        """A model gives one answer here, which is one event; its error is one, too."""
        return await self._generate(request, in_events=True)

    async def _generate(self, request: Request, in_events: bool) -> Response:
        name, version = _target(request)
        served = self.inference.find(name, version)
        headers = fold(request.scope["headers"])
        http_generate.check_coding(headers)
        body = await self._body(headers, request.receive)
        tracer = served.gate.tracer
        arrival = None if tracer is None else tracer.arrive(HTTP, carrier(headers))
        asked = http_generate.decode(served.config, version, body, self._settings)
        ticket = self.inference.submit(self._with_headers(asked, request.scope), arrival=arrival)
        await until_done(ticket.future, request.receive)
        try:
            status, fields = 200, [JSON]
            text = http_generate.encode(self.inference.answer(ticket))
        except Exception as error:
            status, fields, text = error_reply(error, headers)
        if in_events:
            fields = [http_generate.EVENTS, *(field for field in fields if field != JSON)]
            text = http_generate.event(text)
        return _response(status, fields, text)

    # --- every other route -----------------------------------------------------------------------

    def _routes(self) -> list[Route]:
        table = [(method, path, self._endpoint(name)) for method, path, name in ROUTES]
        table += [
            (method, model + path, self._endpoint(name))
            for method, path, name in MODEL_ROUTES
            for model in MODEL
        ]
        # What is refused in any case needs no guard but that against other sites' pages.
        table += [
            (methods, path, self._from_own_pages(_refusal(text)))
            for methods, path, text in UNSUPPORTED
        ]
        return [
            Route(path, _answering(endpoint), methods=methods.split())
            for methods, path, endpoint in table
        ]

    def _endpoint(self, name: str) -> Endpoint:
        endpoint: Endpoint = getattr(self, name)
        guard = self._guards.of(name)
        if guard is not None:
            endpoint = _guarded(endpoint, guard)
        return endpoint if name in OPEN else self._from_own_pages(endpoint)

    def _from_own_pages(self, endpoint: Endpoint) -> Endpoint:
        names = {name.lower() for name in self._settings.http_control_host}

        async def ask(request: Request) -> Response:
            if request.method == "POST":
                check_origin(fold(request.scope["headers"]), names)
            return await endpoint(request)

        return ask

    async def page(self, request: Request) -> Response:
        return _document(self._page, request)

    async def openapi(self, request: Request) -> Response:
        return _document(self._openapi.document(), request)

    async def server_metadata(self, request: Request) -> Response:
        return _json(self.inference.server_metadata())

    async def live(self, request: Request) -> Response:
        return Response(status_code=200 if self.inference.live() else 400)

    async def ready(self, request: Request) -> Response:
        ready = self.inference.ready() and not self.leaving
        return Response(status_code=200 if ready else 400)

    async def model_metadata(self, request: Request) -> Response:
        return _json(self.inference.model_metadata(*_target(request)))

    async def model_ready(self, request: Request) -> Response:
        if not self.inference.model_ready(*_target(request)):
            raise InvalidArgument("Model version not ready")
        return Response(status_code=200)

    async def model_config(self, request: Request) -> Response:
        return _json(pbtxt.to_json(self.inference.model_config(*_target(request))))

    async def statistics(self, request: Request) -> Response:
        return _json(await self.inference.administration.statistics(*_target(request)))

    async def index(self, request: Request) -> Response:
        ready = (await self._document(request)).get("ready", False)
        if not isinstance(ready, bool):
            raise InvalidArgument("Invalid value for 'ready': expected a boolean")
        return _json(await self.inference.administration.index(ready))

    async def load(self, request: Request) -> Response:
        given = await self._parameters(request)
        # Megabytes of base64 would hold up everybody else here.
        decode = http_repository.load_parameters
        parameters = await asyncio.to_thread(decode, given) if given else {}
        await self.inference.administration.load(request.path_params["model"], parameters)
        return Response(status_code=200)

    async def unload(self, request: Request) -> Response:
        parameters = await self._parameters(request)
        await self.inference.administration.unload(request.path_params["model"], parameters)
        return Response(status_code=200)

    async def memory_status(self, request: Request) -> Response:
        return _json(self.inference.memory.status(*_region(request)))

    async def memory_register(self, request: Request) -> Response:
        memory, (kind, region) = self.inference.memory, _region(request)
        if kind == "cuda":
            memory.register_cuda(region)
        memory.register(region, *registration(await self._document(request)))
        return Response(status_code=200)

    async def memory_unregister(self, request: Request) -> Response:
        self.inference.memory.unregister(*_region(request))
        return Response(status_code=200)

    async def logging(self, request: Request) -> Response:
        document = await self._document(request) if request.method == "POST" else {}
        changes = log_settings.from_json(document)
        return _json(await self.inference.administration.log_settings(changes))

    async def trace(self, request: Request) -> Response:
        document = await self._document(request) if request.method == "POST" else {}
        changes = trace_settings.from_json(document)
        model, _ = _target(request)
        return _json(await self.inference.administration.trace_settings(model, changes))

    async def metrics(self, request: Request) -> Response:
        if not self._settings.allow_metrics:
            raise HTTPException(404)
        if request.method != "GET":  # Starlette lets HEAD in with it
            raise MethodNotAllowed()
        return Response(await self.inference.administration.metrics(), media_type="text/plain")

    async def healthz(self, request: Request) -> Response:
        self.inference.live()
        return Response("success", media_type="text/plain")

    async def routes(self, request: Request) -> Response:
        return _json({"/": self._application})

    async def infer_elsewhere(self, request: Request) -> Response:
        """In the table for its 405s; a POST that gets here has a version that is no number."""
        raise HTTPException(404)

    async def _document(self, request: Request) -> dict[str, Any]:
        body = await self._body(fold(request.scope["headers"]), request.receive)
        document = http_infer.parse_json(body, self._settings.max_json_depth) if body else {}
        if not isinstance(document, dict):
            raise Internal("failed to parse the request JSON buffer: not an object")
        return document

    async def _parameters(self, request: Request) -> dict[str, Any]:
        parameters: dict[str, Any] = http_infer.member(
            await self._document(request), "parameters", dict, {}
        )
        return parameters


# --- replies -------------------------------------------------------------------------------------


def _json(document: Any) -> Response:
    return Response(http_infer.dump_json(document), media_type="application/json")


def _document(document: Document, request: Request) -> Response:
    headers = fold(request.scope["headers"])
    return _response(*document.answer(headers.get(b"if-none-match", b"")))


def _response(status: int, fields: list[Field], body: bytes) -> Response:
    return Response(body, status, {name.decode(): value.decode() for name, value in fields})


def _answering(endpoint: Endpoint) -> Endpoint:
    """The endpoint, with errors told as errors are told."""

    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except HTTPException:
            raise
        except ClientGone:
            return Response(status_code=400)  # goes nowhere
        except Exception as error:
            return _response(*error_reply(error, dict(request.scope["headers"])))

    return answer


def _guarded(endpoint: Endpoint, guard: Guard) -> Endpoint:
    async def check(request: Request) -> Response:
        guard.check(dict(request.scope["headers"]))
        return await endpoint(request)

    return check


def _refusal(text: str) -> Endpoint:
    async def refuse(request: Request) -> Response:
        raise Unsupported(text)

    return refuse


def _on_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own answers: a path or a method that the table does not have."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    texts: Mapping[int, str] = {404: "Not Found", 405: str(MethodNotAllowed())}
    return Response(
        error_body(texts.get(status, "internal error")),
        status,
        getattr(error, "headers", None),  # which verbs there are
        "application/json",
    )


def _target(request: Request) -> tuple[str, str]:
    version = request.path_params.get("version", "")
    if version and not (_VERSION.fullmatch(version)):
        raise HTTPException(404)
    return request.path_params.get("model", ""), version


def _region(request: Request) -> tuple[Kind, str]:
    """Whose memory, and the region's name; "" means all."""
    kind: Kind = "cuda" if _path(request.scope).startswith("/v2/cuda") else "system"
    return kind, request.path_params.get("region", "")


def _path(scope: Scope) -> str:
    """The path below the mount point, as Starlette sees it."""
    path: str = scope["path"]
    root: str = scope.get("root_path") or ""
    return path[len(root) :] if root and path.startswith(root + "/") else path
