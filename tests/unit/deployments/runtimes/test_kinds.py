"""Every numeric datatype in the runtimes that need no compiler; the serve tests have packages."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from configs.model import ModelConfig, ModelInput, ModelOutput
from configs.parameters import ModelParameters
from deployments import runtimes
from deployments.errors import InvalidArgument
from deployments.runtimes import convert
from tests import kinds, models
from tests.kinds import NUMERIC
from tests.models import config

CPU = torch.device("cpu")


def declared(width: int, **fields: Any) -> ModelConfig:
    inputs = [
        ModelInput(name=f"INPUT__{i}", data_type=kind.config, dims=(width,))
        for i, kind in enumerate(NUMERIC)
    ]
    outputs = [
        ModelOutput(name=f"OUTPUT__{i}", data_type=kind.config, dims=(width,))
        for i, kind in enumerate(NUMERIC)
    ]
    return config(inputs, outputs, **fields)


@pytest.fixture(scope="module", params=["torchscript", "eager", "exported"])
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[runtimes.Runtime, ModelConfig]:
    folder = tmp_path_factory.mktemp("kinds")
    disabled = ModelParameters(torch_compile_optional_parameters={"disable": True})
    if request.param == "eager":
        path = models.save_eager(kinds.source(NUMERIC), folder)
        made = declared(-1, runtime="model.py")
    elif request.param == "exported":
        path = models.version_folder(folder) / "model.pt2"
        rows = ({0: torch.export.Dim("rows", min=1, max=8)},) * len(NUMERIC)
        program = torch.export.export(
            kinds.module(NUMERIC), kinds.samples(NUMERIC), dynamic_shapes=rows
        )
        torch.export.save(program, path)
        made = declared(kinds.WIDTH, platform="torch_export")
    else:
        path = models.version_folder(folder) / "model.pt"
        kinds.save_traced(NUMERIC, path)
        made = declared(-1)
    return runtimes.load(path, made, disabled, "cpu", "KIND_CPU"), made


@pytest.mark.parametrize("rows", [1, 4])
def test_every_datatype(served: tuple[runtimes.Runtime, ModelConfig], rows: int) -> None:
    runtime, made = served
    members = [[kinds.values(kind, rows, seed=k) for kind in NUMERIC] for k in range(2)]
    inputs = [
        convert.build_tensor(entry, [kinds.wire(kind, members[k][index]) for k in range(2)], CPU)
        for index, (entry, kind) in enumerate(zip(made.input, NUMERIC, strict=True))
    ]
    whole = [np.concatenate(pair) for pair in zip(*members, strict=True)]
    expected = kinds.direct(NUMERIC, whole)
    for output, kind, value, wanted in zip(
        made.output, NUMERIC, runtime.run(inputs), expected, strict=True
    ):
        convert.check_output(output, value)
        found = convert.read_output(output, value).data
        np.testing.assert_array_equal(found, kinds.wire(kind, wanted), err_msg=kind.wire)


def test_another_datatype_does_not_pass_for_it(
    served: tuple[runtimes.Runtime, ModelConfig],
) -> None:
    """Each output checked against each other's configuration."""
    runtime, made = served
    inputs = [torch.ones(2, kinds.WIDTH, dtype=t.dtype) for t in kinds.samples(NUMERIC)]
    values = runtime.run(inputs)
    for index, value in enumerate(values):
        for other, output in enumerate(made.output):
            if other != index:
                with pytest.raises(InvalidArgument, match=f"expects datatype {output.data_type} "):
                    convert.check_output(output, value)
