"""The datatype table against the official proto, numpy, torch and tritonclient."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tritonclient.grpc import model_config_pb2 as pb
from tritonclient.utils import np_to_triton_dtype

from configs.dtypes import DATATYPES, from_config, from_wire


def test_every_type_of_the_proto_has_a_row():
    assert {d.config for d in DATATYPES} == set(pb.DataType.keys()) - {"TYPE_INVALID"}


@pytest.mark.parametrize("datatype", DATATYPES, ids=lambda d: d.wire)
def test_names_and_sizes_agree(datatype):
    assert from_config(datatype.config) is from_wire(datatype.wire) is datatype
    if datatype.wire == "BYTES":
        assert (datatype.numpy, datatype.torch, datatype.size_bytes) == (None, None, 0)
        return
    assert datatype.torch is not None
    carrier = np.dtype(datatype.numpy)
    assert carrier.itemsize == datatype.size_bytes == getattr(torch, datatype.torch).itemsize
    if datatype.wire != "BF16":
        assert np_to_triton_dtype(carrier) == datatype.wire
        assert torch.from_numpy(np.zeros(1, carrier)).dtype == getattr(torch, datatype.torch)


def test_unknown_names_are_key_errors():
    for find in (from_config, from_wire):
        with pytest.raises(KeyError):
            find("TYPE_FP8")
