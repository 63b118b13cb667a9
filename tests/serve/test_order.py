"""`preserve_ordering`: answers leave in the order in which the requests came."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import models
from tests.serve import repository
from tests.serve.clients import Arrays, aio_client, infer_aio, loading
from tests.serve.server import Server, wait_for

HELD, SOON_S = -1.0, 0.7


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
def test_who_came_first_is_answered_first(
    server: Server, models_root: Path, ordered: str, protocol: str
) -> None:
    folders = [models_root / name for name in (ordered, "slow")]
    with repository.holding(folders[0]) as go, repository.holding(folders[1]) as go_too:
        asyncio.run(_first_and_second(server, folders, protocol, (go, go_too)))


async def _first_and_second(
    server: Server, folders: Sequence[Path], protocol: str, release: Sequence[Callable[[], None]]
) -> None:
    """Both instances run one request each, the first until it is released; `slow` is the
    control."""
    client = aio_client(server, protocol)

    def send(value: float) -> dict[str, asyncio.Task[Any]]:
        return {
            folder.name: asyncio.create_task(infer_aio(client, folder.name, seconds(value)))
            for folder in folders
        }

    def both_run() -> bool:
        return all(repository.held(folder) for folder in folders)

    try:
        first = send(HELD)
        await asyncio.to_thread(wait_for, both_run, 20, "the first of each runs")
        second = send(0)
        await second["slow"]
        await asyncio.sleep(SOON_S)  # in which the other has run as well
        assert not any(task.done() for task in (*first.values(), second["ordered"]))
        for go in release:
            go()
        for answers, wanted in ((first, 2 * HELD), (second, 0)):
            for answer in answers.values():
                assert (await answer).as_numpy("t") == pytest.approx(wanted)
    finally:
        await client.close()
