"""Central dispatch: one loop issues each query when it is due, to the replica that has the least.

The replica with the fewest queries outstanding (sent, and not yet said to be completed) gets the
next one; among equals it is the next in turn after the replica that was chosen last, the first turn
being drawn from the seed. Queueing theory calls it join the shortest queue.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from distbench.clock import Now
from distbench.errors import DistbenchError
from distbench.frames import (
    DONE,
    END,
    FAILED_TOKENS,
    FIRST,
    HALTED,
    LEFT,
    PULSE,
    PULSE_NS,
    QUERIES,
    QUERY,
    RAISED,
    WHOLE,
    Channel,
    Frame,
)
from distbench.samples import FAILED, PENDING, Array, SampleLog

FOREVER = 2**63 - 1
BURST = 32
"""So many queries are issued on end before the loop looks for what has completed."""
WORD = "least outstanding, among equals the next in turn"
"""The rule, as a record names it."""
COLUMNS = ("index", "scheduled", "ready", "issued", "completed", "count", "served_by")
TOKEN_COLUMNS = ("tokens", "first_token")


class DriverEnded(DistbenchError):
    """Dispatch cannot go on: a link ended, or the process was told to end."""


def choose(outstanding: Sequence[int], turn: int) -> int:
    """Return the replica with the least outstanding; among equals the next one in turn.

    Args:
        outstanding: of each replica.
        turn: the replica whose turn it is among equals.

    Example:
        >>> choose([2, 1, 1], 2), choose([2, 1, 1], 0), choose([0, 1, 1], 1)
        (2, 1, 0)
    """
    least = min(outstanding)
    if outstanding[turn] == least:
        return turn
    for place in range(turn + 1, len(outstanding)):
        if outstanding[place] == least:
            return place
    return outstanding.index(least)


class Replicas(Protocol):
    """What the loop needs of the links to the replicas."""

    def post(self, place: int, seq: int, index: int) -> None:
        """Add a query to what ``flush`` sends to a replica."""

    def flush(self) -> None:
        """Send what was posted."""

    def wait(self, until_ns: int) -> Sequence[tuple[int, Sequence[Frame]]]:
        """Return what the replicas sent, empty at ``until_ns``; waits no longer."""


class Ledger:
    """Who has which query: what is outstanding at each replica, and when each query ended.

    Attributes:
        outstanding: queries of each replica that were sent and have not ended.
        flying: their sum.
        raised: whether a replica's system under test raised.
        left: replicas whose loop is over.
        over: whether the replicas were told that no more queries come.
    """

    def __init__(self, log: SampleLog, replicas: int, now: Now) -> None:
        self.outstanding, self.flying = [0] * replicas, 0
        self.raised, self.left, self.over = False, set[int](), False
        self._now, self._ended = now, log.ended
        cells = log.cells()
        self._completed, self._served = cells["completed"], cells["served_by"]
        self._first, self._tokens = cells.get("first_token"), cells.get("tokens")

    def take(self, place: int, frames: Sequence[Frame]) -> None:
        """Note what a replica sent; all of it was here when it was read, so one stamp holds.

        Raises:
            DriverEnded: it speaks of a query that it does not have, or left before it was told to.
        """
        stamp = self._now()
        completed, served = self._completed, self._served
        for kind, seq, tokens, _ in frames:
            if kind in (DONE, FIRST):
                # A row that was not issued is served by nobody, -1, whose number no replica has.
                has = 0 <= seq < len(served) and served[seq] == place and completed[seq] == PENDING
                if not has:
                    raise DriverEnded(f"replica {place} answered query {seq}, which it has not")
            if kind == DONE:
                completed[seq] = FAILED if tokens == FAILED_TOKENS else stamp
                if self._tokens is not None:
                    self._tokens[seq] = max(tokens, 0)
                self.outstanding[place] -= 1
                self.flying -= 1
                self._ended[0] += 1
            elif kind == FIRST and self._first is not None:
                self._first[seq] = stamp
            elif kind == LEFT:
                self.left.add(place)
                self.raised |= tokens == RAISED
                if not (self.over or self.raised):
                    raise DriverEnded(
                        f"replica {place} left its loop early: it heard nothing for a while, so "
                        "see whether the network between the two failed"
                    )


def dispatch_loop(
    links: Replicas,
    log: SampleLog,
    order: Sequence[int],
    ledger: Ledger,
    now: Now,
    turn: int,
    backlog: int,
) -> bool:
    """Issue every query when it is due and note what completes meanwhile: the timed loop.

    Args:
        links: to the replicas.
        log: ``scheduled`` is filled; ``served_by`` is -1 in every row.
        order: sample index of each row.
        ledger: of this log.
        now: the clock.
        turn: the replica that comes first among equals.
        backlog: so many queries outstanding at every replica give the window up.

    Returns:
        Whether the window was given up.
    """
    cells = log.cells()
    due, issued, counts, served = (cells[n] for n in ("scheduled", "issued", "count", "served_by"))
    outstanding, replicas, post = ledger.outstanding, len(ledger.outstanding), links.post
    row, rows, full = 0, len(order), False
    while (row < rows or ledger.flying) and not ledger.raised:
        stamp, last = now(), min(row + BURST, rows)
        while row < last and due[row] <= stamp:
            place = choose(outstanding, turn)
            if outstanding[place] >= backlog:
                if full:  # also after what has completed meanwhile was noted
                    return True
                full = True
                break
            full = False
            counts[row], served[row], issued[row] = 1, place, now()
            post(place, row, order[row])
            outstanding[place] += 1
            ledger.flying += 1
            turn, row = (place + 1) % replicas, row + 1
        links.flush()
        for place, frames in links.wait(due[row] if row < rows else FOREVER):
            ledger.take(place, frames)
    return False


class Hub:
    """The links to the replicas as sockets, and what else must be answered meanwhile.

    Args:
        channels: to each replica.
        others: further sockets, each with what to call when something has come on it.
        now: the clock.
        spin_ns: a wait sleeps until so long before its end, and looks again and again from there.
    """

    def __init__(
        self,
        channels: Sequence[Channel],
        others: Sequence[tuple[int, Callable[[], None]]],
        now: Now,
        spin_ns: int,
    ) -> None:
        self.channels, self.now, self.spin_ns = channels, now, spin_ns
        self.data: dict[int, bytes] = {}
        self._places = {each.fileno(): place for place, each in enumerate(channels)}
        self._others = dict(others)
        self._watched = [*self._places, *self._others]
        self._posted: dict[Channel, None] = {}
        self._behind: dict[Channel, None] = {}
        self._pulse = 0
        self._lock = threading.Lock()  # LoadGen's thread posts while another one waits
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._others[self._bell] = self._hush
        self._watched.append(self._bell)

    def post(self, place: int, seq: int, index: int) -> None:
        """Add a query, with its sample where there is one, to what ``flush`` sends."""
        channel = self.channels[place]
        with self._lock:
            channel.post(QUERY, seq, index, self.data.get(index, b""))
        self._posted[channel] = None

    def post_many(self, place: int, seq: int, indices: Array) -> None:
        """Add queries numbered from ``seq`` on, in one piece where only indices are sent."""
        if self.data:
            for each, index in enumerate(indices.tolist(), seq):
                self.post(place, each, index)
            return
        channel = self.channels[place]
        with self._lock:
            channel.post(QUERIES, seq, len(indices), indices.astype("<i8").tobytes())
        self._posted[channel] = None

    def flush(self) -> None:
        """Send what was posted; what an end does not take now goes with the next wait."""
        with self._lock:
            behind = [each for each in self._posted if not each.flush()]
            self._behind |= dict.fromkeys(behind)
        self._posted.clear()
        if behind:
            self.wake()

    def tell(self, kind: int, one: int, data: bytes) -> None:
        """Send one frame to every replica."""
        with self._lock:
            for channel in self.channels:
                channel.post(kind, one, 0, data)
                if not channel.flush():
                    self._behind[channel] = None
        self.wake()

    def wake(self) -> None:
        """End a wait of another thread, which then sends what is left."""
        os.eventfd_write(self._bell, 1)

    def _hush(self) -> None:
        os.eventfd_read(self._bell)

    def wait(self, until_ns: int) -> list[tuple[int, list[Frame]]]:
        """Return what the replicas sent; empty at ``until_ns``, or after ``wake``."""
        while True:
            stamp = self.now()
            if stamp >= self._pulse:
                self._beat(stamp)
            if self._behind:
                with self._lock:
                    self._behind = {each: None for each in self._behind if not each.flush()}
            # Never epoll, whose waits are whole milliseconds.
            asleep = max(0, min(until_ns, self._pulse) - stamp - self.spin_ns) / 1e9
            ready, writable, _ = select.select(self._watched, list(self._behind), (), asleep)
            found = []
            for fd in ready:
                if fd in self._places:
                    place = self._places[fd]
                    found.append((place, self.channels[place].read()))
                else:
                    self._others[fd]()
            if found or self._bell in ready or (not writable and self.now() >= until_ns):
                return found

    def _beat(self, stamp: int) -> None:
        self._pulse = stamp + PULSE_NS
        with self._lock:
            for channel in self.channels:
                channel.post(PULSE, 0, 0)
                if not channel.flush():
                    self._behind[channel] = None

    def end(self, ledger: Ledger, halted: bool) -> None:
        """Tell the replicas that no more queries come, and wait until each has left its loop."""
        ledger.over = True
        for channel in self.channels:
            channel.post(END, HALTED if halted else WHOLE, 0)
            if not channel.flush():
                self._behind[channel] = None
        while len(ledger.left) < len(self.channels):
            for place, frames in self.wait(self.now() + PULSE_NS):
                ledger.take(place, frames)


def settle(channels: Sequence[Channel], kind: int, within_s: float) -> None:
    """Wait until every replica has sent a frame of one kind; others are passed over.

    Raises:
        DriverEnded: one did not in time.
    """
    waiting = {each.fileno(): each for each in channels}
    until = time.monotonic() + within_s
    while waiting:
        left = until - time.monotonic()
        if left <= 0:
            names = ", ".join(each.name for each in waiting.values())
            raise DriverEnded(f"{names} did not answer within {within_s:.0f} s")
        for fd in select.select(list(waiting), (), (), left)[0]:
            if any(frame[0] == kind for frame in waiting[fd].read()):
                del waiting[fd]
