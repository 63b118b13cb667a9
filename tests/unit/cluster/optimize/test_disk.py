"""The move that replaces nothing, by the kernel and without its help."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from cluster.optimize import disk


@pytest.fixture(params=["here", "no such call"])
def anywhere(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "here":
        monkeypatch.setattr(disk, "_rename_new", lambda *_: errno.ENOSYS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "file").write_text("x")
    return tmp_path / "made"


@pytest.mark.usefixtures("anywhere")
def test_a_move_to_a_free_name(folder: Path, tmp_path: Path) -> None:
    disk.move_new(folder, tmp_path / "2")
    assert sorted(os.listdir(tmp_path)) == ["2"] and os.listdir(tmp_path / "2") == ["file"]


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("there", ["empty", "full", "link"])
def test_nothing_is_replaced(folder: Path, tmp_path: Path, there: str) -> None:
    target = tmp_path / "2"
    if there == "link":
        target.symlink_to("nowhere")
    else:
        target.mkdir()
        if there == "full":
            (target / "theirs").write_text("")
    with pytest.raises(FileExistsError):
        disk.move_new(folder, target)
    assert os.listdir(folder) == ["file"]


def test_control_a_plain_rename_replaces_an_empty_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "2").mkdir()
    folder.rename(tmp_path / "2")
    assert os.listdir(tmp_path / "2") == ["file"]


@pytest.mark.usefixtures("anywhere")
def test_other_errors_are_the_disks_own(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        disk.move_new(folder, tmp_path / "absent" / "2")
