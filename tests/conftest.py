"""The one AOTI package of the tests, compiled once and kept in pytest's cache."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest
import torch

from tests import models


@pytest.fixture(scope="session")
def seed_package(request: pytest.FixtureRequest) -> Path:
    """`<cache>/model/1/model.pt2`, rebuilt when torch, the processor or the builders change."""
    if shutil.which("g++") is None:
        pytest.skip("AOTI packages need g++")
    facts = f"{torch.__version__} {torch.backends.cpu.get_cpu_capability()}".encode()
    digest = hashlib.sha256(facts + Path(models.__file__).read_bytes()).hexdigest()[:16]
    assert request.config.cache is not None
    folder = Path(request.config.cache.mkdir("aoti")) / digest
    package = models.version_folder(folder) / "model.pt2"
    if not package.exists():
        building = package.with_name(f"building-{os.getpid()}.pt2")
        models.compile_seed(building)
        building.replace(package)  # whole or not there, also when two runs build at once
    return package
