"""What is loaded, as data: registrations, staleness, readiness, snapshots."""

from __future__ import annotations

from dataclasses import replace

from configs.autoscaling import Autoscaling
from configs.model import InstanceGroup, VersionPolicy
from deployments.catalogue import STALE_S, SUSPECT_S, Catalogue, Generation, Version
from deployments.types import Endpoint, ModelState, Override, Target
from tests.unit.deployments.reports import CONFIG, report


def generation(replicas: int = 2) -> Generation:
    return Generation("manta.m.1.7", CONFIG, "h", {"m_0": replicas})


def target(*replica_ids: str) -> tuple[Target, ...]:
    endpoints = tuple(Endpoint(name, "n", 1, None) for name in replica_ids)
    return (Target("m_0", len(replica_ids), endpoints),)


def test_complete_once_every_replica_vouches() -> None:
    one = generation()
    assert not one.complete()
    assert one.note(report("a"), 0.0) and not one.complete()
    assert not one.note(report("a"), 1.0)  # a heartbeat changes nothing
    assert one.note(report("b"), 1.0) and one.complete()
    assert one.targets() == target("a", "b")


def test_an_error_is_told_and_gives_no_slot() -> None:
    one = generation(1)
    assert one.note(report(loaded=False, error="no such file", instances=0), 0.0)
    assert one.error() == "no such file" and not one.complete()
    assert one.targets() == target()


def test_silent_unhealthy_and_draining_replicas_give_no_slot() -> None:
    one = generation()
    one.note(report("a"), 0.0)
    one.note(report("b"), STALE_S)
    assert one.drop_stale(STALE_S + 0.1) and one.targets() == target("b")
    assert one.note(report("b", healthy=False), STALE_S + 1)
    assert one.targets() == target()
    one.note(report("b"), STALE_S + 2)
    assert one.note(report("b", draining=True), STALE_S + 3)
    assert one.targets() == target() and not one.reports


def test_after_a_lost_call_the_dead_drop_out_sooner() -> None:
    one = generation()
    one.note(report("alive"), 10.0)
    one.note(report("dead"), 10.0)
    one.suspect(10.0)
    one.note(report("alive"), 11.0)
    assert not one.drop_stale(10.0 + SUSPECT_S - 0.1)
    assert one.drop_stale(10.0 + SUSPECT_S + 0.1)
    assert set(one.reports) == {"alive"}


def test_readiness() -> None:
    catalogue = Catalogue(epoch=1)
    assert not catalogue.ready(strict=False)
    catalogue.started = True
    assert catalogue.ready(strict=True)  # nothing to load is ready
    version = catalogue.version("m", 1)
    version.state, version.current = ModelState.READY, generation(1)
    assert catalogue.ready(strict=False) and not catalogue.ready(strict=True)  # nobody serves it
    assert version.current is not None
    version.current.note(report(), 0.0)
    assert catalogue.ready(strict=True)
    other = catalogue.version("n", 1)
    other.state, other.reason = ModelState.UNAVAILABLE, "broken"
    assert catalogue.ready(strict=False) and not catalogue.ready(strict=True)
    other.reason = "unloaded"
    assert catalogue.ready(strict=True)
    catalogue.closing = True
    assert not catalogue.ready(strict=False)


def test_passive_replicas_are_waited_for_and_give_no_slot() -> None:
    one = Generation("manta.m.1.7", CONFIG, "h", {"m_0": 1, "m_1": 1})
    one.note(report("a"), 0.0)
    assert not one.complete()
    one.note(report("b", deployment="m_1", passive=True), 0.0)
    assert one.complete() and one.targets() == (*target("a"), Target("m_1", 0, ()))
    one.note(report("b", deployment="m_1"), 0.0)  # the control
    assert sum(each.slots for each in one.targets()) == 2


def test_a_model_with_passive_instances_alone_keeps_no_server_from_being_ready() -> None:
    catalogue = Catalogue(epoch=1)
    catalogue.started = True
    version = catalogue.version("m", 1)
    for passive in (True, False):  # the control: where somebody should serve, somebody must
        group = InstanceGroup(kind="KIND_CPU", count=1, passive=passive)
        config = CONFIG.model_copy(update={"instance_group": (group,)})
        version.state = ModelState.READY
        version.current = Generation("manta.m.1.7", config, "h", {"m_0": 1})
        assert catalogue.ready(strict=True) is passive


def test_the_snapshot_tells_what_serves() -> None:
    catalogue = Catalogue(epoch=3)
    version = catalogue.version("m", 1)
    version.state, version.current = ModelState.READY, generation(1)
    catalogue.version("untouched", 0)
    (one, untouched) = catalogue.snapshot(strict=False).versions
    assert (one.application, one.config, one.targets) == (
        "manta.m.1.7",
        CONFIG,
        target(),
    )
    assert untouched.state is ModelState.UNKNOWN and untouched.application == ""
    assert catalogue.find("manta.m.1.7") is version.current
    assert catalogue.find("manta.m.1.8") is None


def test_the_configuration_is_what_the_replicas_have_made_of_it() -> None:
    whole = CONFIG.model_copy(update={"max_batch_size": 3})
    one = generation()
    for replica in "ab":
        one.note(report(replica, config=whole), 0.0)
    assert one.config == CONFIG  # as it was planned
    assert one.settle() == "" and one.config == whole
    # A replacement that makes something else of it would answer other requests than Routers send.
    assert one.note(report("b", config=CONFIG), 1.0)
    assert one.targets() == target("a") and "complete its configuration differently" in one.error()


def test_replicas_that_disagree_do_not_load() -> None:
    one = generation()
    one.note(report("a"), 0.0)
    one.note(report("b", config=CONFIG.model_copy(update={"max_batch_size": 3})), 0.0)
    assert one.complete() and "complete its configuration differently" in one.settle()


def test_what_may_change_while_replicas_serve_is_taken_over() -> None:
    """They go on telling what they were made with, and count all the same."""
    one = generation(1)
    one.note(report("a"), 0.0)
    assert one.settle() == "" and not one.adjust(CONFIG)
    group = InstanceGroup(name="m_0", kind="KIND_CPU", count=2)
    changes = {"version_policy": VersionPolicy(all=True), "instance_group": (group,)}
    wanted = CONFIG.model_copy(update=changes)
    assert one.adjust(wanted) and one.config == wanted
    one.replicas = {"m_0": 2}
    assert not one.complete()
    one.note(report("a"), 1.0)
    one.note(report("b"), 1.0)
    assert one.complete() and one.targets() == target("a", "b") and one.error() == ""
    # The control: what else differs is another replica.
    one.note(report("b", config=CONFIG.model_copy(update={"max_batch_size": 3})), 2.0)
    assert one.targets() == target("a") and one.error()


def test_a_generation_knows_the_folder_of_the_files_that_it_was_given() -> None:
    assert generation().folder == ""
    given = [Override("{}"), Override("{}", "/somewhere")]
    assert [replace(generation(), override=one).folder for one in given] == ["", "/somewhere"]


ZERO = Autoscaling(min_count=0, max_count=3)


def scaled(count: int = 1) -> tuple[Catalogue, Version, Generation]:
    """One that serves, and is scaled, beside a passive group."""
    catalogue = Catalogue(epoch=1)
    catalogue.started = True
    version = catalogue.version("m", 1)
    version.state = ModelState.READY
    one = Generation("manta.m.1.7", CONFIG, "h", {"m_0": count, "m_1": 2})
    one.autoscaling, one.settled = {"m_0": ZERO}, True
    version.current = one
    return catalogue, version, one


def test_at_zero_and_on_the_way_back_a_version_is_ready() -> None:
    catalogue, version, one = scaled(0)
    assert one.count == 0 and one.resting and version.snapshot().resting
    assert catalogue.ready(strict=True)
    one.replicas, one.waking = {"m_0": 1, "m_1": 2}, True
    assert catalogue.ready(strict=True)
    one.note(report(deployment="m_1", passive=True), 0.0)
    assert one.waking  # a passive one answers nobody
    one.note(report("b"), 0.0)
    assert not one.waking and not one.resting and catalogue.ready(strict=True)
    one.drop_stale(STALE_S + 1)  # the control: a replica that is lost is none that rests
    assert not catalogue.ready(strict=True)
    assert version.snapshot().state is ModelState.READY


def test_one_that_wakes_and_does_not_load_is_unavailable() -> None:
    catalogue, version, one = scaled(1)
    one.waking = True
    one.note(report(loaded=False, error="no such file", instances=0), 0.0)
    told = version.snapshot()
    assert (told.state, told.reason) == (ModelState.UNAVAILABLE, "no such file")
    assert not told.resting and not catalogue.ready(strict=True)


def test_replicas_that_are_sent_away_get_nothing_and_are_not_heard() -> None:
    _, _, one = scaled(1)
    one.note(report("a"), 0.0)
    one.note(report("p", deployment="m_1", passive=True), 0.0)
    one.replicas = {"m_0": 0, "m_1": 2}
    one.rest()
    assert set(one.reports) == {"p"} and one.targets()[0].slots == 0
    assert not one.note(report("a"), 1.0) and set(one.reports) == {"p"}
    one.replicas, one.waking = {"m_0": 1, "m_1": 2}, True
    one.note(report("a"), 2.0)
    assert one.waking and one.resting
    assert one.note(report("b"), 2.0) and one.targets()[0].slots == 1 and not one.waking


def test_bounds_are_taken_over_and_make_no_other_replica() -> None:
    one = generation(1)
    one.settle()
    config = CONFIG.model_copy(update={"parameters": {"AUTOSCALING": '{"max_count": 2}', "K": "v"}})
    assert one.adjust(config) and one.config.parameters == {"AUTOSCALING": '{"max_count": 2}'}
    assert one.note(report(), 0.0) and one.targets() == target("a")  # it has its spec's bounds
    assert one.adjust(CONFIG) and one.config == CONFIG


def test_none_is_awaited_where_none_is_wanted_after_all() -> None:
    one = generation(0)
    one.autoscaling = {"m_0": Autoscaling(min_count=0, max_count=2)}
    one.waking, one.replicas = one.resting, {"m_0": 1}
    one.restore({"m_0": 0})
    assert not one.waking and one.resting
    one.waking, one.replicas = True, {"m_0": 2}
    one.restore({"m_0": 1})
    assert one.waking  # the first still is
