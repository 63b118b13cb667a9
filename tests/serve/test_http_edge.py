"""The edges of HTTP over a real server: compression both ways, generate, chunks, odd paths."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import socket
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import torch
import tritonclient.http as httpclient
from tritonclient.utils import InferenceServerException

from tests.serve import raw, repository
from tests.serve.clients import aio_client, infer, infer_aio, pending, rows, statistics
from tests.serve.server import Server, wait_for

ALGORITHMS = (None, "gzip", "deflate")
EVENTS = "text/event-stream; charset=utf-8"
MIB = 1 << 20


def direct(x: Any) -> Any:
    with torch.inference_mode():
        return repository.mlp()(torch.from_numpy(x)).numpy()


def url(server: Server, path: str) -> str:
    return f"http://{server.http}/v2/models/{path}"


def post(address: str, **options: Any) -> httpx.Response:
    return httpx.post(address, timeout=120, **options)


# --- compression ---------------------------------------------------------------------------------


@pytest.mark.parametrize("there", ALGORITHMS)
@pytest.mark.parametrize("back", ALGORITHMS)
@pytest.mark.parametrize("binary", [True, False])
def test_the_stock_client_compresses_both_ways(
    http: Any, there: str | None, back: str | None, binary: bool
) -> None:
    x = rows(3, 8)
    one = httpclient.InferInput("INPUT__0", [3, 8], "FP32")
    one.set_data_from_numpy(x, binary_data=binary)
    asked = [httpclient.InferRequestedOutput("OUTPUT__0", binary_data=binary)]
    for _ in range(3):
        reply = http.infer(
            "mlp",
            [one],
            outputs=asked,
            request_compression_algorithm=there,
            response_compression_algorithm=back,
        )
        np.testing.assert_allclose(reply.as_numpy("OUTPUT__0"), direct(x), atol=1e-5)


def test_the_aio_client_compresses_both_ways(server: Server) -> None:
    """It asks for gzip unless told otherwise, and unpacks nothing but answers to infer."""
    x = rows(2, 8)

    async def ask() -> list[Any]:
        async with aio_client(server, "http") as client:
            assert (await client.get_model_metadata("mlp"))["name"] == "mlp"
            assert (await client.get_model_config("mlp"))["max_batch_size"] == 32
            assert (await client.get_inference_statistics("mlp"))["model_stats"]
            with pytest.raises(InferenceServerException, match="unknown model: 'nobody'"):
                await infer_aio(client, "nobody", {"INPUT__0": x})
            return [
                await infer_aio(
                    client,
                    "mlp",
                    {"INPUT__0": x},
                    request_compression_algorithm=there,
                    response_compression_algorithm=back,
                )
                for there in ALGORITHMS
                for back in ALGORITHMS
            ]

    for reply in asyncio.run(ask()):
        np.testing.assert_allclose(reply.as_numpy("OUTPUT__0"), direct(x), atol=1e-5)


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_large_tensors_are_compressed_both_ways(http: Any, algorithm: str) -> None:
    x = np.repeat(rows(1, 1 << 14), 64).reshape(1, -1)  # 4 MiB, a tenth of it compressed
    reply = infer(
        http,
        "big",
        {"x": x},
        request_compression_algorithm=algorithm,
        response_compression_algorithm=algorithm,
    )
    assert np.array_equal(reply.as_numpy("OUTPUT__0"), x)


@pytest.mark.parametrize(
    ("accepted", "coding"),
    [
        ("gzip", "gzip"),
        ("gzip;q=0.2, deflate;q=0.8", "deflate"),
        ("identity", None),
        ("gzip;q=0", None),
        ("br", None),
    ],
)
def test_the_answer_has_the_coding_that_is_asked_for(
    server: Server, accepted: str, coding: str | None
) -> None:
    x = rows(1, 8)
    document = {
        "inputs": [{"name": "INPUT__0", "datatype": "FP32", "shape": [1, 8], "data": x.tolist()}],
        "parameters": {"binary_data_output": True},
    }
    with httpx.stream(
        "POST",
        url(server, "mlp/infer"),
        json=document,
        headers={"accept-encoding": accepted},
        timeout=60,
    ) as reply:
        body = b"".join(reply.iter_raw())
        assert reply.status_code == 200 and reply.headers.get("content-encoding") == coding
    if coding is not None:
        body = zlib.decompress(body, 47)
    length = int(reply.headers["inference-header-content-length"])  # before compression
    assert json.loads(body[:length])["outputs"][0]["parameters"] == {"binary_data_size": 16}
    np.testing.assert_allclose(np.frombuffer(body[length:], np.float32), direct(x)[0], atol=1e-5)


BAD = [
    ("br", b"abc", 501, "Unsupported compression type 'br'"),
    (
        "gzip, gzip",
        gzip.compress(gzip.compress(b"{}", mtime=0), mtime=0),
        501,
        "Unsupported compression type",
    ),
    ("gzip", b"abc", 400, "no valid gzip data"),
    ("gzip", gzip.compress(b"{}", mtime=0)[:-1], 400, "ends before the end"),
    ("gzip", gzip.compress(b"{}", mtime=0) + b"x", 400, "goes on after the end"),
    ("deflate", gzip.compress(b"{}", mtime=0), 400, "no valid deflate data"),
    ("gzip", gzip.compress(b"{", mtime=0), 500, "failed to parse the request JSON buffer"),
]


@pytest.mark.parametrize(("encoding", "content", "status", "text"), BAD)
def test_bad_compressed_bodies(
    server: Server, encoding: str, content: bytes, status: int, text: str
) -> None:
    headers = {"content-encoding": encoding}
    reply = post(url(server, "mlp/infer"), content=content, headers=headers)
    assert reply.status_code == status and text in reply.json()["error"]
    assert reply.headers.get("accept-encoding") == ("gzip, deflate" if status == 501 else None)
    assert server.live()


def test_bombs_are_refused_and_leave_no_memory_behind(server: Server, http: Any) -> None:
    """64 KiB that would be 64 MiB and more, many times and at once."""
    bomb = gzip.compress(bytes(96 * MIB), 9)
    assert len(bomb) < 128 << 10
    (router,) = (psutil.Process(pid) for pid in server.replica_pids("manta:Router"))

    def two() -> int:
        forms: tuple[dict[str, str], ...] = ({}, {"inference-header-content-length": "2"})
        for more in forms:
            reply = post(
                url(server, "mlp/infer"),
                content=bomb,
                headers={"content-encoding": "gzip", **more},
            )
            assert reply.status_code == 400
            assert "exceeds the maximum allowed value" in reply.json()["error"]
        return 2

    def volley() -> None:
        with ThreadPoolExecutor(4) as pool:
            posts = [pool.submit(two) for _ in range(6)]
        assert sum(one.result() for one in posts) == 12

    def leaves_none() -> bool:
        before = router.memory_info().rss
        volley()
        with contextlib.suppress(TimeoutError):
            wait_for(lambda: router.memory_info().rss < before + 64 * MIB, 10, "it is given back")
            return True
        return False

    volley()  # what so many at once have taken, the allocator may keep for the next ones
    # Nor need the first have been as many at once as these: what is lost is lost each time.
    assert any(leaves_none() for _ in range(3))
    assert infer(http, "mlp", {"INPUT__0": rows(1, 8)}).as_numpy("OUTPUT__0").shape == (1, 4)


def test_control_bodies_that_are_kept_are_seen(server: Server) -> None:
    """What is looked at there grows by what clients have begun to send."""
    (router,) = (psutil.Process(pid) for pid in server.replica_pids("manta:Router"))
    before = router.memory_info().rss

    def grown() -> bool:
        return bool(router.memory_info().rss > before + 64 * MIB)

    with contextlib.ExitStack() as stack:
        for _ in range(12):  # what earlier ones have left is used first
            if grown():
                break
            client = stack.enter_context(raw.connect(server))
            client.sendall(raw.head(f"Content-Length: {raw.LIMIT}") + bytes(raw.LIMIT - MIB))
        wait_for(grown, 30, "memory grows")


# --- generate ------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["generate", "generate_stream"])
def test_generate_maps_members_by_the_models_configuration(server: Server, verb: str) -> None:
    x = rows(2, 8)
    body = {"id": "7", "INPUT__0": x.ravel().tolist(), "temperature": 0.5}
    reply = post(url(server, f"mlp/versions/1/{verb}"), json=body)
    assert reply.status_code == 200, reply.text
    text = reply.text
    if verb == "generate_stream":
        assert reply.headers["content-type"] == EVENTS
        assert text.startswith("data: ") and text.endswith("\n\n")
        text = text.removeprefix("data: ")
    answer = json.loads(text)
    assert (answer["id"], answer["model_name"], answer["model_version"]) == ("7", "mlp", "1")
    np.testing.assert_allclose(answer["OUTPUT__0"], direct(x).ravel(), atol=1e-5)


def test_generate_speaks_in_strings(server: Server) -> None:
    reply = post(url(server, "strings/generate"), json={"words": "Grüße"})
    assert reply.json()["OUTPUT__0"] == "Grüße!"
    body = {"parameters": {"words": ["a", ""]}}
    assert post(url(server, "strings/generate"), json=body).json()["OUTPUT__0"] == ["a!", "!"]


def test_generate_and_infer_tell_the_same_errors(server: Server, http: Any) -> None:
    x = np.array([[-1, 1]], np.float32)
    with pytest.raises(InferenceServerException) as caught:
        infer(http, "picky", {"x": x})
    for verb in ("generate", "generate_stream"):
        reply = post(url(server, f"picky/{verb}"), json={"x": [-1, 1]})
        assert reply.status_code == 500
        text = reply.text.removeprefix("data: ")
        assert json.loads(text)["error"] == caught.value.message()
        assert (reply.headers["content-type"] == EVENTS) == (verb == "generate_stream")
        reply = post(url(server, f"nobody/{verb}"), json={})
        assert reply.status_code == 404 and "unknown model" in reply.json()["error"]
        reply = post(url(server, f"mlp/{verb}"), json={"INPUT__0": [1, 2, 3]})
        assert reply.status_code == 400 and "The schema can not convert" in reply.text
        reply = post(url(server, f"mlp/{verb}"), json={"PROMPT": "hello"})
        assert reply.status_code == 400 and "expected 1 inputs but got 0 inputs" in reply.text
        reply = post(url(server, f"mlp/{verb}"), json={"INPUT__0": [1] * 8, "timeout": 5})
        assert reply.status_code == 501 and "'timeout' is not supported" in reply.text
        reply = post(url(server, f"pickled/versions/1/{verb}"), json={})
        assert reply.status_code == 503 and "version 1 is not at ready state" in reply.text
        packed = gzip.compress(b'{"INPUT__0": [1, 2, 3, 4, 5, 6, 7, 8]}')
        headers = {"content-encoding": "gzip"}
        reply = post(url(server, f"mlp/{verb}"), content=packed, headers=headers)
        assert reply.status_code == 400 and "only 'identity' is supported" in reply.json()["error"]


def test_a_client_that_leaves_a_stream_takes_its_request_along(
    server: Server, http: Any, models_root: Path
) -> None:
    """Both instances of `slow` are held, so that the third waits in the queue."""
    before = statistics(http, "slow")
    folder, body = models_root / "slow", b'{"s": -1}'
    stream = url(server, "slow/generate_stream")
    head = raw.head(f"Content-Length: {len(body)}", path="/v2/models/slow/generate_stream")
    with ThreadPoolExecutor(2) as pool, repository.holding(folder) as go:
        held = [pool.submit(post, stream, content=body) for _ in range(2)]
        wait_for(lambda: len(repository.held(folder)) == 2, 30, "both run")
        with raw.connect(server) as leaver:
            leaver.sendall(head + body)
            wait_for(lambda: pending(server) == 1, 20, "the third waits")
        wait_for(
            lambda: statistics(http, "slow")["fail"] > before["fail"], 20, "it has left the queue"
        )
        go()
        for one in held:
            assert one.result().status_code == 200 and '"t":-2.0' in one.result().text
    after = statistics(http, "slow")
    assert after["execution_count"] - before["execution_count"] == 2
    assert after["fail"] - before["fail"] == 1


# --- chunks and paths ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "length"),
    [("mlp/infer", "Inference-Header-Content-Length: 0\r\n"), ("mlp/generate", "")],
)
@pytest.mark.parametrize("count", [65536, 65537, 200_000])
def test_a_body_of_too_many_chunks_ends_its_connection(
    server: Server, path: str, length: str, count: int
) -> None:
    head = f"POST /v2/models/{path} HTTP/1.1\r\nHost: x\r\n{length}Transfer-Encoding: chunked\r\n"
    host, port = server.http.split(":")
    with socket.create_connection((host, int(port)), 30) as client:
        client.settimeout(60)
        got = b""
        try:
            client.sendall(head.encode() + b"\r\n" + b"1\r\nA\r\n" * count + b"0\r\n\r\n")
        except ConnectionError:
            assert count > 65537  # it was closed in the middle
        try:
            while b'"}' not in got:
                piece = client.recv(65536)
                if not piece:
                    break
                got += piece
        except ConnectionError:
            pass  # what was sent and not read has swept the answer away
    if count == 65536:
        assert got.startswith((b"HTTP/1.1 400", b"HTTP/1.1 500")) and b"chunks" not in got
        assert b"connection: close" not in got
    elif count == 65537 or got:
        assert got.startswith(b"HTTP/1.1 400") and b"connection: close" in got
        assert b"more than 65536 chunks" in got
    assert server.live()


PATHS = [
    ("GET", "/v2/models/ml%70", 200),
    ("GET", "/v2/models/mlp/versions/%31/config", 200),
    ("GET", "/v2/models/mlp%2fconfig", 200),  # decoded once, before anything is looked up
    ("GET", "/v2/models/mlp%252fconfig", 400),
    ("GET", "/v2/models/..%2f..%2fetc%2fpasswd", 404),
    ("GET", "/v2/models/%2e%2e/config", 400),
    ("GET", "/v2/models/mlp/", 404),
    ("GET", "/v2/health/ready/", 404),
    ("GET", "//v2/health/ready", 404),
    ("GET", "/V2/health/ready", 404),
    ("GET", "/v2/health/ready?x=1", 200),
    ("HEAD", "/v2/health/ready", 200),
    ("HEAD", "/v2/models/mlp", 200),
    ("HEAD", "/v2/models/mlp/infer", 405),
    ("OPTIONS", "/v2/models/mlp/infer", 405),
    ("POST", "/v2/models/mlp/infer/", 404),
    ("GET", "/v2/models/mlp/generate_stream", 405),
]


@pytest.mark.parametrize(("method", "path", "status"), PATHS)
def test_odd_paths_and_verbs(server: Server, method: str, path: str, status: int) -> None:
    """As it is written: httpx would tidy it up."""
    host, port = server.http.split(":")
    with socket.create_connection((host, int(port)), 30) as client:
        client.settimeout(60)
        client.sendall(f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        reply = b"".join(iter(lambda: client.recv(65536), b""))
    head, _, body = reply.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d" % status), reply
    if method == "HEAD":
        assert body == b""
    elif status >= 400:
        assert list(json.loads(body)) == ["error"]
    if status == 405:
        assert b"\r\nallow: " in head
