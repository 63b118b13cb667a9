"""Who may ask for counts, the index, load and unload, and what reaches the Controller."""

from __future__ import annotations

import asyncio

import pytest

from deployments.errors import ControlDisabled, InvalidArgument, MantaError
from deployments.types import ModelState

from .serving import Server


@pytest.fixture(scope="module")
def server():
    return Server()


def test_index():
    server = Server()
    server.versions = [
        server.version("linear", 1),
        server.version("gone", 2, ModelState.UNAVAILABLE, "unloaded"),
        server.version("broken", 0, ModelState.UNAVAILABLE, "config.pbtxt: line 3"),
        server.version("untouched", 0, ModelState.UNKNOWN),
    ]
    server.publish()
    administration = server.inference.administration
    ready = {"name": "linear", "version": "1", "state": "READY"}
    assert asyncio.run(administration.index(False)) == [
        {"name": "broken", "state": "UNAVAILABLE", "reason": "config.pbtxt: line 3"},
        {"name": "gone", "version": "2", "state": "UNAVAILABLE", "reason": "unloaded"},
        ready,
        {"name": "untouched"},
    ]
    assert asyncio.run(administration.index(True)) == [ready]


def test_control_is_off_unless_explicit(server):
    administration = server.inference.administration
    for verb in (administration.load, administration.unload):
        with pytest.raises(ControlDisabled):
            asyncio.run(verb("linear", {}))
    assert server.controller.calls == []


def test_control_reaches_the_controller():
    server = Server(model_control_mode="explicit", allow_file_override=True)
    administration = server.inference.administration
    given = {"config": "{}", "file:1/model.pt": b"x"}
    asyncio.run(administration.load("linear", {}))
    asyncio.run(administration.load("linear", given))
    asyncio.run(administration.unload("linear", {"unload_dependents": True}))
    assert server.controller.calls == [
        ("load", "linear", {}),
        ("load", "linear", given),
        ("unload", "linear", {"unload_dependents": True}),
    ]
    for verb, parameters in (
        (administration.load, {"config": 1}),
        (administration.load, {"file:1/model.pt": b""}),
        (administration.load, {"config": "{}", "file:../x": b""}),
        (administration.load, {"x": 1}),
        (administration.unload, {"x": 1}),
        (administration.unload, {"unload_dependents": 1}),
    ):
        with pytest.raises(MantaError):
            asyncio.run(verb("linear", parameters))
    assert len(server.controller.calls) == 3


def test_in_poll_mode_clients_have_no_control():
    server = Server(model_control_mode="poll")
    administration = server.inference.administration
    for verb in (administration.load, administration.unload):
        with pytest.raises(ControlDisabled) as caught:
            asyncio.run(verb("linear", {}))
    assert str(caught.value) == (
        "explicit model load / unload is not allowed if polling is enabled"
    )


def test_statistics(server):
    administration = server.inference.administration
    report = asyncio.run(administration.statistics("linear", "1"))
    assert report["model_stats"][0]["name"] == "linear"
    with pytest.raises(InvalidArgument, match="^requested model 'x' is not available$"):
        asyncio.run(administration.statistics("x", ""))
    with pytest.raises(
        InvalidArgument, match="^requested model version is not available for model 'linear'$"
    ):
        asyncio.run(administration.statistics("linear", "9"))
    asyncio.run(administration.statistics("", "9"))  # of all, whatever the version
    assert server.controller.calls[-1] == ("statistics", "", "")
