"""Withdrawal, expiry, batches put back; and that nothing is lost whatever happens."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.scheduler import Entry, Group, Scheduler, Wait

from .queues import MS, fill, limits, take

# --- leaving -------------------------------


def test_withdrawn_entries_do_not_run_and_do_not_count():
    scheduler = Scheduler(limits(max_requests=3))
    first, second, third = fill(scheduler, 1, 2, 3)
    assert scheduler.full
    assert scheduler.withdraw(second)
    assert not scheduler.withdraw(second)
    assert not scheduler.full
    assert list(take(scheduler, 0).members) == [first, third]
    assert not scheduler.withdraw(first)
    assert scheduler.pending == 0


def test_withdrawing_the_head_moves_the_delay_and_the_expiry():
    scheduler = Scheduler(limits(delay_ns=5 * MS, max_queue_ns=50 * MS))
    (head,) = fill(scheduler, 1, now=0)
    fill(scheduler, 1, now=2 * MS)
    assert scheduler.next_expiry_ns == 50 * MS
    scheduler.withdraw(head)
    assert scheduler.next_expiry_ns == 52 * MS
    assert scheduler.next(5 * MS) == Wait(7 * MS)


def test_memory_of_withdrawn_entries_is_bounded():
    scheduler = Scheduler(limits(max_requests=0))
    fill(scheduler, 1)  # the front stays, so that the others cannot leave over it
    for _ in range(10_000):
        scheduler.withdraw(fill(scheduler, 1)[0])
    assert scheduler.pending == 1
    assert len(scheduler._queue) < 200


def test_expired_entries_are_handed_out_once_and_never_run():
    scheduler = Scheduler(limits(max_queue_ns=10))
    (old,) = fill(scheduler, 1, now=0)
    (young,) = fill(scheduler, 1, now=5)
    assert scheduler.expired(9) == []
    assert scheduler.next_expiry_ns == 10
    assert list(take(scheduler, 10).members) == [young]  # asked before `expired` was
    assert scheduler.expired(10) == [old]
    assert scheduler.expired(99) == []
    assert scheduler.pending == 0
    assert scheduler.next_expiry_ns is None


def test_an_expired_entry_is_not_withdrawn_a_second_time():
    scheduler = Scheduler(limits(max_queue_ns=10))
    (entry,) = fill(scheduler, 1)
    assert scheduler.expired(10) == [entry]
    assert not scheduler.withdraw(entry)
    assert scheduler.pending == 0


def test_full_counts_requests_not_rows():
    scheduler = Scheduler(limits(max_requests=2))
    fill(scheduler, 8)
    assert not scheduler.full
    fill(scheduler, 8)
    assert scheduler.full
    scheduler.next(0)
    assert not scheduler.full


def test_no_limit_is_never_full():
    scheduler = Scheduler(limits(max_requests=0))
    fill(scheduler, *[1] * 200)
    assert not scheduler.full


def test_clear_gives_what_waits_in_order():
    scheduler = Scheduler(limits())
    first, second, third = fill(scheduler, 1, 1, 1)
    scheduler.withdraw(second)
    assert scheduler.clear() == [first, third]
    assert scheduler.next(0) is None
    assert not first.waiting


# --- put back -------------------------------


def test_refused_batches_return_to_the_front_in_arrival_order():
    scheduler = Scheduler(limits(max_rows=2, preferred=(2,)))
    entries = fill(scheduler, *[1] * 6)
    older, newer = take(scheduler), take(scheduler)
    scheduler.put_back(older)
    scheduler.put_back(newer)  # refused later, but came earlier than what waits
    assert scheduler.pending == 6
    again = [entry for _ in range(3) for entry in take(scheduler).members]
    assert again == entries


def test_a_group_put_back_among_arrivals_keeps_its_place():
    scheduler = Scheduler(limits(max_rows=2, preferred=(2,)))
    entries = fill(scheduler, *[1] * 4)
    older, newer = take(scheduler), take(scheduler)
    scheduler.put_back(newer)
    late = fill(scheduler, 1)
    scheduler.put_back(older)
    again = [entry for _ in range(3) for entry in take(scheduler).members]
    assert again == entries + late


def test_entries_put_back_still_expire_and_withdraw():
    scheduler = Scheduler(limits(max_queue_ns=10))
    first, second = fill(scheduler, 1, 1)
    scheduler.put_back(take(scheduler))
    assert scheduler.withdraw(first)
    assert scheduler.expired(10) == [second]


def test_thousands_held_back_cost_one_step_per_arrival():
    """Counts the comparisons of keys instead of the time."""
    compared = []

    class Key:
        def __eq__(self, other):
            compared.append(1)
            return True

        def __hash__(self):
            return 0

    scheduler = Scheduler(limits(max_rows=5000, preferred=(5000,), delay_ns=MS, max_requests=0))
    for _ in range(4096):
        scheduler.add(Entry(rows=1, key=Key(), queued_ns=0))
        assert isinstance(scheduler.next(0), Wait)
    assert len(compared) <= 4096
    assert len(take(scheduler, MS).members) == 4096


# --- whatever happens -------------------------------

OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 8), st.sampled_from("ab")),
        st.tuples(st.just("next"), st.integers(0, 4), st.none()),
        st.tuples(st.just("back"), st.integers(0, 9), st.none()),
        st.tuples(st.just("withdraw"), st.integers(0, 99), st.none()),
        st.tuples(st.just("expired"), st.integers(0, 9), st.none()),
    ),
    max_size=60,
)
POLICIES = st.builds(
    limits,
    merge=st.booleans(),
    preferred=st.sampled_from([(8,), (4,), (2, 6), (3, 4, 8)]),
    delay_ns=st.sampled_from([0, 3, 20]),
    max_queue_ns=st.sampled_from([0, 15]),
)


@settings(max_examples=200, deadline=None)
@given(policy=POLICIES, operations=OPERATIONS)
def test_nothing_is_lost_doubled_reordered_or_too_large(policy, operations):
    scheduler, now = Scheduler(policy), 0
    entries: list[Entry] = []
    gone: list[Entry] = []
    running: list[Group] = []

    def check(group):
        members = list(group.members)
        assert members
        assert sum(e.rows for e in members) <= policy.max_rows
        assert len({e.key for e in members}) == 1
        assert policy.merge or len(members) == 1
        orders = [e.order for e in members]
        assert orders == sorted(orders)
        assert all(
            not policy.max_queue_ns or now < e.queued_ns + policy.max_queue_ns for e in members
        )
        waiting = [e.order for e in entries if e.waiting]
        assert not waiting or max(orders) < min(waiting)  # FIFO: nobody was overtaken

    for name, number, key in operations:
        if name == "add":
            entries.append(Entry(rows=number, key=key, queued_ns=now))
            scheduler.add(entries[-1])
        elif name == "next":
            now += number
            step = scheduler.next(now)
            if isinstance(step, Group):
                check(step)
                running.append(step)
            elif isinstance(step, Wait):
                assert now < step.until_ns <= now + policy.delay_ns
        elif name == "back" and running:
            scheduler.put_back(running.pop(number % len(running)))
        elif name == "withdraw" and entries:
            entry = entries[number % len(entries)]
            if scheduler.withdraw(entry):
                gone.append(entry)
        elif name == "expired":
            now += number
            gone.extend(scheduler.expired(now))
        assert scheduler.pending == sum(e.waiting for e in entries)

    now += 1000
    gone.extend(scheduler.expired(now))
    while (step := scheduler.next(now)) is not None:
        assert isinstance(step, Group)  # no delay is left
        check(step)
        running.append(step)
    ended = gone + [entry for group in running for entry in group.members]
    assert sorted(e.order for e in ended) == sorted(e.order for e in entries)
