from __future__ import annotations

import zipfile

import pytest
import torch

from deployments import archives
from tests import models


@pytest.mark.parametrize(
    ("content", "kind", "class_name"),
    [
        (models.AddSub(), "module", "tests.models.AddSub"),
        (torch.nn.Linear(2, 2), "module", "torch.nn.modules.linear.Linear"),
        (torch.nn.Linear(2, 2).state_dict(), "state_dict", ""),
        ({"w": torch.ones(1)}, "state_dict", ""),
    ],
)
def test_pickles(tmp_path, content, kind, class_name):
    torch.save(content, tmp_path / "model.pt")
    found = archives.inspect(tmp_path / "model.pt")
    assert (found.kind, found.class_name) == (kind, class_name)
    assert archives.refuse_torchscript(found) and archives.refuse_aoti(found)


def test_torchscript(tmp_path):
    found = archives.inspect(models.save_torchscript(models.add_sub(), tmp_path))
    assert found.kind == "torchscript" and not archives.refuse_torchscript(found)


def test_package(seed_package):
    found = archives.inspect(seed_package)
    assert (found.kind, found.device, found.models) == ("aoti", "cpu", ("model",))
    assert not archives.refuse_aoti(found)


def test_package_without_the_model_that_is_served():
    other = archives.Archive("aoti", models=("left", "right"))
    assert "only left, right" in archives.refuse_aoti(other)


def test_unknown(tmp_path):
    (tmp_path / "x").write_bytes(b"")
    assert archives.inspect(tmp_path / "x").kind == "unknown"


def test_archives_that_cannot_be_read(tmp_path, seed_package):
    """Whoever asks is told so; the Controller asks, and must go on."""
    data = seed_package.read_bytes()
    path = tmp_path / "model.pt2"
    for cut in (100, len(data) // 2, len(data) - 60):
        path.write_bytes(data[:cut])
        assert archives.inspect(path).kind == "unknown"
    path.write_bytes(data.replace(b'{"AOTI_DEVICE_KEY"', b'["AOTI_DEVICE_KEY"'))
    assert archives.inspect(path).kind == "unknown"
    name = "m/data/aotinductor/model/m_metadata.json"
    for text, damaged in (("[1]", False), ("{}" * 40, True), ("[" * 100_000, False)):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(name, text)
        if damaged:  # the compressed data itself
            start = 30 + len(name)
            whole = bytearray(path.read_bytes())
            whole[start : start + 4] = b"\xff" * 4
            path.write_bytes(whole)
        assert archives.inspect(path).kind == "unknown"
    assert archives.inspect(seed_package).kind == "aoti"
