"""What a Controller takes over, and whom it waits for; Serve is what the test says."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

import pytest

from deployments import adoption
from deployments.adoption import Adoption, facts, lasting_facts
from deployments.catalogue import Catalogue, Generation
from deployments.overrides import Overrides
from deployments.types import ModelState, ReplicaReport
from tests import models

CONFIG = models.config({"x": [2]}, {"y": [2]})


def name_of(model: str) -> str:
    return f"manta.{model}.1.7"


class Bench:
    """Applications by model: those that Serve runs, of which some have a replica that loaded, and
    what is remembered of some."""

    def __init__(
        self, live: dict[str, int], started: Collection[str] = (), known: Collection[str] = ()
    ) -> None:
        self._live, self._started, self._known = live, started, known
        self.catalogue = Catalogue(epoch=1)
        self.adoption = Adoption(self.catalogue, Overrides(""), lambda _: None, self)

    def live(self) -> dict[str, dict[str, int]]:
        return {name_of(model): {"g": count} for model, count in self._live.items()}

    def started(self) -> set[str]:
        return {name_of(model) for model in self._started}

    def recall(self, name: str) -> bytes | None:
        generation = Generation(name, CONFIG, "f", {"g": 1})
        return facts(generation) if name.split(".")[1] in self._known else None

    def report(self, model: str) -> None:
        self.adoption.stray(
            ReplicaReport(name_of(model), "g", "r", "n", 1, 1, "cpu", "f", CONFIG, loaded=True)
        )

    async def adopt(self) -> list[str]:
        """Those left over, by model."""
        _, left = await self.adoption.adopt()
        return sorted(name.split(".")[1] for name in left)

    def served(self) -> dict[str, int]:
        """Adopted models, with the instances that they have to offer."""
        return {
            one.model_name: sum(target.slots for target in one.current.targets())
            for one in self.catalogue.versions()
            if one.current is not None and one.state is ModelState.READY
        }


def test_one_that_only_loads_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were it awaited, this would not end in the test's time."""
    monkeypatch.setattr(adoption, "ADOPTION_S", 3600.0)
    bench = Bench({"serves": 1, "loads": 1, "zero": 0}, {"serves"}, {"zero"})
    bench.report("serves")
    assert asyncio.run(asyncio.wait_for(bench.adopt(), 30)) == ["loads"]
    assert bench.served() == {"serves": 1, "zero": 0}


def test_one_that_lost_all_replicas_is_adopted_by_what_is_remembered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its new replicas load, and what waits for it in Routers must not fail."""
    monkeypatch.setattr(adoption, "ADOPTION_S", 3600.0)
    bench = Bench({"lost": 2}, (), {"lost"})
    assert asyncio.run(asyncio.wait_for(bench.adopt(), 30)) == []
    assert bench.served() == {"lost": 0}
    assert not bench.catalogue.ready(strict=True)


def test_control_one_that_runs_is_waited_for() -> None:
    """Else Routers would hear that it has no replica, and send it nothing."""

    async def run() -> None:
        bench = Bench({"serves": 1}, {"serves"}, {"serves"})
        adopting = asyncio.create_task(bench.adopt())
        await asyncio.wait({adopting}, timeout=0.3)
        assert not adopting.done()
        bench.report("serves")
        assert await adopting == []
        assert bench.served() == {"serves": 1}

    asyncio.run(run())


def test_one_that_runs_and_is_silent_is_waited_for_no_longer_than_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(adoption, "ADOPTION_S", 0.3)
    bench = Bench({"known": 1, "unknown": 1}, {"known", "unknown"}, {"known"})
    assert asyncio.run(bench.adopt()) == ["unknown"]
    assert bench.served() == {"known": 0}


def test_what_lasts_says_nothing_of_scaling() -> None:
    """One that comes back without replicas would count as one that rests."""
    generation = Generation("manta.m.1.7", CONFIG, "f", {"g": 1})
    assert lasting_facts(generation) == facts(generation)
    generation.autoscaling = {"g": None}  # type: ignore[dict-item]
    assert lasting_facts(generation) != facts(generation)
    assert generation.autoscaling
