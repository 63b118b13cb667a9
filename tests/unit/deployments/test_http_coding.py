"""gzip and deflate: what is asked for, what comes back, and what is refused before it has grown."""

from __future__ import annotations

import asyncio
import gzip
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest

from deployments import http_coding
from deployments.errors import InvalidArgument, Unsupported
from deployments.http_coding import inflate, inflated, of_reply, of_request, pack, packed

COMPRESS: dict[str, Any] = {"gzip": gzip.compress, "deflate": zlib.compress}
DECOMPRESS: dict[str, Any] = {"gzip": gzip.decompress, "deflate": zlib.decompress}
CODINGS = list(COMPRESS)
BLOCK = 256 << 10
LIMIT = 64 << 20
TEXT = b"All work and no play makes Jack a dull boy\n" * 20


# --- which one ----------------------------------------


@pytest.mark.parametrize(
    ("value", "coding"),
    [
        (None, ""),
        (b"", ""),
        (b"identity", ""),
        (b"Identity", ""),
        (b"gzip", "gzip"),
        (b" GZIP ", "gzip"),
        (b"deflate", "deflate"),
    ],
)
def test_the_coding_of_a_request(value, coding):
    assert of_request(value) == coding


@pytest.mark.parametrize(
    "value", [b"br", b"x-gzip", b"gzip, gzip", b"gzip,deflate", b"*", b"gzip;q=1", b"\xff" * 100]
)
def test_other_codings_are_not_supported(value):
    with pytest.raises(Unsupported, match="^Unsupported compression type '") as caught:
        of_request(value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("accepted", "coding"),
    [
        (None, ""),
        (b"", ""),
        (b"gzip", "gzip"),
        (b"GZIP", "gzip"),
        (b"deflate", "deflate"),
        (b"gzip, deflate", "gzip"),  # what aiohttp and httpx send unless told otherwise
        (b"deflate, gzip", "deflate"),
        (b"gzip, deflate, br, zstd", "gzip"),
        (b"gzip;q=0.5, deflate", "deflate"),
        (b"gzip;q=0.5, deflate;q=0.8", "deflate"),
        (b"gzip; q=0.5 ,deflate;q=0.5", "gzip"),
        (b"identity", ""),
        (b"identity, gzip", ""),
        (b"gzip;q=0.5, identity", ""),
        (b"identity;q=0.5, gzip", "gzip"),
        (b"gzip;q=0", ""),
        (b"gzip;q=0, deflate", "deflate"),
        (b"gzip;q=0.000, identity;q=0", ""),
        (b"identity;q=0", ""),
        (b"identity;q=0, *", "gzip"),
        (b"identity;q=0, *;q=0.5, gzip;q=0", "deflate"),
        (b"identity;q=0, *;q=0", ""),
        (b"*", ""),
        (b"*;q=0", ""),
        (b"br", ""),
        (b"gzip;q=x, deflate;q=0.1", "deflate"),
        (b"gzip;q=nan", ""),
        (b"gzip;q=2", ""),
        (b"gzip;q=-1", ""),
        (b"gzip;level=9", ""),
        (b"gzip;q=", ""),
        (b",,;q=1,", ""),
        (b"\xff\xfe", ""),
        (b"br," * 20_000 + b"gzip", ""),  # nobody has so many
    ],
)
def test_the_coding_of_a_reply(accepted, coding):
    assert of_reply(accepted) == coding


# --- both directions ----------------------------------------


def data_of(size):
    """Half of it cannot be made smaller."""
    noise = np.random.default_rng(size).bytes(size // 2)
    return noise + bytes(size - len(noise))


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("size", [0, 1, 1000, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 3_000_000])
def test_what_is_packed_is_what_comes_out(coding, size):
    data = data_of(size)
    pieces = [data[:10], memoryview(data)[10:], b""]
    assert DECOMPRESS[coding](packed(pieces, coding)) == data
    assert inflated(packed(pieces, coding), coding, LIMIT) == data
    assert inflated(COMPRESS[coding](data), coding, LIMIT) == data
    assert inflated(COMPRESS[coding](bytes(size)), coding, size) == bytes(size)


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("size", [100, 500_000])
def test_on_a_thread_or_not(coding, size):
    """Small ones at once; the answer is the same."""
    data = data_of(size)

    async def both():
        there = await pack([data], coding)
        return there, await inflate(there, coding, LIMIT)

    there, back = asyncio.run(both())
    assert back == data
    assert there == packed([data], coding)
    assert http_coding.is_large([data]) == (size > 100)


def test_arrays_are_packed_as_they_lie_in_memory():
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    part = array.reshape(-1).view(np.uint8).data
    assert gzip.decompress(packed([b"head", part], "gzip")) == b"head" + array.tobytes()


# --- limits ----------------------------------------


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("size", [0, 1, 100, BLOCK, 3 * BLOCK])
def test_the_limit_is_exact(coding, size):
    body = COMPRESS[coding](bytes(size + 1))
    assert inflated(body, coding, size + 1) == bytes(size + 1)
    text = f"exceeds the maximum allowed value of {size} bytes. Use --http-max-input-size to incr"
    with pytest.raises(InvalidArgument, match=text):
        inflated(body, coding, size)


@pytest.mark.parametrize("coding", CODINGS)
def test_a_bomb_is_refused_before_it_has_grown(coding):
    """A thousand to one: never more than the limit in memory, and nothing of it afterwards."""
    limit = 8 << 20
    bomb = COMPRESS[coding](bytes(128 << 20))
    assert len(bomb) < 200_000
    tracemalloc.start()
    try:
        with pytest.raises(InvalidArgument, match="exceeds the maximum allowed") as caught:
            inflated(bomb, coding, limit)
        now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < limit + (2 << 20)
    assert now < 1 << 20, caught  # which holds on to the frames


# --- what is no such data ----------------------------------------


@pytest.mark.parametrize("coding", CODINGS)
def test_a_body_that_is_cut_off_is_refused(coding):
    body = COMPRESS[coding](TEXT)
    for end in range(len(body)):
        with pytest.raises(InvalidArgument, match="ends before the end of its"):
            inflated(body[:end], coding, LIMIT)


@pytest.mark.parametrize("coding", CODINGS)
def test_damage_never_gets_through(coding):
    body = COMPRESS[coding](TEXT)
    for at in range(len(body)):
        damaged = bytearray(body)
        damaged[at] ^= 0x55
        try:
            found = inflated(bytes(damaged), coding, LIMIT)
        except InvalidArgument:
            continue
        assert found == TEXT  # a field of the head that says nothing of the data


@pytest.mark.parametrize(
    ("coding", "body"),
    [
        ("gzip", b"abc"),
        ("deflate", b"abc"),
        ("gzip", TEXT),
        ("gzip", zlib.compress(TEXT)),
        ("deflate", gzip.compress(TEXT, mtime=0)),
        ("deflate", zlib.compress(TEXT)[2:-4]),  # without its wrapper
    ],
)
def test_other_data_is_refused(coding, body):
    with pytest.raises(InvalidArgument, match=f"is no valid {coding} data"):
        inflated(body, coding, LIMIT)


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("rest", [b"\0", b"x", b"\x1f", b"\x1fx", TEXT * 10_000])
def test_what_follows_the_end_is_refused(coding, rest):
    with pytest.raises(InvalidArgument, match="goes on after|is no valid|ends before"):
        inflated(COMPRESS[coding](TEXT) + rest, coding, LIMIT)
    if rest != b"\x1f":
        with pytest.raises(InvalidArgument, match=f"goes on after the end of its {coding} data"):
            inflated(COMPRESS[coding](TEXT) + rest, coding, LIMIT)


@pytest.mark.parametrize("count", [2, 3, http_coding.MAX_MEMBERS])
def test_gzip_bodies_may_have_several_members(count):
    parts = [b"%d" % number * (number % 7) for number in range(count)]
    assert inflated(b"".join(map(gzip.compress, parts)), "gzip", LIMIT) == b"".join(parts)


def test_members_count_together_and_are_counted():
    one = gzip.compress(bytes(1000))
    with pytest.raises(InvalidArgument, match="exceeds the maximum allowed value of 2999 bytes"):
        inflated(one * 3, "gzip", 2999)
    empty = gzip.compress(b"")
    with pytest.raises(InvalidArgument, match="more than 1024 gzip members"):
        inflated(empty * (http_coding.MAX_MEMBERS + 1), "gzip", LIMIT)
    with pytest.raises(InvalidArgument, match="goes on after the end of its deflate data"):
        inflated(zlib.compress(b"a") * 2, "deflate", LIMIT)


def test_members_may_end_anywhere():
    """Also where a piece of what is fed ends."""
    piece = http_coding._PIECE_BYTES
    noise = np.random.default_rng(0).bytes(piece)
    for size in range(piece - 40, piece - 10):
        first = gzip.compress(noise[:size])
        assert inflated(first + gzip.compress(TEXT), "gzip", LIMIT) == noise[:size] + TEXT
