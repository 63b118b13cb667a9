"""The load generators: both count the same things, on a real server on loopback."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import baseline, load, mlp


def test_read_log_cuts_the_warm_up_and_counts_failures():
    second = 1_000_000
    rows = [(0, 200, 10), (second - 5, 200, 10), (2 * second, 503, 7), (3 * second, 200, 30)]
    result = load.read_log("".join("\t".join(map(str, row)) + "\n" for row in rows))
    assert (result.requests, result.failed) == (2, 1)
    assert result.seconds == pytest.approx(2.00003)
    assert result.latencies_us.tolist() == [10, 30]


@pytest.mark.parametrize("text", ["", "0\t200\t10\n", "0\t200\t1\n2000000\t500\t1\n"])
def test_read_log_without_a_usable_request(text: str):
    with pytest.raises(load.LoadError):
        load.read_log(text)


def test_content_length_is_case_blind():
    assert load.content_length(b"HTTP/1.1 200 OK\r\na: b\r\ncontent-LENGTH: 17") == 17
    with pytest.raises(load.LoadError):
        load.content_length(b"HTTP/1.1 200 OK\r\na: b")


def test_the_asyncio_client_closes_the_loop(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(load, "WARM_UP_S", 0.0)
    request, seen = mlp.Request(b"x" * 3000, 7, np.zeros(1)), []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                seen.append((head, await reader.readexactly(load.content_length(head[:-4]))))
                status = b"200 OK" if len(seen) % 5 else b"503 Busy"
                writer.write(b"HTTP/1.1 " + status + b"\r\nContent-Length: 4\r\n\r\nab")
                await writer.drain()
                writer.write(b"cd")  # in two pieces
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def drive() -> load.Load:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            return await load.run_asyncio(port, request, 3, 0.2)

    result = asyncio.run(drive())
    assert result.requests >= 8 and result.failed >= 1
    assert len(result.latencies_us) == result.requests
    assert all(body == request.body for _, body in seen)
    assert b"Inference-Header-Content-Length: 7" in seen[0][0]


def test_the_baseline_answers_as_torch_does(tmp_path: Path):
    model_file = mlp.build_repository(tmp_path, delay_us=0)
    request = mlp.make_request(model_file)
    model = torch.jit.load(model_file)
    body, header_bytes = baseline.answer(model, request.body, request.header_bytes)
    assert np.array_equal(mlp.read_answer(body, header_bytes), request.expected)
