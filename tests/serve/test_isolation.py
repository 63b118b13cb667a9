"""One bad request in a batch of eight hurts nobody else."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httpx
import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from tests.serve.clients import aio_client, infer_aio, rows, statistics
from tests.serve.server import Server, in_three_tries

# `picky` holds a partial batch back for up to 1.5 s: eight rows at once are one batch.
EIGHT = np.abs(rows(8, 2)) + 1


def eight(server: Server, protocol: str, spoilt: dict[int, Any]) -> list[Any]:
    """Eight requests at once; `spoilt` replaces the tensor of some."""

    async def run() -> list[Any]:
        async with aio_client(server, protocol) as client:
            calls = [
                infer_aio(client, "picky", {"x": spoilt.get(i, EIGHT[i : i + 1])}) for i in range(8)
            ]
            return await asyncio.gather(*calls, return_exceptions=True)

    return asyncio.run(run())


def check_others(replies: list[Any], spoilt: set[int]) -> None:
    for i, reply in enumerate(replies):
        if i not in spoilt:
            assert np.array_equal(reply.as_numpy("OUTPUT__0"), EIGHT[i : i + 1] * 2)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_eight_good_requests_are_one_execution(server: Server, http: Any, protocol: str) -> None:
    """The control: without a culprit the eight run as one batch, unless they come too far apart."""

    def executions() -> int:
        before = statistics(http, "picky")
        check_others(eight(server, protocol, {}), set())
        return statistics(http, "picky")["execution_count"] - before["execution_count"]

    in_three_tries(lambda: executions() == 1)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_model_exception_fails_only_the_culprit(server: Server, http: Any, protocol: str) -> None:
    before = statistics(http, "picky")
    replies = eight(server, protocol, {3: -EIGHT[3:4]})
    assert isinstance(replies[3], InferenceServerException)
    assert "negative value" in replies[3].message()
    check_others(replies, {3})
    after = statistics(http, "picky")
    assert after["success"] - before["success"] == 7
    assert after["fail"] - before["fail"] == 1


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_bad_row_is_refused_before_it_is_queued(server: Server, protocol: str) -> None:
    replies = eight(server, protocol, {5: rows(1, 3)})
    assert isinstance(replies[5], InferenceServerException)
    assert "unexpected shape" in replies[5].message()
    check_others(replies, {5})


def test_a_client_that_leaves_takes_nobody_along(server: Server, http: Any) -> None:
    """One that left before it was queued, or too late, shows nothing: then it is done again."""
    x = EIGHT[:1].tolist()
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": x[0]}]}

    async def run() -> list[Any]:
        async with httpx.AsyncClient(timeout=60) as leaver, aio_client(server, "http") as client:
            assert await client.is_server_live()
            url = f"http://{server.http}/v2/models/picky/infer"
            leaving = asyncio.create_task(leaver.post(url, json=body))
            await asyncio.sleep(0.2)  # it waits in the queue, held back for more rows
            leaving.cancel()
            await asyncio.gather(leaving, return_exceptions=True)
            await asyncio.sleep(0.2)
            calls = [infer_aio(client, "picky", {"x": EIGHT[i : i + 1]}) for i in range(7)]
            return await asyncio.gather(*calls)

    def left() -> bool:
        before = statistics(http, "picky")
        check_others([*asyncio.run(run()), None], {7})
        after = statistics(http, "picky")
        counts = [after[name] - before[name] for name in ("inference_count", "fail")]
        assert counts[0] in (7, 8)
        return counts == [7, 1]

    in_three_tries(left)


def test_a_grpc_deadline_withdraws_what_waits(server: Server, http: Any) -> None:
    """Where it was over before the request had come, it is done again."""

    async def run() -> None:
        async with aio_client(server, "grpc") as client:
            assert await client.is_server_live()  # connected: what follows is sent at once
            with pytest.raises(InferenceServerException, match="Deadline"):
                await infer_aio(client, "picky", {"x": EIGHT[:1]}, client_timeout=0.2)

    def withdrawn() -> bool:
        before = statistics(http, "picky")
        asyncio.run(run())
        time.sleep(2.0)  # longer than it would have been held back, had it stayed
        after = statistics(http, "picky")
        assert after["execution_count"] == before["execution_count"]
        return after["fail"] - before["fail"] == 1

    in_three_tries(withdrawn)
