"""Requests made from /openapi.json, right ones and wrong ones: every answer is one that document
and protocol have, within a limit, and the server goes on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis

from tests.serve.fuzz import Found, Target, fuzz, fuzz_methods
from tests.serve.protocol_rules import GOOD, TOLERATED, VALUES, expected, right_bodies
from tests.serve.server import ROOT, Server, wait_for

# To make the requests takes the processor, which a server with its clients may have as well.
pytestmark = pytest.mark.timeout(900)

# Those that answer at once; `slow` sleeps as long as it is told, `picky` waits for a fuller batch.
MODELS = ("mlp", "eager_mlp", "shared", "strings", "big", "seed")
FEW = ("mlp", "strings")
LOGGING = "/v2/logging"
# Of these null brings back what the server began with.
TRACES = ("/v2/trace/setting", *(f"/v2/models/{model}/trace/setting" for model in VALUES["model"]))


@pytest.fixture
def region() -> Iterator[str]:
    """The key of shared memory that is there."""
    memory = SharedMemory(create=True, size=64)
    yield f"/{memory.name}"
    memory.close()
    memory.unlink()


@pytest.fixture
def target(
    server: Server, models_root: Path, region: str, request: pytest.FixtureRequest
) -> Iterator[Target]:
    """The shared server, which is left as it was."""
    models = MODELS if request.node.get_closest_marker("long") else FEW
    with httpx.Client(base_url=f"http://{server.http}", timeout=60) as client:
        before = {path: client.get(path) for path in (LOGGING, *TRACES)}
        index = settled_index(client)
        secrets = [str(models_root), str(server.folder), str(ROOT), sys.prefix]
        yield Target(
            f"http://{server.http}",
            client.get("/openapi.json").json(),
            VALUES,
            right_bodies(region),
            expected,
            TOLERATED,
            [*secrets, server._ray_address()],
            lambda path: _is_chosen(path, models),
            _sparing({entry["name"] for entry in index}, region),
        )
        for path, was in before.items():
            if was.is_success:
                settings = was.json() if path == LOGGING else dict.fromkeys(was.json())
                fixed = ("log_file", "trace_file", "trace_mode")
                changes = {key: settings[key] for key in settings if key not in fixed}
                assert client.post(path, json=changes).json() == was.json()
        assert client.post("/v2/systemsharedmemory/unregister").is_success
        assert settled_index(client) == index


def settled_index(client: httpx.Client) -> Any:
    """Once what others have unloaded is gone."""

    def settled() -> Any:
        index = client.post("/v2/repository/index").json()
        return None if "UNLOADING" in {entry.get("state") for entry in index} else index

    return wait_for(settled, 120, "nothing is being unloaded")


def _is_chosen(path: str, models: Sequence[str]) -> bool:
    name = path.removeprefix("/v2/models/").partition("/")[0]
    return not path.startswith("/v2/models/") or name in (*models, "{model}", "stats")


def _sparing(known: set[str], region: str) -> Callable[[schemathesis.Case], None]:
    """Nothing that is there is loaded anew or unloaded; some regions name memory that exists."""

    def spare(case: schemathesis.Case) -> None:
        if case.path.endswith(("/load", "/unload")) and case.path_parameters["model"] in known:
            case.path_parameters["model"] = "nobody"
        if case.path.endswith("/register") and isinstance(case.body, dict):
            if len(str(case.body.get("key", ""))) % 2:
                case.body["key"] = region

    return spare


def run(server: Server, target: Target, examples: int, *, fixed: bool) -> Found:
    with httpx.Client(base_url=f"http://{server.http}", timeout=60) as client:

        def infer() -> Any:
            return client.post("/v2/models/mlp/infer", json=GOOD).json()

        def alive() -> None:
            assert infer() == right

        right = infer()
        assert right["outputs"][0]["shape"] == [1, 4]
        found = fuzz(target, examples, alive, fixed=fixed)
        alive()
    print(found.table())
    assert not found.faults, "\n\n".join(f"{name}: {text}" for name, text in found.faults.items())
    for status in (200, 400, 404, 500, 501):  # or all of it could be refusals at the door
        assert found.total(status) > 0, status
    return found


def test_a_few_requests_for_each_operation(server: Server, target: Target) -> None:
    found = run(server, target, 5, fixed=True)
    assert found.total() >= 400
    held = found.ruled
    assert held["does not fit: an error"] >= 50 and held["fits: a rule"] >= 100, held


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_ten_thousand_requests(server: Server, target: Target) -> None:
    found = run(server, target, 90, fixed=False)
    assert found.total() >= 10_000
    held = found.ruled
    assert held["does not fit: an error"] >= 1000 and held["fits: a rule"] >= 1000, held


def run_methods(target: Target, fills: int | None) -> Found:
    found = fuzz_methods(target, fills=fills)
    print(found.table())
    assert not found.faults, "\n\n".join(f"{name}: {text}" for name, text in found.faults.items())
    return found


def test_methods_and_paths_that_the_document_does_not_have(server: Server, target: Target) -> None:
    found = run_methods(target, 1)
    assert found.total(405) >= 200 and found.total(404) >= 100


@pytest.mark.long
def test_methods_and_paths_with_all_values(server: Server, target: Target) -> None:
    found = run_methods(target, None)
    assert found.total(405) >= 700 and found.total(404) >= 300
