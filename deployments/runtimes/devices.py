"""Devices as models see them: what a GPU can do, and where a KIND_MODEL model belongs.

Which device an instance gets is decided by configs/placement.py and the replica.
"""

from __future__ import annotations

import itertools

import torch


def compute_capability(device: str) -> str:
    """Such as "9.0", as `cc_model_filenames` has it."""
    major, minor = torch.cuda.get_device_capability(torch.device(device))
    return f"{major}.{minor}"


def settle(module: torch.nn.Module) -> bool:
    """Moves a model that names no device to the first GPU, where there is one; whether it did.

    One that names a device of its own is left as it is.
    """
    tensors = [*itertools.chain(module.parameters(), module.buffers())]
    if not tensors or not torch.cuda.is_available():
        return False
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return False
    module.to("cuda:0")
    return True
