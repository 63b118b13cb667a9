from __future__ import annotations

import pytest
import torch

from deployments.runtimes import faults


@pytest.mark.parametrize(
    ("text", "fatal"),
    [
        ("CUDA error: device-side assert triggered", True),
        ("CUDA error: unspecified launch failure", True),
        ("CUDA error: uncorrectable ECC error encountered", True),
        ("CUDA error: invalid configuration argument", False),
        ("CUDA out of memory. Tried to allocate 2 GiB", False),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_which_errors_are_fatal(text, fatal):
    assert faults.is_fatal(RuntimeError(text)) is fatal


def test_memory_errors():
    assert faults.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert faults.is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert faults.is_out_of_memory(caught.value)
    assert not faults.is_out_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize(
    ("raised", "text"),
    [
        ("cannot open /srv/repo/m/1/x.pt now", "cannot open x.pt now"),
        ("1/2 of input/output", "1/2 of input/output"),
        ("at 0x7ffdeadbeef0", "at 0x?"),
        ("bad\nframe #0: c10::Error", "bad"),
        ('x\nTraceback (most recent call last):\n  File "/a/b.py"\nKeyError: 1', "x\nKeyError: 1"),
        ("", "RuntimeError"),
    ],
)
def test_clean_text(raised, text):
    assert faults.clean_text(RuntimeError(raised)) == text
