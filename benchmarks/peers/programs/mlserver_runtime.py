"""A runtime of MLServer that calls torch."""

import os

import numpy as np
import torch
from mlserver import MLModel  # type: ignore[import-not-found]
from mlserver.codecs import NumpyCodec  # type: ignore[import-not-found]
from mlserver.types import InferenceRequest, InferenceResponse  # type: ignore[import-not-found]

DTYPES = {"FP32": np.float32, "INT64": np.int64}


class Runtime(MLModel):  # type: ignore[misc]
    async def load(self) -> bool:
        torch.set_num_threads(1)
        self.model = torch.jit.load(os.environ["BENCH_FILE"]).eval()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        given = payload.inputs[0]
        array = NumpyCodec.decode_input(given).astype(DTYPES[given.datatype], copy=False)
        with torch.inference_mode():
            result = self.model(torch.from_numpy(array)).numpy()
        output = NumpyCodec.encode_output("OUTPUT__0", result)
        return InferenceResponse(model_name=self.name, outputs=[output])
