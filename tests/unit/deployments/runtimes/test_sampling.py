"""TorchScript models completed from a sample."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest
import torch

from configs.errors import ConfigError
from configs.model import ModelConfig, ModelInput, ModelOutput, ModelWarmup, WarmupInput
from configs.parameters import ModelParameters
from deployments import runtimes
from deployments.runtimes import autocomplete
from tests import models

BARE = ModelConfig(name="model", backend="pytorch", platform="pytorch_libtorch", open_batch=True)
HALF = np.array([[1, 2, 3, 4], [5, 6, 7, 9]], np.float32)


class Mixed(torch.nn.Module):
    """A score a row, words, and a row's share of the whole batch when `whole`."""

    def forward(self, x: torch.Tensor, words: list[str]) -> tuple[torch.Tensor, list[str]]:
        return x.sum(1), [word + "!" for word in words]


class Whole(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / x.sum()


def complete(path, config=BARE):
    return autocomplete.complete(path, config, ModelParameters(), "cpu", "KIND_CPU")


def saved(module, root, *arrays, **named):
    path = models.save_torchscript(module.eval(), root)
    if arrays or named:
        np.savez(path.parent / "sample_input.npz", *arrays, **named)
    return path


def read(tensors):
    return [(t.name, t.data_type, t.dims, t.reshape is not None) for t in tensors]


@pytest.mark.parametrize(
    "sample",
    [{"b": HALF, "a": HALF}, {"arr_1": HALF, "arr_0": HALF}, {"INPUT__0": HALF, "INPUT__1": HALF}],
)
def test_names_and_positions(tmp_path, sample):
    path = saved(models.add_sub(), tmp_path, **sample)
    config = complete(path)
    assert config.max_batch_size == 4  # rows may be put together
    names = ["INPUT__0", "INPUT__1"] if "INPUT__0" in sample else ["a", "b"]
    assert sorted(read(config.input)) == [(name, "TYPE_FP32", (4,), False) for name in names]
    outputs = [(f"OUTPUT__{k}", "TYPE_FP32", (4,), False) for k in range(2)]
    assert read(config.output) == outputs
    runtime = runtimes.load(path, config, ModelParameters(), "cpu", "KIND_CPU")
    found = runtime.run([torch.ones(1, 4), torch.ones(1, 4)])
    assert [value.tolist() for value in found if isinstance(value, torch.Tensor)] == [
        [[2.0] * 4],
        [[0.0] * 4],
    ]


def test_a_sample_beside_the_configuration(tmp_path):
    path = saved(models.identity(), tmp_path)
    np.savez(tmp_path / "model" / "sample_input.npz", x=HALF.astype(np.int64))
    assert read(complete(path).output) == [("OUTPUT__0", "TYPE_INT64", (4,), False)]


def test_a_model_that_mixes_rows_gets_no_batches(tmp_path):
    config = complete(saved(Whole(), tmp_path, x=HALF))
    assert config.max_batch_size == 0 and config.dynamic_batching is None
    assert read(config.input) == [("x", "TYPE_FP32", (2, 4), False)]


def test_strings_and_numbers_per_row(tmp_path):
    config = complete(saved(Mixed(), tmp_path, x=HALF, words=np.array(["a", "b"])))
    assert config.max_batch_size == 4
    assert read(config.input)[1] == ("words", "TYPE_STRING", (1,), True)
    assert read(config.output) == [
        ("OUTPUT__0", "TYPE_FP32", (1,), True),
        ("OUTPUT__1", "TYPE_STRING", (1,), True),
    ]


def test_dictionaries_and_nested_results(tmp_path):
    config = complete(saved(models.DictInput(), tmp_path, A=HALF, B=HALF))
    assert [t.name for t in config.input] == ["A", "B"]
    config = complete(saved(models.Nested(), tmp_path, x=HALF))
    assert [t.name for t in config.output] == ["RESULT[0]", "RESULT[1][double]"]


def test_what_is_written_wins(tmp_path):
    path = saved(models.add_sub(), tmp_path, a=HALF, b=HALF)
    given = BARE.model_copy(
        update={
            "input": (ModelInput(name="left"), ModelInput(name="right", dims=(-1,))),
            "output": (ModelOutput(name="OUTPUT__1"),),
            "max_batch_size": 32,
            "open_batch": False,
        }
    )
    config = complete(path, given)
    assert config.max_batch_size == 32 and config.dynamic_batching is None
    assert [(t.name, t.dims) for t in config.input] == [("left", (4,)), ("right", (-1,))]
    assert read(config.output) == [("OUTPUT__1", "TYPE_FP32", (4,), False)]
    wrong = given.model_copy(update={"input": (ModelInput(name="a", data_type="TYPE_FP64"),)})
    with pytest.raises(ConfigError, match=r"'a' is TYPE_FP64, and the model has TYPE_FP32"):
        complete(path, wrong)


def test_outputs_alone_need_no_sample(tmp_path):
    """Zeros will do, where the inputs are known."""
    path = saved(models.identity(), tmp_path)
    known = ModelInput(name="x", data_type="TYPE_INT32", dims=(3,))
    given = BARE.model_copy(update={"input": (known,), "max_batch_size": 8, "open_batch": False})
    assert read(complete(path, given).output) == [("OUTPUT__0", "TYPE_INT32", (3,), False)]


def warm(dims, batch_size=1, **fields):
    given = WarmupInput(data_type="TYPE_FP32", dims=dims, random_data=True)
    sample = ModelWarmup(name="w", batch_size=batch_size, inputs={"a": given, "b": given})
    return BARE.model_copy(update={"model_warmup": (sample,), **fields})


def test_the_sample_of_a_warmup_will_do(tmp_path):
    path = saved(models.add_sub(), tmp_path)
    config = complete(path, warm((4,), 3))
    assert config.max_batch_size == 4
    assert read(config.input) == [(name, "TYPE_FP32", (4,), False) for name in "ab"]
    config = complete(path, warm((2, 4), max_batch_size=0, open_batch=False))
    assert config.max_batch_size == 0  # rows may be put together, but nobody wants batches
    assert read(config.input) == [(name, "TYPE_FP32", (-1, 4), False) for name in "ab"]
    with pytest.raises(ConfigError, match="on the sample of model_warmup: the model does not run"):
        complete(path, warm((3,)))


def test_a_file_that_lies_deeper_than_its_version(tmp_path):
    """Samples lie beside it no more than the data of a warmup does."""
    shallow = saved(models.add_sub(), tmp_path)
    path = shallow.parent / "net" / "add.pt"
    path.parent.mkdir()
    shallow.rename(path)
    deeper = {"default_model_filename": "net/add.pt"}
    config = warm((4,), 3, **deeper)
    given = {"data_type": "TYPE_FP32", "dims": (4,), "input_data_file": "a"}
    inputs = {name: WarmupInput(**given) for name in "ab"}
    first = config.model_warmup[0].model_copy(update={"inputs": inputs})
    (tmp_path / "model" / "warmup").mkdir()
    (tmp_path / "model" / "warmup" / "a").write_bytes(HALF[:1].tobytes())
    made = complete(path, config.model_copy(update={"model_warmup": (first,)}))
    assert read(made.input) == [(name, "TYPE_FP32", (4,), False) for name in "ab"]
    np.savez(tmp_path / "model" / "sample_input.npz", a=HALF, b=HALF[:, :3])
    with pytest.raises(ConfigError, match="model/sample_input.npz: the model does not run on it"):
        complete(path, config)
    np.savez(shallow.parent / "sample_input.npz", a=HALF)
    with pytest.raises(ConfigError, match="model/1/sample_input.npz: "):
        complete(path, config)
    (shallow.parent / "sample_input.npz").unlink()
    (tmp_path / "model" / "sample_input.npz").unlink()
    with pytest.raises(ConfigError, match=r"model/1/net/add.pt: forward takes a \(Tensor\)"):
        complete(path, BARE.model_copy(update=deeper))


def test_without_a_sample_it_says_what_is_missing(tmp_path):
    with pytest.raises(ConfigError, match=r"model/1/model.pt: forward takes a \(Tensor\), b .*npz"):
        complete(saved(models.add_sub(), tmp_path))


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        ({"a": HALF}, "does not run on it|b"),
        ({"a": HALF, "b": HALF[:, :3]}, "the model does not run on it: .*The size of tensor"),
        ({"a": np.array([{}], object), "b": HALF}, "no file of plain arrays"),
        ({"a": np.array([b"\xff"]), "b": HALF}, "its strings must be UTF-8"),
    ],
)
def test_samples_that_are_none(tmp_path, sample, reason):
    with pytest.raises(ConfigError, match=f"model/1/sample_input.npz: .*({reason})"):
        complete(saved(models.add_sub(), tmp_path, **sample))


def test_a_file_that_is_no_sample(tmp_path):
    path = saved(models.add_sub(), tmp_path)
    sample = path.parent / "sample_input.npz"
    sample.write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="model/1/sample_input.npz: this is no file of plain"):
        complete(path)
    with zipfile.ZipFile(sample, "w") as archive:
        archive.writestr("notes.txt", "no array")
    with pytest.raises(ConfigError, match="no file of plain arrays by numpy.savez: notes.txt"):
        complete(path)


def test_arrays_of_another_byte_order(tmp_path):
    path = saved(models.add_sub(), tmp_path, a=HALF.astype(">f4"), b=HALF)
    assert read(complete(path).input)[0] == ("a", "TYPE_FP32", (4,), False)
