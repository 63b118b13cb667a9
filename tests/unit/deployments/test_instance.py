from __future__ import annotations

import logging
import socket
import struct
import sys
from concurrent.futures import Future
from unittest import mock

import numpy as np
import pytest
import torch

from configs.errors import ConfigError
from configs.model import ModelConfig, ModelInput, ModelOutput
from configs.parameters import ModelParameters
from deployments.errors import ExecutionFailed, InvalidArgument, ShuttingDown
from deployments.instance import FatalDeviceError, Instance
from deployments.poller import Poller
from deployments.tensors import decode_bytes
from deployments.types import Batch, BatchReply
from deployments.weights import WeightCache
from tests import models
from tests.models import config, string_input, string_output
from tests.structures import MaybeWords

ONE = config({"x": (4,)}, {"y": (4,)})


def row(*values: float) -> np.ndarray:
    return np.array([values], np.float32)


def batch_of(*members, outputs=("y",)) -> Batch:
    return Batch(tuple(len(m) for m in members), (tuple(members),), outputs)


@pytest.fixture
def start(tmp_path):
    """Starts an instance of a module, or of a model.py's source; closes it after the test."""
    opened: list[Instance] = []

    def make(module, made: ModelConfig = ONE, cache: WeightCache | None = None, **parameters):
        name = f"i{len(opened)}"
        if isinstance(module, str):
            path = models.save_eager(module, tmp_path)
            made = made.model_copy(update={"runtime": "model.py", "platform": ""})
            parameters["torch_compile_optional_parameters"] = {"disable": True}
        elif not (path := models.version_folder(tmp_path) / "model.pt").exists():
            path = models.save_torchscript(module, tmp_path)
        instance = Instance(
            name, path, made, ModelParameters(**parameters), "cpu", "KIND_CPU", cache
        )
        opened.append(instance)
        instance.load()
        return instance

    yield make
    for instance in opened:
        instance.close()


def by_member(reply: BatchReply) -> dict[int, object]:
    """Each member's error, or None."""
    return {k: part.error for part in reply.parts for k in part.members}


def test_a_batch_equals_direct_calls(start):
    module = models.mlp()
    instance = start(module, config({"INPUT__0": (8,)}, {"y": (4,)}))
    rows = [np.random.default_rng(k).random((k + 1, 8), np.float32) for k in range(3)]
    (part,) = instance.run(batch_of(*rows)).parts
    direct = module(torch.from_numpy(np.concatenate(rows))).detach().numpy()
    np.testing.assert_allclose(part.outputs["y"].data, direct, atol=1e-5)
    assert part.members == (0, 1, 2)
    assert min(part.input_ns, part.infer_ns, part.output_ns) > 0


def test_only_wanted_outputs(start):
    made = config({"a": (4,), "b": (4,)}, {"sum": (4,), "difference": (4,)})
    batch = Batch((1,), ((row(1, 2, 3, 4),), (row(1, 1, 1, 1),)), ("difference",))
    (part,) = start(models.add_sub(), made).run(batch).parts
    assert list(part.outputs) == ["difference"]
    assert part.outputs["difference"].data.tolist() == [[0, 1, 2, 3]]


def test_only_the_culprit_fails(start):
    members = [row(k, k, k, k) for k in (1, 2, -3, 4, 5, 6, 7, 8)]
    reply = start(models.RefusesNegative()).run(batch_of(*members))
    errors = by_member(reply)
    assert [k for k, error in errors.items() if error is not None] == [2]
    assert str(errors[2]) == "PyTorch execute failure: ValueError: negative value"
    for part in reply.parts:
        if part.error is None:
            (k,) = part.members
            np.testing.assert_array_equal(part.outputs["y"].data, members[k] * 2)


def test_members_that_do_not_fit_each_other_run_by_themselves(start):
    made = config({"x": (-1,)}, {"y": (-1,)})
    reply = start(models.identity(), made).run(batch_of(row(1, 2), row(1, 2, 3)))
    assert by_member(reply) == {0: None, 1: None}


def test_without_batching_each_member_runs_by_itself(start):
    made = config({"x": (4,)}, {"y": (4,)}, max_batch_size=0)
    reply = start(models.identity(), made).run(
        Batch((1, 1), ((np.zeros(4, np.float32), np.ones(4, np.float32)),), ("y",))
    )
    assert [part.members for part in reply.parts] == [(0,), (1,)]
    assert reply.parts[1].outputs["y"].data.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("module", "outputs", "error", "text"),
    [
        (models.Scalar(), {"y": (4,)}, InvalidArgument, "output 'y' is a scalar"),
        (models.TensorList(), {"y": (4,)}, ExecutionFailed, "PyTorch execute failure: output must"),
        (
            models.TensorList(),
            {"RESULT[3]": (4,)},
            InvalidArgument,
            "returned list(Tensor, Tensor)",
        ),
    ],
)
def test_errors_of_the_whole_batch(start, module, outputs, error, text):
    made = config({"x": (4,)}, outputs)
    reply = start(module, made).run(batch_of(row(1, 2, 3, 4), row(5, 6, 7, 8)))
    errors = by_member(reply)
    assert len(errors) == 2
    for found in errors.values():
        assert isinstance(found, error) and text in str(found)


def test_wrong_output_type_is_every_members_error(start):
    made = ONE.model_copy(
        update={"output": (ONE.output[0].model_copy(update={"data_type": "TYPE_INT32"}),)}
    )
    reply = start(models.identity(), made).run(batch_of(row(1, 2, 3, 4), row(5, 6, 7, 8)))
    expected = "configuration expects datatype TYPE_INT32 for output 'y', model provides TYPE_FP32"
    assert [str(error) for error in by_member(reply).values()] == [expected] * 2


def test_rows_are_left_as_the_model_gives_them(start):
    (part,) = start(models.FirstRows()).run(batch_of(row(1, 2, 3, 4), row(5, 6, 7, 8))).parts
    assert part.error is None and part.outputs["y"].data.shape == (1, 4)


def test_zero_size_rows(start):
    made = config({"x": (-1,)}, {"y": (-1,)})
    (part,) = start(models.identity(), made).run(batch_of(np.zeros((2, 0), np.float32))).parts
    assert part.outputs["y"].data.shape == (2, 0)


def encode(*elements: bytes) -> np.ndarray:
    data = b"".join(struct.pack("<I", len(e)) + e for e in elements)
    return np.frombuffer(data, np.uint8)


def test_bad_strings_fail_their_own_member(start):
    instance = start(models.Strings(), config([string_input("words")], [string_output("y")]))
    members = (encode(b"a", b"b"), encode(b"\xff"), encode(b"c"))
    reply = instance.run(Batch((2, 1, 1), (members,), ("y",)))
    good, bad = reply.parts
    assert good.members == (0, 2) and good.error is None
    assert good.outputs["y"].data.tobytes() == encode(b"a!", b"b!", b"c!").tobytes()
    assert good.outputs["y"].offsets is not None
    assert good.outputs["y"].offsets.tolist() == [0, 6, 12, 18]
    assert bad.members == (1,) and isinstance(bad.error, InvalidArgument)


def text(name: str, *dims: int) -> ModelConfig:
    """A model of strings in and out."""
    entry = ModelInput(name=name, data_type="TYPE_STRING", dims=dims)
    out = ModelOutput(name="y", data_type="TYPE_STRING", dims=dims)
    return config([entry], [out])


UPPER = """
import numpy as np
import torch
class Net(torch.nn.Module):
    def forward(self, words):
        assert words.dtype == object and all(type(one) is bytes for one in words.flat)
        if b"bad" in words.ravel().tolist():
            raise ValueError("bad word")
        return np.array([one.upper() for one in words.flat], object).reshape(words.shape)
"""


def test_python_models_take_strings_of_any_shape_and_any_bytes(start):
    instance = start(UPPER, text("words", -1, 2))
    members = (encode(b"a", b"\xff\0b"), encode(b"c", b"", b"ee", b"f"))
    (part,) = instance.run(Batch((1, 2), (members,), ("y",))).parts
    assert part.error is None and part.outputs["y"].shape == (3, 1, 2)
    wanted = [b"A", b"\xff\0B", b"C", b"", b"EE", b"F"]
    assert decode_bytes("y", part.outputs["y"].data) == wanted
    # Of two shapes, which the queue would not have put together: each by itself.
    first, second = instance.run(Batch((1, 1), (members,), ("y",))).parts
    assert first.outputs["y"].shape == (1, 1, 2) and second.outputs["y"].shape == (1, 2, 2)


def test_python_models_of_strings_fail_for_the_culprit_alone(start):
    instance = start(UPPER, text("words", 2))
    members = (encode(b"a", b"b"), encode(b"bad", b"c"), encode(b"d"))
    parts = {
        k: p for p in instance.run(Batch((1, 1, 1), (members,), ("y",))).parts for k in p.members
    }
    assert parts[0].error is None and parts[0].outputs["y"].shape == (1, 2)
    assert isinstance(parts[1].error, ExecutionFailed)
    assert isinstance(parts[2].error, InvalidArgument)  # one element where two are wanted


def test_strings_may_be_left_out(start):
    inputs = [*ONE.input, string_input("words").model_copy(update={"optional": True})]
    instance = start(MaybeWords(), config(inputs, {"y": (4,)}))
    rows_of = (row(1, 2, 3, 4), row(5, 6, 7, 8))
    absent = instance.run(Batch((1, 1), (rows_of, (None, None)), ("y",)))
    assert absent.parts[0].outputs["y"].data.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    words = (encode(b"a"), encode(b"b"))
    present = instance.run(Batch((1, 1), (rows_of, words), ("y",)))
    assert present.parts[0].outputs["y"].data.tolist() == [[3, 4, 5, 6], [7, 8, 9, 10]]


def test_an_answer_does_not_change_with_the_next_run(start):
    made = config({"x": (1,)}, {"y": (1,), "count": (1,)})
    instance = start(models.Counter(), made)
    replies = [instance.run(batch_of(row(7), outputs=("count",))) for _ in range(3)]
    assert [reply.parts[0].outputs["count"].data.tolist() for reply in replies] == [[1], [2], [3]]


HEAD = "import torch\nclass Net(torch.nn.Module):\n    def forward(self, x):\n        "


def test_out_of_memory_splits_the_batch(start):
    source = HEAD + (
        "if x.shape[0] > 2:\n"
        "            raise torch.OutOfMemoryError('CUDA out of memory')\n"
        "        return x * 2"
    )
    members = [row(k, k, k, k) for k in range(5)]
    reply = start(source).run(batch_of(*members))
    assert [part.members for part in reply.parts] == [(0, 1), (2,), (3, 4)]
    assert set(by_member(reply).values()) == {None}


def test_out_of_memory_of_one_member_is_its_answer(start):
    instance = start(HEAD + "raise torch.OutOfMemoryError('CUDA out of memory')")
    (error,) = by_member(instance.run(batch_of(row(1, 2, 3, 4)))).values()
    assert str(error) == "PyTorch execute failure: CUDA out of memory"
    assert instance.progress().state == "idle"


def test_a_lost_device_is_fatal_and_stays_so(start):
    source = "raise torch.AcceleratorError('CUDA error: an illegal memory access was encountered')"
    instance = start(HEAD + source)
    for _ in range(2):
        with pytest.raises(FatalDeviceError, match="illegal memory access"):
            instance.run(batch_of(row(1, 2, 3, 4), row(1, 2, 3, 4)))
    assert instance.progress().state == "stopped"


def test_error_texts_are_clean_and_short(start):
    source = (
        HEAD + "raise ValueError('see /srv/models/secret/model.py at 0x7f00deadbeef ' + 'é' * 9000)"
    )
    (error,) = by_member(start(source).run(batch_of(row(1, 2, 3, 4)))).values()
    text = str(error)
    assert "see model.py at 0x?" in text and "/srv" not in text and "Traceback" not in text
    assert len(text.encode()) < 4200


@pytest.mark.parametrize("inference_mode", [True, False])
def test_autograd_is_off_either_way(start, inference_mode):
    """A module with parameters, whose results could not become arrays if they asked for grad."""
    made = config({"a": (4,), "b": (4,)}, {"y": (4,)})
    instance = start(models.add_sub(), made, inference_mode=inference_mode)
    batch = Batch((1,), ((row(1, 2, 3, 4),), (row(1, 1, 1, 1),)), ("y",))
    (part,) = instance.run(batch).parts
    assert part.outputs["y"].data.tolist() == [[2, 3, 4, 5]]


def on_thread(instance: Instance, look):
    found: Future[object] = instance._post(look)
    return found.result(10)


def test_settings_hold_on_the_instances_thread(start):
    instance = start(models.identity(), disable_optimized_execution=True, intra_op_thread_count=2)
    look = torch._C._get_graph_executor_optimize
    assert on_thread(instance, look) is False and look() is True
    assert on_thread(instance, torch.get_num_threads) == 2


def test_eager_threads_default_to_one(start):
    instance = start(HEAD + "return x")
    assert on_thread(instance, torch.get_num_threads) == 1


def test_sharing_loads_once_and_weights_go_with_the_last(start, caplog):
    cache = WeightCache()
    made = config({"a": (4,), "b": (4,)}, {"y": (4,)})
    with caplog.at_level(logging.INFO, "ray.serve"):
        shared = [start(models.add_sub(), made, cache) for _ in range(3)]
    reuses = [r for r in caplog.messages if "Reusing TorchScript model for instance" in r]
    assert len(reuses) == 2
    assert len({instance.weight_pointer() for instance in shared}) == 1
    alone = start(models.add_sub(), made)
    assert alone.weight_pointer() not in (0, shared[0].weight_pointer())
    batch = Batch((1,), ((row(1, 2, 3, 4),), (row(1, 1, 1, 1),)), ("y",))
    for future in [instance.submit(batch) for instance in shared * 4]:
        assert future.result(10).parts[0].outputs["y"].data.tolist() == [[2, 3, 4, 5]]
    for instance in shared:
        assert len(cache) == 1
        instance.close()
    assert len(cache) == 0


def test_aoti_instances_share_one_package(seed_package):
    names = [f"INPUT__{k}" for k in range(6)]
    made = config({n: (16,) for n in names}, {"RESULT[AAA]": (16,)}, platform="torch_aoti")
    cache, parameters = WeightCache(), ModelParameters(enable_weight_sharing=True)
    pair = [
        Instance(f"i{k}", seed_package, made, parameters, "cpu", "KIND_CPU", cache)
        for k in range(2)
    ]
    for instance in pair:
        instance.load()
    one = np.ones((1, 16), np.float32)
    batch = Batch((1, 1, 1), tuple((one * k, one, one) for k in range(6)), ("RESULT[AAA]",))
    for future in [instance.submit(batch) for instance in pair * 4]:
        data = future.result(10).parts[0].outputs["RESULT[AAA]"].data
        np.testing.assert_allclose(data[:, 0], [1, 2, 2])
    assert pair[0].weight_pointer() == pair[1].weight_pointer() != 0
    for instance in pair:
        instance.close()


def test_a_load_error_reaches_the_caller_and_can_be_mended(tmp_path):
    path = models.version_folder(tmp_path) / "model.pt"
    instance = Instance("i", path, ONE, ModelParameters(), "cpu", "KIND_CPU", WeightCache())
    with pytest.raises(ConfigError, match="model/1/model.pt: cannot find"):
        instance.load()
    assert instance.weight_pointer() == 0
    models.save_torchscript(models.identity(), tmp_path)
    instance.load()
    assert instance.progress().state == "idle"
    instance.close()


def test_progress_and_beats(start):
    source = (
        "import threading\nimport torch\nENTERED, GO_ON = threading.Event(), threading.Event()\n"
        "class Net(torch.nn.Module):\n    def forward(self, x):\n"
        "        ENTERED.set()\n        assert GO_ON.wait(10)\n        return x"
    )
    instance = start(source)
    first = instance.progress()
    assert (first.state, first.running_since_ns) == ("idle", None)
    instance.beat()
    instance._post(lambda: None).result(10)
    assert instance.progress().asked_since_ns is None  # asked for, and answered
    module = sys.modules[type(instance._runtime.module).__module__]
    future = instance.submit(batch_of(row(1, 2, 3, 4)))
    assert module.ENTERED.wait(10)
    running = instance.progress()
    assert running.state == "running" and running.running_since_ns is not None
    module.GO_ON.set()
    assert future.result(10).parts[0].error is None


def test_close_answers_what_was_submitted_and_refuses_the_rest(start):
    instance = start(models.identity())
    futures = [instance.submit(batch_of(row(k, 0, 0, 0))) for k in range(20)]
    instance.close()
    assert [f.result(10).parts[0].outputs["y"].data[0, 0] for f in futures] == [*range(20)]
    with pytest.raises(ShuttingDown):
        instance.run(batch_of(row(1, 2, 3, 4)))
    assert instance.progress().state == "stopped"
    instance.close()


def test_a_model_that_calls_exit_fails_only_the_culprit(start):
    instance = start(
        "import sys\nimport torch\nclass Net(torch.nn.Module):\n    def forward(self, x):\n"
        "        if (x < 0).any():\n            sys.exit(3)\n        return x"
    )
    reply = instance.run(batch_of(row(1, 2, 3, 4), row(-1, 2, 3, 4), row(5, 6, 7, 8)))
    errors = {part.members: part.error for part in reply.parts}
    assert [members for members, error in errors.items() if error is not None] == [(1,)]
    assert "sys.exit" in str(errors[(1,)])


def test_a_connection_that_cannot_be_read_is_closed(start):
    instance = start(models.identity())
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours, mock.patch.object(Poller, "add", side_effect=OSError(28, "no space")):
        instance.attach(theirs, "router")
        ours.settimeout(10)
        assert ours.recv(100) == b""  # and has been told nothing
    assert instance.slots.parties == 0
    assert instance.run(batch_of(row(1, 2, 3, 4))).parts[0].error is None
