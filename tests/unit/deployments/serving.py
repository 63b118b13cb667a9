"""A whole server but for Ray: directory, inference, edges, over gates that run in this process."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import torch

from configs.dtypes import DATATYPES, from_config
from configs.model import ModelConfig, ModelInput, ModelOutput, Reshape
from configs.server import ServerSettings
from deployments.batcher import MemberResult
from deployments.directory import Directory
from deployments.errors import ExecutionFailed, MantaError, QueueFull
from deployments.http import HttpApp
from deployments.inference import Inference
from deployments.tensors import decode_bytes
from deployments.types import ModelState, OutputArray, Snapshot, Target, VersionSnapshot

torch.manual_seed(0)
LINEAR = torch.nn.Linear(4, 3)


class LocalGate:
    """Runs `model(*arrays) -> arrays` at once, or when `hold` is released."""

    def __init__(self, config, model):
        self.config, self.model = config, model
        self.submitted, self.cancelled = [], 0
        self.hold: list | None = None

    tracer = None

    def submit(self, rows, key, inputs, outputs, facts=None):
        work = SimpleNamespace(rows=rows, key=key, inputs=inputs, outputs=outputs, facts=facts)
        self.submitted.append(work)
        if self.model is QueueFull:
            raise QueueFull(self.config.name, 1)
        reply = asyncio.get_running_loop().create_future()
        reply.add_done_callback(self._ended)
        if self.hold is None:
            self._run(inputs, outputs, reply)
        else:
            self.hold.append(lambda: self._run(inputs, outputs, reply))
        return reply

    def _ended(self, reply):
        self.cancelled += reply.cancelled()

    def _run(self, inputs, outputs, reply):
        if reply.done():
            return
        try:
            results = self.model(*inputs)
        except MantaError as error:
            reply.set_exception(error)
            return
        named = {
            entry.name: output_array(entry, array)
            for entry, array in zip(self.config.output, results, strict=True)
            if entry.name in outputs
        }
        reply.set_result(MemberResult(named, 0, 0, 0, 0))


def output_array(entry, array):
    if from_config(entry.data_type).wire != "BYTES":
        return OutputArray(array)
    sizes = [0] + [len(element) + 4 for element in decode_bytes(entry.name, array)]
    return OutputArray(array, np.cumsum(sizes, dtype=np.int64))


def echo(*arrays):
    return arrays


def linear(x):
    with torch.inference_mode():
        return (LINEAR(torch.tensor(x)).numpy(),)


def add_sub(a, b):
    first, second = torch.tensor(a), torch.tensor(b)
    return (first + second).numpy(), (first - second).numpy()


def transpose(x):
    return (np.ascontiguousarray(np.swapaxes(x, 1, 2)),)


def fail(*arrays):
    raise ExecutionFailed("shapes do not agree")


def crash(*arrays):
    raise ZeroDivisionError("/secret/path")


def config(name, inputs, outputs, max_batch_size=8, **more):
    return ModelConfig(
        name=name,
        backend="pytorch",
        max_batch_size=max_batch_size,
        input=tuple(ModelInput(**entry) for entry in inputs),
        output=tuple(ModelOutput(**entry) for entry in outputs),
        **more,
    )


def tensor(name, data_type, dims, reshape=None):
    return {
        "name": name,
        "data_type": data_type,
        "dims": dims,
        "reshape": None if reshape is None else Reshape(shape=reshape),
    }


def models():
    """Every model that the tests use: configuration and function."""
    fp32 = "TYPE_FP32"
    yield (
        config(
            "linear",
            [tensor("INPUT__0", fp32, (4,))],
            [tensor("OUTPUT__0", fp32, (3,))],
            platform="pytorch_libtorch",
        ),
        linear,
    )
    yield (
        config(
            "add_sub",
            [tensor("INPUT0", "TYPE_INT32", (4,)), tensor("INPUT1", "TYPE_INT32", (4,))],
            [tensor("OUTPUT1", "TYPE_INT32", (4,)), tensor("OUTPUT0", "TYPE_INT32", (4,))],
        ),
        lambda a, b: add_sub(a, b)[::-1],
    )
    for each in DATATYPES:
        if each.wire != "BYTES":
            one = [tensor("X", each.config, (-1,))]
            yield config(f"echo_{each.wire}", one, [tensor("Y", each.config, (-1,))]), echo
    yield (
        config(
            "echo_BYTES",
            [tensor("X", "TYPE_STRING", (1,), ())],
            [tensor("Y", "TYPE_STRING", (1,), ())],
        ),
        echo,
    )
    yield (
        config(
            "strings",
            [tensor("X", "TYPE_STRING", (-1,))],
            [tensor("Y", "TYPE_STRING", (-1,))],
            max_batch_size=0,
        ),
        echo,
    )
    yield (
        config(
            "unbatched",
            [tensor("X", fp32, (-1, 2))],
            [tensor("Y", fp32, (-1, 2))],
            max_batch_size=0,
        ),
        echo,
    )
    yield (
        config(
            "reshaped",
            [tensor("X", fp32, (-1, 2), (2, -1))],
            [tensor("Y", fp32, (2, -1), (-1, 2))],
        ),
        transpose,
    )
    # A model of the Python backend, which is told of whole requests.
    told = config("told", [tensor("X", fp32, (1,))], [tensor("Y", fp32, (1,))])
    yield told.model_copy(update={"backend": "python"}), echo
    for name, model in (("failing", fail), ("crashing", crash), ("full", QueueFull)):
        yield config(name, [tensor("X", fp32, (1,))], [tensor("Y", fp32, (1,))]), model


class Controller:
    """The Control seam, in this process."""

    def __init__(self):
        self.calls = []

    async def call(self, verb, *args):
        self.calls.append((verb, *args))
        if verb == "statistics":
            return [{"name": args[0], "version": "1", "inference_count": 2**40}]


class Server:
    """`gates` by model name; version 1 of every model, and versions as told of `linear`."""

    def __init__(self, **settings):
        self.settings = ServerSettings(model_repository=("m",), **settings)
        self.directory, self.controller = Directory(), Controller()
        self.inference = Inference(self.directory, self.controller, self.settings)
        self.http: Any = HttpApp(self.inference, self.settings)
        self.gates: dict[str, Any] = {each.name: LocalGate(each, model) for each, model in models()}
        self.versions = [self.version(name) for name in self.gates]
        self.publish()

    def version(self, name, version=1, state=ModelState.READY, reason=""):
        gate = self.gates.get(name)
        return VersionSnapshot(
            name,
            version,
            state,
            reason,
            config=gate.config if gate else None,
            application=name if gate else "",
            targets=(Target("all", 1),) if gate else (),
        )

    def publish(self, **facts):
        facts = {"started": True, "ready": True, **facts}
        self.directory.update(Snapshot(1, 1, versions=tuple(self.versions), **facts), self.gates)

    def client(self):
        transport = httpx.ASGITransport(self.http)
        return httpx.AsyncClient(transport=transport, base_url="http://manta")

    def ask(self, method, path, **request):
        """One request over the real ASGI app, on a loop of its own."""

        async def one():
            async with self.client() as client:
                return await client.request(method, path, **request)

        return asyncio.run(one())

    def check_alive(self):
        """After any abuse: the next good request gets the right answer."""
        x = [[1.0, -2.0, 3.0, 0.5]]
        body = {"inputs": [json_input("INPUT__0", "FP32", [1, 4], x)]}
        reply = self.ask("POST", "/v2/models/linear/infer", json=body)
        assert reply.status_code == 200, reply.text
        expected = linear(np.array(x, np.float32))[0]
        np.testing.assert_allclose(reply.json()["outputs"][0]["data"], expected[0], rtol=1e-6)


def json_input(name, datatype, shape, data):
    return {"name": name, "datatype": datatype, "shape": shape, "data": data}
