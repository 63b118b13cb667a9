"""Requests through stock tritonclient, the same for HTTP and gRPC."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import tritonclient.grpc.aio as grpcaio
import tritonclient.http.aio as httpaio
from tritonclient.utils import np_to_triton_dtype

Arrays = dict[str, npt.NDArray[Any]]
HTTP_S = 240.0


def inputs(module: Any, arrays: Arrays) -> list[Any]:
    made = []
    for name, array in arrays.items():
        one = module.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        one.set_data_from_numpy(array)
        made.append(one)
    return made


def module_of(client: Any) -> Any:
    """tritonclient.http or .grpc, sync or aio, by the client at hand."""
    import tritonclient.grpc as grpcclient
    import tritonclient.http as httpclient

    return httpclient if "http" in type(client).__module__ else grpcclient


def infer(client: Any, model: str, arrays: Arrays, **options: Any) -> Any:
    return client.infer(model, inputs(module_of(client), arrays), **options)


async def infer_aio(client: Any, model: str, arrays: Arrays, **options: Any) -> Any:
    return await client.infer(model, inputs(module_of(client), arrays), **options)


def pending(server: Any, model: str = "slow") -> int:
    """Its requests that wait in the Router's queue."""
    text = httpx.get(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=60).text
    name = f'nv_inference_pending_request_count{{model="{model}",'
    return sum(int(float(line.split()[-1])) for line in text.splitlines() if line.startswith(name))


def aio_client(server: Any, protocol: str) -> Any:
    if protocol == "http":
        # It would give up after a minute otherwise, and gRPC's would not.
        return httpaio.InferenceServerClient(server.http, conn_limit=256, conn_timeout=HTTP_S)
    return grpcaio.InferenceServerClient(server.grpc)


@contextlib.contextmanager
def loading(server: Any, names: Sequence[str]) -> Iterator[None]:
    """Loads models, some at the same time, and unloads them at the end."""

    def post(name: str, verb: str) -> None:
        address = f"http://{server.http}/v2/repository/models/{name}/{verb}"
        reply = httpx.post(address, json={}, timeout=300)
        assert reply.status_code == 200, reply.text

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(post, names, ["load"] * len(names)))
        yield
        list(pool.map(post, names, ["unload"] * len(names)))


def statistics(client: Any, model: str) -> dict[str, int]:
    """Counters of one model: inference_count, execution_count, success, fail."""
    reply = client.get_inference_statistics(model)
    if not isinstance(reply, dict):
        one = reply.model_stats[0]
        return {
            "inference_count": one.inference_count,
            "execution_count": one.execution_count,
            "success": one.inference_stats.success.count,
            "fail": one.inference_stats.fail.count,
        }
    one = reply["model_stats"][0]
    stats = one["inference_stats"]
    return {
        "inference_count": one["inference_count"],
        "execution_count": one["execution_count"],
        "success": stats["success"]["count"],
        "fail": stats["fail"]["count"],
    }


def rows(count: int, width: int, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)
