"""A real instance behind a real doorway, on the test's own loop, for tests of the local channel."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np

from configs.model import ModelConfig
from configs.parameters import ModelParameters
from deployments.doorway import Doorway
from deployments.instance import Instance
from deployments.local import LocalClient
from deployments.types import Batch, ChannelAddress
from tests import models
from tests.models import config

LIMIT_S = 30.0
ONE = config({"x": (-1,)}, {"y": (-1,)}, max_batch_size=64)


def drive(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(**fixtures: Any) -> None:
        asyncio.run(asyncio.wait_for(test(**fixtures), 60))

    return run


class Place:
    """One instance that Routers can reach."""

    def __init__(self, instance: Instance, door: Doorway, address: ChannelAddress) -> None:
        self.instance = instance
        self.door = door
        self.address = address

    async def connect(
        self, changed: Callable[[], None] | None = None, limit_s: float = LIMIT_S
    ) -> LocalClient:
        """Returns when the instance has told what may be sent."""
        told = asyncio.Event()

        def heard() -> None:
            told.set()
            if changed is not None:
                changed()

        client = await LocalClient.connect(self.address, 0, "router", "model", heard, limit_s)
        await asyncio.wait_for(told.wait(), LIMIT_S)
        return client


@contextlib.asynccontextmanager
async def place(module: Any, made: ModelConfig = ONE) -> AsyncIterator[Place]:
    """`module`: a torch module, or the source of a model.py."""
    with tempfile.TemporaryDirectory() as name:
        parameters: dict[str, Any] = {}
        if isinstance(module, str):
            path = models.save_eager(module, Path(name))
            made = made.model_copy(update={"runtime": "model.py", "platform": ""})
            parameters["torch_compile_optional_parameters"] = {"disable": True}
        else:
            path = models.save_torchscript(module, Path(name))
        instance = Instance(
            "i", path, made, ModelParameters(**parameters), "cpu", "KIND_CPU", None, 1
        )
        await asyncio.to_thread(instance.load)
        door = Doorway(1, lambda _, sock, router: instance.attach(sock, router))
        address = door.open()
        assert address is not None
        try:
            yield Place(instance, door, address)
        finally:
            door.close()
            await asyncio.to_thread(instance.close)
            assert not Path(address.path).parent.exists()


def rows(count: int, width: int = 16, seed: int = 0) -> list[np.ndarray]:
    """`count` members of one row each."""
    generator = np.random.default_rng(seed)
    return [generator.random((1, width), np.float32) for _ in range(count)]


def batch_of(*members: np.ndarray | None, outputs: tuple[str, ...] = ("y",)) -> Batch:
    return Batch(tuple(1 if m is None else len(m) for m in members), (tuple(members),), outputs)


def whole(batch: Batch) -> np.ndarray:
    """The members' rows one after another."""
    return np.concatenate([one for one in batch.inputs[0] if one is not None])


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.002)
