"""Connections that mean harm: heads of two meanings, bodies without an end, clients that leave or
stand still. Each ends as it should, the server goes on, no memory stays."""

from __future__ import annotations

import contextlib
import socket
import struct
from typing import Any

import psutil
import pytest

from tests.serve.raw import LENGTH, LIMIT, MIB, SENT, ask, body, connect, head, parsed, rest
from tests.serve.server import Server, wait_for

pytestmark = pytest.mark.usefixtures("unharmed")


# --- bodies --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "text"),
    [
        (f"Content-Length: {LIMIT + 128}", "exceeds the maximum allowed value"),
        (f"{LENGTH}: 0\r\nContent-Length: {LIMIT + 1}", "exceeds the maximum allowed value"),
        ("Content-Length: 2147483648", "Content-Length"),
        (f"{LENGTH}: 2\r\nContent-Length: {1024 * MIB + 1}", "exceeds the maximum allowed value"),
    ],
)
def test_a_body_that_is_announced_too_large_is_not_waited_for(
    server: Server, field: str, text: str
) -> None:
    """Not a byte of it is sent."""
    for path in ("/v2/models/mlp/infer", "/v2/models/mlp/generate", "/v2/repository/index"):
        if LENGTH not in field or path.endswith("/infer"):
            status, error = ask(server, head(field, path=path))
            assert status == 400 and text in error


@pytest.mark.parametrize("path", ["/v2/models/mlp/infer", "/v2/repository/index"])
def test_a_body_in_chunks_without_an_end_is_cut_at_the_limit(
    server: Server, router: psutil.Process, path: str
) -> None:
    chunk = b"100000\r\n" + b" " * MIB + b"\r\n"
    before = router.memory_info().rss
    pieces = [head("Transfer-Encoding: chunked", path=path), *[chunk] * (LIMIT // MIB)]
    status, error = ask(server, *pieces, b"1\r\n \r\n")  # of which nothing stays unread
    assert status == 400 and "exceeds the maximum allowed value" in error
    assert router.memory_info().rss < before + 4 * LIMIT


# --- heads, order and ends ------------------------------------------------------------------------


GOOD = head(f"Content-Length: {len(body(SENT))}") + body(SENT)
HEADS = [
    ("a long header", head("X: " + "a" * 70_000, "Content-Length: 0"), 431),
    ("many headers", head(*[f"X-{i}: 1" for i in range(10_000)], "Content-Length: 0"), 431),
    ("a header without an end", head()[:-4] + b"\r\nX: " + b"a" * 80_000, 431),
    ("a long path", head("Content-Length: 0", path="/v2/" + "a" * 70_000), 431),
    (
        "length and chunks",
        head("Content-Length: 5", "Transfer-Encoding: chunked") + b"0\r\n\r\n",
        400,
    ),
    (
        "chunks and length",
        head("Transfer-Encoding: chunked", "Content-Length: 5") + b"0\r\n\r\n",
        400,
    ),
    ("two lengths", head("Content-Length: 2", "Content-Length: 3") + b"{}x", 400),
    ("a negative length", head("Content-Length: -2") + b"{}", 400),
    ("a length with a sign", head("Content-Length: +2") + b"{}", 400),
    ("no length", head("Content-Length: two") + b"{}", 400),
    ("an unknown transfer", head("Transfer-Encoding: xchunked") + b"{}", 400),
    ("chunks not last", head("Transfer-Encoding: chunked, x") + b"0\r\n\r\n", 400),
    ("no chunk", head("Transfer-Encoding: chunked") + b"zz\r\n\r\n", 400),
    ("a chunk of 64 bits and more", head("Transfer-Encoding: chunked") + b"f" * 17 + b"\r\n", 400),
    ("a space before the colon", head("Content-Length : 2") + b"{}", 400),
    ("no HTTP", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc" * 10 + b"\r\n\r\n", 400),
    ("another version", b"POST / HTTP/9.9\r\n\r\n", 400),
]


@pytest.mark.parametrize("case", HEADS, ids=[case[0] for case in HEADS])
def test_heads_that_mean_two_things_or_none(server: Server, case: Any) -> None:
    _, data, wanted = case
    with connect(server) as client:
        with contextlib.suppress(ConnectionError):
            client.sendall(data + GOOD)  # which must not be taken for a request of its own
        got = rest(client)
    if wanted == 431 and not got:
        return  # what was sent and not read has swept the answer away
    assert got.count(b"HTTP/1.1 ") == 1, got
    assert parsed(got)[0] == wanted


def test_an_upgrade_is_not_made(server: Server) -> None:
    for protocol in ("h2c", "websocket"):
        sent = head("Content-Length: 0", path="/v2/repository/index", close=False)
        fields = f"Connection: Upgrade, close\r\nUpgrade: {protocol}\r\n\r\n".encode()
        with connect(server) as client:
            client.sendall(sent[:-2] + fields)
            assert rest(client).startswith(b"HTTP/1.1 200 ")


def test_pipelined_requests_are_answered_in_order(server: Server) -> None:
    bad = b'{"inputs": ['
    kept = head(f"Content-Length: {len(body(SENT))}", close=False) + body(SENT)
    wrong = head(f"Content-Length: {len(bad)}", close=False) + bad
    with connect(server) as client:
        client.sendall(kept + wrong + kept + GOOD)
        got = rest(client)
    statuses = [int(piece[:3]) for piece in got.split(b"HTTP/1.1 ")[1:]]
    assert statuses == [200, 500, 200, 200]


def test_chunks_of_one_byte_each(server: Server) -> None:
    pieces = [b"1\r\n%c\r\n" % byte for byte in body(SENT)]
    assert ask(server, head("Transfer-Encoding: chunked"), *pieces, b"0\r\n\r\n") == (200, "")


def test_a_body_that_waits_to_be_asked_for(server: Server) -> None:
    content = body(SENT)
    with connect(server) as client:
        client.sendall(head("Expect: 100-continue", f"Content-Length: {len(content)}"))
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 100 ")
        client.sendall(content)
        assert parsed(rest(client)) == (200, "")
    fields = ("Expect: 100-continue", f"Content-Length: {LIMIT + 1}")
    with connect(server) as client:
        client.sendall(head(*fields))
        assert rest(client).startswith(b"HTTP/1.1 400 ")


def test_clients_that_leave_in_every_way(server: Server, router: psutil.Process) -> None:
    """With a reset, within the head, within the body, before the answer, half closed."""
    files = router.num_fds()
    begun = head(f"Content-Length: {len(body(SENT))}")
    for data in (b"", b"POST /v2", begun, begun + body(SENT)[:9], GOOD, b"0\r\n\r\n"):
        for reset in (True, False):
            for _ in range(10):
                client = connect(server)
                client.sendall(data)
                if reset:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                else:
                    client.shutdown(socket.SHUT_WR)
                client.close()
    wait_for(lambda: router.num_fds() < files + 10, 60, "their connections are closed")


def test_a_client_that_has_no_more_to_say_is_let_go(server: Server) -> None:
    for data in (b"POST /v2", head("Content-Length: 100") + b"{"):
        with connect(server) as client:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            assert b"200 OK" not in rest(client)


# --- the slow ones, which all others above have waited beside ------------------------------------


def test_slow_clients_are_let_go(slow_clients: list[socket.socket]) -> None:
    """Last of all: within a head without a word, within a body with an error."""
    for number, client in enumerate(slow_clients):
        got = rest(client)
        assert got == b"" if number % 2 == 0 else parsed(got)[0] == 400
