"""Every numeric datatype through every runtime, as an instance would call it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.dtypes import DataType
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


def carried(kind: DataType, array: np.ndarray) -> np.ndarray:
    """In the form of the wire: BF16 is the upper half of FP32."""
    if kind.wire == "BF16":
        return (array.view(np.uint32) >> 16).astype(np.uint16)
    return array


@pytest.fixture(params=["torchscript", "aoti", "eager"])
def served(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[runtimes.Runtime, ModelConfig]:
    disabled = ModelParameters(torch_compile_optional_parameters={"disable": True})
    if request.param == "aoti":
        path = request.getfixturevalue("kinds_package")
        made = declared(kinds.WIDTH, platform="torch_aoti")
    elif request.param == "eager":
        path = models.save_eager(kinds.source(NUMERIC), tmp_path)
        made = declared(-1, runtime="model.py")
    else:
        path = models.version_folder(tmp_path) / "model.pt"
        kinds.save_traced(NUMERIC, path)
        made = declared(-1)
    return runtimes.load(path, made, disabled, "cpu", "KIND_CPU"), made


@pytest.mark.parametrize("rows", [1, 4])
def test_every_datatype(served: tuple[runtimes.Runtime, ModelConfig], rows: int) -> None:
    runtime, made = served
    members = [[kinds.values(kind, rows, seed=k) for kind in NUMERIC] for k in range(2)]
    inputs = [
        convert.build_tensor(entry, [carried(kind, members[k][index]) for k in range(2)], CPU)
        for index, (entry, kind) in enumerate(zip(made.input, NUMERIC, strict=True))
    ]
    whole = [np.concatenate(pair) for pair in zip(*members, strict=True)]
    expected = kinds.direct(NUMERIC, whole)
    for output, kind, value, wanted in zip(
        made.output, NUMERIC, runtime.run(inputs), expected, strict=True
    ):
        convert.check_output(output, value)
        found = convert.read_output(output, value).data
        np.testing.assert_array_equal(found, carried(kind, wanted), err_msg=kind.wire)


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
