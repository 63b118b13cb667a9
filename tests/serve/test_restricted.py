"""Restricted APIs, options of the gRPC port and limits of queues on a real server, with stock
clients."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc as grpcio
import httpx
import numpy as np
import psutil
import pytest
import torch
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tritonclient.utils import InferenceServerException

from tests.serve import repository
from tests.serve.clients import aio_client, infer, infer_aio, inputs, pending, rows
from tests.serve.server import BIN, START_S, Server, manta_serve, wait_for

WAITING = 4  # requests for one model
INFER_VALUE, ADMIN_VALUE = "1nf3r-v4lue", "4dm1n-v4lue"
GROUPS = [f"inference:X-Infer={INFER_VALUE}", f"model-repository,model-config:adm={ADMIN_VALUE}"]
HTTP = {"inference": {"x-infer": INFER_VALUE}, "admin": {"ADM": ADMIN_VALUE}}
GRPC = {
    "inference": {"triton-grpc-protocol-x-infer": INFER_VALUE},
    "admin": {"triton-grpc-protocol-adm": ADMIN_VALUE},
}


@pytest.fixture(scope="module")
def closed(models_root: Path) -> Iterator[Server]:
    flags = ["--model-control-mode=explicit", "--load-model=mlp", "--log-verbose=1"]
    flags += ["--load-model=slow", f"--max-queue-requests={WAITING}", "--max-queue-secs=5"]
    flags += [f"--http-restricted-api={group}" for group in GROUPS]
    flags += [f"--grpc-restricted-protocol={group}" for group in GROUPS]
    flags += ["--grpc-infer-response-compression-level=high", "--grpc-keepalive-time=60000"]
    with manta_serve(models_root, *flags) as one:
        one.wait_ready()
        yield one


@pytest.fixture(params=["http", "grpc"])
def client(request: pytest.FixtureRequest, closed: Server) -> Iterator[Any]:
    if request.param == "http":
        one = httpclient.InferenceServerClient(closed.http, network_timeout=120)
    else:
        one = grpcclient.InferenceServerClient(closed.grpc)
    yield one
    one.close()


def over_http(client: Any) -> bool:
    return "http" in type(client).__module__


def headers(client: Any) -> dict[str, dict[str, str]]:
    """New ones, since tritonclient adds to those that it is given."""
    return {name: dict(value) for name, value in (HTTP if over_http(client) else GRPC).items()}


def refused(client: Any, call: Any, key: str) -> None:
    with pytest.raises(InferenceServerException) as caught:
        call()
    name = key if over_http(client) else f"triton-grpc-protocol-{key}"
    assert caught.value.status() == ("403" if over_http(client) else "StatusCode.UNAVAILABLE")
    assert caught.value.message() == f"This API is restricted, expecting header '{name}'"


def test_infer_wants_its_header(client: Any) -> None:
    x = rows(2, 8)
    with torch.inference_mode():
        expected = repository.mlp()(torch.from_numpy(x)).numpy()
    good, admin = headers(client)["inference"], headers(client)["admin"]
    wrong = {name: value + "x" for name, value in good.items()}
    for _ in range(4):  # a head that comes again is remembered
        for bad in ({}, wrong, admin):
            call = partial(infer, client, "mlp", {"INPUT__0": x}, headers=bad)
            refused(client, call, "X-Infer")
        reply = infer(client, "mlp", {"INPUT__0": x}, headers=good)
        np.testing.assert_allclose(reply.as_numpy("OUTPUT__0"), expected, atol=1e-5)


def test_each_operation_of_a_group_wants_it_and_others_do_not(client: Any) -> None:
    admin = headers(client)["admin"]
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("mlp")
    client.get_server_metadata()
    client.get_model_metadata("mlp")
    client.get_inference_statistics("mlp")
    for call in (
        lambda **more: client.get_model_config("mlp", **more),
        lambda **more: client.get_model_repository_index(**more),
        lambda **more: client.load_model("spare", **more),
        lambda **more: client.unload_model("spare", **more),
    ):
        refused(client, call, "adm")
        refused(client, partial(call, headers=headers(client)["inference"]), "adm")
        call(headers=admin)


def test_refused_loads_load_nothing(closed: Server) -> None:
    index = f"http://{closed.http}/v2/repository/index"

    def states() -> dict[str, Any]:
        entries = httpx.post(index, headers=HTTP["admin"], timeout=60).json()
        return {entry["name"]: entry.get("state") for entry in entries}

    # The model of the test before may still leave.
    wait_for(lambda: "UNLOADING" not in states().values(), 120, "no model leaves")
    before = states()
    for path in ("load", "load/", "/load", "%6coad", "LOAD"):
        reply = httpx.post(f"http://{closed.http}/v2/repository/models/big/{path}", timeout=60)
        assert reply.status_code in (403, 404)
    assert states() == before


def test_streams_are_restricted_as_infer_calls_are(closed: Server) -> None:
    one = grpcclient.InferenceServerClient(closed.grpc)
    told: list[Any] = []
    one.start_stream(lambda result, error: told.append(error))
    wait_for(lambda: told, 60, "the stream is refused")
    one.stop_stream()
    assert told[0].status() == "StatusCode.UNAVAILABLE"
    assert "expecting header 'triton-grpc-protocol-X-Infer'" in told[0].message()
    told.clear()
    one.start_stream(lambda result, error: told.append(error), headers=dict(GRPC["inference"]))
    one.async_stream_infer("mlp", inputs(grpcclient, {"INPUT__0": rows(1, 8)}))
    one.stop_stream()
    assert told == [None]
    one.close()


def test_health_by_the_standard_service_is_open_as_health_is(closed: Server) -> None:
    with grpcio.insecure_channel(closed.grpc) as channel:
        reply = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(), timeout=30
        )
    assert reply.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize("algorithm", ["gzip", "deflate", None])
def test_compressed_both_ways(closed: Server, algorithm: str | None) -> None:
    one = grpcclient.InferenceServerClient(closed.grpc)
    x = np.zeros((32, 8), np.float32)
    for _ in range(4):
        reply = infer(
            one,
            "mlp",
            {"INPUT__0": x},
            headers=dict(GRPC["inference"]),
            compression_algorithm=algorithm,
        )
        got = reply.as_numpy("OUTPUT__0")
        assert got.shape == (32, 4) and np.array_equal(got, np.repeat(got[:1], 32, 0))
    one.close()


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_who_finds_the_queue_full_and_who_waits_in_it_too_long(
    closed: Server, protocol: str
) -> None:
    """Of 16, two run, and beside each one more may be on its way; four wait; the rest is told."""
    refusal = "503" if protocol == "http" else "StatusCode.UNAVAILABLE"

    async def ask(one: Any, seconds: float) -> str:
        x = np.full((1, 1), seconds, np.float32)
        try:
            await infer_aio(one, "slow", {"s": x}, headers=headers(one)["inference"])
        except InferenceServerException as error:
            assert error.status() == refusal
            return str(error.message())
        return "ok"

    async def use(go: Callable[[], None]) -> Counter[str]:
        async with aio_client(closed, protocol) as one:
            asked = [asyncio.create_task(ask(one, -1.0)) for _ in range(16)]
            # Until all that wait have waited too long.
            while (
                sum(call.done() for call in asked) < 16 - 4
                or (await asyncio.to_thread(pending, closed)) > 0
            ):
                await asyncio.sleep(0.05)
            go()
            told = Counter(await asyncio.gather(*asked))
            assert await ask(one, 0.0) == "ok"
            return told

    with repository.holding(closed.repository / "slow") as go:
        told = asyncio.run(asyncio.wait_for(use(go), 120))
    full = f"[request id: <id_unknown>] Exceeds maximum queue size: {WAITING} requests wait for"
    late = "[request id: <id_unknown>] Request timeout expired: model 'slow' had no free instance"
    assert 16 - WAITING - 4 <= told[f"{full} model 'slow'"] <= 16 - WAITING - 2, told
    assert told[f"{late} in time"] >= WAITING
    assert 2 <= told["ok"] <= 4 and sum(told.values()) == 16 and len(told) == 3


def test_what_haproxy_does_not_take_was_warned_of(closed: Server) -> None:
    assert "grpc_keepalive_time_ms: HAProxy has the gRPC port" in closed.output()


def test_the_values_are_nowhere_to_be_read(closed: Server) -> None:
    """Last: all of the above is in the logs by now."""
    infer_reply = httpx.post(
        f"http://{closed.http}/v2/models/mlp/infer",
        headers=HTTP["inference"],
        content=b"{",
        timeout=60,
    )
    assert infer_reply.status_code == 500
    config = httpx.get(
        f"http://{closed.http}/v2/models/mlp/config", headers=HTTP["admin"], timeout=60
    )
    metrics = httpx.get(f"http://127.0.0.1:{closed.metrics_port}/metrics", timeout=60)
    shown = [closed.output(), config.text, infer_reply.text, metrics.text]
    logs = [path for path in closed.folder.rglob("*") if path.is_file() and "logs" in path.parts]
    assert logs
    shown += [path.read_text(errors="replace") for path in logs]
    for process in closed.descendants():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if not any(word.startswith("--http-restricted-api") for word in words):
                shown.append(" ".join(words))
    for text in shown:
        assert INFER_VALUE not in text and ADMIN_VALUE not in text


@pytest.mark.parametrize(
    "groups",
    [
        ["--http-restricted-api=nonsense:k=v4lue"],
        ["--grpc-restricted-protocol=health:k=v4lue", "--grpc-restricted-protocol=health:j=v4lue"],
        ["--http-restricted-api=health=v4lue"],
    ],
)
def test_wrong_groups_end_the_start(models_root: Path, groups: list[str]) -> None:
    done = subprocess.run(
        [str(BIN / "manta"), "serve", f"--model-repository={models_root}", *groups],
        capture_output=True,
        text=True,
        timeout=START_S,
    )
    assert done.returncode == 1 and "restricted" in done.stderr
    assert "v4lue" not in done.stderr + done.stdout
