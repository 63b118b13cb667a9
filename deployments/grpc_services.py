"""What the gRPC port offers: inference, health and reflection, for grpc.aio and for Serve's proxy.

Owns who may call what there, and how errors end a call. What calls mean is the business of `grpc`
and `grpc_stream`. Called by the Router, which hands it to the listener, and by Serve's proxy.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping
from contextlib import aclosing
from functools import partial
from typing import Any, Protocol

import grpc
from grpc_reflection.v1alpha import reflection

from configs.server import ServerSettings

from .errors import MantaError, ShuttingDown
from .forwarding import forwarding
from .grpc import INFER, STREAM, VERBS, add_parameters, handle, status
from .grpc_stream import Ahead, Stream
from .grpc_stubs import (
    HEALTH,
    INFERENCE,
    add_GRPCInferenceServiceServicer_to_server,
    add_health_to_server,
    health_pb2,
)
from .grpc_stubs import service_pb2 as pb
from .inference import Inference
from .restricted import METADATA_PREFIX, Guard, Guards, fields_of, headers

STREAM_PATH = f"/{INFERENCE.full_name}/{STREAM}"
CHECK = "Check"  # grpc.health.v1.Health's
# With this metadata a stream ends at its first error, with that error's status.
ERRORS_END = ("triton_grpc_error", "true")

Metadata = Any  # pairs of name and value


class GrpcServicer:
    """Has one method per RPC. Those of grpc.aio are called as the RPC is; `answer` and `stream`
    serve any carrier, once `guard` has let the call pass."""

    def __init__(self, inference: Inference) -> None:
        self.inference = inference
        self._guards = guards(inference.settings)
        self._forwarding = forwarding(
            inference.settings.grpc_header_forward_pattern,
            headers(inference.settings.grpc_restricted_protocol, METADATA_PREFIX),
        )
        self._streams: set[Stream] = set()
        self._ahead = Ahead()
        self._leaving = False
        for verb in (*VERBS, CHECK):
            setattr(self, verb, partial(self._serve, verb))

    def leave(self) -> None:
        """Streams take no more requests: what they have is answered, then they end."""
        self._leaving = True
        for stream in self._streams:
            stream.leave()

    def guard(self, verb: str) -> Guard | None:
        return self._guards.of(verb)

    async def answer(self, verb: str, request: Any, context: Any) -> Any:
        """To a single call. Raises nothing but MantaError."""
        if verb == CHECK:
            return _health(self.inference)
        self.forward(verb, request, context)
        return await handle(verb, request, self.inference, context)

    def forward(self, verb: str, request: Any, context: Any) -> None:
        """Makes parameters of the call's metadata, where the server is told to."""
        if self._forwarding is not None and verb == INFER:
            add_parameters(request, self._forwarding.of_grpc(context.invocation_metadata() or ()))

    async def stream(
        self, requests: AsyncIterator[Any], metadata: Metadata
    ) -> AsyncGenerator[Any, None]:
        """Answers to a stream's requests. To be closed whatever happens."""
        if self._leaving:
            raise ShuttingDown()
        most = self.inference.settings.grpc_max_response_pool_size
        pairs = tuple(metadata or ())
        given = None if self._forwarding is None else self._forwarding.of_grpc(pairs)
        stream = Stream(self.inference, most, ERRORS_END in pairs, given, self._ahead, pairs)
        self._streams.add(stream)
        try:
            async with aclosing(stream.answers(requests)) as answers:
                async for answer in answers:
                    yield answer
        finally:
            self._streams.discard(stream)

    # --- for grpc.aio ----------------------------------------------------------------------------

    async def _serve(self, verb: str, request: Any, context: Any) -> Any:
        try:
            return await self.answer(verb, request, context)
        except MantaError as error:
            await context.abort(*status(error))

    async def ModelStreamInfer(self, requests: Any, context: Any) -> None:
        try:
            async with aclosing(self.stream(requests, context.invocation_metadata())) as answers:
                async for answer in answers:
                    await context.write(answer)
        except MantaError as error:
            await context.abort(*status(error))


def guards(settings: ServerSettings) -> Guards:
    return Guards(settings.grpc_restricted_protocol, METADATA_PREFIX)


def add_services(servicer: GrpcServicer, server: Any) -> None:
    """All of them to a server of grpc.aio's."""
    add_GRPCInferenceServiceServicer_to_server(servicer, server)
    add_health_to_server(servicer, server)
    names = (INFERENCE.full_name, HEALTH.full_name, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)


class Gatekeeper(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc asks for its own class
    """Ends restricted calls of grpc.aio before a byte of their messages is read."""

    def __init__(self, guards: Guards) -> None:
        self._guards = guards

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        handler = await continuation(details)
        if handler is None:  # no such method
            return None
        guard = self._guards.of(details.method.rpartition("/")[2])
        if guard is not None:
            try:
                guard.check(fields_of(details.invocation_metadata))
            except MantaError as error:
                # As a stream, since it may end a call that has sent nothing.
                return grpc.stream_stream_rpc_method_handler(partial(_abort, error))
        return handler


async def _abort(error: MantaError, _requests: Any, context: Any) -> None:
    await context.abort(*status(error))


def _health(inference: Inference) -> Any:
    """Ready or not, of the whole server: the service that is asked for does not matter."""
    kinds = health_pb2.HealthCheckResponse
    try:
        ready = inference.ready()
    except ShuttingDown:
        ready = False
    return kinds(status=kinds.SERVING if ready else kinds.NOT_SERVING)


# --- for Serve's proxy ---------------------------------------------------------------------------


class Ingress(Protocol):
    """What a class needs whose methods Serve's gRPC proxy calls."""

    grpc_verbs: GrpcServicer


_REPLIES: Mapping[str, Any] = {
    **{method.name: getattr(pb, method.output_type.name) for method in INFERENCE.methods},
    CHECK: health_pb2.HealthCheckResponse,
}


def serve_proxy_method(verb: str) -> Callable[..., Coroutine[Any, Any, Any]]:
    """A method of the ingress class for Serve's proxy, which passes its own kind of context."""
    reply = _REPLIES[verb]

    async def method(ingress: Ingress, request: Any, grpc_context: Any) -> Any:
        servicer = ingress.grpc_verbs
        try:
            _check(servicer.guard(verb), grpc_context)
            return await servicer.answer(verb, request, grpc_context)
        except MantaError as error:
            # Raised, the proxy and the replica would each log it as a failure of the server.
            _tell(error, grpc_context)
            return reply()

    method.__name__ = method.__qualname__ = verb
    return method


async def serve_proxy_stream(
    ingress: Ingress, requests: Any, grpc_context: Any
) -> AsyncGenerator[Any, None]:
    """The ingress class's ModelStreamInfer: Serve's proxy fetches requests and takes answers."""
    servicer = ingress.grpc_verbs
    try:
        _check(servicer.guard(STREAM), grpc_context)
        metadata = grpc_context.invocation_metadata()
        async with aclosing(servicer.stream(requests, metadata)) as answers:
            async for answer in answers:
                yield answer
    except MantaError as error:
        _tell(error, grpc_context)
        raise  # with a stream, a status goes no other way


serve_proxy_stream.__name__ = serve_proxy_stream.__qualname__ = STREAM


def _check(guard: Guard | None, grpc_context: Any) -> None:
    if guard is not None:
        guard.check(fields_of(grpc_context.invocation_metadata()))


def _tell(error: MantaError, grpc_context: Any) -> None:
    code, text = status(error)
    grpc_context.set_code(code)
    grpc_context.set_details(text)


PROXY_METHODS: Mapping[str, Callable[..., Any]] = {
    STREAM: serve_proxy_stream,
    **{verb: serve_proxy_method(verb) for verb in (*VERBS, CHECK)},
}
