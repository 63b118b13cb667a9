"""`preserve_ordering`: answers leave in the order in which the requests came."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import models
from tests.serve import repository
from tests.serve.clients import Arrays, aio_client, infer_aio, loading
from tests.serve.server import Server

SLOW_S, SOON_S, BETWEEN_S = 1.5, 0.7, 0.2


@pytest.fixture(scope="module")
def ordered(server: Server, models_root: Path) -> Iterator[str]:
    """As `slow`, with its two instances, but in order."""
    models.save_eager(repository.SLOW, models_root, "ordered")
    text = (models_root / "slow" / "config.pbtxt").read_text()
    text += "dynamic_batching { preserve_ordering: true }\n"
    repository.write_config(models_root, "ordered", text)
    with loading(server, ["ordered"]):
        yield "ordered"


def seconds(value: float) -> Arrays:
    return {"s": np.full((1, 1), value, np.float32)}


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_who_came_first_is_answered_first(server: Server, ordered: str, protocol: str) -> None:
    asyncio.run(_first_and_second(server, ordered, protocol))


async def _first_and_second(server: Server, ordered: str, protocol: str) -> None:
    """Both instances run one request each; `slow` is the control."""
    client = aio_client(server, protocol)

    def send(value: float) -> dict[str, asyncio.Task[Any]]:
        return {
            name: asyncio.create_task(infer_aio(client, name, seconds(value)))
            for name in (ordered, "slow")
        }

    try:
        first = send(SLOW_S)
        await asyncio.sleep(BETWEEN_S)
        second = send(0)
        await second["slow"]
        assert not first["slow"].done() and not second[ordered].done()
        await second[ordered]
        # Not one and a half seconds later: it was there, or in the same instant.
        await asyncio.wait_for(asyncio.shield(first[ordered]), SOON_S)
        for answers, wanted in ((first, 2 * SLOW_S), (second, 0)):
            for answer in answers.values():
                assert (await answer).as_numpy("t") == pytest.approx(wanted)
    finally:
        await client.close()
