"""The model repository that the serve tests drive, built anew for each run."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import torch

from tests import models
from tests.serve.server import wait_for

SIZES = (8, 16, 4)

EAGER_MLP = """
import torch

class Mlp(torch.nn.Sequential):
    def __init__(self):
        super().__init__(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
"""

# For models of `holding`.
HOLD = '''
import contextlib
import os
import time
import torch

FOLDER = os.path.dirname(os.path.dirname(__file__))
GO = os.path.join(FOLDER, "go")

def hold():
    """Until the model's folder has a file `go`; leaves a file there that says so, and another one
    when it goes on."""
    open(os.path.join(FOLDER, f"held.{os.getpid()}"), "w").close()
    while not os.path.exists(GO):
        time.sleep(0.01)
    with contextlib.suppress(OSError):
        open(os.path.join(FOLDER, f"gone.{os.getpid()}"), "w").close()
'''

SLOW = f'''{HOLD}
class Slow(torch.nn.Module):
    """Sleeps as many seconds as its input says; below 0 it is held."""

    def forward(self, seconds):
        if seconds.min() < 0:
            hold()
        time.sleep(max(0.0, float(seconds.max())))
        return seconds * 2
'''


WHO = '''
import os
import time
import torch

class Who(torch.nn.Module):
    """Sleeps as many seconds as its input says, and tells its process."""

    def forward(self, seconds):
        time.sleep(float(seconds.max()))
        return torch.full(seconds.shape, os.getpid(), dtype=torch.int64)
'''


NAP = """
import time
import torch

class Nap(torch.nn.Module):
    def forward(self, x):
        time.sleep(0.02)
        return x * 2
"""


@contextlib.contextmanager
def holding(folder: Path) -> Iterator[Callable[[], None]]:
    """Requests below 0 to a model that can hold are held until this is called, and no longer than
    this."""
    go = folder / "go"
    with contextlib.suppress(TimeoutError):  # who was let go before may not have looked yet
        wait_for(lambda: not _still_held(folder), 10, "nobody is held")
    for left in (go, *folder.glob("held.*"), *folder.glob("gone.*")):
        left.unlink(missing_ok=True)
    try:
        yield go.touch
    finally:
        go.touch()


def _still_held(folder: Path) -> bool:
    gone = {int(path.suffix[1:]) for path in folder.glob("gone.*")}
    return any(map(psutil.pid_exists, held(folder) - gone))


def tensor(name: str, dims: str, data_type: str = "TYPE_FP32", more: str = "") -> str:
    return f'{{ name: "{name}" data_type: {data_type} dims: [ {dims} ] {more} }}'


def config(
    inputs: list[str],
    outputs: list[str],
    *,
    engine: str = 'platform: "pytorch_libtorch"',
    max_batch_size: int = 32,
    more: str = "dynamic_batching { }",
) -> str:
    return (
        f"{engine}\nmax_batch_size: {max_batch_size}\n"
        f"input [ {', '.join(inputs)} ]\noutput [ {', '.join(outputs)} ]\n{more}\n"
    )


def parameter(key: str, value: str) -> str:
    return f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}\n'


def write_config(root: Path, name: str, text: str) -> None:
    (root / name).mkdir(parents=True, exist_ok=True)
    (root / name / "config.pbtxt").write_text(text)


EAGER = parameter("TORCH_COMPILE_OPTIONAL_PARAMETERS", '{\\"disable\\": true}')
MLP = config([tensor("INPUT__0", "8")], [tensor("OUTPUT__0", "4")])


def mlp() -> torch.nn.Module:
    return models.mlp(SIZES)


def held(folder: Path) -> set[int]:
    """Processes that hold a request, or have, since `holding` began."""
    return {int(path.suffix[1:]) for path in folder.glob("held.*")}


def write_nap(root: Path, name: str, more: str = "") -> None:
    """A model that takes 20 ms to double its input; batches of four."""
    models.save_eager(NAP, root, name)
    text = config(
        [tensor("x", "2")],
        [tensor("y", "2")],
        engine='backend: "pytorch"\nruntime: "model.py"',
        max_batch_size=4,
        more="dynamic_batching { }\n" + more + EAGER,
    )
    write_config(root, name, text)


def write_who(root: Path, name: str, more: str) -> None:
    """A model that answers with the process that ran it."""
    models.save_eager(WHO, root, name)
    text = config(
        [tensor("s", "1")],
        [tensor("pid", "1", "TYPE_INT64")],
        engine='backend: "pytorch"\nruntime: "model.py"',
        max_batch_size=1,
        more=EAGER + more,
    )
    write_config(root, name, text)


def build(root: Path, seed_package: Path | None) -> Path:
    """Good models, and three that cannot be loaded, each for another reason."""
    models.save_torchscript(mlp(), root, "mlp")
    write_config(root, "mlp", MLP)

    models.save_eager(EAGER_MLP, root, "eager_mlp", mlp().state_dict())
    eager = 'backend: "pytorch"\nruntime: "model.py"'
    write_config(
        root,
        "eager_mlp",
        config(
            [tensor("x", "8")],
            [tensor("y", "4")],
            engine=eager,
            more="dynamic_batching { }\n" + EAGER,
        ),
    )
    if seed_package is not None:
        shutil.copy(seed_package, models.version_folder(root, "seed") / "model.pt2")
        write_config(root, "seed", SEED)

    models.save_eager(SLOW, root, "slow")
    two = "instance_group [ { kind: KIND_CPU count: 2 } ]\n" + EAGER
    write_config(
        root,
        "slow",
        config([tensor("s", "1")], [tensor("t", "1")], engine=eager, max_batch_size=1, more=two),
    )

    models.save_torchscript(mlp(), root, "shared")
    shared = parameter("ENABLE_WEIGHT_SHARING", "true") + "dynamic_batching { }\n"
    write_config(
        root,
        "shared",
        config(
            [tensor("INPUT__0", "8")],
            [tensor("OUTPUT__0", "4")],
            more=shared + "instance_group [ { kind: KIND_CPU count: 2 } ]",
        ),
    )

    models.save_torchscript(models.RefusesNegative(), root, "picky")
    held = "dynamic_batching { preferred_batch_size: [ 8 ] max_queue_delay_microseconds: 1500000 }"
    write_config(
        root,
        "picky",
        config([tensor("x", "2")], [tensor("OUTPUT__0", "2")], max_batch_size=8, more=held),
    )

    models.save_torchscript(models.Strings(), root, "strings")
    words = tensor("words", "1", "TYPE_STRING", "reshape { shape: [] }")
    out = tensor("OUTPUT__0", "1", "TYPE_STRING", "reshape { shape: [] }")
    write_config(root, "strings", config([words], [out]))

    models.save_torchscript(models.identity(), root, "big")
    write_config(root, "big", config([tensor("x", "-1")], [tensor("OUTPUT__0", "-1")]))

    models.save_torchscript(models.identity(), root, "spare")
    write_config(root, "spare", config([tensor("x", "2")], [tensor("OUTPUT__0", "2")]))

    build_broken(root)
    return root


def build_broken(root: Path) -> None:
    write_config(root, "bad_field", 'platfrm: "pytorch_libtorch"\n')
    models.version_folder(root, "bad_field")
    write_config(root, "pickled", MLP)
    torch.save(mlp(), models.version_folder(root, "pickled") / "model.pt")
    models.save_torchscript(models.add_sub(), root, "bad_name")
    unresolved = config(
        [tensor("INPUT__0", "4"), tensor("INPUT__7", "4")], [tensor("OUTPUT__0", "4")]
    )
    write_config(root, "bad_name", unresolved)


SEED = config(
    [
        tensor(name, "16")
        for name in (
            "ARGS[0]",
            "ARGS[1]",
            "ARGS[2][keyA]",
            "ARGS[2][key2]",
            "KWARGS[kwarg1]",
            "INPUT__5",
        )
    ],
    [
        tensor(name, "16")
        for name in (
            "RESULT[AAA]",
            "RESULT[BBB][0]",
            "RESULT[BBB][1]",
            "RESULT[CCC][keyA]",
            "RESULT[CCC][key2]",
            "RESULT[DDD][KA]",
            "OUTPUT__7",
            "RESULT[ZZZ]",
        )
    ],
    engine='backend: "pytorch"\nplatform: "torch_aoti"',
    max_batch_size=8,
    more="instance_group [ { kind: KIND_CPU } ]\ndynamic_batching { }",
)
