"""The same answers on every road: the session's server has all the short ones, a second server
leaves them out (`batching: direct`, Serve's handle, plain ASGI, grpc.aio alone)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
from tritonclient.utils import InferenceServerException

from tests.serve import repository
from tests.serve.clients import aio_client, infer, infer_aio, inputs, pending, rows
from tests.serve.server import GONE_S, Server, manta_serve, port_is_free, wait_for

MODELS = ("mlp", "eager_mlp", "seed", "strings", "big")
PLAIN = ("--batching=direct", "--local-channel=false", "--http-lane=false", "--grpc-lane=false")


@pytest.fixture(scope="module")
def plain(models_root: Path) -> Iterator[Server]:
    loads = [f"--load-model={name}" for name in MODELS]
    with manta_serve(models_root, "--model-control-mode=explicit", *PLAIN, *loads) as server:
        server.wait_ready()
        yield server


def words(*texts: str) -> Any:
    return np.array([[text.encode()] for text in texts], np.object_)


SEED_INPUTS = [
    ("ARGS[0]", 0), ("ARGS[1]", 1), ("ARGS[2][keyA]", 2), ("ARGS[2][key2]", 3),
    ("KWARGS[kwarg1]", 4), ("INPUT__5", 5),
]  # fmt: skip
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "one row": ("mlp", {"INPUT__0": rows(1, 8)}),
    "several rows": ("mlp", {"INPUT__0": rows(5, 8, 1)}),
    "a full batch": ("mlp", {"INPUT__0": rows(32, 8, 2)}),
    "an eager model": ("eager_mlp", {"x": rows(3, 8, 3)}),
    "an AOTI package": ("seed", {name: rows(2, 16, n) for name, n in SEED_INPUTS}),
    "strings": ("strings", {"words": words("a", "", "zwei Wörter", "x" * 5000)}),
    "4 KB": ("big", {"x": rows(1, 1024, 4)}),
    "6 MB, by reference or in shared memory": ("big", {"x": rows(2, 786432, 5)}),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_all_roads_lead_to_the_same_bits(server: Server, plain: Server, name: str) -> None:
    """One request is one batch here, so that both servers run the very same rows together."""
    model, arrays = REQUESTS[name]
    answers: dict[str, dict[str, Any]] = {}
    for road, one in (("short", server), ("plain", plain)):
        with (
            contextlib.closing(httpclient.InferenceServerClient(one.http)) as http,
            contextlib.closing(grpcclient.InferenceServerClient(one.grpc)) as grpc,
        ):
            for protocol, client in (("http", http), ("grpc", grpc)):
                for turn in range(3):  # the third goes by a plan, where there is one
                    reply = infer(client, model, arrays)
                    answers[f"{road} {protocol} {turn}"] = outputs_of(client, model, reply)
    first, *others = answers
    for other in others:
        assert answers[first].keys() == answers[other].keys()
        for output, value in answers[first].items():
            assert np.array_equal(value, answers[other][output]), f"{output}: {first}, {other}"


def outputs_of(client: Any, model: str, reply: Any) -> dict[str, Any]:
    metadata = client.get_model_metadata(model)
    entries = metadata["outputs"] if isinstance(metadata, dict) else metadata.outputs
    names = [one["name"] if isinstance(one, dict) else one.name for one in entries]
    return {name: reply.as_numpy(name) for name in names}


def test_the_bits_are_torchs_own(server: Server) -> None:
    x = rows(5, 8, 1)
    torch.set_num_threads(1)
    with torch.inference_mode():
        expected = torch.jit.script(repository.mlp())(torch.from_numpy(x)).numpy()
    with contextlib.closing(httpclient.InferenceServerClient(server.http)) as client:
        np.testing.assert_allclose(
            infer(client, "mlp", {"INPUT__0": x}).as_numpy("OUTPUT__0"), expected, rtol=1e-6
        )


def test_each_server_takes_the_roads_that_it_is_told(server: Server, plain: Server) -> None:
    """Or the comparison above would compare a road with itself."""

    def batches(one: Server, road: str) -> int:
        details = [r["details"] for r in one.peek()["replicas"] if ".mlp." in r["application"]]
        return int(details[0][road])

    def grown(one: Server, road: str, before: int) -> bool:
        with contextlib.closing(httpclient.InferenceServerClient(one.http)) as client:
            infer(client, "mlp", {"INPUT__0": rows(1, 8)})
        return batches(one, road) > before

    # A replica tells it once a second, and Serve may stand in until there is a channel.
    wait_for(partial(grown, server, "by_channel", 0), 60, "the short road is taken")
    stood_in = batches(server, "by_serve")
    before = batches(server, "by_channel")
    wait_for(partial(grown, server, "by_channel", before + 9), 60, "and taken again")
    assert batches(server, "by_serve") == stood_in
    wait_for(partial(grown, plain, "by_serve", 0), 60, "the other road is taken")
    assert batches(plain, "by_channel") == 0
    assert len(server.haproxies()) == 1 and plain.haproxies() == []


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_shared_memory_is_off_unless_it_is_allowed(plain: Server, protocol: str) -> None:
    """As it is on the session's server; see test_shared_memory.py."""
    module = httpclient if protocol == "http" else grpcclient
    address = plain.http if protocol == "http" else plain.grpc
    with contextlib.closing(module.InferenceServerClient(address)) as client:
        check_off(client, module)


def check_off(client: Any, module: Any) -> None:
    extensions = client.get_server_metadata()
    extensions = extensions["extensions"] if module is httpclient else extensions.extensions
    assert "classification" in extensions and "system_shared_memory" not in extensions
    one = module.InferInput("INPUT__0", [1, 8], "FP32")
    one.set_shared_memory("r", 32)
    output = module.InferRequestedOutput("OUTPUT__0")
    output.set_shared_memory("r", 16)
    sent = inputs(module, {"INPUT__0": rows(1, 8)})
    for use in (
        lambda: client.register_system_shared_memory("r", "/r", 64),
        lambda: client.register_cuda_shared_memory("r", "AAAA", 0, 64),
        lambda: client.unregister_system_shared_memory(),
        lambda: client.unregister_cuda_shared_memory("r"),
        lambda: client.infer("mlp", [one]),
        lambda: client.infer("mlp", sent, outputs=[output]),
    ):
        with pytest.raises(InferenceServerException) as caught:
            use()
        assert caught.value.status() in ("501", "StatusCode.UNIMPLEMENTED")
        assert caught.value.message() == (
            "Client shared memory is disabled. Start the server with "
            "'--allow-client-shm=true' to enable."
        )


def test_ctrl_c_reaches_the_whole_group_and_ends_well(plain: Server) -> None:
    """A terminal sends SIGINT to every process of the foreground group, Ray's among them. The last
    test of this server."""
    with contextlib.closing(
        httpclient.InferenceServerClient(plain.http, network_timeout=120)
    ) as client:
        client.load_model("slow")
    plain.stop_peeking()
    folder = plain.repository / "slow"
    family = plain.descendants()

    async def run(go: Callable[[], None]) -> list[Any]:
        async with aio_client(plain, "http") as client:
            held = {"s": np.full((1, 1), -1.0, np.float32)}
            soon = {"s": np.full((1, 1), 0.01, np.float32)}
            calls = [
                asyncio.create_task(infer_aio(client, "slow", each))
                for each in (held, held, soon, soon, soon, soon)
            ]

            def accepted() -> bool:
                """Two run, and the others wait, unless they came before and have been answered."""
                rest = pending(plain) + sum(call.done() for call in calls)
                return len(repository.held(folder)) == 2 and rest == 4

            await asyncio.to_thread(wait_for, accepted, 60, "the server has them all")
            os.killpg(plain.process.pid, signal.SIGINT)
            await asyncio.sleep(0.4)
            go()
            return await asyncio.gather(*calls)

    with repository.holding(folder) as go:
        replies = asyncio.run(run(go))
    assert [reply.as_numpy("t").shape for reply in replies] == [(1, 1)] * 6
    assert plain.process.wait(90) == 0
    _, alive = psutil.wait_procs(family, timeout=GONE_S)
    assert not alive and port_is_free(plain.http_port)
