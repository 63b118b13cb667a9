"""A released batch on its way to its place, and what is put off until it is there.

Stands between the Batcher and the place, and knows when the one hands the batch to the other. Made
by the Gate, which puts off the answers of the batch before.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Callable

from .places import Place
from .types import Batch, BatchReply


class Sending:
    """A group on its way to its place. `then` is done when it is there, or never will be."""

    __slots__ = ("place", "then", "under_way")

    def __init__(self, place: Place) -> None:
        self.place = place
        self.under_way = True
        self.then: list[Callable[[], None]] = []

    def execute(self, batch: Batch) -> Awaitable[BatchReply]:
        try:
            return self.place.execute(batch)
        finally:
            self.over()

    def over(self) -> None:
        self.under_way = False
        then, self.then = self.then, []
        for call in then:  # not from here: this may be the inside of somebody's request
            asyncio.get_running_loop().call_soon(call, context=contextvars.Context())
