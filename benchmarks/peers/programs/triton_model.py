"""model.py of Triton's Python backend: one torch call on the rows of all requests of a batch."""

import os

import numpy as np
import torch
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        torch.set_num_threads(1)
        self.model = torch.jit.load(os.environ["BENCH_FILE"]).eval()

    def execute(self, requests: list) -> list:
        rows = [pb_utils.get_input_tensor_by_name(one, "INPUT__0").as_numpy() for one in requests]
        batch = rows[0] if len(rows) == 1 else np.concatenate(rows)
        with torch.inference_mode():
            result = self.model(torch.from_numpy(batch)).numpy()
        answers, begin = [], 0
        for given in rows:
            end = begin + given.shape[0]
            tensor = pb_utils.Tensor("OUTPUT__0", result[begin:end])
            answers.append(pb_utils.InferenceResponse(output_tensors=[tensor]))
            begin = end
        return answers
