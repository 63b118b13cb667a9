"""A whole server but for Ray, over real sockets: gRPC on two ports, with and without the lane.

A real HAProxy, lane and grpc.aio over one and the same directory and gates.
"""

from __future__ import annotations

import asyncio
import gc
from functools import partial

import grpc
import pytest

from deployments.grpc_lane import PATH
from deployments.grpc_listener import GrpcListener
from deployments.grpc_services import GrpcServicer, add_services
from deployments.haproxy import HaproxyFailed, find_binary
from deployments.ports import PortClaim

from .lanes import LaneServer

ROADS = ("lane", "ordinary")
UNLIMITED = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
]


def no_haproxy() -> str:
    try:
        find_binary()
    except HaproxyFailed as error:
        return str(error)
    return ""


needs_haproxy = pytest.mark.skipif(bool(no_haproxy()), reason=f"no HAProxy here: {no_haproxy()}")


class Twins(LaneServer):
    """`lane` and `ordinary` are the ports of one and the same server."""

    def __init__(self, port=0, **settings):
        super().__init__(**settings)
        self.port = port  # the lane's

    async def __aenter__(self):
        self.servicer = GrpcServicer(self.inference)
        self.edges: dict[str, GrpcListener] = {}
        self.ports, self.channels = {}, {}
        for road in ROADS:
            claim = PortClaim("127.0.0.1", self.port if road == "lane" else 0, "test")
            settings = self.settings.model_copy(update={"grpc_lane": road == "lane"})
            self.edges[road] = listener = GrpcListener(
                claim, partial(add_services, self.servicer), settings, self.inference
            )
            self.ports[road] = claim.port
            await listener.start()
            assert listener.has_lane == (road == "lane")
            self.channels[road] = self.channel(road)
        return self

    async def __aexit__(self, *exc_info):
        for channel in self.channels.values():
            await channel.close()
        gc.collect()  # errors hold their call in a cycle, and it holds the connection
        for listener in self.edges.values():
            await listener.drain()

    def address(self, road="lane"):
        return f"127.0.0.1:{self.ports[road]}"

    def channel(self, road="lane", **options):
        more = [(f"grpc.{name}", value) for name, value in options.items()]
        return grpc.aio.insecure_channel(self.address(road), options=[*UNLIMITED, *more])

    async def call(self, road, message, **more):
        """What comes back for a message's bytes: status, details, the answer's bytes, metadata."""
        call = self.channels[road].unary_unary(PATH)(message, **more)
        try:
            reply = await asyncio.wait_for(call, 30)
        except grpc.aio.AioRpcError as error:
            trailing = tuple(error.trailing_metadata() or ())
            return error.code().name, error.details(), b"", trailing
        return "OK", await call.details(), reply, tuple(await call.trailing_metadata())

    async def same(self, message, times=1, **more):
        """Both roads' answer, which must be one and the same each time."""
        first = await self.call("ordinary", message, **more)
        for _ in range(times):
            assert await self.call("lane", message, **more) == first
        return first


def run(use, **settings):
    settings = {"exit_timeout_s": 5, **settings}

    async def main():
        async with Twins(**settings) as server:
            await asyncio.wait_for(use(server), 120)

    asyncio.run(main())
