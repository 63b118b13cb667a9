"""Tiny real models and the configurations that serve them, for every test that needs one.

Builders return plain modules; `save_*` write the artifact into `<root>/<name>/1/`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from configs.model import ModelConfig, ModelInput, ModelOutput, Reshape


class AddSub(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(4))

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return a + b * self.scale, a - b


class Identity(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Mode(torch.nn.Module):
    """Whether autograd and inference mode are on, as TorchScript sees it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mode = torch.tensor([[int(torch.is_grad_enabled()), int((x * 2).is_inference())]])
        return mode.expand(x.shape[0], 2)


class Strings(torch.nn.Module):
    def forward(self, words: list[str]) -> list[str]:
        return [word + "!" for word in words]


class DictInput(torch.nn.Module):
    def forward(self, named: dict[str, torch.Tensor]) -> torch.Tensor:
        return named["A"] - named["B"]


class RefusesNegative(torch.nn.Module):
    """Raises when any value of the batch is negative, as a model with one bad row does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if bool((x < 0).any()):
            raise ValueError("negative value")
        return x * 2


class Counter(torch.nn.Module):
    """Returns its own buffer, which counts the executions."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))
        self.count: torch.Tensor

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.count += 1
        return x, self.count


class Nested(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return x, {"double": x * 2}


class TensorList(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [x, x * 2]


class Scalar(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sum()


class FirstRows(torch.nn.Module):
    """Returns a row less than it was given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:-1]


class Seed(torch.nn.Module):
    """The seed README's example: nested dict, tuple, keyword inputs and outputs."""

    def forward(
        self,
        hdata: torch.Tensor,
        vdata: torch.Tensor,
        options: dict[str, torch.Tensor],
        *,
        kwarg1: torch.Tensor,
        kw_arg2: torch.Tensor,
    ) -> dict[str, Any]:
        return {
            "AAA": hdata + vdata,
            "ZZZ": hdata - vdata,
            "BBB": (hdata, vdata),
            "CCC": options,
            "DDD": {"KA": kwarg1, "KB": kw_arg2},
        }


def add_sub() -> torch.nn.Module:
    return AddSub().eval()


def identity() -> torch.nn.Module:
    return Identity().eval()


def mlp(sizes: Sequence[int] = (8, 16, 4)) -> torch.nn.Module:
    torch.manual_seed(0)
    layers: list[torch.nn.Module] = []
    for width, height in zip(sizes, sizes[1:], strict=False):
        layers += [torch.nn.Linear(width, height), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1]).eval()


def config(
    inputs: Mapping[str, Sequence[int]] | Sequence[ModelInput],
    outputs: Mapping[str, Sequence[int]] | Sequence[ModelOutput],
    *,
    name: str = "model",
    data_type: str = "TYPE_FP32",
    max_batch_size: int = 8,
    **fields: Any,
) -> ModelConfig:
    """Mappings are names to dims, all of `data_type`."""
    if isinstance(inputs, Mapping):
        inputs = [ModelInput(name=n, data_type=data_type, dims=tuple(d)) for n, d in inputs.items()]
    if isinstance(outputs, Mapping):
        outputs = [
            ModelOutput(name=n, data_type=data_type, dims=tuple(d)) for n, d in outputs.items()
        ]
    engine = {"backend": "pytorch"} | ({} if "runtime" in fields else {"platform": LIBTORCH})
    return ModelConfig(
        name=name,
        max_batch_size=max_batch_size,
        input=tuple(inputs),
        output=tuple(outputs),
        **{**engine, **fields},
    )


LIBTORCH = "pytorch_libtorch"


def string_input(name: str, batching: bool = True) -> ModelInput:
    if batching:
        return ModelInput(name=name, data_type="TYPE_STRING", dims=(1,), reshape=Reshape())
    return ModelInput(name=name, data_type="TYPE_STRING", dims=(-1,))


def string_output(name: str, batching: bool = True) -> ModelOutput:
    if batching:
        return ModelOutput(name=name, data_type="TYPE_STRING", dims=(1,), reshape=Reshape())
    return ModelOutput(name=name, data_type="TYPE_STRING", dims=(-1,))


def version_folder(root: Path, name: str = "model") -> Path:
    folder = root / name / "1"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def save_torchscript(module: torch.nn.Module, root: Path, name: str = "model") -> Path:
    path = version_folder(root, name) / "model.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(module), str(path))
    return path


def save_eager(source: str, root: Path, name: str = "model", state: Any = None) -> Path:
    path = version_folder(root, name) / "model.py"
    path.write_text(source)
    if state is not None:
        torch.save(state, path.with_suffix(".pt"))
    return path


def export_seed() -> Any:
    """The seed's example with a dynamic batch dimension, as an exported program."""

    def sample() -> torch.Tensor:
        return torch.zeros(3, 16)

    rows = {0: torch.export.Dim("rows", min=1, max=8)}
    return torch.export.export(
        Seed().eval(),
        (sample(), sample(), {"keyA": sample(), "key2": sample()}),
        {"kwarg1": sample(), "kw_arg2": sample()},
        dynamic_shapes={
            "hdata": rows,
            "vdata": rows,
            "options": {"keyA": rows, "key2": rows},
            "kwarg1": rows,
            "kw_arg2": rows,
        },
    )


def compile_seed(path: Path) -> Path:
    """An AOTI package; takes a compiler and some 10 seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = export_seed()
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(path), inductor_configs={"cpp.simdlen": 1}
        )
    return path
