"""Loads that bring a configuration or files, changes in place, and a repository that is polled."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
from tritonclient.utils import InferenceServerException

from tests import models
from tests.serve import repository
from tests.serve.clients import infer, rows
from tests.serve.server import Server, manta_serve, wait_for

X = rows(1, 2)
CONFIG = repository.config([repository.tensor("x", "2")], [repository.tensor("OUTPUT__0", "2")])
STATUS = {
    "400": "INVALID_ARGUMENT",
    "404": "NOT_FOUND",
    "500": "INTERNAL",
    "501": "UNIMPLEMENTED",
    "503": "UNAVAILABLE",
}
LEAVE_S, LOAD_S = 60.0, 60.0

TIMES = """
import torch

class Times(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x * self.factor
"""


class Twice(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


def write_times(root: Path, name: str, factor: float, version: int = 1) -> Path:
    """A model that multiplies, by weights whose file has the same size for any factor."""
    folder = root / name / str(version)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.py").write_text(TIMES)
    torch.save({"factor": torch.tensor([float(factor)])}, folder / "model.pt")
    return folder / "model.pt"


def times_config(more: str = "", max_batch_size: int = 32) -> str:
    return repository.config(
        [repository.tensor("x", "2")],
        [repository.tensor("y", "2")],
        engine='backend: "pytorch"\nruntime: "model.py"',
        max_batch_size=max_batch_size,
        more=repository.EAGER + more,
    )


def factor(client: Any, name: str, output: str = "y", **options: Any) -> float:
    reply = infer(client, name, {"x": X}, **options).as_numpy(output)
    return float(np.round(reply[0, 0] / X[0, 0], 5))


def entries(client: Any, name: str) -> list[dict[str, str]]:
    index = client.get_model_repository_index()
    if not isinstance(index, list):
        keys = ("name", "version", "state", "reason")
        index = [{k: getattr(m, k) for k in keys if getattr(m, k)} for m in index.models]
    return [dict(one) for one in index if one["name"] == name]


def config_of(client: Any, name: str) -> dict[str, Any]:
    """As JSON, whatever the protocol."""
    if type(client).__module__.startswith("tritonclient.grpc"):
        shown: dict[str, Any] = client.get_model_config(name, as_json=True)["config"]
        return shown
    return dict(client.get_model_config(name))


def replicas(server: Server, name: str, version: int = 1) -> dict[int, str]:
    """Process -> application, for the replicas of a version."""
    prefix = f"manta.{name}.{version}."
    found = server.peek()["replicas"]
    return {r["pid"]: r["application"] for r in found if r["application"].startswith(prefix)}


def refused(call: Any, status: str, text: str) -> None:
    with pytest.raises(InferenceServerException, match=text) as caught:
        call()
    shown = str(caught.value.status()).removeprefix("StatusCode.")
    assert shown in (status, STATUS[status])


@contextlib.contextmanager
def asking(server: Server, name: str, output: str) -> Iterator[list[float]]:
    """Requests over both protocols all the while; every one of them must be answered."""
    stop = threading.Event()
    answers: list[float] = []
    errors: list[str] = []

    def ask(module: Any, address: str) -> None:
        # A client of its own, made where it is used: gevent's are bound to their thread.
        with contextlib.closing(module.InferenceServerClient(address)) as client:
            while not stop.is_set():
                try:
                    answers.append(factor(client, name, output))
                except Exception as error:
                    errors.append(repr(error))

    roads = [(httpclient, server.http), (grpcclient, server.grpc)] * 2
    threads = [threading.Thread(target=ask, args=road) for road in roads]
    for thread in threads:
        thread.start()
    try:
        yield answers
        before = len(answers)
        wait_for(lambda: len(answers) > before + 20, LOAD_S, "requests are still answered")
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert not errors, errors[:3]


def none_left(folder: Path) -> None:
    wait_for(lambda: not list(folder.iterdir()), LEAVE_S, "given files are removed")


# --- explicit mode: a configuration and files with the request -----------------------------------


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
            return server.replica_pids("manta:Controller") != [pid]
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
        reply = httpx.post(f"{base}/repository/models/{escaped}/{verb}")
        assert reply.status_code == 400 and "odel name" in reply.json()["error"], reply.text
    # Where a name has a slash, the whole path is none of the table.
    expected = 404 if "/" in name or not name else 400
    for path in ("", "/config", "/ready", "/stats"):
        if name or path:
            assert httpx.get(f"{base}/models/{escaped}{path}").status_code in (expected, 400)
    reply = httpx.post(f"{base}/models/{escaped}/infer", json={"inputs": []})
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
    assert replicas(server, "control", 2) == before


def test_what_has_not_changed_is_not_loaded_again(server: Server, control: Path, http: Any) -> None:
    http.load_model("control")
    before = replicas(server, "control", 2)
    (control / "2" / "model.pt").touch()
    http.load_model("control")
    assert replicas(server, "control", 2) == before
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


# --- poll mode -----------------------------------------------------------------------------------

FLAKY = """
import os
import torch

if not os.path.exists(MARK):
    open(MARK, "w").close()
    raise RuntimeError("the first time it does not load")

class Flaky(torch.nn.Module):
    def forward(self, x):
        return x
"""


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    write_times(one, "steady", 1)
    repository.write_config(one, "steady", times_config())
    write_times(one, "custom", 1)
    repository.write_config(one, "custom", times_config())
    (one / "custom" / "configs").mkdir()
    chosen = times_config(max_batch_size=7)
    (one / "custom" / "configs" / "chosen.pbtxt").write_text(chosen)
    mark = str(two.parent / "flaky_mark")
    models.save_eager(FLAKY.replace("MARK", repr(mark)), two, "flaky")
    repository.write_config(two, "flaky", times_config())
    for root in (one, two):
        write_times(root, "twin", 4)
        repository.write_config(root, "twin", times_config())
    return one, two


@pytest.fixture(scope="module")
def polled(roots: tuple[Path, Path]) -> Iterator[Server]:
    flags = ["--model-control-mode=poll", "--repository-poll-secs=1", "--exit-on-error=false"]
    flags += ["--strict-readiness=false", f"--model-repository={roots[1]}"]
    flags += ["--model-config-name=chosen", "--model-load-retry-count=1"]
    with manta_serve(roots[0], *flags) as server:
        server.wait_ready()
        yield server
        assert server.stop() == 0, server.output()[-3000:]


@pytest.fixture
def clients(polled: Server) -> Iterator[tuple[Any, Any]]:
    http = httpclient.InferenceServerClient(polled.http, network_timeout=120)
    grpc = grpcclient.InferenceServerClient(polled.grpc)
    yield http, grpc
    http.close()
    grpc.close()


def becomes(client: Any, name: str, wanted: float, **options: Any) -> None:
    """The model multiplies by `wanted` before long."""

    def is_so() -> bool:
        with contextlib.suppress(InferenceServerException):
            return factor(client, name, **options) == wanted
        return False

    wait_for(is_so, LOAD_S, f"{name} multiplies by {wanted}")


def test_polled_models_are_not_the_clients_to_load(clients: tuple[Any, Any]) -> None:
    text = "explicit model load / unload is not allowed if polling is enabled"
    for client in clients:
        for call in (client.load_model, client.unload_model):
            refused(lambda call=call: call("steady"), "503", text)
        assert factor(client, "steady") == 1


def test_a_configuration_of_the_chosen_name(clients: tuple[Any, Any]) -> None:
    for client in clients:
        assert config_of(client, "custom")["max_batch_size"] == 7
        assert config_of(client, "steady")["max_batch_size"] == 32  # it has none of that name


def test_a_load_that_fails_is_tried_again(polled: Server, clients: tuple[Any, Any]) -> None:
    for client in clients:
        assert client.is_model_ready("flaky") and factor(client, "flaky") == 1
    lines = [line for line in polled.output().splitlines() if "'flaky'" in line]
    told = [line for line in lines if line.endswith("it is tried again")]
    assert len(told) == 1 and "the first time it does not load" in told[0]


def test_twins_are_unavailable_until_one_of_them_is_gone(
    roots: tuple[Path, Path], clients: tuple[Any, Any]
) -> None:
    http, _ = clients
    reason = "model appears in two or more repositories"
    duplicate = [{"name": "twin", "state": "UNAVAILABLE", "reason": reason}]
    for client in clients:
        assert entries(client, "twin") == duplicate
        assert not client.is_model_ready("twin")
    shutil.rmtree(roots[1] / "twin")
    becomes(http, "twin", 4)
    shutil.copytree(roots[0] / "twin", roots[1] / "twin")
    wait_for(lambda: not http.is_model_ready("twin"), LOAD_S, "twin is unavailable")
    assert entries(http, "twin") == duplicate
    refused(lambda: factor(http, "twin"), "404", "no available versions")
    shutil.rmtree(roots[0] / "twin")
    becomes(http, "twin", 4)


def test_models_versions_files_and_configurations_are_followed(
    polled: Server, roots: tuple[Path, Path], clients: tuple[Any, Any]
) -> None:
    http, grpc = clients
    _, root = roots
    steady = replicas(polled, "steady")
    write_times(root, "moving", 2)
    repository.write_config(root, "moving", times_config())
    becomes(http, "moving", 2)

    write_times(root, "moving", 5, version=2)  # a version comes
    becomes(grpc, "moving", 5)
    wait_for(lambda: not http.is_model_ready("moving", "1"), LOAD_S, "only the latest is served")
    shutil.rmtree(root / "moving" / "2")  # and goes
    becomes(http, "moving", 2)

    file = root / "moving" / "1" / "model.pt"  # a file changes, and does not look it
    before = file.stat()
    write_times(root, "moving", 3)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    becomes(grpc, "moving", 3)

    repository.write_config(root, "moving", times_config(max_batch_size=8))

    def batch() -> int:
        return int(config_of(http, "moving")["max_batch_size"])

    wait_for(lambda: batch() == 8, LOAD_S, "a new configuration")
    assert factor(http, "moving") == 3

    shutil.rmtree(root / "moving")
    wait_for(lambda: not grpc.is_model_ready("moving"), LOAD_S, "it is gone")
    for client in clients:
        refused(lambda client=client: factor(client, "moving"), "404", "no available versions")
    assert replicas(polled, "steady") == steady  # all this was none of its business


def test_what_cannot_be_loaded_leaves_the_old_one_until_it_can(
    polled: Server, roots: tuple[Path, Path], clients: tuple[Any, Any]
) -> None:
    http, _ = clients
    root, _ = roots
    write_times(root, "mended", 2)
    repository.write_config(root, "mended", times_config())
    becomes(http, "mended", 2)
    with asking(polled, "mended", "y") as answers:
        file = root / "mended" / "1" / "model.py"
        file.write_text('raise RuntimeError("it is not mended yet")')
        wait_for(lambda: "it is not mended yet" in polled.output(), LOAD_S, "the failure is told")
        assert entries(http, "mended") == [{"name": "mended", "version": "1", "state": "READY"}]
        (root / "mended" / "config.pbtxt").write_text("no configuration")
        wait_for(lambda: "mended/config.pbtxt:1" in polled.output(), LOAD_S, "this one, too")
        assert factor(http, "mended") == 2
        write_times(root, "mended", 7)
        repository.write_config(root, "mended", times_config())
        wait_for(lambda: answers[-1] == 7, LOAD_S, "it is mended")
    assert set(answers) == {2.0, 7.0}


def test_what_is_only_touched_is_not_loaded_again(
    polled: Server, roots: tuple[Path, Path], clients: tuple[Any, Any]
) -> None:
    before = replicas(polled, "steady")
    folder = roots[0] / "steady"
    (folder / "1" / "model.py").touch()
    (folder / "config.pbtxt").write_text((folder / "config.pbtxt").read_text() + "# a comment\n")
    # Told by what comes after it: a change that is seen at the same look, or a later one.
    write_times(roots[1], "witness", 6)
    repository.write_config(roots[1], "witness", times_config())
    becomes(clients[0], "witness", 6)
    time.sleep(2)
    assert replicas(polled, "steady") == before
