"""A repository of broken models, each for a reason of its own, and a good one beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from tests import models

LIBTORCH = 'platform: "pytorch_libtorch"\n'
EAGER = 'backend: "pytorch"\nruntime: "model.py"\n'
UNCOMPILED = (
    'parameters { key: "TORCH_COMPILE_OPTIONAL_PARAMETERS" '
    'value { string_value: "{\\"disable\\": true}" } }\n'
)
NET = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x)
"""


def tensor(name: str, dims: str = "4", more: str = "data_type: TYPE_FP32") -> str:
    return f'{{ name: "{name}" dims: [ {dims} ] {more} }}\n'


def text(inputs: str = "a b", outputs: str = "OUTPUT__0", engine: str = LIBTORCH) -> str:
    """Input and output names, each of FP32 [4]; one field a line."""
    lines = [engine.rstrip("\n"), "max_batch_size: 8"]
    lines += [f"input {tensor(name)}".rstrip("\n") for name in inputs.split()]
    lines += [f"output {tensor(name)}".rstrip("\n") for name in outputs.split()]
    return "\n".join(lines) + "\n"


def parameter(key: str, value: str) -> str:
    return f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}\n'


# --- what lies in the version directory ----------------------------------------------------------


def nothing(root: Path, name: str) -> None:
    models.version_folder(root, name)


def script(root: Path, name: str) -> None:
    """The forward of all of these takes `a` and `b`; saved once and copied."""
    first = root.parent / "script.pt"
    if not first.exists():
        models.save_torchscript(models.add_sub(), root.parent / "made").rename(first)
    (models.version_folder(root, name) / "model.pt").write_bytes(first.read_bytes())


def file(filename: str, content: bytes) -> Callable[[Path, str], None]:
    def write(root: Path, name: str) -> None:
        (models.version_folder(root, name) / filename).write_bytes(content)

    return write


def saved(value: object) -> Callable[[Path, str], None]:
    def write(root: Path, name: str) -> None:
        torch.save(value, models.version_folder(root, name) / "model.pt")

    return write


def source(code: str, state: object = None) -> Callable[[Path, str], None]:
    def write(root: Path, name: str) -> None:
        models.save_eager(code, root, name, state)

    return write


def takes_int(root: Path, name: str) -> None:
    class Repeat(torch.nn.Module):
        def forward(self, a: torch.Tensor, times: int) -> torch.Tensor:
            return a * times

    models.save_torchscript(Repeat(), root, name)


@dataclass(frozen=True)
class Broken:
    """`told` are the words of its errors, one tuple for each, in their order."""

    config: str | bytes
    files: Callable[[Path, str], None]
    told: tuple[tuple[str, ...], ...]


def once(config: str | bytes, files: Callable[[Path, str], None], *words: str) -> Broken:
    return Broken(config, files, (words,))


LABELS = 'data_type: TYPE_FP32 label_filename: "names.txt"'
X = text("x", "y", EAGER) + UNCOMPILED
SAMPLE = (
    'model_warmup { name: "s" batch_size: 2 inputs { key: "x" value '
    "{ data_type: TYPE_FP32 dims: 4 %s } } }\n"
)
BROKEN: dict[str, Broken] = {
    "unknown_field": once(
        'platfrm: "pytorch_libtorch"\n', nothing, "unknown_field/config.pbtxt:1: platfrm"
    ),
    "not_text": once(
        b'platform: "pytorch_libtorch"\nname: "\xff"\n', nothing, "config.pbtxt:2: ", "not UTF-8"
    ),
    "misnamed": once(
        text() + 'name: "other"\n', script, "misnamed/config.pbtxt:6: name", "'other'", "'misnamed'"
    ),
    "no_version": once(text(), lambda root, name: None, "no_version", "at least one version"),
    "no_file": once(text(), nothing, "unable to find 'no_file/1/model.pt'"),
    "outside": once(
        text() + 'default_model_filename: "../../m.pt"\n',
        script,
        "outside/config.pbtxt:6: default_model_filename",
        "must not leave the model's directory",
    ),
    "no_labels": once(
        text(outputs="") + f"output {tensor('o', '4', LABELS)}",
        script,
        "no_labels/config.pbtxt:5: output[0].label_filename",
        "unable to find 'no_labels/names.txt'",
    ),
    "reshaped": once(
        text("a").replace("dims: [ 4 ]", "dims: [ 4 ] reshape { shape: [ 3 ] }", 1),
        script,
        "reshaped/config.pbtxt:3: input[0].reshape",
        "dims [4] and reshape [3]",
    ),
    "many_strings": once(
        text().replace("TYPE_FP32", "TYPE_STRING", 1),
        script,
        "only 1-dimensional List of String is supported as input for 'a'",
    ),
    "sequence": once(
        text() + "sequence_batching { }\n",
        script,
        "sequence/config.pbtxt:6: sequence_batching",
    ),
    "cpu_with_gpus": once(
        text() + "instance_group { kind: KIND_CPU gpus: 0 }\n",
        script,
        "cpu_with_gpus/config.pbtxt:6: instance_group[0].gpus",
        "KIND_CPU but specifies one or more GPUs",
    ),
    "no_such_gpu": once(
        text() + "instance_group { kind: KIND_GPU gpus: 7 }\n",
        script,
        "no_such_gpu/config.pbtxt:6: instance_group[0].gpus[0]",
        "gpu id 7",
    ),
    "half_bool": once(
        text() + parameter("INFERENCE_MODE", "yes"),
        script,
        "half_bool/config.pbtxt:6: ",
        "failed to convert 'yes' to boolean",
    ),
    "crowded": once(
        text()
        + parameter("GPU_FRACTION", "0.6")
        + "instance_group { kind: KIND_GPU count: 2 gpus: 0 }\n",
        script,
        "does not fit on gpu 0: GPU_FRACTION is 0.6",
        "need 1.2 of 1",
    ),
    "too_few_inputs": once(
        text("a"),
        script,
        "too_few_inputs/config.pbtxt:3: input",
        "configuration expects 1 inputs, model provides 2",
        "ARGS[1] (b)",
    ),
    "no_such_index": once(
        text("INPUT__0 INPUT__7"),
        script,
        "no_such_index/config.pbtxt:4: input[1].name",
        "'INPUT__7'",
    ),
    "takes_int": once(text("a times"), takes_int, "takes 'times' of type int"),
    "garbage": once(
        text(), file("model.pt", b"PK\x03\x04 no archive"), "garbage/1/model.pt", "failed to load"
    ),
    "pickled": once(
        text(),
        saved(torch.nn.Linear(4, 4)),
        "pickled/1/model.pt",
        "'torch.nn.modules.linear.Linear'",
    ),
    "weights_only": once(
        text(),
        saved({"w": torch.zeros(2)}),
        "weights_only/1/model.pt",
        "this is a state dict, not TorchScript (it has no constants.pkl)",
    ),
    "no_package": once(
        text(engine='platform: "torch_aoti"\n'),
        file("model.pt2", b"nothing"),
        "no_package/1/model.pt2",
        "not an AOT Inductor package",
    ),
    "no_class": once(
        X, source("import os\n"), "no_class/1/model.py", "no subclass of torch.nn.Module"
    ),
    "raises": once(
        X,
        source("import torch\nraise KeyError('secret')\n"),
        "raises/1/model.py: failed to import: KeyError: 'secret'",
    ),
    "other_weights": once(
        X,
        source(NET, {"linear.weight": torch.zeros(4, 4)}),
        "other_weights/1/model.pt",
        "linear.bias",
    ),
    "exits": once(
        X, source("import os\nos.write(2, b'bye')\nos._exit(3)\n"), "exits", "exit code 3", "bye"
    ),
    "crashes": once(
        X, source("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n"), "crashes", "SIGSEGV"
    ),
    "failing_sample": once(
        X + SAMPLE % "zero_data: true",
        source(NET.replace("return self.linear(x)", "raise ValueError('not today')")),
        "failed to run warmup sample 's': ",
        "PyTorch execute failure: not today; batch size 2",
    ),
    "missing_sample": once(
        X + SAMPLE % 'input_data_file: "x.raw"',
        source(NET),
        "missing_sample/config.pbtxt:7: model_warmup[0]",
        "unable to find 'missing_sample/warmup/x.raw'",
    ),
    "three_faults": Broken(
        text("a a") + "instance_group { kind: KIND_MODEL gpus: 0 }\nsequence_batching { }\n",
        script,
        (
            ("three_faults/config.pbtxt:7: sequence_batching",),
            ("three_faults/config.pbtxt:4: input[1].name", "'a' is listed more than once"),
            ("three_faults/config.pbtxt:6: instance_group[0].gpus", "KIND_MODEL"),
        ),
    ),
}


def build_broken(root: Path) -> None:
    for name, one in BROKEN.items():
        (root / name).mkdir(parents=True)
        content = one.config if isinstance(one.config, bytes) else one.config.encode()
        (root / name / "config.pbtxt").write_bytes(content)
        one.files(root, name)


def build_hanging(root: Path) -> None:
    (root / "hangs").mkdir(parents=True)
    (root / "hangs" / "config.pbtxt").write_text(X)
    source("import time\ntime.sleep(600)\n")(root, "hangs")


def build_good(root: Path) -> None:
    (root / "script").mkdir(parents=True)
    (root / "script" / "config.pbtxt").write_text(
        text() + parameter("INFERENCE_MODE", "on") + parameter("INFERENCE_MOOD", "off")
    )
    script(root, "script")
    (root / "eager").mkdir()
    (root / "eager" / "config.pbtxt").write_text(X)
    source(NET, {"linear.weight": torch.zeros(4, 4), "linear.bias": torch.zeros(4)})(root, "eager")
