"""A batch goes to a deployment where somebody lives and has a slot."""

from __future__ import annotations

import asyncio

from deployments.client import Pool
from deployments.types import Batch, BatchReply, Target

BATCH = Batch(rows=(1,), inputs=(), outputs=())


class Client:
    """Takes batches and keeps them until it is told to answer."""

    def __init__(self) -> None:
        self.taken = 0
        self.go_on = asyncio.Event()

    async def execute(self, batch: Batch) -> BatchReply:
        self.taken += 1
        await self.go_on.wait()
        return BatchReply(())

    async def aclose(self) -> None:
        self.go_on.set()


async def send(pool: Pool, count: int) -> list[asyncio.Task[BatchReply]]:
    tasks = [asyncio.create_task(pool.execute(BATCH)) for _ in range(count)]
    await asyncio.sleep(0)
    return tasks


def test_the_one_with_the_most_free_slots() -> None:
    async def run() -> tuple[int, int]:
        one, other = Client(), Client()
        pool = Pool({"one": one, "other": other})
        pool.resize([Target("one", 1), Target("other", 3)])
        assert pool.slots == 4
        tasks = await send(pool, 4)
        await pool.aclose()
        await asyncio.gather(*tasks)
        return one.taken, other.taken

    assert asyncio.run(run()) == (1, 3)


def test_never_to_where_nobody_lives() -> None:
    async def run() -> tuple[int, int]:
        dead, alive = Client(), Client()
        pool = Pool({"dead": dead, "alive": alive})
        pool.resize([Target("dead", 0), Target("alive", 1)])
        tasks = await send(pool, 3)  # more than there are slots: sent ahead
        await pool.aclose()
        await asyncio.gather(*tasks)
        return dead.taken, alive.taken

    assert asyncio.run(run()) == (0, 3)
