"""Shared memory: written, read, reused, and never a way to make the reader fault."""

from __future__ import annotations

import gc
import os
import sys

import numpy as np
import pytest

from deployments.arena import Arenas, Mappings
from deployments.channel import ChannelError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs sealed memory files")

MB = 1 << 20


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def pair():
    arenas, mappings = Arenas(max_bytes=8 * MB, max_count=4), Mappings(writable=True)
    before = descriptors()
    yield arenas, mappings
    arenas.close()
    mappings.close()
    assert descriptors() <= before


def share(arenas: Arenas, mappings: Mappings, size: int):
    arena = arenas.take(size)
    assert arena is not None
    if not arena.passed:
        arena.passed = True
        mappings.add(arena.number, os.dup(arena.fd), arena.size)
    return arena


def test_what_one_writes_the_other_reads(pair):
    arenas, mappings = pair
    arena = share(arenas, mappings, 3000)
    column = np.arange(512, dtype="<f4").reshape(2, 256)
    arena.write([column.T, b"end"])
    payload = mappings.payload(arena.number, 2051)
    np.testing.assert_array_equal(payload[:2048].view("<f4"), column.T.reshape(-1))
    assert payload[2048:].tobytes() == b"end"


def test_arenas_are_used_again_when_their_reader_is_done(pair):
    arenas, mappings = pair
    first = share(arenas, mappings, MB)
    second = share(arenas, mappings, MB)
    assert first.number != second.number
    arenas.free(first.number)
    arenas.free(first.number)
    arenas.free(77)  # no arena: no harm
    assert share(arenas, mappings, 10) is first
    assert (len(arenas), len(mappings)) == (2, 2)


def test_number_and_bytes_are_capped(pair):
    arenas, mappings = pair
    taken = [share(arenas, mappings, MB) for _ in range(4)]
    assert arenas.take(MB) is None
    for arena in taken:
        arenas.free(arena.number)
    large = arenas.take(7 * MB)  # room is made where nobody reads
    assert large is not None and arenas.size_bytes <= 8 * MB
    assert set(arenas.dropped()) <= {arena.number for arena in taken}
    assert arenas.dropped() == []
    assert arenas.take(9 * MB) is None


def test_what_is_not_needed_for_long_is_let_go(pair):
    arenas, mappings = pair
    arena = share(arenas, mappings, MB)
    arenas.trim(idle_s=0.0)
    assert len(arenas) == 1  # somebody reads it
    arenas.free(arena.number)
    arenas.trim(idle_s=60.0)
    assert len(arenas) == 1
    arenas.trim(idle_s=0.0)
    assert (len(arenas), arenas.dropped()) == (0, [arena.number])


def test_the_reader_knows_whether_somebody_still_looks(pair):
    arenas, mappings = pair
    arena = share(arenas, mappings, MB)
    assert not mappings.is_held(arena.number)
    view = np.ndarray((4,), "<f4", mappings.payload(arena.number, 64), 0)
    assert mappings.is_held(arena.number)
    kept = view[1:]
    del view
    assert mappings.is_held(arena.number)
    mappings.drop(arena.number)
    assert kept.tolist() == [0, 0, 0]  # dropped, and still there for who looks
    assert not mappings.is_held(arena.number)


def test_what_is_lent_comes_back_with_the_last_view(pair):
    arenas, mappings = pair
    arena = share(arenas, mappings, MB)
    released: list[int] = []
    lent = mappings.lend(arena.number, 128, released.append)
    row = lent.view("<f4").reshape(2, 16)[1]
    del lent
    assert released == []
    mappings.close()
    assert row.sum() == 0
    del row
    assert released == [arena.number]


def test_a_router_cannot_write_what_it_is_lent():
    arenas, mappings = Arenas(), Mappings(writable=False)
    arena = share(arenas, mappings, MB)
    lent = mappings.lend(arena.number, 128, lambda number: None)
    with pytest.raises(ValueError, match="read-only"):
        lent[0] = 1
    arenas.close()


def unsealed(size: int) -> int:
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    return fd


def test_memory_that_can_shrink_is_not_mapped(pair):
    _, mappings = pair
    with pytest.raises(ChannelError, match="can shrink"):
        mappings.add(1, unsealed(MB), MB)


def test_control_shrinking_is_what_the_seal_prevents(pair):
    arenas, _ = pair
    arena = arenas.take(MB)
    with pytest.raises(PermissionError):
        os.ftruncate(arena.fd, 0)
    fd = unsealed(MB)
    os.ftruncate(fd, 0)
    os.close(fd)


def test_what_is_no_memory_or_too_small_is_not_mapped(pair, tmp_path):
    arenas, mappings = pair
    path = tmp_path / "file"
    path.write_bytes(b"x" * 4096)
    with pytest.raises(ChannelError):
        mappings.add(1, os.open(path, os.O_RDWR), 4096)
    arena = arenas.take(MB)
    for size in (2 * MB, 0):
        with pytest.raises(ChannelError, match="smaller"):
            mappings.add(1, os.dup(arena.fd), size)
    read, write = os.pipe()
    os.close(write)
    with pytest.raises(ChannelError):
        mappings.add(1, read, 64)


def test_unknown_arenas_and_too_many_are_refused(pair):
    arenas, _ = pair
    mappings = Mappings(writable=False, max_count=1)
    arena = arenas.take(MB)
    with pytest.raises(ChannelError, match="not known"):
        mappings.payload(arena.number, 64)
    mappings.add(arena.number, os.dup(arena.fd), MB)
    with pytest.raises(ChannelError, match="not known"):
        mappings.payload(arena.number, MB + 64)
    with pytest.raises(ChannelError, match="twice"):
        mappings.add(arena.number, os.dup(arena.fd), MB)
    with pytest.raises(ChannelError, match="too many"):
        mappings.add(2, os.dup(arena.fd), MB)
