from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from configs.parameters import ModelParameters
from deployments.runtimes import settings
from tests import models

C: Any = torch._C


@pytest.fixture
def jit():
    """The process's JIT switches, put back after the test."""
    executor, mode = C._jit_set_profiling_executor(True), C._jit_set_profiling_mode(True)
    fuser, cudnn = C._jit_texpr_fuser_enabled(), torch.backends.cudnn.enabled
    yield
    C._jit_set_profiling_executor(executor)
    C._jit_set_profiling_mode(mode)
    C._jit_set_texpr_fuser_enabled(fuser)
    torch.backends.cudnn.enabled = cudnn


@pytest.mark.parametrize(("kind", "applied"), [("torchscript", True), ("aoti", False)])
def test_jit_switches_are_torchscripts(jit, kind, applied):
    off = ModelParameters(
        enable_jit_executor=False, enable_jit_profiling=False, enable_tensor_fuser=False
    )
    C._jit_set_texpr_fuser_enabled(True)
    settings.apply_process(off, kind)
    assert C._jit_set_profiling_executor(True) is not applied
    assert C._jit_set_profiling_mode(True) is not applied
    assert C._jit_texpr_fuser_enabled() is not applied


def test_unset_switches_leave_torch_alone(jit):
    settings.apply_process(ModelParameters(), "torchscript")
    assert C._jit_set_profiling_executor(True) is True
    assert C._jit_set_profiling_mode(True) is True


@pytest.mark.parametrize("disable", [True, False])
def test_cudnn(jit, disable):
    settings.apply_process(ModelParameters(disable_cudnn=disable), "aoti")
    assert torch.backends.cudnn.enabled is not disable


def test_guard_turns_autograd_off():
    with settings.guard(ModelParameters(inference_mode=True), "torchscript"):
        assert torch.is_inference_mode_enabled()
    with settings.guard(ModelParameters(inference_mode=False), "torchscript"):
        assert not torch.is_inference_mode_enabled() and not torch.is_grad_enabled()
    with settings.guard(ModelParameters(inference_mode=False), "eager"):
        assert torch.is_inference_mode_enabled()


def test_what_is_in_force_is_what_torch_says(jit):
    asked = ModelParameters(
        disable_cudnn=True, enable_jit_executor=False, enable_tensor_fuser=False
    )
    threads = torch.get_num_threads()
    settings.apply_process(asked, "torchscript")
    force = settings.in_force(asked, "torchscript")
    assert force["cudnn"] == force["tensor_fuser"] == force["jit_executor"] == "False"
    assert "jit_profiling" not in force
    assert force["intra_op_threads"] == str(threads)
    settings.apply_process(ModelParameters(enable_tensor_fuser=True), "torchscript")
    force = settings.in_force(ModelParameters(), "torchscript")
    assert force["cudnn"] == force["tensor_fuser"] == "True" and "jit_executor" not in force


def test_the_log_tells_the_threads_in_force_where_a_count_is_given():
    made = models.config({"x": (1,)}, {"y": (1,)}, name="m")
    force = {"intra_op_threads": "2", "inter_op_threads": "7"}
    asked = ModelParameters(inter_op_thread_count=9, intra_op_thread_count=2)
    assert settings.thread_lines(made, asked, force) == [
        "Inter op thread count is set to 7 for model 'm'",
        "Intra op thread count is set to 2 for model 'm'",
    ]
    assert settings.thread_lines(made, ModelParameters(), force) == []


def test_a_second_inter_op_count_is_said(caplog):
    have = torch.get_num_interop_threads()
    settings.apply_process(ModelParameters(inter_op_thread_count=have), "torchscript")
    assert not caplog.messages
    with contextlib.suppress(RuntimeError):
        torch.set_num_interop_threads(have)  # torch takes it once: this, or an earlier call
    settings.apply_process(ModelParameters(inter_op_thread_count=have + 1), "torchscript")
    assert f"stay at {have}, {have + 1} wanted" in caplog.text
