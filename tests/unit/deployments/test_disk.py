"""What tells that files have changed, without reading them."""

from __future__ import annotations

import os
import time

import pytest

from deployments.disk import signature


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "m"
    for path in ("config.pbtxt", "labels.txt", "1/model.pt", "1/sub/part", "configs/other.pbtxt"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(path)
    return folder


def test_nothing_has_changed(model):
    before = signature(model)
    (model / "1" / "__pycache__").mkdir()
    (model / "1" / "__pycache__" / "model.pyc").write_text("compiled")
    assert signature(model) == before
    assert [one[0] for one in before] == [
        "1", "1/model.pt", "1/sub/part", "config.pbtxt", "configs", "configs/other.pbtxt",
        "labels.txt",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "path", ["config.pbtxt", "labels.txt", "1/model.pt", "1/sub/part", "configs/other.pbtxt"]
)
def test_every_file_counts(model, path):
    before = signature(model)
    file = model / path
    times = file.stat()
    time.sleep(0.02)  # ctime has the grain of the clock's ticks
    file.write_text(path.upper())  # as long as before
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # and as old, as far as it says
    assert signature(model) != before
    file.unlink()
    assert path not in [one[0] for one in signature(model)]


def test_versions_come_and_go(model):
    before = signature(model)
    (model / "2").mkdir()
    assert signature(model) != before
    (model / "2").rmdir()
    assert signature(model) == before


def test_links_are_what_they_lead_to(model):
    """Config maps are mounted so: a link is set from one folder to the next."""
    for name in ("one", "two"):
        (model.parent / name / "3").mkdir(parents=True)
        (model.parent / name / "3" / "model.pt").write_text("weights")
    (model / "3").symlink_to(model.parent / "one" / "3")
    first = signature(model)
    assert "3/model.pt" in [one[0] for one in first]
    (model / "3").unlink()
    (model / "3").symlink_to(model.parent / "two" / "3")
    assert signature(model) != first


def test_a_model_that_is_gone(model):
    assert signature(model.parent / "nobody") == ()
