from __future__ import annotations

import pytest

from deployments.directory import Directory
from deployments.errors import (
    InvalidArgument,
    MantaError,
    NoAvailableVersion,
    NotReady,
    UnknownModel,
    UnknownVersion,
)
from deployments.types import ModelState

from .serving import Server

LINEAR = "linear"


@pytest.fixture
def server():
    server = Server()
    server.versions = [
        server.version(LINEAR, 2),
        server.version(LINEAR, 10),
        server.version(LINEAR, 11, ModelState.UNAVAILABLE, "broken"),
        server.version("gone", 1, ModelState.UNAVAILABLE, "unloaded"),
        server.version("empty", 0, ModelState.UNAVAILABLE, "no config"),
    ]
    server.publish()
    return server


@pytest.mark.parametrize(("version", "found"), [("", 10), ("2", 2), ("10", 10), ("0002", 2)])
def test_a_ready_version_is_found(server, version, found):
    served = server.directory.find(LINEAR, version)
    assert served.snapshot.version == found
    assert served.gate is server.gates[LINEAR]


@pytest.mark.parametrize(
    ("name", "version", "error", "text"),
    [
        ("nobody", "", UnknownModel, "Request for unknown model: 'nobody' is not found"),
        ("nobody", "1", UnknownModel, "Request for unknown model: 'nobody' is not found"),
        (LINEAR, "3", UnknownVersion, "'linear' version 3 is not found"),
        (LINEAR, "11", NotReady, "'linear' version 11 is not at ready state"),
        ("gone", "", NoAvailableVersion, "'gone' has no available versions"),
        ("empty", "", NoAvailableVersion, "'empty' has no available versions"),
        ("gone", "1", NotReady, "'gone' version 1 is not at ready state"),
        *(
            (LINEAR, version, InvalidArgument, "version should be an integer > 0")
            for version in ("0", "-1", "x", "1.0", "²", "1e3", " 1", "9" * 19, "9" * 5000)
        ),
    ],
)
def test_what_is_not_there_is_told_why(server, name, version, error, text):
    with pytest.raises(MantaError) as raised:
        server.directory.find(name, version)
    assert type(raised.value) is error
    assert text in str(raised.value)


def test_a_version_without_a_gate_is_not_ready(server):
    server.directory.update(server.directory.snapshot(), {})
    with pytest.raises(NotReady):
        server.directory.find(LINEAR, "2")


def test_a_version_that_loads_anew_is_served_by_its_old_application(server):
    server.versions = [server.version(LINEAR, 2, ModelState.LOADING)]
    server.publish()
    assert server.directory.find(LINEAR, "").snapshot.version == 2


def test_before_the_first_snapshot_nothing_is_known():
    directory = Directory()
    assert not directory.snapshot().started
    with pytest.raises(UnknownModel):
        directory.find(LINEAR, "")


def test_an_update_replaces_everything(server):
    server.versions = []
    server.publish()
    with pytest.raises(UnknownModel):
        server.directory.find(LINEAR, "2")


def test_what_lanes_have_learned_stays_while_the_application_stays(server):
    served = server.directory.find(LINEAR, "2")
    served.http_plans.seen(b"{}")
    server.versions[0] = server.version(LINEAR, 2)
    server.publish(ready=False)
    again = server.directory.find(LINEAR, "2")
    assert again is not served and again.http_plans is served.http_plans
    assert again.grpc_plans is served.grpc_plans is not served.http_plans
    assert again.contract is served.contract
    assert server.directory.find(LINEAR, "10").http_plans is not served.http_plans


def test_another_application_starts_with_nothing_learned(server):
    before = server.directory.find(LINEAR, "2")
    server.gates[LINEAR] = Server().gates[LINEAR]
    server.publish()
    after = server.directory.find(LINEAR, "2")
    assert after.http_plans is not before.http_plans
    assert after.grpc_plans is not before.grpc_plans
