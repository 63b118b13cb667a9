"""`manta config`."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from cluster import cli
from configs import pbtxt
from configs.complete import normalise
from tests import models


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("repository")
    made = torch.export.export(
        models.add_sub(),
        (torch.ones(2, 4), torch.ones(2, 4)),
        dynamic_shapes=({0: torch.export.Dim("rows", max=64)},) * 2,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(made, str(models.version_folder(root, "bare") / "model.pt2"))
    models.save_torchscript(models.add_sub(), root, "script")
    return root


def run(capsys, *words):
    code = cli.main(["config", *map(str, words)])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_what_is_printed_is_a_config_pbtxt(capsys, root):
    code, text, _ = run(capsys, root, "--model", "bare")
    assert code == 0 and text.startswith("# bare/config.pbtxt, version 1\n")
    config = pbtxt.parse(text, "bare/config.pbtxt", "bare")  # complete, without the model
    assert (config.platform, config.max_batch_size) == ("torch_export", 64)
    assert [t.name for t in config.output] == ["RESULT[0]", "RESULT[1]"]
    assert normalise(config, ("model.pt2",), torch.cuda.is_available()) == config
    (root / "bare" / "config.pbtxt").write_text(text)
    assert run(capsys, root, "--model", "bare")[1] == text
    (root / "bare" / "config.pbtxt").unlink()


def test_a_path_may_be_a_model(capsys, root):
    assert run(capsys, root / "bare")[1] == run(capsys, root, "--model=bare")[1]


def test_what_cannot_be_completed_is_told_and_the_rest_printed(capsys, root):
    code, text, errors = run(capsys, root)
    assert code == 1 and "# bare/config.pbtxt" in text and "script" not in text
    assert "script/1/model.pt: forward takes a (Tensor), b (Tensor)" in errors
    assert "sample_input.npz" in errors
    np.savez(root / "script" / "sample_input.npz", *[np.ones((2, 4), np.float32)] * 2)
    code, text, _ = run(capsys, root)
    assert code == 0 and 'name: "OUTPUT__1"' in text


def test_no_such_model(capsys, root, tmp_path):
    assert run(capsys, root, "--model", "nobody")[0] == 1
    assert "there is no model" in run(capsys, tmp_path)[2]
    assert "is not a directory" in run(capsys, tmp_path / "nowhere")[2]
    assert run(capsys, root / "bare", "--version", "7")[2].count("unable to find 'bare/7'") == 1
