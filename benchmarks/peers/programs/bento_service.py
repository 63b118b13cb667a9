"""BentoML around torch, with its adaptive batching."""

import os

import bentoml  # type: ignore[import-not-found]
import numpy as np
import torch

DTYPES = {"FP32": np.float32, "INT64": np.int64}
DTYPE = DTYPES[os.environ["BENCH_DATATYPE"]]
MAX_BATCH = int(os.environ["BENCH_MAX_BATCH"])


@bentoml.service(workers=1, traffic={"timeout": 120, "max_concurrency": 1024})
class Torch:
    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.model = torch.jit.load(os.environ["BENCH_FILE"]).eval()

    @bentoml.api(batchable=MAX_BATCH > 1, max_batch_size=MAX_BATCH, max_latency_ms=60_000)
    def infer(self, rows: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            result: np.ndarray = self.model(torch.from_numpy(rows.astype(DTYPE))).numpy()
        return result
