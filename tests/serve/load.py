"""A load that goes on while something dies: stock clients, each request awaited, checked, counted.

Closed loops of `tritonclient.http.aio` and `tritonclient.grpc.aio`, each client with a connection
of its own, in a thread; nothing is sent again. What a request came to is `ok`, the status with
which the server refused it (`503` for gRPC's UNAVAILABLE too), or `cut`: its connection was
refused, reset or closed without an answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import aiohttp
import numpy as np
import numpy.typing as npt
from tritonclient.utils import InferenceServerException

from tests.serve.clients import aio_client, infer_aio
from tests.serve.server import Server, wait_for

STATUS = {"UNAVAILABLE": "503", "NOT_FOUND": "404", "INVALID_ARGUMENT": "400", "INTERNAL": "500"}
# What grpcio itself says of a connection.
BROKEN = re.compile(
    "failed to connect|socket closed|stream removed|connection (reset|refused)|broken pipe"
    "|end of tcp stream|transport closed|recvmsg|sendmsg|goaway",
    re.IGNORECASE,
)
# After a failure a client waits a moment, as one does; it would only measure refused connections.
AFTER_FAILURE_S = 0.05
PROTOCOLS = ("http", "grpc")
# What a request may come to whose Router is killed. HAProxy, which gRPC goes through, outlives its
# Router by a moment, in which it answers for it.
ROUTER_GONE = {"http": {"cut"}, "grpc": {"cut", "503"}}
LIMIT_S = 120.0


@dataclass(frozen=True, slots=True)
class Target:
    """One model, and how to tell that its answer belongs to its request: it is twice as much."""

    model: str
    input: str
    output: str
    make: Callable[[int], npt.NDArray[np.float32]]


@dataclass(slots=True)
class Sent:
    """`outcome` is "" while it is not answered."""

    loop: int
    protocol: str
    model: str
    begun_s: float
    ended_s: float = 0.0
    outcome: str = ""


class Load:
    """Begin with `running`; the rest may be called from the test's thread."""

    def __init__(
        self, server: Server, targets: Sequence[Target], clients: int, passing: int
    ) -> None:
        self._server = server
        self._targets = targets
        self._clients, self._passing = clients, passing
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._numbers = itertools.count(1)
        self.sent: list[Sent] = []
        self.texts: Counter[tuple[str, str]] = Counter()

    # --- what was sent ---------------------------------------------------------------------------

    def mark(self) -> int:
        """Where `codes` and `wait_ok` begin to count: with what is sent from now on."""
        return len(self.sent)

    def codes(self, since: int = 0, **only: str) -> dict[str, int]:
        """How many came to what, of those sent since a mark; `protocol` and `model` may narrow."""
        chosen = (one for one in self.sent[since:] if _is(one, only))
        return dict(Counter(one.outcome or "unanswered" for one in chosen))

    def lost(self, since: int = 0, **only: str) -> dict[str, int]:
        """Of the answered ones, those that came to anything but `ok`."""
        codes = self.codes(since, **only)
        return {name: n for name, n in codes.items() if name not in ("ok", "unanswered")}

    def wait_ok(self, each: int = 5) -> None:
        """Until each protocol and model has so many new good answers; fails if any is not good."""
        since = self.mark()

        def enough() -> bool:
            good = Counter(
                (one.protocol, one.model) for one in self.sent[since:] if one.outcome == "ok"
            )
            roads = itertools.product(PROTOCOLS, (target.model for target in self._targets))
            return all(good[road] >= each for road in roads)

        wait_for(enough, LIMIT_S, "the load is answered")
        assert not self.lost(since), self.codes(since)

    def wait_back(self, struck_s: float) -> None:
        """Until every loop has had a good answer to what it sent after the strike, and no failure
        since. gRPC's channels wait a second, and then longer, before they connect again."""

        def back() -> bool:
            last = {one.loop: one for one in self.sent if one.outcome}
            good = [one.outcome == "ok" and one.begun_s > struck_s for one in last.values()]
            return all(good)

        wait_for(back, LIMIT_S, "every loop is answered again")

    def recovered_s(self, strike_s: float) -> dict[str, float]:
        """For each protocol, from the strike to the end of the first good answer after its last
        failure; 0 where there was none."""
        found = {}
        for protocol in PROTOCOLS:
            mine = [one for one in self.sent if one.protocol == protocol and one.outcome]
            failed = [one.ended_s for one in mine if one.outcome != "ok"]
            after = (
                [one.ended_s for one in mine if one.outcome == "ok" and one.begun_s > max(failed)]
                if failed
                else []
            )
            found[protocol] = round(min(after) - strike_s, 2) if after else 0.0
        return found

    def relapses(self, dead_s: float) -> list[Sent]:
        """Failures of loops that had a good answer already to what they sent after that moment: who
        was back once stays so."""
        found, back = [], set()
        for one in sorted(self.sent, key=lambda each: each.begun_s):
            if one.begun_s > dead_s and one.outcome == "ok":
                back.add(one.loop)
            elif one.loop in back and one.outcome:
                found.append(one)
        return found

    def in_work(self, at_s: float) -> dict[str, int]:
        """What those came to that were sent before that moment and not answered by then."""
        return dict(Counter(one.outcome for one in self.sent if one.begun_s < at_s < one.ended_s))

    @property
    def loops(self) -> int:
        """So many requests are in work at any moment, at most."""
        return len(PROTOCOLS) * len(self._targets) * (self._clients + self._passing)

    # --- single requests -------------------------------------------------------------------------

    def submit(self, protocol: str, model: str, arrays: Any) -> Future[str]:
        """One request beside the loops, not counted among them; the future is its outcome."""

        async def one() -> str:
            async with aio_client(self._server, protocol) as client:
                return await outcome(infer_aio(client, model, arrays), self._note)

        return asyncio.run_coroutine_threadsafe(one(), self._loop)

    # --- the thread ------------------------------------------------------------------------------

    def run(self) -> None:
        self._loop.run_until_complete(self._run())

    async def _run(self) -> None:
        roads = itertools.product(PROTOCOLS, self._targets)
        kinds = [self._stays] * self._clients + [self._passes] * self._passing
        loops = enumerate(itertools.product(roads, kinds))
        await asyncio.gather(*(kind(number, *road) for number, (road, kind) in loops))

    async def _stays(self, loop: int, protocol: str, target: Target) -> None:
        """One client, and so one connection, for as long as the server keeps it."""
        async with aio_client(self._server, protocol) as client:
            while not self._stop.is_set():
                await self._send(loop, client, protocol, target)

    async def _passes(self, loop: int, protocol: str, target: Target) -> None:
        """A client, and a connection, for each request."""
        while not self._stop.is_set():
            async with aio_client(self._server, protocol) as client:
                await self._send(loop, client, protocol, target)

    async def _send(self, loop: int, client: Any, protocol: str, target: Target) -> None:
        sent = Sent(loop, protocol, target.model, time.monotonic())
        self.sent.append(sent)
        arrays = {target.input: target.make(next(self._numbers))}
        result = await outcome(_checked(client, target, arrays), self._note)
        sent.ended_s, sent.outcome = time.monotonic(), result
        await asyncio.sleep(0 if result == "ok" else AFTER_FAILURE_S)

    def _note(self, result: str, error: Exception) -> None:
        """For who reads why a test failed."""
        self.texts[result, str(error)[:120]] += 1

    def end(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)

    def close(self) -> None:
        self._loop.close()


def pair_of(number: int) -> npt.NDArray[np.float32]:
    """An input of two values that no other request has."""
    return np.array([[number, -number]], np.float32)


def _is(one: Sent, only: Mapping[str, str]) -> bool:
    return all(getattr(one, name) == value for name, value in only.items())


async def _checked(client: Any, target: Target, arrays: dict[str, npt.NDArray[np.float32]]) -> None:
    reply = await infer_aio(client, target.model, arrays)
    given = arrays[target.input]
    if not np.array_equal(reply.as_numpy(target.output), given * 2):
        raise AssertionError(f"{given} was answered by {reply.as_numpy(target.output)}")


async def outcome(call: Coroutine[Any, Any, Any], note: Callable[[str, Exception], None]) -> str:
    why: Exception
    try:
        await call
    except InferenceServerException as error:
        result, why = _status(error), error
    except (aiohttp.ClientError, OSError) as error:
        result, why = "cut", error
    except AssertionError as error:
        result, why = "wrong", error
    else:
        return "ok"
    note(result, why)
    return result


def _status(error: InferenceServerException) -> str:
    status = str(error.status())
    if not status.startswith("StatusCode."):
        return status
    name = status.removeprefix("StatusCode.")
    # gRPC has one code for what the server says and for a connection that broke.
    if name == "UNAVAILABLE" and BROKEN.search(str(error.message())):
        return "cut"
    # HAProxy's word for a Router that went in the middle of an answer.
    if name in ("UNAVAILABLE", "INTERNAL") and "RST_STREAM" in str(error.message()):
        return "cut"
    return STATUS.get(name, name)


@contextlib.contextmanager
def running(
    server: Server, targets: Sequence[Target], clients: int = 2, passing: int = 0
) -> Iterator[Load]:
    """`clients` loops per protocol and model, and `passing` more of clients that connect anew for
    each request. At the end all that was sent has been answered."""
    load = Load(server, targets, clients, passing)
    thread = threading.Thread(target=load.run)
    thread.start()
    try:
        load.wait_ok()
        yield load
    finally:
        load.end()
        thread.join(LIMIT_S)
        assert not thread.is_alive(), "a request was never answered"
        load.close()
