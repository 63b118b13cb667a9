"""What the instance's thread does next."""

from __future__ import annotations

import socket
import threading
from unittest import mock

import pytest

from deployments import poller as room
from deployments.poller import Poller
from deployments.slots import Slots


class Line:
    """A connection that notes what it is asked for."""

    def __init__(self, poller: Poller, memory: bool = False) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.poller = poller
        self.has_memory = memory
        self.log: list[str] = []

    def fileno(self) -> int:
        return self.ours.fileno()

    def serve(self, readable: bool, writable: bool) -> None:
        if readable:
            text = self.ours.recv(100).decode()
            self.log.append(text)
            self.poller.ready(lambda: self.log.append(text.upper()))
        if writable:
            self.log.append("writable")
            self.poller.watch(self, False)

    def trim(self) -> None:
        self.log.append("trim")

    def finish(self, limit_s: float) -> None:
        self.poller.remove(self)
        self.ours.close()
        self.theirs.close()


def do_next(poller: Poller) -> None:
    work = poller.next()
    assert work is not None
    work()


def test_work_comes_in_its_order_from_both_sides():
    poller, done = Poller(Slots()), []
    line = Line(poller)
    poller.add(line)
    poller.post(lambda: done.append(1))
    poller.post(lambda: done.append(2))
    for _ in range(2):
        do_next(poller)
    assert done == [1, 2]
    line.theirs.send(b"a")
    do_next(poller)
    assert line.log == ["a", "A"]
    poller.watch(line, True)
    poller.post(lambda: None)
    do_next(poller)
    assert line.log[-1] == "writable"
    poller.finish(0.1)


def test_a_thread_that_waits_wakes_for_what_is_posted():
    poller = Poller(Slots())
    came = threading.Event()

    def wait() -> None:
        while (work := poller.next()) is not None:
            work()

    thread = threading.Thread(target=wait)
    thread.start()
    for _ in range(100):
        came.clear()
        poller.post(came.set)
        assert came.wait(10)
    poller.post(None)
    thread.join(10)
    assert not thread.is_alive()
    poller.finish(0.1)


def test_what_has_come_before_the_end_is_still_done():
    poller = Poller(Slots())
    line = Line(poller)
    poller.add(line)
    poller.post(None)
    assert poller.next() is None
    line.theirs.send(b"late")
    (work,) = poller.last()
    work()
    assert line.log == ["late", "LATE"]
    poller.finish(0.1)
    poller.finish(0.1)
    poller.post(lambda: None)  # too late, and no harm


def test_a_connection_that_cannot_be_watched_is_not_there():
    poller = Poller(Slots())
    line = Line(poller)
    with mock.patch.object(poller._selector, "register", side_effect=OSError(28, "no space")):
        with pytest.raises(OSError, match="no space"):
            poller.add(line)
    assert poller._connections == []
    poller.finish(0.1)
    assert line.log == []


class Leaves(Line):
    def trim(self) -> None:
        super().trim()
        self.finish(0.0)


@pytest.mark.parametrize("unsettled", [False, True])
def test_memory_is_looked_through_also_where_several_compete(monkeypatch, unsettled):
    monkeypatch.setattr(room, "_TRIM_S", 0.01)
    monkeypatch.setattr(Slots, "unsettled", unsettled)
    poller = Poller(Slots())
    lines = [Leaves(poller, memory=True), Leaves(poller, memory=True), Line(poller)]
    for line in lines:
        poller.add(line)
    ringing = threading.Timer(0.6, poller.post, [lambda: None])
    ringing.start()
    do_next(poller)
    ringing.join()
    assert [line.log[:1] for line in lines] == [["trim"]] * 3
    assert poller._connections == lines[2:]
    poller.finish(0.1)
