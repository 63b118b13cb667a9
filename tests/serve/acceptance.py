"""The models of the acceptance cases, `a01_..` to `a26_..`: what they compute, and their configs.

Those in `REFUSED` must not load. Built into the repository of the session's server.
"""

from __future__ import annotations

import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests import models
from tests.serve.repository import EAGER, config, parameter, tensor, write_config

PYTHON = 'backend: "pytorch"\nruntime: "model.py"'
EXPORTED = 'backend: "pytorch"\nplatform: "torch_export"'
AOTI = 'backend: "pytorch"\nplatform: "torch_aoti"'
X, Y = tensor("x", "2"), tensor("OUTPUT__0", "2")


def held(rows: int) -> str:
    """A batch waits until it has so many rows, for up to 1.5 s."""
    delay = "max_queue_delay_microseconds: 1500000"
    return f"dynamic_batching {{ preferred_batch_size: [ {rows} ] {delay} }}\n"


class Words(torch.nn.Module):
    """Marks each string with its place in the whole batch."""

    def forward(self, words: list[str]) -> list[str]:
        found: list[str] = []
        for place, word in enumerate(words):
            found.append(word + "#" + str(place))
        return found


class Doubled(torch.nn.Module):
    """Returns twice the rows that it was given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, -x])


class Named(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"double": x * 2, "same": x}


class Gradient(torch.nn.Module):
    """Whether autograd is on, and whether what it makes are inference tensors."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = x * 2
        rows = x.size(0)
        on = torch.full((rows, 2), float(torch.is_grad_enabled()))
        return on, torch.full((rows, 2), float(y.is_inference()))


class Keywords(torch.nn.Module):
    """No positional argument, and a result that is no plain dictionary."""

    def forward(self, *, x: torch.Tensor, shift: torch.Tensor) -> OrderedDict[str, torch.Tensor]:
        return OrderedDict(sum=x + shift, difference=x - shift)


class Times(torch.nn.Module):
    def forward(self, x: torch.Tensor, count: int) -> torch.Tensor:
        return x * count


class Spare(torch.nn.Module):
    """Takes a structure beside its tensor, which it does not look at."""

    def forward(self, x: torch.Tensor, spare: Any) -> torch.Tensor:
        return x * 2


OPTIONAL = """
import torch

class Scaled(torch.nn.Module):
    def forward(self, x, scale=None):
        return x if scale is None else x * scale
"""
NEEDED = OPTIONAL.replace("=None", "").replace("x if scale is None else ", "")
NESTED = """
import torch

class Nested(torch.nn.Module):
    def forward(self, x, *, options, shift):
        return {"sum": (x * options["scale"]["by"] + shift, shift), "plain": x}
"""
TWO = """
import torch

class Beta(torch.nn.Module):
    def forward(self, x):
        return x - 1

class Alpha(torch.nn.Module):
    def forward(self, x):
        return x + 1
"""
THREADS = """
import torch

class Threads(torch.nn.Module):
    def forward(self, x):
        return torch.full_like(x, torch.get_num_threads())
"""


class Builder:
    """Writes one model after another into a repository."""

    def __init__(self, root: Path, seed_package: Path) -> None:
        self._root = root
        self._seed_package = seed_package

    def script(self, name: str, module: torch.nn.Module, text: str) -> None:
        models.save_torchscript(module, self._root, name)
        write_config(self._root, name, text)

    def eager(self, name: str, source: str, text: str) -> None:
        models.save_eager(source, self._root, name)
        write_config(self._root, name, text)

    def program(
        self, name: str, module: torch.nn.Module, args: tuple[Any, ...], kwargs: Any, text: str
    ) -> None:
        """Exported with one size only: the same call spec as a compiled package has."""
        exported = torch.export.export(module.eval(), args, kwargs)
        torch.export.save(exported, models.version_folder(self._root, name) / "model.pt2")
        write_config(self._root, name, text)

    def package(self, name: str, text: str) -> None:
        shutil.copy(self._seed_package, models.version_folder(self._root, name) / "model.pt2")
        write_config(self._root, name, text)


def names(build: Builder) -> None:
    two = [tensor("b", "4"), tensor("a", "4")]
    both = [tensor("OUTPUT__1", "4"), tensor("OUTPUT__0", "4")]
    build.script("a01_reversed", models.add_sub(), config(two, both))
    gapped = [tensor("INPUT__0", "4"), tensor("INPUT__7", "4")]
    build.script("a02_gapped", models.add_sub(), config(gapped, [tensor("OUTPUT__0", "4")]))
    letters = [tensor("B", "4"), tensor("A", "4")]
    build.script("a03_dict", models.DictInput(), config(letters, [tensor("OUTPUT__0", "4")]))


def outputs(build: Builder) -> None:
    build.script("a04_list", models.TensorList(), config([X], [Y]))
    build.script("a04_dict", Named(), config([X], [Y]))
    by_place = [tensor("RESULT[1]", "2"), tensor("RESULT[0]", "2")]
    build.script("a04_list_result", models.TensorList(), config([X], by_place))
    by_key = [tensor("RESULT[same]", "2"), tensor("RESULT[double]", "2")]
    build.script("a04_dict_result", Named(), config([X], by_key))
    build.script("a05_dims", models.identity(), config([X], [tensor("OUTPUT__0", "7, -1")]))
    build.script("a05_scalar", models.Scalar(), config([X], [Y]))
    integers = [tensor("OUTPUT__0", "2", "TYPE_INT32")]
    build.script("a06_integers", models.identity(), config([X], integers, more=held(3)))
    build.script("a07_fewer_rows", models.FirstRows(), config([X], [Y], more=held(3)))
    build.script("a08_more_rows", Doubled(), config([X], [Y], more=held(3)))


def strings(build: Builder) -> None:
    word = tensor("words", "1", "TYPE_STRING", "reshape { shape: [] }")
    out = tensor("OUTPUT__0", "1", "TYPE_STRING", "reshape { shape: [] }")
    build.script("a09_words", Words(), config([word], [out], more=held(6)))


def parameters(build: Builder) -> None:
    two = [tensor("OUTPUT__0", "2"), tensor("OUTPUT__1", "2")]
    off = parameter("INFERENCE_MODE", "false")
    build.script("a11_inference", Gradient(), config([X], two))
    build.script("a11_no_inference", Gradient(), config([X], two, more=off))
    for name, key, value in (
        ("a12_bool", "INFERENCE_MODE", "perhaps"),
        ("a12_int", "INTRA_OP_THREAD_COUNT", "many"),
    ):
        build.script(name, models.identity(), config([X], [Y], more=parameter(key, value)))
    for count in (1, 3):
        more = parameter("INTRA_OP_THREAD_COUNT", str(count))
        build.script(f"a13_intra_{count}", models.identity(), config([X], [Y], more=more))
        text = config(
            [X],
            [tensor("y", "2")],
            engine=PYTHON,
            more=EAGER + parameter("NUM_THREADS", str(count)),
        )
        build.eager(f"a13_threads_{count}", THREADS, text)


def arguments(build: Builder) -> None:
    scale = tensor("scale", "2", more="optional: true")
    text = config([X, scale], [tensor("y", "2")], engine=PYTHON, more=EAGER)
    build.eager("a14_optional", OPTIONAL, text)
    build.eager("a14_needed", NEEDED, text)
    nested = [
        tensor("ARGS[0]", "2"),
        tensor("KWARGS[shift]", "2"),
        tensor("KWARGS[options][scale][by]", "2"),
    ]
    results = [tensor("RESULT[plain]", "2"), tensor("RESULT[sum][0]", "2")]
    build.eager("a18_nested", NESTED, config(nested, results, engine=PYTHON, more=EAGER))


def packages(build: Builder) -> None:
    named = ("INPUT__0", "ARGS[1]", "INPUT__2", "ARGS[2][key2]", "KWARGS[kwarg1]", "INPUT__5")
    results = ("OUTPUT__0", "RESULT[ZZZ]")
    more = "instance_group [ { kind: KIND_CPU } ]\ndynamic_batching { }"
    for name, dims in (("a15_mixed", "16"), ("a16_any_width", "-1")):
        text = config(
            [tensor(one, dims) for one in named],
            [tensor(one, dims) for one in results],
            engine=AOTI,
            max_batch_size=8,
            more=more,
        )
        build.package(name, text)


def structures(build: Builder) -> None:
    x = torch.ones(2)

    def text(inputs: list[str], results: list[str]) -> str:
        every = [tensor(name, "2") for name in inputs], [tensor(name, "2") for name in results]
        return config(*every, engine=EXPORTED, max_batch_size=0, more="")

    both = {"x": x, "shift": torch.zeros(2)}  # one tensor for both would be one input
    keywords = text(["KWARGS[shift]", "KWARGS[x]"], ["RESULT[difference]", "RESULT[sum]"])
    build.program("a17_keywords", Keywords(), (), both, keywords)
    only, two = text(["ARGS[0]"], ["RESULT"]), text(["ARGS[0]", "ARGS[1]"], ["RESULT"])
    build.program("a17_constant", Times(), (x, 3), {}, only)
    build.program("a17_integer", Times(), (x, 3), {}, two)
    build.program("a17_empty", Spare(), (x, []), {}, only)
    build.program("a17_key", Spare(), (x, {"a b": torch.zeros(2)}), {}, two)


def files(build: Builder) -> None:
    plain = config([X], [tensor("y", "2")], engine=PYTHON, more=EAGER)
    build.eager("a19_two_classes", TWO, plain)
    build.eager("a20_no_weights", OPTIONAL, plain)
    build.script("a21_script", models.identity(), config([X], [tensor("y", "2")], engine=PYTHON))
    wide = [tensor("x", "-1")], [tensor("OUTPUT__0", "-1")]
    build.script("a22_empty", models.identity(), config(*wide))


def sequences(build: Builder) -> None:
    build.script("a23_sequence", models.identity(), config([X], [Y], more="sequence_batching { }"))
    state = (
        'state { input_name: "INPUT__1" output_name: "OUTPUT__1" data_type: TYPE_FP32 dims: [ 2 ] }'
    )
    text = config([X], [Y], more=f"sequence_batching {{ {state} }}")
    build.script("a24_state", models.identity(), text)


def groups(build: Builder) -> None:
    build.script("a25_auto", models.identity(), config([X], [Y], more="instance_group { }"))
    three = "instance_group { kind: KIND_CPU count: 3 }\n"
    shared = three + parameter("ENABLE_WEIGHT_SHARING", "true")
    build.script("a26_shared", models.add_sub(), _add_sub(shared))
    build.script("a26_apart", models.add_sub(), _add_sub(three))


def _add_sub(more: str) -> str:
    return config([tensor("a", "4"), tensor("b", "4")], [tensor("OUTPUT__0", "4")], more=more)


BUILDERS: tuple[Callable[[Builder], None], ...] = (
    names,
    outputs,
    strings,
    parameters,
    arguments,
    packages,
    structures,
    files,
    sequences,
    groups,
)
REFUSED = (
    "a02_gapped",
    "a12_bool",
    "a12_int",
    "a14_needed",
    "a17_integer",
    "a17_empty",
    "a17_key",
    "a23_sequence",
    "a24_state",
)


def build(root: Path, seed_package: Path) -> tuple[str, ...]:
    """The names of the models, in order."""
    builder = Builder(root, seed_package)
    for one in BUILDERS:
        one(builder)
    return tuple(sorted(path.name for path in root.iterdir() if path.name.startswith("a")))
