"""AOTI packages over the real server: names, structures, and what is no input of theirs."""

from __future__ import annotations

import shutil
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tritonclient.http as httpclient
from tritonclient.utils import InferenceServerException

from tests import models
from tests.serve import repository
from tests.serve.clients import Arrays, infer, rows
from tests.serve.repository import tensor
from tests.serve.server import Server

NAMES = ("ARGS[0]", "INPUT__1", "ARGS[2][keyA]", "INPUT__3", "KWARGS[kwarg1]", "INPUT__5")
RESULTS = ("RESULT[AAA]", "OUTPUT__1", "RESULT[BBB][0]", "OUTPUT__7")
AOTI = 'platform: "torch_aoti"'


class Keywords(torch.nn.Module):
    def forward(
        self, *, left: torch.Tensor, more: dict[str, list[torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        return {"sum": left + more["a"][1], "difference": left - more["a"][0]}


@pytest.fixture(scope="module", autouse=True)
def packages(server: Server, models_root: Path, seed_package: Path) -> Iterator[None]:
    root = models_root
    for name, dims in (("mixed", "16"), ("wide", "-1")):
        shutil.copy(seed_package, models.version_folder(root, name) / "model.pt2")
        inputs = [tensor(one, dims) for one in NAMES]
        outputs = [tensor(one, "16") for one in RESULTS]
        text = repository.config(inputs, outputs, engine=AOTI, max_batch_size=8)
        repository.write_config(root, name, text)
    for name, old, new in (
        ("bad_key", rb"[\"keyA\", \"key2\"]", rb"[\"ke A\", \"key2\"]"),
        ("bad_type", b"builtins.dict", b"builtins.dick"),
    ):
        rewrite(seed_package, models.version_folder(root, name) / "model.pt2", old, new)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = torch.ones(2, 4)
        made = torch.export.export(Keywords(), (), {"left": x, "more": {"a": [x, x]}})
        torch.export.save(made, str(models.version_folder(root, "keywords") / "model.pt2"))
    good = ("mixed", "wide", "keywords")
    with httpclient.InferenceServerClient(server.http, network_timeout=240) as client:
        for name in good:
            client.load_model(name)
        yield
        for name in good:
            client.unload_model(name)


def rewrite(package: Path, target: Path, old: bytes, new: bytes) -> None:
    """The same package with another call spec, in its code and in its source."""
    assert len(old) == len(new)
    with zipfile.ZipFile(package) as source, zipfile.ZipFile(target, "w") as copy:
        for info in source.infolist():
            copy.writestr(info.filename, source.read(info).replace(old, new))


@pytest.fixture(params=["http", "grpc"])
def client(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def seed_arrays(count: int) -> tuple[Arrays, list[torch.Tensor]]:
    arrays = {name: rows(count, 16, seed) for seed, name in enumerate(NAMES)}
    h, v, key_a, key_2, kw1, kw2 = (torch.from_numpy(array) for array in arrays.values())
    out = models.Seed()(h, v, {"keyA": key_a, "key2": key_2}, kwarg1=kw1, kw_arg2=kw2)
    return arrays, [out["AAA"], out["ZZZ"], out["BBB"][0], out["DDD"]["KB"]]


def test_a15_both_styles_of_names_in_one_configuration(client: Any) -> None:
    arrays, wanted = seed_arrays(3)
    found = infer(client, "mixed", arrays)
    for name, right in zip(RESULTS, wanted, strict=True):
        np.testing.assert_allclose(found.as_numpy(name), right.numpy(), atol=1e-5)


def test_a16_a_wrong_last_dimension_is_400_and_no_garbage(client: Any) -> None:
    """Whether the configuration knows it, or only the compiled code."""
    narrow = seed_arrays(2)[0] | {"INPUT__1": rows(2, 5)}
    for name, reason in (
        ("mixed", r"unexpected shape for input 'INPUT__1'.* Expected \[-1,16\], got \[2,5\]"),
        ("wide", "input 'INPUT__1' does not fit the compiled model: .*expected: 16, but got: 5"),
    ):
        with pytest.raises(InferenceServerException, match=reason) as caught:
            infer(client, name, narrow)
        assert caught.value.status() in ("400", "StatusCode.INVALID_ARGUMENT")
        infer(client, name, seed_arrays(2)[0])


def test_a17_structures_that_cannot_be_named_do_not_load(client: Any) -> None:
    for name, reason in (
        ("bad_key", "failed to parse input call spec: key 'ke A' of .*blank"),
        ("bad_type", "failed to parse input call spec: .*builtins.dick"),
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


def test_a18_keyword_names_nested_and_not(client: Any) -> None:
    arrays, wanted = seed_arrays(1)  # has KWARGS[kwarg1]; nested ones are those of `keywords`
    found = infer(client, "mixed", arrays)
    np.testing.assert_allclose(found.as_numpy("OUTPUT__7"), wanted[3].numpy(), atol=1e-5)
    inputs = client.get_model_metadata("keywords")
    told = inputs["inputs"] if isinstance(inputs, dict) else inputs.inputs
    names = [one["name"] if isinstance(one, dict) else one.name for one in told]
    assert names == ["KWARGS[left]", "KWARGS[more][a][0]", "KWARGS[more][a][1]"]
