"""Longer than every landing has time for: `make test-long`."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from tritonclient.utils import InferenceServerException

from tests.serve import repository
from tests.serve.clients import aio_client, infer_aio, rows
from tests.serve.server import Server

REQUESTS = 10_000
CONCURRENCY = 64
pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_each_answer_depends_on_its_own_request_alone(server: Server, protocol: str) -> None:
    """A tenth of the requests is bad; every good one gets its own answer, and memory stays."""
    x = rows(REQUESTS, 8, seed=3)
    with torch.inference_mode():
        expected = repository.mlp()(torch.from_numpy(x)).numpy()
    (router,) = server.replica_pids("manta:Router")
    wrong: list[int] = []
    refused = 0

    async def worker(client: Any, numbers: Any) -> None:
        nonlocal refused
        for i in numbers:
            bad = i % 10 == 7
            array = x[i : i + 1, :7] if bad else x[i : i + 1]
            try:
                reply = await infer_aio(client, "mlp", {"INPUT__0": np.ascontiguousarray(array)})
            except InferenceServerException:
                refused += 1
                if not bad:
                    wrong.append(i)
                continue
            if bad or not np.allclose(reply.as_numpy("OUTPUT__0"), expected[i], atol=1e-5):
                wrong.append(i)

    async def run() -> None:
        async with aio_client(server, protocol) as client:
            numbers = iter(range(REQUESTS))
            await asyncio.gather(*(worker(client, numbers) for _ in range(CONCURRENCY)))

    asyncio.run(run())  # once to warm up
    before = psutil.Process(router).memory_info().rss
    refused = 0
    asyncio.run(run())
    assert not wrong
    assert refused == REQUESTS // 10
    assert psutil.Process(router).memory_info().rss - before < 32 << 20
