"""Warmup samples as batches: their data, their sizes, and what a failing one says."""

from __future__ import annotations

import logging
import struct
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.dtypes import DATATYPES
from configs.errors import ConfigError
from configs.model import DynamicBatching, ModelInput, ModelWarmup, Reshape, WarmupInput
from configs.parameters import ModelParameters
from deployments import warmup
from deployments.errors import ExecutionFailed
from deployments.instance import Instance
from deployments.types import Batch, BatchReply, Part
from tests import models
from tests.models import config, string_input


def sample(name: str = "s", batch_size: int = 1, count: int = 0, **inputs: WarmupInput):
    return ModelWarmup(name=name, batch_size=batch_size, inputs=inputs, count=count)


def given(data_type: str = "TYPE_FP32", dims: tuple[int, ...] = (4,), **source) -> WarmupInput:
    return WarmupInput(data_type=data_type, dims=dims, **(source or {"zero_data": True}))


def made(*samples: ModelWarmup, x: ModelInput | None = None, **fields):
    one = x or ModelInput(name="x", data_type="TYPE_FP32", dims=(4,))
    return config([one], {"y": (4,)}, model_warmup=samples, **fields)


def nowhere(relative: str) -> Any:
    raise AssertionError(f"{relative} is asked for")


class Recorder:
    """An instance's part in a warmup, which keeps the batches and fails from a size on."""

    name = "i0"

    def __init__(self, fails_at: int = 1 << 30) -> None:
        self.batches: list[Any] = []
        self._fails_at = fails_at

    def warm(self, batch: Batch) -> BatchReply:
        self.batches.append(batch)
        failed = ExecutionFailed("no") if len(batch.rows) >= self._fails_at else None
        return BatchReply((Part(tuple(range(len(batch.rows))), {}, failed),))


def test_each_sample_runs_at_its_own_and_at_every_preferred_size():
    made_ = made(
        sample("one", batch_size=3, count=2, x=given()),
        sample("two", batch_size=8, x=given()),
        dynamic_batching=DynamicBatching(preferred_batch_size=(8, 4)),
    )
    recorder = Recorder()
    warmup.run(recorder, warmup.prepare(made_, "eager", nowhere), "model")
    assert [len(batch.rows) for batch in recorder.batches] == [3, 3, 4, 4, 8, 8, 8, 4]
    batch = recorder.batches[0]
    assert batch.rows == (1, 1, 1) and batch.outputs == ("y",)
    assert [np.shape(array) for array in batch.inputs[0]] == [(1, 4)] * 3


def test_torchscript_runs_each_at_least_three_times():
    samples = (sample(x=given()), sample(count=5, x=given()))
    recorder = Recorder()
    warmup.run(recorder, warmup.prepare(made(*samples), "torchscript", nowhere), "model")
    assert len(recorder.batches) == 3 + 5


def test_without_batching_there_is_no_batch_dimension_and_one_size():
    flat = made(
        sample(x=given()),
        max_batch_size=0,
        dynamic_batching=DynamicBatching(preferred_batch_size=(4,)),
    )
    recorder = Recorder()
    warmup.run(recorder, warmup.prepare(flat, "aoti", nowhere), "model")
    (batch,) = recorder.batches
    assert np.shape(batch.inputs[0][0]) == (4,)


def test_a_batch_size_of_zero_leaves_a_sample_out(caplog):
    with caplog.at_level(logging.INFO, "ray.serve"):
        assert warmup.prepare(made(sample(batch_size=0, x=given())), "aoti", nowhere) == ()
    assert caplog.messages == ["Skipping batch 0 warmup sample 's'"]


def test_members_do_not_share_memory_nor_do_runs():
    recorder = Recorder()
    prepared = warmup.prepare(made(sample(batch_size=2, count=3, x=given())), "aoti", nowhere)
    warmup.run(recorder, prepared, "model")
    arrays: list[Any] = [array for batch in recorder.batches for array in batch.inputs[0]]
    arrays[0][:] = 7
    assert [bool(array.any()) for array in arrays] == [True, False, False, False, False, False]


def data_of(what: WarmupInput, x: ModelInput | None = None, find: Any = nowhere) -> np.ndarray:
    (one,) = warmup.prepare(made(sample(x=what), x=x), "aoti", find)
    (array,) = one.row.inputs
    assert array is not None
    return array


@pytest.mark.parametrize("data_type", [one.wire for one in DATATYPES if one.numpy])
@pytest.mark.parametrize("source", ["zero_data", "random_data"])
def test_data_of_every_type(data_type, source):
    x = ModelInput(name="x", data_type=f"TYPE_{data_type}", dims=(-1,))
    # A flag that is given as false is given: only its presence counts.
    array = data_of(given(f"TYPE_{data_type}", (64,), **{source: False}), x)
    assert array.shape == (1, 64)
    assert (array == 0).all() if source == "zero_data" else len(np.unique(array)) > 1
    values = array
    if data_type == "BF16":  # carried as its bits
        values = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).float().numpy()
    assert 0 <= values.min() and values.max() <= 1
    again = data_of(given(f"TYPE_{data_type}", (64,), **{source: True}), x)
    np.testing.assert_array_equal(array, again)


@pytest.mark.parametrize("source", ["zero_data", "random_data"])
def test_strings_are_empty_ones(source):
    array = data_of(given("TYPE_STRING", (1,), **{source: True}), string_input("x"))
    assert array.tobytes() == bytes(4)


def wire(*elements: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(e)) + e for e in elements)


def test_data_from_a_file_reshaped_and_one_row_of_it(tmp_path, caplog):
    values = np.arange(12, dtype=np.float32)
    (tmp_path / "raw").write_bytes(values.tobytes())
    x = ModelInput(name="x", data_type="TYPE_FP32", dims=(6,), reshape=Reshape(shape=(2, 3)))
    asked: list[str] = []

    def find(relative: str) -> Any:
        asked.append(relative)
        return tmp_path / "raw"

    with caplog.at_level(logging.WARNING, "ray.serve"):
        array = data_of(given(dims=(6,), input_data_file="raw"), x, find)
    np.testing.assert_array_equal(array, values[:6].reshape(1, 2, 3))
    assert asked == ["warmup/raw"]
    assert "raw has 48 bytes, of which the first 24 are one row" in caplog.text


def test_strings_from_a_file_are_in_wire_form(tmp_path):
    path = tmp_path / "raw"
    path.write_bytes(wire(b"h\0i"))
    what = given("TYPE_STRING", (1,), input_data_file="raw")
    assert data_of(what, string_input("x"), lambda _: path).tobytes() == wire(b"h\0i")
    path.write_bytes(wire(b"a", b"b"))
    with pytest.raises(
        ConfigError, match="^failed to run warmup sample 's': unexpected number of string elements"
    ):
        data_of(what, string_input("x"), lambda _: path)


def test_a_file_that_is_too_short(tmp_path):
    path = tmp_path / "raw"
    path.write_bytes(bytes(15))
    with pytest.raises(ConfigError) as caught:
        data_of(given(input_data_file="raw"), find=lambda _: path)
    assert str(caught.value) == (
        "warmup setting expects 16 bytes for input 'x', but the data provided from raw only has "
        "15 bytes"
    )


def test_a_failing_sample_names_itself_the_reason_and_the_size():
    prepared = warmup.prepare(
        made(
            sample("zero sample", x=given()),
            dynamic_batching=DynamicBatching(preferred_batch_size=(4,)),
        ),
        "aoti",
        nowhere,
    )
    recorder = Recorder(fails_at=4)
    with pytest.raises(ConfigError) as caught:
        warmup.run(recorder, prepared, "model")
    assert str(caught.value) == (
        "failed to run warmup sample 'zero sample': PyTorch execute failure: no; batch size 4"
    )
    assert len(recorder.batches) == 2


# --- on an instance ------------------------------------------------------------------------------


def loaded(tmp_path: Path, module: torch.nn.Module | str, of) -> Instance:
    parameters = ModelParameters(torch_compile_optional_parameters={"disable": True})
    if isinstance(module, str):
        path = models.save_eager(module, tmp_path)
        of = of.model_copy(update={"runtime": "model.py", "platform": ""})
    else:
        path = models.save_torchscript(module, tmp_path)
    instance = Instance("i0", path, of, parameters, "cpu", "KIND_CPU")
    instance.load()
    return instance


def test_it_runs_on_the_instance_and_is_no_batch_of_a_router(tmp_path):
    x = ModelInput(name="x", data_type="TYPE_FP32", dims=(1,))
    of = made(sample(count=4, x=given(dims=(1,))), x=x)
    of = of.model_copy(
        update={"output": (*of.output, of.output[0].model_copy(update={"name": "count"}))}
    )
    instance = loaded(tmp_path, models.Counter(), of)
    try:
        warmup.run(instance, warmup.prepare(of, "torchscript", nowhere), "model")
        assert (instance.slots.peak_held, instance.slots.by_serve) == (0, 0)
        one = Batch((1,), ((np.zeros((1, 1), np.float32),),), ("count",))
        assert instance.run(one).parts[0].outputs["count"].data.tolist() == [5]
    finally:
        instance.close()


ONE_ROW = """
import torch
class Net(torch.nn.Module):
    def forward(self, x):
        if x.shape[0] > 1:
            raise ValueError('one row only')
        return x
"""


def test_a_batch_that_fails_as_a_whole_fails_though_its_rows_would_not(tmp_path):
    """A request's batch is run again in pieces; a sample's must run as it is."""
    of = made(sample(batch_size=2, x=given()))
    instance = loaded(tmp_path, ONE_ROW, of)
    try:
        prepared = warmup.prepare(of, "eager", nowhere)
        with pytest.raises(ConfigError, match="sample 's': .*one row only; batch size 2"):
            warmup.run(instance, prepared, "model")
        reply = instance.run(Batch((1, 1), ((np.zeros((1, 4), np.float32),) * 2,), ("y",)))
        assert [part.error for part in reply.parts] == [None, None]
    finally:
        instance.close()


class Counting:
    """An instance, and the sizes of the batches that it was warmed with."""

    def __init__(self, instance: Instance) -> None:
        self.name = instance.name
        self.sizes: list[int] = []
        self._instance = instance

    def warm(self, batch: Batch) -> BatchReply:
        self.sizes.append(len(batch.rows))
        return self._instance.warm(batch)


def test_an_aoti_package_runs_at_every_size(seed_package):
    names = [f"INPUT__{k}" for k in range(6)]
    inputs: dict[str, Any] = {name: given(dims=(16,)) for name in names}
    of = config(
        {name: (16,) for name in names},
        {"RESULT[AAA]": (16,)},
        platform="torch_aoti",
        model_warmup=(sample(**inputs),),
        dynamic_batching=DynamicBatching(preferred_batch_size=(2, 8)),
    )
    instance = Instance("i0", seed_package, of, ModelParameters(), "cpu", "KIND_CPU")
    instance.load()
    try:
        counting = Counting(instance)
        warmup.run(counting, warmup.prepare(of, "aoti", nowhere), "model")
        assert counting.sizes == [1, 2, 8]
    finally:
        instance.close()


def test_an_optional_input_may_be_left_out():
    of = config(
        [
            ModelInput(name="a", data_type="TYPE_FP32", dims=(4,), optional=True),
            ModelInput(name="b", data_type="TYPE_FP32", dims=(4,)),
        ],
        {"y": (4,)},
        model_warmup=(sample(batch_size=2, b=given()),),
    )
    recorder = Recorder()
    warmup.run(recorder, warmup.prepare(of, "aoti", nowhere), "model")
    (batch,) = recorder.batches
    assert batch.inputs[0] == (None, None) and len(batch.inputs[1]) == 2


PYTHON = """
import numpy as np
import triton_python_backend_utils as pb_utils
CALLS = []
class TritonPythonModel:
    def execute(self, requests):
        CALLS.append([request.requested_output_names() for request in requests])
        if len(requests) > 2:
            raise ValueError("two at most")
        x = [pb_utils.get_input_tensor_by_name(request, "x").as_numpy() for request in requests]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("y", one)]) for one in x]
"""


def test_a_model_of_the_python_backend_is_handed_requests(tmp_path):
    path = models.save_eager(PYTHON, tmp_path)
    of = made(sample(batch_size=2, x=given()), backend="python", platform="")
    instance = Instance("i0", path, of, ModelParameters(), "cpu", "KIND_CPU")
    instance.load()
    python: Any = instance._python
    calls = sys.modules[type(python._model).__module__].CALLS
    try:
        warmup.run(instance, warmup.prepare(of, "python", nowhere), "model")
        assert calls == [[["y"], ["y"]]]
        three = made(sample(batch_size=3, x=given()), backend="python", platform="")
        with pytest.raises(ConfigError, match="sample 's': .*two at most; batch size 3"):
            warmup.run(instance, warmup.prepare(three, "python", nowhere), "model")
        assert len(calls) == 2
    finally:
        instance.close()


HELD = """
import threading
import torch
ENTERED, GO_ON = threading.Event(), threading.Event()
class Net(torch.nn.Module):
    def forward(self, x):
        ENTERED.set()
        assert GO_ON.wait(10)
        return x
"""


def test_a_long_warmup_is_loading_and_no_hang(tmp_path):
    of = made(sample(x=given()))
    instance = loaded(tmp_path, HELD, of)
    runtime: Any = instance._runtime
    module = sys.modules[type(runtime.module).__module__]
    prepared = warmup.prepare(of, "eager", nowhere)
    thread = threading.Thread(target=warmup.run, args=(instance, prepared, "model"))
    thread.start()
    try:
        assert module.ENTERED.wait(10)
        progress = instance.progress()
        assert (progress.state, progress.running_since_ns) == ("loading", None)
    finally:
        module.GO_ON.set()
        thread.join(10)
        instance.close()
