"""Each runtime under 200 concurrent requests: right answers, in fewer executions than requests."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
import torch

from tests import models
from tests.serve import repository
from tests.serve.clients import Arrays, aio_client, infer_aio, rows, statistics
from tests.serve.server import Server

REQUESTS = 200


def mlp_case(inp: str, out: str) -> tuple[list[Arrays], list[Arrays]]:
    x = rows(REQUESTS, 8)
    with torch.inference_mode():
        y = repository.mlp()(torch.from_numpy(x)).numpy()
    return [{inp: x[i : i + 1]} for i in range(REQUESTS)], [
        {out: y[i : i + 1]} for i in range(REQUESTS)
    ]


def seed_case() -> tuple[list[Arrays], list[Arrays]]:
    names = ("ARGS[0]", "ARGS[1]", "ARGS[2][keyA]", "ARGS[2][key2]", "KWARGS[kwarg1]", "INPUT__5")
    columns = [rows(REQUESTS, 16, seed) for seed in range(6)]
    asked, wanted = [], []
    for i in range(REQUESTS):
        given = [torch.from_numpy(column[i : i + 1]) for column in columns]
        out = models.Seed()(
            given[0],
            given[1],
            {"keyA": given[2], "key2": given[3]},
            kwarg1=given[4],
            kw_arg2=given[5],
        )
        asked.append(dict(zip(names, (tensor.numpy() for tensor in given), strict=True)))
        wanted.append(
            {
                "RESULT[AAA]": out["AAA"].numpy(),
                "RESULT[ZZZ]": out["ZZZ"].numpy(),
                "RESULT[BBB][0]": out["BBB"][0].numpy(),
                "RESULT[BBB][1]": out["BBB"][1].numpy(),
                "RESULT[CCC][keyA]": out["CCC"]["keyA"].numpy(),
                "RESULT[CCC][key2]": out["CCC"]["key2"].numpy(),
                "RESULT[DDD][KA]": out["DDD"]["KA"].numpy(),
                "OUTPUT__7": out["DDD"]["KB"].numpy(),
            }
        )
    return asked, wanted


CASES = {
    "mlp": lambda: mlp_case("INPUT__0", "OUTPUT__0"),
    "eager_mlp": lambda: mlp_case("x", "y"),
    "seed": seed_case,
    "shared": lambda: mlp_case("INPUT__0", "OUTPUT__0"),
}


@pytest.mark.parametrize("protocol", ["http", "grpc"])
@pytest.mark.parametrize("model", CASES)
def test_concurrent_requests_are_batched_and_right(
    server: Server, http: Any, model: str, protocol: str
) -> None:
    asked, wanted = CASES[model]()
    before = statistics(http, model)

    async def run() -> list[Any]:
        async with aio_client(server, protocol) as client:
            return await asyncio.gather(*(infer_aio(client, model, arrays) for arrays in asked))

    replies = asyncio.run(run())
    for reply, expected in zip(replies, wanted, strict=True):
        for name, array in expected.items():
            np.testing.assert_allclose(reply.as_numpy(name), array, rtol=1e-5, atol=1e-5)
    after = statistics(http, model)
    assert after["inference_count"] - before["inference_count"] == REQUESTS
    assert after["success"] - before["success"] == REQUESTS
    assert 0 < after["execution_count"] - before["execution_count"] < REQUESTS
