"""What all tests share: the AOTI packages, compiled once and kept in pytest's cache, and which
tests stay together when several workers run them."""

from __future__ import annotations

import fcntl
import gc
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import kinds, models

# Files of tests/serve that start what they ask; all others share one server.
OWN_SERVERS = frozenset(
    f"tests/serve/test_{name}.py"
    for name in (
        "cloud failures leaks logging metrics nodes paths placement polling restricted scaling"
        " serve_run soak_mixed spans tls traces_of_routers update"
    ).split()
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests go to one worker, since they share its fixtures. Of those that drive servers
    the ones with the shared server go to one worker, in their order, and the others to another: no
    more than two servers with their clients run at a time."""
    from xdist.scheduler import LoadScopeScheduling

    scheduler = LoadScopeScheduling(config, log)
    scheduler._split_scope = lambda nodeid: scope(nodeid.partition("::")[0])
    return scheduler


def scope(file: str) -> str:
    """What runs together with this file of tests; `file` is relative to the project's root."""
    if not file.startswith("tests/serve/"):
        return file
    return "own servers" if file in OWN_SERVERS else "shared server"


def pytest_collection_finish() -> None:
    """What is imported by now stays. A full collection, which some tests ask for by themselves or
    by unloading a model, need not go through it each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def seed_package(request: pytest.FixtureRequest) -> Path:
    return _package(request, models, models.compile_seed)


@pytest.fixture(scope="session")
def kinds_package(request: pytest.FixtureRequest) -> Path:
    return _package(request, kinds, kinds.compile_package)


def _package(
    request: pytest.FixtureRequest, builders: Any, compile_to: Callable[[Path], object]
) -> Path:
    """`<cache>/model/1/model.pt2`, rebuilt when torch, the processor or the builders change."""
    if shutil.which("g++") is None:
        pytest.skip("AOTI packages need g++")
    facts = f"{torch.__version__} {torch.backends.cpu.get_cpu_capability()}".encode()
    digest = hashlib.sha256(facts + Path(builders.__file__).read_bytes()).hexdigest()[:16]
    assert request.config.cache is not None
    folder = Path(request.config.cache.mkdir("aoti")) / digest
    package = models.version_folder(folder) / "model.pt2"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second worker waits: inductor's cache is not for two
        if not package.exists():
            building = package.with_name(f"building-{os.getpid()}.pt2")
            compile_to(building)
            building.replace(package)
    return package
