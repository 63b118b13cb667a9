"""Loads that bring a configuration or files, and changes in place."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from tritonclient.utils import InferenceServerException

from tests import models
from tests.serve import repository
from tests.serve.clients import infer, rows
from tests.serve.server import Server, wait_equal, wait_for
from tests.serve.times import (
    LOAD_S,
    X,
    asking,
    config_of,
    entries,
    factor,
    refused,
    replicas,
    times_config,
    write_times,
)

CONFIG = repository.config([repository.tensor("x", "2")], [repository.tensor("OUTPUT__0", "2")])
LEAVE_S = 120.0


class Twice(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


def none_left(folder: Path) -> None:
    wait_for(lambda: not list(folder.iterdir()), LEAVE_S, "given files are removed")


# --- a configuration and files with the request --------------------------------------------------


@pytest.fixture
def control(models_root: Path, http: Any) -> Iterator[Path]:
    """A model of two versions, 1 as it is and 2 doubled, that nobody else uses."""
    folder = models_root / "control"
    models.save_torchscript(models.identity(), models_root, "control")
    (folder / "2").mkdir()
    torch.jit.save(torch.jit.script(Twice()), str(folder / "2" / "model.pt"))
    repository.write_config(models_root, "control", CONFIG)
    yield folder
    http.unload_model("control")
    shutil.rmtree(folder)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_given_configuration_stays_until_the_model_is_unloaded(
    request: pytest.FixtureRequest, control: Path, protocol: str
) -> None:
    client = request.getfixturevalue(protocol)
    client.load_model("control")
    shown = config_of(client, "control")
    assert shown["max_batch_size"] == 32 and factor(client, "control", "OUTPUT__0") == 2
    given = {**shown, "max_batch_size": 4, "version_policy": {"specific": {"versions": [1]}}}
    given["dynamic_batching"] = {}
    client.load_model("control", config=json.dumps(given))
    for _ in range(2):
        assert config_of(client, "control")["max_batch_size"] == 4
        assert factor(client, "control", "OUTPUT__0") == 1
        refused(lambda: infer(client, "control", {"x": rows(5, 2)}), "400", "must be <= 4")
        assert not client.is_model_ready("control", "2")
        client.load_model("control")  # and this changes nothing
    client.unload_model("control")
    client.load_model("control")
    assert config_of(client, "control")["max_batch_size"] == 32
    assert factor(client, "control", "OUTPUT__0") == 2


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_what_is_wrong_with_a_load_is_told_and_what_serves_goes_on(
    request: pytest.FixtureRequest, control: Path, protocol: str
) -> None:
    client = request.getfixturevalue(protocol)
    client.load_model("control")
    data = (control / "1" / "model.pt").read_bytes()
    config = json.dumps(config_of(client, "control"))

    def load(**given: Any) -> Any:
        return lambda: client.load_model("control", **given)

    refused(load(config='{"max_batch": 4}'), "400", "load failed .* no field named")
    refused(load(config="{"), "400", "load failed for model 'control': config: Expecting")
    refused(load(config='{"name": "mlp"}'), "400", "must be left out or equal")
    missing = {"version_policy": {"specific": {"versions": [9]}}}
    given = json.dumps({**json.loads(config), **missing})
    refused(load(config=given), "400", "version 9 is at UNAVAILABLE state: unable to find")
    refused(load(files={"file:1/model.pt": data}), "500", "failed to poll from model repository")
    for path in ("../x/model.pt", "/tmp/model.pt", "1/../../model.pt", "", "1//model.pt"):
        refused(load(config=config, files={f"file:{path}": data}), "400", "must not leave")
    broken = {"file:1/model.pt": b"no archive"}
    refused(load(config=config, files=broken), "400", "version 1 is at UNAVAILABLE state")
    refused(load(config=config, files={"file:labels.txt": b""}), "400", "at least one version")
    assert factor(client, "control", "OUTPUT__0") == 2
    ready = {"name": "control", "version": "2", "state": "READY"}
    assert ready in entries(client, "control")
    client.load_model("control")  # nothing of all that is in force
    assert factor(client, "control", "OUTPUT__0") == 2


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_given_files_are_served_until_the_next_load_without(
    request: pytest.FixtureRequest, control: Path, overrides_root: Path, protocol: str
) -> None:
    client = request.getfixturevalue(protocol)
    none_left(overrides_root)
    client.load_model("control")
    config = json.dumps(config_of(client, "control"))
    data = (control / "1" / "model.pt").read_bytes()
    client.load_model("control", config=config, files={"file:5/model.pt": data})
    assert not client.is_model_ready("control", "2")  # only what was given counts
    assert client.is_model_ready("control", "5") and factor(client, "control", "OUTPUT__0") == 1
    (folder,) = overrides_root.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    client.load_model("control")
    assert client.is_model_ready("control", "2") and factor(client, "control", "OUTPUT__0") == 2
    assert not client.is_model_ready("control", "5")
    none_left(overrides_root)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_model_that_no_repository_has(
    request: pytest.FixtureRequest, control: Path, overrides_root: Path, protocol: str
) -> None:
    client = request.getfixturevalue(protocol)
    data = (control / "2" / "model.pt").read_bytes()
    config = json.dumps(
        {
            "platform": "pytorch_libtorch",
            "input": [{"name": "x", "data_type": "TYPE_FP32", "dims": [1, 2]}],
            "output": [{"name": "OUTPUT__0", "data_type": "TYPE_FP32", "dims": [1, 2]}],
            "max_batch_size": 0,
        }
    )
    client.load_model("homeless", config=config, files={"file:1/model.pt": data})
    assert factor(client, "homeless", "OUTPUT__0") == 2
    assert entries(client, "homeless") == [{"name": "homeless", "version": "1", "state": "READY"}]
    refused(lambda: client.load_model("homeless"), "500", "failed to poll from model repository")
    assert factor(client, "homeless", "OUTPUT__0") == 2
    client.unload_model("homeless")
    none_left(overrides_root)
    refused(lambda: infer(client, "homeless", {"x": X}), "404", "no available versions")


def test_what_was_given_outlives_the_controller(
    server: Server, control: Path, overrides_root: Path, http: Any
) -> None:
    """It asks the replicas; nothing is loaded anew, and the files stay where they are."""
    none_left(overrides_root)
    http.load_model("control")
    given = json.dumps({**config_of(http, "control"), "max_batch_size": 32})
    data = (control / "1" / "model.pt").read_bytes()
    http.load_model("control", config=given, files={"file:2/model.pt": data})
    before = replicas(server, "control", 2)
    (pid,) = server.replica_pids("manta:Controller")
    os.kill(pid, signal.SIGKILL)

    def answers() -> bool:
        with contextlib.suppress(InferenceServerException):
            http.get_inference_statistics("control")
            return bool({*server.replica_pids("manta:Controller")} - {pid})
        return False

    wait_for(answers, LOAD_S, "the new Controller answers")
    assert factor(http, "control", "OUTPUT__0") == 1
    wait_for(lambda: replicas(server, "control", 2) == before, LOAD_S, "it is adopted")
    http.load_model("control")
    assert factor(http, "control", "OUTPUT__0") == 2
    none_left(overrides_root)


def test_parameters_that_only_a_hand_made_request_has(server: Server, control: Path) -> None:
    path = f"http://{server.http}/v2/repository/models/control/load"
    for parameters, status in (
        ({"config": {}}, 500),
        ({"x": "y"}, 500),
        ({"config": "{}", "file:1/model.pt": "not base64"}, 400),
    ):
        reply = httpx.post(path, json={"parameters": parameters}, timeout=60)
        assert reply.status_code == status and reply.json()["error"], reply.text
    assert server.ready()


BAD_NAMES = ["..", "../mlp", "a/../mlp", "/etc/passwd", "mlp/", " ..", "", " ", "a\r\nb", "x" * 256]


@pytest.mark.parametrize("name", [*BAD_NAMES, "%2e%2e%2f"])
def test_names_that_lead_elsewhere_are_refused_by_every_call(
    server: Server, grpc: Any, name: str
) -> None:
    calls = (
        lambda: grpc.load_model(name),
        lambda: grpc.unload_model(name),
        lambda: grpc.get_model_metadata(name),
        lambda: grpc.get_model_config(name),
        lambda: grpc.is_model_ready(name),
        lambda: infer(grpc, name, {"x": X}),
    )
    for call in calls:
        refused(call, "400", "(?i)model name")
    escaped = "".join(f"%{byte:02x}" for byte in name.encode())
    base = f"http://{server.http}/v2"
    for verb in ("load", "unload"):
        reply = httpx.post(f"{base}/repository/models/{escaped}/{verb}", timeout=60)
        assert reply.status_code == 400 and "odel name" in reply.json()["error"], reply.text
    # Where a name has a slash, the whole path is none of the table.
    expected = 404 if "/" in name or not name else 400
    for path in ("", "/config", "/ready", "/stats"):
        if name or path:
            reply = httpx.get(f"{base}/models/{escaped}{path}", timeout=60)
            assert reply.status_code in (expected, 400)
    reply = httpx.post(f"{base}/models/{escaped}/infer", json={"inputs": []}, timeout=60)
    assert reply.status_code == expected and reply.json()["error"], reply.text
    assert server.ready()


# --- changes in place ----------------------------------------------------------------------------


def test_more_and_fewer_instances_while_requests_go_on(
    server: Server, models_root: Path, http: Any
) -> None:
    def group(count: int) -> str:
        return f"instance_group [ {{ kind: KIND_CPU count: {count} }} ]\n"

    write_times(models_root, "resized", 3)
    repository.write_config(models_root, "resized", times_config(group(1)))
    http.load_model("resized")
    ((pid, application),) = replicas(server, "resized").items()
    with asking(server, "resized", "y") as answers:
        for count in (3, 1):
            repository.write_config(models_root, "resized", times_config(group(count)))
            http.load_model("resized")
            found = replicas(server, "resized")
            assert set(found.values()) == {application}
            if count == 3:
                assert len(found) == 3 and pid in found
            shown = config_of(http, "resized")["instance_group"]
            assert [one["count"] for one in shown] == [count]
        wait_for(lambda: len(replicas(server, "resized")) == 1, LEAVE_S, "two have left")
    assert set(answers) == {3.0}
    http.unload_model("resized")
    shutil.rmtree(models_root / "resized")


def test_versions_come_and_go_beside_one_that_stays(
    server: Server, control: Path, http: Any
) -> None:
    http.load_model("control")
    before = replicas(server, "control", 2)
    with asking(server, "control", "OUTPUT__0") as answers:
        repository.write_config(control.parent, "control", CONFIG + "version_policy { all { } }")
        http.load_model("control")
        assert http.get_model_metadata("control")["versions"] == ["1", "2"]
        assert config_of(http, "control")["version_policy"] == {"all": {}}
        repository.write_config(control.parent, "control", CONFIG + "# and this is a comment\n")
        http.load_model("control")
        assert http.get_model_metadata("control")["versions"] == ["2"]
    assert set(answers) == {2.0}
    wait_equal(lambda: replicas(server, "control", 2), before, LOAD_S)  # one may be late to report


def test_what_has_not_changed_is_not_loaded_again(server: Server, control: Path, http: Any) -> None:
    http.load_model("control")
    before = replicas(server, "control", 2)
    (control / "2" / "model.pt").touch()
    http.load_model("control")
    wait_equal(lambda: replicas(server, "control", 2), before, LOAD_S)
    (control / "2" / "extra.txt").write_text("read by nobody, and part of the version")
    http.load_model("control")  # the control
    after = replicas(server, "control", 2)
    assert not set(before.values()) & set(after.values())


def test_the_index_has_what_is_on_disk_now(models_root: Path, http: Any, grpc: Any) -> None:
    (models_root / "just_here" / "1").mkdir(parents=True)
    for client in (http, grpc):
        assert entries(client, "just_here") == [{"name": "just_here"}]
    shutil.rmtree(models_root / "just_here")
    for client in (http, grpc):
        assert entries(client, "just_here") == []
