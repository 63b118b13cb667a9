"""What `bench.py` compares with: bare uvicorn and Starlette, one model call per request.

    python benchmarks/baseline.py --model mlp/1/model.pt --port 9000 --executor loop

The same v2 binary body in and out as the server's. The model runs on the event loop's thread
(`loop`) or in a thread pool (`pool`); the benchmark takes whichever is faster. Nothing is batched.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import orjson
import torch
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.mlp import HEADER

Model = Callable[[torch.Tensor], torch.Tensor]


def answer(model: Model, body: bytes, header_bytes: int) -> tuple[bytes, int]:
    """A binary v2 request body -> a binary v2 response body, and the length of its JSON."""
    head = orjson.loads(body[:header_bytes])
    shape = head["inputs"][0]["shape"]
    # A copy, because torch refuses memory that it may not write to.
    tensor = torch.frombuffer(bytearray(body[header_bytes:]), dtype=torch.float32).reshape(shape)
    with torch.inference_mode():
        result = model(tensor)
    raw = result.numpy().tobytes()
    output = {
        "name": "OUTPUT__0",
        "datatype": "FP32",
        "shape": list(result.shape),
        "parameters": {"binary_data_size": len(raw)},
    }
    text = orjson.dumps({"model_name": "mlp", "model_version": "1", "outputs": [output]})
    return text + raw, len(text)


def build_app(model: Model, pool: ThreadPoolExecutor | None) -> Starlette:
    async def infer(request: Request) -> Response:
        body, header_bytes = await request.body(), int(request.headers[HEADER])
        if pool is None:
            content, length = answer(model, body, header_bytes)
        else:
            loop = asyncio.get_running_loop()
            content, length = await loop.run_in_executor(pool, answer, model, body, header_bytes)
        return Response(content, headers={HEADER: str(length)})

    async def ready(request: Request) -> Response:
        return Response()

    endpoints: list[tuple[str, Callable[[Request], Awaitable[Response]], str]] = [
        ("/v2/models/mlp/infer", infer, "POST"),
        ("/v2/health/ready", ready, "GET"),
    ]
    return Starlette(routes=[Route(path, call, methods=[verb]) for path, call, verb in endpoints])


def main() -> None:
    parser = argparse.ArgumentParser(description="The benchmark's baseline server.")
    parser.add_argument("--model", type=Path, required=True, help="a TorchScript file")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--executor", choices=("loop", "pool"), default="loop")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = torch.jit.load(options.model).eval()
    pool = ThreadPoolExecutor(os.cpu_count()) if options.executor == "pool" else None
    app = build_app(model, pool)
    uvicorn.run(app, host="127.0.0.1", port=options.port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
