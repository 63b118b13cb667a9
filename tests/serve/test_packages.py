"""Structures of packages and programs (A17): what no name reaches, and what one does."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tritonclient.utils import InferenceServerException

from tests import models
from tests.serve.clients import infer, loading, rows
from tests.serve.server import Server


class Keywords(torch.nn.Module):
    def forward(
        self, *, left: torch.Tensor, more: dict[str, list[torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        return {"sum": left + more["a"][1], "difference": left - more["a"][0]}


@pytest.fixture(scope="module", autouse=True)
def packages(server: Server, models_root: Path, seed_package: Path) -> Iterator[None]:
    root = models_root
    for name, old, new in (
        ("bad_key", rb"[\"keyA\", \"key2\"]", rb"[\"ke A\", \"key2\"]"),
        ("bad_type", rb'dict", "context": "[\"keyA', rb'dick", "context": "[\"keyA'),
    ):
        rewrite(seed_package, models.version_folder(root, name) / "model.pt2", old, new)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x, y, z = torch.ones(3, 2, 4).unbind()  # one tensor thrice would be one input thrice
        made = torch.export.export(Keywords(), (), {"left": x, "more": {"a": [y, z]}})
        torch.export.save(made, str(models.version_folder(root, "keywords") / "model.pt2"))
    with loading(server, ["keywords"]):
        yield


def rewrite(package: Path, target: Path, old: bytes, new: bytes) -> None:
    """The same package with another call spec, in its code and in its source."""
    assert len(old) == len(new)
    with zipfile.ZipFile(package) as source, zipfile.ZipFile(target, "w") as copy:
        for info in source.infolist():
            copy.writestr(info.filename, source.read(info).replace(old, new))


@pytest.fixture(params=["http", "grpc"])
def client(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def test_a17_structures_that_cannot_be_named_do_not_load(http: Any, grpc: Any) -> None:
    for client, name, reason in (
        (http, "bad_key", "failed to parse input call spec: key 'ke A' of .*blank"),
        (grpc, "bad_type", "failed to parse input call spec: .*builtins.dick"),
    ):
        with pytest.raises(InferenceServerException, match=reason):
            client.load_model(name)


def test_a17_keywords_alone_are_served(client: Any) -> None:
    """Where a name reaches in, it is no limit any more."""
    names = ("KWARGS[left]", "KWARGS[more][a][0]", "KWARGS[more][a][1]")
    left, zero, one = (rows(2, 4, seed) for seed in range(3))
    found = infer(client, "keywords", dict(zip(names, (left, zero, one), strict=True)))
    np.testing.assert_allclose(found.as_numpy("RESULT[sum]"), left + one, atol=1e-6)
    np.testing.assert_allclose(found.as_numpy("RESULT[difference]"), left - zero, atol=1e-6)
