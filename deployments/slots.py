"""Who may send an instance its next batch: one runs, one more may wait beside it, never a third.

Plain counting, no sockets and no threads of its own; the lock is because batches also come through
Serve, on another thread. One Router alone sends without asking; several ask, and take turns.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

SIZE = 2
# Who has done nothing for so long does not compete; a promise that is not used lapses.
QUIET_NS = 1_000_000_000


class Party(Protocol):
    """One who sends batches. Both are called on the thread that calls `settle`, without a lock."""

    def limited(self, limit: int) -> None:
        """So many may be under way without asking; what was promised before is void."""
        ...

    def granted(self) -> None:
        """One batch may come."""
        ...


class Seat:
    """What is known of one party."""

    __slots__ = (
        "active_ns",
        "granted",
        "granted_ns",
        "limit",
        "party",
        "resend_ns",
        "resends",
        "wants",
    )

    def __init__(self, party: Party) -> None:
        self.party = party
        self.limit = -1  # not told yet
        self.granted = 0
        self.granted_ns = 0
        # Promised to batches that are to be sent again: no change of limits makes these void.
        self.resends = 0
        self.resend_ns = 0
        self.active_ns = 0
        self.wants = False


class Slots:
    """`held` counts batches that are accepted and not answered; the others only grow: the most that
    were held at once, and who brought them."""

    def __init__(self, size: int = SIZE, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._size = size
        self._clock = clock
        self._lock = threading.Lock()
        self._seats: list[Seat] = []
        self._owner: Seat | None = None
        self._turns: deque[Seat | Callable[[], bool]] = deque()
        self._granted = 0  # with the resends
        self._asking = 0  # turns that hold a place, and may not want it any more
        self._outside_ns = -QUIET_NS
        self._draining = False
        self.held = 0
        self.peak_held = 0
        self.by_channel = 0
        self.by_serve = 0

    @property
    def parties(self) -> int:
        """How many have a channel to this instance."""
        return len(self._seats)

    # --- on any thread ---------------------------------------------------------------------------

    def admit(self, always: bool = False) -> bool:
        """A batch that comes through Serve: whether there is room for it now."""
        with self._lock:
            self._outside_ns = self._clock()
            if not always and not self._has_room():
                return False
            self._hold()
            self.by_serve += 1
            return True

    def queue(self, admitted: Callable[[], bool]) -> None:
        """`admitted` is called in its turn, holding a place; False: it is not wanted any more."""
        with self._lock:
            self._outside_ns = self._clock()
            self._turns.append(admitted)

    def done(self) -> None:
        """A batch is answered, or came to nothing."""
        with self._lock:
            self.held -= 1

    def drain(self) -> None:
        """No promises from now on; what comes all the same is taken while there is room."""
        with self._lock:
            self._draining = True

    @property
    def waiting(self) -> int:
        return len(self._turns)

    # --- on the instance's thread ----------------------------------------------------------------

    def join(self, party: Party) -> Seat:
        seat = Seat(party)
        with self._lock:
            self._seats.append(seat)
        return seat

    def leave(self, seat: Seat) -> None:
        """Its batches that are held stay so until `done`."""
        with self._lock:
            if seat not in self._seats:
                return
            self._seats.remove(seat)
            self._revoke(seat)
            self._granted -= seat.resends
            seat.resends = 0
            if self._owner is seat:
                self._owner = None

    def take(self, seat: Seat) -> bool:
        """A batch has come: by a promise, or because there is room. False: refuse it."""
        with self._lock:
            seat.active_ns = self._clock()
            if seat.granted:
                seat.granted -= 1
                self._granted -= 1
            elif seat.resends:
                seat.resends -= 1
                self._granted -= 1
            elif not self._has_room():
                return False
            self._hold()
            self.by_channel += 1
            return True

    def give_back(self, seat: Seat) -> None:
        """A batch that is held is to be sent again: its place is promised to it."""
        with self._lock:
            self.held -= 1
            if seat in self._seats:
                seat.resends += 1
                seat.resend_ns = self._clock()
                self._granted += 1

    def want(self, seat: Seat) -> None:
        with self._lock:
            seat.active_ns = self._clock()
            if seat is not self._owner and not seat.wants:
                seat.wants = True
                self._turns.append(seat)

    def spare(self, seat: Seat) -> None:
        """Nothing waits there any more: its promise and its wish are void."""
        with self._lock:
            self._revoke(seat)

    def settle(self) -> None:
        """Tells the parties what has changed for them. Between runs, and before each."""
        while self._settle_once():
            pass

    def _settle_once(self) -> bool:
        """Whether it must be done again: a place was held for one who does not want it."""
        with self._lock:
            if self._owner is not None and len(self._seats) == 1 and not self._turns:
                if self._clock() - self._outside_ns >= QUIET_NS and not self._draining:
                    return False
            told, promised, admitted = self._settle(self._clock())
        for seat in told:
            seat.party.limited(seat.limit)
        for seat in promised:
            seat.party.granted()
        free = False
        for call in admitted:
            wanted = call()
            with self._lock:
                self._asking -= 1
                if wanted:
                    self.by_serve += 1
                    self.peak_held = max(self.peak_held, self.held - self._asking)
                else:
                    self.held -= 1
                    free = True
        return free

    @property
    def unsettled(self) -> bool:
        """Whether time alone may change something: a promise lapses, a competitor falls quiet."""
        return bool(self._seats) and self._owner is None

    # --- with the lock ---------------------------------------------------------------------------

    def _has_room(self) -> bool:
        return self.held + self._granted < self._size

    def _hold(self) -> None:
        self.held += 1
        self.peak_held = max(self.peak_held, self.held - self._asking)

    def _grant(self, seat: Seat) -> None:
        seat.granted += 1
        seat.granted_ns = self._clock()
        self._granted += 1

    def _revoke(self, seat: Seat) -> None:
        self._granted -= seat.granted
        seat.granted = 0
        if seat.wants:
            seat.wants = False
            self._turns.remove(seat)

    def _settle(self, now_ns: int) -> tuple[list[Seat], list[Seat], list[Callable[[], bool]]]:
        self._owner = self._choose(now_ns)
        told = []
        for seat in self._seats:
            if seat.granted and now_ns - seat.granted_ns >= QUIET_NS:
                self._granted -= seat.granted
                seat.granted = 0
            if seat.resends and now_ns - seat.resend_ns >= QUIET_NS:
                self._granted -= seat.resends
                seat.resends = 0
            limit = self._size if seat is self._owner else 0
            if seat.limit != limit:
                wanted = seat.wants and seat is not self._owner
                seat.limit = limit
                self._revoke(seat)
                if wanted:  # it has asked, and does not know that this has become void
                    seat.wants = True
                    self._turns.append(seat)
                told.append(seat)
        promised: list[Seat] = []
        admitted: list[Callable[[], bool]] = []
        while self._turns and self._has_room():
            turn = self._turns.popleft()
            if not isinstance(turn, Seat):
                self.held += 1
                self._asking += 1
                admitted.append(turn)
                continue
            turn.wants = False
            if not self._draining:
                self._grant(turn)
                promised.append(turn)
        return told, promised, admitted

    def _choose(self, now_ns: int) -> Seat | None:
        """The one who need not ask: the only one, or the only one of late."""
        since_ns = now_ns - QUIET_NS
        if self._draining or self._outside_ns > since_ns:
            return None
        active = [seat for seat in self._seats if seat.wants or seat.active_ns > since_ns]
        if len(active) > 1:
            return None
        if active or not self._seats:
            return active[0] if active else None
        return max(self._seats, key=lambda seat: seat.active_ns)
