"""A repository that is polled: what changes on disk is followed, by a server of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
from tritonclient.utils import InferenceServerException

from tests import models
from tests.serve import repository
from tests.serve.server import Server, manta_serve, wait_equal, wait_for
from tests.serve.times import (
    LOAD_S,
    asking,
    config_of,
    entries,
    factor,
    refused,
    replicas,
    times_config,
    write_times,
)

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

    def told() -> list[str]:
        lines = [line for line in polled.output().splitlines() if "'flaky'" in line]
        return [line for line in lines if line.endswith("it is tried again")]

    wait_for(told, 30, "the failure is told")
    assert len(told()) == 1 and "the first time it does not load" in told()[0]


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
    # With the reason, after it has left.
    wait_equal(lambda: entries(http, "twin"), duplicate, LOAD_S)
    refused(lambda: factor(http, "twin"), "404", "no available versions")
    shutil.rmtree(roots[0] / "twin")
    becomes(http, "twin", 4)


def test_models_versions_files_and_configurations_are_followed(
    polled: Server, roots: tuple[Path, Path], clients: tuple[Any, Any]
) -> None:
    http, grpc = clients
    _, root = roots
    steady = wait_for(lambda: replicas(polled, "steady"), 60, "steady has a replica")
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
    # All this was none of its business.
    wait_equal(lambda: replicas(polled, "steady"), steady, 60)


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
    before = wait_for(lambda: replicas(polled, "steady"), 60, "steady has a replica")
    folder = roots[0] / "steady"
    (folder / "1" / "model.py").touch()
    (folder / "config.pbtxt").write_text((folder / "config.pbtxt").read_text() + "# a comment\n")
    # Told by what comes after it: a change that is seen at the same look, or a later one.
    write_times(roots[1], "witness", 6)
    repository.write_config(roots[1], "witness", times_config())
    becomes(clients[0], "witness", 6)
    time.sleep(2)
    wait_equal(lambda: replicas(polled, "steady"), before, 60)
