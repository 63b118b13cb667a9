"""What every server is compared with: FastAPI on uvicorn, the model in the same process.

    python benchmarks/baseline.py --model mlp.pt --name mlp --port 9000 --executor loop

v2 binary bodies in and out, one model call per request, on the event loop's thread (`loop`) or in
a thread pool (`pool`); the benchmark takes whichever is faster. Nothing is batched or validated.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import orjson
import torch
import uvicorn
from fastapi import FastAPI, Request, Response

HEADER = "Inference-Header-Content-Length"
DTYPES = {"FP32": np.float32, "INT64": np.int64}

Model = Callable[[torch.Tensor], torch.Tensor]


def answer(model: Model, body: bytes, header_bytes: int) -> tuple[bytes, int]:
    """A binary v2 request body -> a binary v2 response body, and the length of its JSON."""
    (given,) = orjson.loads(body[:header_bytes])["inputs"]
    array = np.frombuffer(body, DTYPES[given["datatype"]], offset=header_bytes)
    # No copy. Torch warns once of memory that it may not write to; no model here does.
    tensor = torch.from_numpy(array.reshape(given["shape"]))
    with torch.inference_mode():
        result = model(tensor)
    raw = result.numpy().tobytes()
    output = {
        "name": "OUTPUT__0",
        "datatype": "FP32",
        "shape": list(result.shape),
        "parameters": {"binary_data_size": len(raw)},
    }
    text = orjson.dumps({"model_name": "model", "model_version": "1", "outputs": [output]})
    return text + raw, len(text)


def build_app(model: Model, name: str, pool: ThreadPoolExecutor | None) -> FastAPI:
    app = FastAPI(openapi_url=None)

    async def infer(request: Request) -> Response:
        body, header_bytes = await request.body(), int(request.headers[HEADER])
        if pool is None:
            content, length = answer(model, body, header_bytes)
        else:
            loop = asyncio.get_running_loop()
            content, length = await loop.run_in_executor(pool, answer, model, body, header_bytes)
        return Response(content, headers={HEADER: str(length)})

    async def ready() -> Response:
        return Response()

    app.add_api_route(f"/v2/models/{name}/infer", infer, methods=["POST"], response_model=None)
    app.add_api_route("/v2/health/ready", ready, methods=["GET"], response_model=None)
    return app


def main() -> None:
    parser = argparse.ArgumentParser(description="The benchmark's baseline server.")
    parser.add_argument("--model", type=Path, required=True, help="a TorchScript file")
    parser.add_argument("--name", required=True, help="the model's name in the path")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--executor", choices=("loop", "pool"), default="loop")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = torch.jit.load(options.model).eval()
    pool = ThreadPoolExecutor(os.cpu_count()) if options.executor == "pool" else None
    app = build_app(model, options.name, pool)
    uvicorn.run(app, host="127.0.0.1", port=options.port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
