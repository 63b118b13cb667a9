"""A handler of TorchServe: one torch call on the rows of all requests of a batch."""

import json
import os
from typing import Any

import numpy as np
import torch

DTYPES = {"FP32": np.float32, "INT64": np.int64}
ROW = json.loads(os.environ["BENCH_ROW"])
DTYPE = DTYPES[os.environ["BENCH_DATATYPE"]]


class Handler:
    def initialize(self, context: Any) -> None:
        torch.set_num_threads(1)
        self.model = torch.jit.load(os.environ["BENCH_FILE"]).eval()

    def handle(self, data: list[dict[str, bytes]], context: Any) -> list[bytes]:
        rows = [np.frombuffer(one["body"], DTYPE).reshape(ROW) for one in data]
        with torch.inference_mode():
            result = self.model(torch.from_numpy(np.stack(rows))).numpy()
        return [row.tobytes() for row in result]
