"""Who may send when: counted by hand, with a clock that stands still unless told."""

from __future__ import annotations

import pytest

from deployments.slots import QUIET_NS, Seat, Slots


class Router:
    """What one party has been told."""

    def __init__(self, slots: Slots) -> None:
        self.limits: list[int] = []
        self.grants = 0
        self.seat: Seat = slots.join(self)

    def limited(self, limit: int) -> None:
        self.limits.append(limit)
        self.grants = 0

    def granted(self) -> None:
        self.grants += 1


class Clock:
    def __init__(self) -> None:
        self.now_ns = 100 * QUIET_NS

    def __call__(self) -> int:
        return self.now_ns


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def slots(clock) -> Slots:
    return Slots(clock=clock)


def test_one_router_sends_without_asking(slots):
    router = Router(slots)
    slots.settle()
    assert router.limits == [2]
    assert slots.take(router.seat) and slots.take(router.seat)
    assert not slots.take(router.seat)
    slots.done()
    assert slots.take(router.seat)
    assert (slots.held, slots.peak_held) == (2, 2)


def contended(slots: Slots, count: int = 2) -> list[Router]:
    routers = [Router(slots) for _ in range(count)]
    for router in routers:
        slots.want(router.seat)
    slots.settle()
    return routers


def test_several_take_turns_in_the_order_of_asking(slots):
    a, b, c = contended(slots, 3)
    assert [r.limits for r in (a, b, c)] == [[0], [0], [0]]
    assert [r.grants for r in (a, b, c)] == [1, 1, 0]
    assert slots.take(a.seat)
    slots.want(a.seat)
    slots.settle()
    assert [r.grants for r in (a, b, c)] == [1, 1, 0]  # one runs, one is promised
    slots.done()
    slots.settle()
    assert [r.grants for r in (a, b, c)] == [1, 1, 1]
    assert slots.take(b.seat)
    slots.done()
    slots.settle()
    assert [r.grants for r in (a, b, c)] == [2, 1, 1]


def test_held_and_promised_never_exceed_two(slots):
    a, b = contended(slots)
    assert (a.grants, b.grants) == (1, 1)
    third = Router(slots)
    assert not slots.take(third.seat)  # it came without a promise
    assert not slots.admit()
    assert slots.take(a.seat) and slots.take(b.seat)
    assert not slots.take(a.seat)
    assert slots.peak_held == 2


def test_control_without_the_limit_a_third_is_held(slots):
    for _ in range(3):
        assert slots.admit(always=True)
    assert slots.peak_held == 3


def test_a_batch_without_a_promise_is_taken_while_there_is_room(slots):
    a, b = Router(slots), Router(slots)
    slots.want(a.seat)
    slots.settle()
    assert slots.take(b.seat)  # its limit changed while it was on its way
    assert slots.held == 1


def test_a_promise_given_back_is_the_next_ones(slots):
    a, b, c = contended(slots, 3)
    slots.spare(a.seat)
    slots.settle()
    assert c.grants == 1
    slots.want(a.seat)
    slots.spare(a.seat)  # a wish can be taken back, too
    slots.spare(b.seat)
    slots.settle()
    assert (a.grants, b.grants) == (1, 1)


def test_a_router_that_leaves_takes_no_promise_along(slots):
    a, b, c = contended(slots, 3)
    slots.take(a.seat)
    slots.leave(a.seat)
    slots.leave(b.seat)
    slots.leave(b.seat)
    assert slots.held == 1  # what it sent still runs
    slots.settle()
    assert c.limits[-1] == 2  # alone now
    slots.done()
    assert slots.take(c.seat) and slots.take(c.seat)


def test_a_promise_that_is_not_used_lapses(slots, clock):
    a, b, c = contended(slots, 3)
    clock.now_ns += QUIET_NS
    slots.want(c.seat)
    slots.want(b.seat)  # b is awake, a is not
    slots.settle()
    assert c.grants == 1
    assert slots.take(a.seat) is False


def test_the_only_one_of_late_need_not_ask(slots, clock):
    a, b = contended(slots)
    for router in (a, b):
        slots.take(router.seat)
        slots.done()
    assert slots.unsettled
    clock.now_ns += QUIET_NS
    slots.want(a.seat)
    slots.settle()
    assert (a.limits, b.limits) == ([0, 2], [0])
    assert not slots.unsettled
    slots.want(b.seat)  # and both compete again
    slots.settle()
    assert (a.limits, b.limits, b.grants) == ([0, 2, 0], [0], 2)


def test_when_all_fall_quiet_one_need_not_ask(slots, clock):
    a, b = contended(slots)
    clock.now_ns += 1
    slots.take(b.seat)
    slots.done()
    clock.now_ns += QUIET_NS
    slots.settle()
    assert (a.limits, b.limits) == ([0], [0, 2])


def test_batches_through_serve_count_and_make_others_ask(slots, clock):
    router = Router(slots)
    slots.settle()
    assert slots.admit() and slots.admit() and not slots.admit()
    slots.settle()
    assert router.limits == [2, 0]
    slots.want(router.seat)
    slots.settle()
    assert router.grants == 0
    slots.done()
    slots.settle()
    assert router.grants == 1
    clock.now_ns += QUIET_NS
    slots.settle()
    assert router.limits == [2, 0, 2]


def test_batches_through_serve_take_turns(slots):
    admitted: list[int] = []

    def admit() -> bool:
        admitted.append(1)
        return True

    router = Router(slots)
    slots.admit()
    slots.admit()
    slots.queue(admit)
    slots.want(router.seat)
    slots.settle()
    assert admitted == [] and slots.waiting == 2
    slots.done()
    slots.settle()
    assert admitted == [1] and slots.held == 2 and router.grants == 0
    slots.done()
    slots.settle()
    assert router.grants == 1


def test_one_who_gave_up_holds_no_place(slots):
    slots.admit()
    slots.queue(lambda: False)
    slots.settle()
    assert (slots.held, slots.waiting) == (1, 0)


def test_a_batch_to_be_sent_again_keeps_its_place(slots):
    a, b = contended(slots)
    slots.take(a.seat)
    slots.give_back(a.seat)
    assert slots.held == 0 and not slots.admit()
    assert slots.take(a.seat)


def test_draining_promises_nothing(slots):
    router = Router(slots)
    slots.settle()
    slots.drain()
    slots.want(router.seat)
    slots.settle()
    assert router.limits == [2, 0] and router.grants == 0
    assert slots.take(router.seat)  # it was on its way
    slots.leave(router.seat)
    assert slots.waiting == 0


def test_turns_that_were_given_up_cost_the_next_one_nothing(slots):
    a, b = contended(slots)
    assert slots.take(a.seat) and slots.take(b.seat)
    for _ in range(2):
        slots.queue(lambda: False)
    slots.want(a.seat)
    slots.done()
    slots.done()
    slots.settle()
    assert (a.grants, slots.held, slots.waiting) == (2, 0, 0)


def test_only_batches_that_came_are_counted(slots):
    for wanted in (False, False, True, False):
        slots.queue(lambda wanted=wanted: wanted)
    slots.settle()
    assert (slots.by_serve, slots.held, slots.peak_held) == (1, 1, 1)
    assert slots.admit()
    assert (slots.by_serve, slots.held, slots.peak_held) == (2, 2, 2)


def test_the_owners_batch_to_be_sent_again_keeps_its_place(slots):
    router = Router(slots)
    slots.settle()
    assert slots.take(router.seat) and slots.take(router.seat)
    slots.give_back(router.seat)
    slots.queue(lambda: True)
    slots.settle()
    assert router.limits == [2, 0]  # others send: what it need not ask for is over, this is not
    assert (slots.held, slots.waiting) == (1, 1) and not slots.admit()
    slots.spare(router.seat)
    assert slots.take(router.seat)
    assert (slots.held, slots.peak_held) == (2, 2)
    assert not slots.take(router.seat)
    slots.done()
    slots.settle()
    assert (slots.held, slots.waiting, slots.peak_held) == (2, 0, 2)


def test_a_place_for_what_is_not_sent_again_lapses(slots, clock):
    a, b = contended(slots)
    for router in (a, b):
        slots.take(router.seat)
        slots.give_back(router.seat)
    assert not slots.admit()
    slots.leave(a.seat)
    assert slots.admit() and not slots.admit()
    clock.now_ns += QUIET_NS
    slots.settle()
    assert slots.admit() and not slots.admit()
