"""LitServe around torch: python litserve_server.py PORT."""

import json
import os
import sys
from typing import Annotated

import litserve  # type: ignore[import-not-found]
import numpy as np
import torch
from fastapi import Body, Response

DTYPES = {"FP32": np.float32, "INT64": np.int64}
ROW = json.loads(os.environ["BENCH_ROW"])
DTYPE = DTYPES[os.environ["BENCH_DATATYPE"]]


class Torch(litserve.LitAPI):  # type: ignore[misc]
    def setup(self, device: str) -> None:
        torch.set_num_threads(1)
        self.model = torch.jit.load(os.environ["BENCH_FILE"]).eval()

    def decode_request(self, request: Annotated[bytes, Body()]) -> np.ndarray:
        return np.frombuffer(request, DTYPE).reshape(ROW)

    def batch(self, inputs: list[np.ndarray]) -> np.ndarray:
        return np.stack(inputs)

    def predict(self, batch: np.ndarray) -> np.ndarray:
        # Without batching the row comes alone.
        rows = batch if batch.ndim > len(ROW) else batch[None]
        with torch.inference_mode():
            result: np.ndarray = self.model(torch.from_numpy(rows)).numpy()
        return result

    def unbatch(self, output: np.ndarray) -> list[np.ndarray]:
        return list(output)

    def encode_response(self, output: np.ndarray) -> Response:
        return Response(output.tobytes(), media_type="application/octet-stream")


if __name__ == "__main__":
    api = Torch(
        max_batch_size=int(os.environ["BENCH_MAX_BATCH"]),
        batch_timeout=int(os.environ["BENCH_DELAY_US"]) / 1e6,
    )
    server = litserve.LitServer(api, accelerator="cpu", devices=1, workers_per_device=1)
    server.run(
        host="127.0.0.1",
        port=int(sys.argv[1]),
        num_api_servers=1,
        log_level="warning",
        generate_client_file=False,
    )
