"""A whole server but for Ray, over real sockets: the HTTP edge on two ports, with and without lane.

Real listeners, directory and gates; a batch is answered in this process, request by request.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial

from deployments.batcher import Execution, MemberResult, Outcome
from deployments.errors import MantaError, QueueFull
from deployments.gate import Gate
from deployments.listener import HttpListener
from deployments.places import Place
from deployments.ports import PortClaim
from deployments.scheduler import policy
from deployments.statistics import Counters

from .gates import Nobody
from .serving import Server, output_array

LENGTH = "inference-header-content-length"
X = {"name": "INPUT__0", "datatype": "FP32", "shape": [1, 4]}
LINEAR = "/v2/models/linear/infer"


class OnePlace:
    """The only place where batches of a model run; the model itself is called by the gate."""

    def __init__(self):
        self.place = Place(Nobody(), lambda: None)

    def idle(self):
        return self.place if self.place.idle else None

    def ahead(self):
        return None

    def want(self):
        pass

    spare = want


class Model:
    """Answers at once, or when `held` is set. `ran` are the inputs that it has seen, and `told`
    what it was told beside them."""

    def __init__(self, config, function):
        self.config, self.function = config, function
        self.held: asyncio.Event | None = None
        self.ran: list = []
        self.told: list = []
        self.groups: list[int] = []

    async def execute(self, group, place):
        self.groups.append(len(group.members))
        place.execute(None)
        if self.held is not None:
            await self.held.wait()
        results = [self.one(entry) for entry in group.members]
        return Outcome(results, (Execution(len(results), 1, 2, 3),))

    def one(self, entry):
        self.ran.append(entry.inputs)
        self.told.append(entry.facts)
        if self.function is QueueFull:
            return QueueFull(self.config.name, 1)
        try:
            arrays = self.function(*entry.inputs)
        except MantaError as error:
            return error
        named = {
            each.name: output_array(each, array)
            for each, array in zip(self.config.output, arrays, strict=True)
            if each.name in entry.outputs
        }
        return MemberResult(named, 0, 1, 2, 3)


class LaneServer(Server):
    """`lane` and `ordinary` are the ports of one and the same application.

    `drains`: whether uvicorn itself has the sockets.
    """

    def __init__(self, drains=False, **settings):
        super().__init__(**settings)
        self.drains = drains
        self.models = {name: Model(gate.config, gate.model) for name, gate in self.gates.items()}
        self.counters = {name: Counters() for name in self.models}
        self.gates = {name: self.gate(name) for name in self.models}
        self.publish()

    def gate(self, name):
        model = self.models[name]
        rules = policy(model.config, self.settings)
        return Gate(name, rules, model.execute, OnePlace(), self.counters[name])

    async def __aenter__(self):
        """The listeners' own protocols on plain sockets: uvicorn itself takes its time to end."""
        loop = asyncio.get_running_loop()
        self.listeners, self.ports, self.clients, self.servers = {}, {}, [], []
        for road, on in (("lane", True), ("ordinary", False)):
            claim = PortClaim("127.0.0.1", 0, "test")
            settings = self.settings.model_copy(update={"http_lane": on})
            self.listeners[road] = listener = HttpListener(claim, self.http, settings)
            self.ports[road] = claim.port
            if self.drains:
                listener.start()
                await asyncio.sleep(0.05)
            else:
                self.servers.append(
                    await loop.create_server(partial(protocol, listener._server), sock=claim.socket)
                )
        return self

    async def __aexit__(self, *exc_info):
        for client in self.clients:
            client.leave()
        for server in self.servers:
            server.close()
        if self.drains:
            await asyncio.gather(*(each.drain() for each in self.listeners.values()))
        for listener in self.listeners.values():
            listener._claim.close()

    def connections(self, road="lane"):
        return list(self.listeners[road]._server.server_state.connections)

    async def connect(self, road="lane"):
        client = Client(*await asyncio.open_connection("127.0.0.1", self.ports[road]))
        self.clients.append(client)
        return client


def protocol(server):
    """One connection, as uvicorn makes it."""
    if not server.config.loaded:
        server.config.load()
    return server.config.http_protocol_class(
        config=server.config, server_state=server.server_state, app_state={}
    )


class Client:
    """One connection, byte by byte."""

    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer

    def send(self, *pieces):
        self.writer.write(b"".join(pieces))

    async def reply(self, has_body=True):
        """The next answer: its head and its body, as they came."""
        head = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 10)
        size = int(head.lower().partition(b"\r\ncontent-length: ")[2].split(b"\r\n")[0])
        return head, await asyncio.wait_for(self.reader.readexactly(size * has_body), 10)

    async def ask(self, *pieces):
        self.send(*pieces)
        return await self.reply()

    async def ended(self):
        """Whether the server closes, without another byte."""
        return await asyncio.wait_for(self.reader.read(), 10) == b""

    def leave(self):
        self.writer.transport.abort()


def run(use: Callable[[LaneServer], Awaitable[None]], **settings) -> None:
    async def main():
        async with LaneServer(**settings) as server:
            await asyncio.wait_for(use(server), 60)

    with suppress(asyncio.CancelledError):
        asyncio.run(main())


def request(body=b"", path=LINEAR, version="1.1", method="POST", **fields):
    """The bytes of one request; `fields` are written as they are named, with - for _."""
    lines = [f"{method} {path} HTTP/{version}", "host: x"]
    fields.setdefault("content_length", len(body))
    lines += [
        f"{name.replace('_', '-')}: {value}" for name, value in fields.items() if value is not None
    ]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def binary(document, *tensors, **more):
    """A request in the binary tensor form."""
    text = json.dumps(document).encode()
    fields = {"inference_header_content_length": len(text), **more}
    return request(b"".join((text, *tensors)), **fields)


def tensor(name="INPUT__0", datatype="FP32", shape=(1, 4), size=16):
    return {
        "name": name,
        "datatype": datatype,
        "shape": list(shape),
        "parameters": {"binary_data_size": size},
    }


def planned(row=b"\0" * 16, **more):
    """The request that becomes a plan when it comes a second time."""
    document = {"inputs": [tensor()], "parameters": {"binary_data_output": True}, **more}
    return binary(document, row)
