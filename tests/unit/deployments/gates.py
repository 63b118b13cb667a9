"""A gate in virtual time over a model that runs when the test says so."""

from __future__ import annotations

import asyncio

from deployments.batcher import Execution, MemberResult, Outcome
from deployments.gate import Gate
from deployments.places import Place
from deployments.scheduler import BatchPolicy
from deployments.statistics import Counters

from .virtual_time import run

MS = 1_000_000


class Nobody:
    """At each place: what is sent there runs when the test says so."""

    def execute(self, batch):
        return asyncio.get_running_loop().create_future()

    async def aclose(self):
        pass


class Model:
    """Runs groups when told to. `calls` holds the member numbers of each group, in order."""

    def __init__(self):
        self.calls = []
        self.replies = []

    async def execute(self, group, place):
        self.calls.append([entry.inputs[0] for entry in group.members])
        reply = asyncio.get_running_loop().create_future()
        self.replies.append((group, reply))
        place.execute(None)
        return await reply

    def finish(self, index=0, error=None, refused=False, results=None):
        group, reply = self.replies.pop(index)
        if error is not None:
            reply.set_exception(error)
        elif refused:
            reply.set_result(Outcome((), refused=True))
        else:
            rows = sum(entry.rows for entry in group.members)
            results = results or [
                MemberResult({}, group.released_ns - entry.queued_ns, 1, 2, 3)
                for entry in group.members
            ]
            reply.set_result(Outcome(results, (Execution(rows, 1, 2, 3),)))


class Slots:
    """A number of places that changes when the test says so."""

    def __init__(self, count, changed):
        self._changed = changed
        self._all = []
        self.count = count

    def _places(self):
        while len(self._all) < self.count:
            self._all.append(Place(Nobody(), self._changed))
        return self._all[: self.count]

    def idle(self):
        return next((place for place in self._places() if place.idle), None)

    def ahead(self):
        return next((place for place in self._places() if place.ahead), None)

    def want(self):
        pass

    def spare(self):
        pass


class SlotGate(Gate):
    """A gate over Slots."""

    def __init__(self, model_name, policy, execute, slots, counters=None, clock=None):
        self.slots = Slots(slots, lambda: self.pump())
        clocks = {} if clock is None else {"clock": clock}
        super().__init__(model_name, policy, execute, self.slots, counters, **clocks)

    def resize(self, slots):
        self.slots.count = slots
        self.pump()


def make(clock, slots=1, model=None, **changes):
    policy = {
        "max_rows": 8,
        "merge": True,
        "preferred": (8,),
        "delay_ns": 0,
        "max_requests": 100,
        "max_queue_ns": 0,
        **changes,
    }
    model = model or Model()
    counters = Counters(clock)
    gate = SlotGate("m", BatchPolicy(**policy), model.execute, slots, counters, clock)
    return gate, model, counters


def submit(gate, number, rows=1, key="k"):
    return gate.submit(rows, key, (number,), ("y",))


def drive(test):
    """Runs the coroutine function in virtual time."""

    def wrapper():
        run(test)

    wrapper.__name__ = test.__name__
    return wrapper
