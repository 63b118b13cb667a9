"""A connection's two ends: any cut of the bytes, slow readers, descriptors that come along."""

from __future__ import annotations

import array
import os
import socket
from unittest import mock

import numpy as np
import pytest

from deployments import channel, stream
from deployments.channel import ChannelError, Frame, Layout
from deployments.stream import Stream


@pytest.fixture
def ends():
    a, b = socket.socketpair(socket.AF_UNIX)
    pair = Stream(a), Stream(b)
    yield pair
    for one in pair:
        one.close()


@pytest.fixture
def raw():
    a, b = socket.socketpair(socket.AF_UNIX)
    end = Stream(b)
    yield a, end
    a.close()
    end.close()


def head(size: int, number: int = 0, header: bytes = b"") -> bytes:
    return channel.head(channel.BATCH, Layout(header, [], size), number=number)


def frames(end: Stream, sender: Stream | None = None) -> list[Frame]:
    found: list[Frame] = []
    while True:
        if sender is not None and not sender.closed:
            sender.flush()
        try:
            more = end.receive()
        except ChannelError:
            return found
        found += more
        if not more and (sender is None or not sender.pending):
            if not end._end - end._start:
                return found


def test_frames_arrive_one_by_one_however_the_bytes_are_cut(raw):
    sock, end = raw
    sizes = [0, 64, 640, 64 * 100, 0]
    data = b"".join(
        head(size, n, b"h" * (n * 30)) + bytes([n]) * size for n, size in enumerate(sizes)
    )
    found = []
    for start in range(0, len(data), 97):
        sock.send(data[start : start + 97])
        found += end.receive()
    assert [f.number for f in found] == [0, 1, 2, 3, 4]
    for n, (frame, size) in enumerate(zip(found, sizes, strict=True)):
        assert frame.payload.tobytes() == bytes([n]) * size
        assert frame.header == b"h" * (n * 30)


def test_payloads_are_aligned_and_stay_as_they_are_while_looked_at(ends):
    a, b = ends
    kept = []
    for n in range(40):
        size = 64 * (1 + n * 37 % 700)
        a.send(head(size, n), [bytes([n]) * size], size)
        kept += [(n, size, frame.payload) for frame in b.receive()]
    assert [n for n, _, _ in kept] == [*range(40)]
    for n, size, payload in kept:
        assert payload.tobytes() == bytes([n]) * size
        assert payload.ctypes.data % 64 == 0


def test_memory_is_used_again_when_nobody_looks(ends):
    a, b = ends
    places = set()
    for n in range(50):
        a.send(head(64, n), [bytes(64)], 64)
        (frame,) = b.receive()
        places.add(frame.payload.ctypes.data)
        del frame
    assert len(places) == 1


def test_large_frames_are_queued_and_arrive_whole(ends):
    a, b = ends
    data = np.random.default_rng(0).integers(0, 255, 9_000_000 // 64 * 64, np.uint8)
    halves = [data[: len(data) // 2], data[len(data) // 2 :]]
    a.send(head(data.nbytes, 1), halves, data.nbytes)
    a.send(head(0, 2))
    assert a.pending
    first, second = frames(b, a)
    np.testing.assert_array_equal(first.payload, data)
    assert second.number == 2 and not a.pending


def test_one_who_does_not_read_is_cut_off_in_the_end(ends):
    a, _ = ends
    block = np.zeros(stream.MAX_QUEUED_BYTES // 4, np.uint8)
    for _ in range(5):
        a.send(head(block.nbytes), [block], block.nbytes)
    with pytest.raises(ChannelError, match="does not read"):
        for _ in range(5):
            a.send(head(block.nbytes), [block], block.nbytes)


def test_memory_in_another_order_is_sent_as_its_rows(ends):
    a, b = ends
    for width in (16, 16384):  # small ones in one piece, large ones as they are
        table = np.arange(width * 4, dtype="<u4").reshape(4, width).T
        a.send(head(table.nbytes), [table], table.nbytes)
        (frame,) = frames(b, a)
        np.testing.assert_array_equal(frame.payload.view("<u4").reshape(width, 4), table)


def test_many_pieces_are_more_than_one_call_takes(ends):
    a, b = ends
    pieces = [np.full(64, n % 251, np.uint8) for n in range(3000)]
    a.send(head(64 * 3000), pieces, 64 * 3000)
    (frame,) = frames(b, a)
    np.testing.assert_array_equal(frame.payload, np.concatenate(pieces))


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_descriptors_come_with_their_frames(ends):
    a, b = ends
    fds = [os.memfd_create(f"m{n}", os.MFD_CLOEXEC) for n in range(3)]
    for n, fd in enumerate(fds):
        os.write(fd, bytes([n]))
        a.send(head(0, n), fd=fd)
        os.close(fd)
    found = frames(b)
    assert [f.number for f in found] == [0, 1, 2]
    for n in range(3):
        fd = b.take_fd()
        assert os.get_inheritable(fd) is False
        assert os.pread(fd, 1, 0) == bytes([n])
        os.close(fd)
    with pytest.raises(ChannelError):
        b.take_fd()


def test_a_descriptor_behind_a_full_queue_is_kept_until_it_is_sent(ends):
    a, b = ends
    size = 4 << 20
    a.send(head(size, 0), [np.zeros(size, np.uint8)], size)
    fd = os.memfd_create("m", os.MFD_CLOEXEC)
    os.write(fd, b"here")
    a.send(head(0, 1), fd=fd)
    os.close(fd)  # the sender may let go of it
    assert [f.number for f in frames(b, a)] == [0, 1]
    got = b.take_fd()
    assert os.pread(got, 4, 0) == b"here"
    os.close(got)


@pytest.mark.parametrize("count", [1, 4, 9])
def test_descriptors_that_nothing_was_said_of_are_closed(raw, count):
    before = descriptors()
    sock, end = raw
    fds = array.array("i", [0] * count)
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)]
    with pytest.raises(ChannelError, match="descriptor"):
        sock.sendmsg([head(0)], rights)
        end.receive()
        end.check_fds()
    end.close()
    assert descriptors() == before - 1  # and its own socket


def test_a_closed_peer_and_garbage_are_errors_and_nothing_else(raw):
    sock, end = raw
    sock.send(b"GET / HTTP/1.1\r\n" * 8)
    with pytest.raises(ChannelError, match="not a frame"):
        end.receive()
    sock.close()
    with pytest.raises(ChannelError):
        end.send(head(0))
    end.close()
    end.close()
    with pytest.raises(ChannelError):
        end.send(head(0))


def test_a_huge_claim_takes_no_memory_before_it_comes(raw):
    sock, end = raw
    before_kib = resident_kib()
    sock.send(head(channel.MAX_PAYLOAD_BYTES))
    assert end.receive() == [] and end.receive() == []
    assert resident_kib() - before_kib < 1 << 17 < channel.MAX_PAYLOAD_BYTES >> 10


def resident_kib() -> int:
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("RssAnon")).split()[1])


def test_both_ends_belong_to_us():
    a, b = socket.socketpair(socket.AF_UNIX)
    with a, b:
        stream.check_peer(a)


def test_a_descriptor_that_cannot_be_kept_is_the_connections_end(ends):
    sender, _ = ends
    while not sender.pending:
        sender.send(head(1 << 20), [bytes(1 << 20)], 1 << 20)
    with mock.patch.object(os, "dup", side_effect=OSError(24, "too many")):
        with pytest.raises(ChannelError, match="too many"):
            sender.send(head(0), fd=0)
