from __future__ import annotations

import warnings

import torch

from deployments.runtimes.schema import describe, named_fields
from tests import models
from tests.structures import Structured


def test_named_tuples_of_a_file_have_fields(tmp_path):
    path = models.save_torchscript(Structured(), tmp_path)
    fields = named_fields(path)
    assert list(fields.values()) == [("left", "right")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.jit.load(str(path))
    named, plain = describe(module, "m", fields), describe(module, "m")
    assert named.called.arguments[3].structure.fields == ("left", "right")
    assert plain.called.arguments[3].structure.fields == ()
    assert [(a.name, a.required, a.default) for a in named.called.arguments[4:]] == [
        ("words", True, None),
        ("bias", False, None),
        ("scale", False, 2.0),
        ("last", False, None),
    ]
    assert named.called.offers()[-3:] == ["ARGS[4] (words)", "ARGS[5] (bias)", "ARGS[7] (last)"]


def test_a_file_that_is_no_archive_has_none(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"nothing")
    assert named_fields(tmp_path / "model.pt") == {}
