"""The side thread of a rank: heartbeats, clock pings, meetings, signals; awake once a second.

On rank 0 it pings the other clock domains and watches every rank; elsewhere it watches rank 0. A
rank is lost at the end of its link, after 5 s of silence, or when its count stands still for longer
than the limit it tells with its heartbeats. Then ``on_end`` saves what there is, and the process
ends: the loop may never return.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict

from distbench import pings, wire
from distbench.clock import ClockModel, Exchange, Now, measure_exchange, now_ns
from distbench.errors import ClockError, DistbenchError, End, IncompleteError
from distbench.wire import Link, LinkClosed, Seat

TICK_S, SILENCE_S = 1.0, 5.0
EXCHANGE_TRIPS, WINDOW_TRIPS = 100, 3  # in the window each trip takes the loop's interpreter lock
END_S = 20.0  # how long saving may take once the end is known; torchrun kills after 30 s
_HEART = struct.Struct("<qdq")
IDLE = (0, float("inf"))

Answer = Callable[[list[bytes]], bytes]


class SideThread:
    """One per rank; see the module.

    Attributes:
        seats: of all ranks, by rank.
        exchanges: on rank 0, what was measured with each domain's leader.
        progress: returns what has ended and for how many seconds that count may stand still
            (infinity while nothing is in flight); replaced for each window.
        on_end: saves what there is; called once, from this thread, before the process ends.
        on_tick: called once a second while the run is well, for progress and flushes.
        halt: one truth, whether the window is given up; carried to all ranks with the heartbeats.
    """

    def __init__(self, seats: list[Seat], rank: int, links: dict[int, Link], now: Now = now_ns):
        self.seats, self.rank, self.links, self.now = seats, rank, links, now
        self.exchanges: dict[int, list[Exchange]] = {}
        self.progress: Callable[[], tuple[int, float]] = lambda: IDLE
        self.on_end: Callable[[End], None] = lambda _end: None
        self.on_tick: Callable[[], None] = lambda: None
        self._counts: dict[int, tuple[int, float, float]] = {}
        self._leaving: set[int] = set()
        self._lock = threading.RLock()
        self._arrived: dict[str, dict[int, bytes]] = {}
        self._answers: dict[str, Answer] = {}
        self._passed: dict[str, bytes] = {}
        self._news = threading.Condition(self._lock)
        self._requests = self._window = 0
        self.halt, self._stop = [False], False
        self.ending = threading.Event()
        self._last_tick = time.monotonic()
        self._wake_read, self._wake_write = socket.socketpair()
        for end in (self._wake_read, self._wake_write):
            end.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_read, selectors.EVENT_READ)
        for link in links.values():
            link.connection.settimeout(SILENCE_S)
            link.clock = now
            self._selector.register(link, selectors.EVENT_READ, link)
        self._thread = threading.Thread(target=self._run, name="distbench-side", daemon=True)

    # -- the main thread's side ------------------------------------------------------------------

    def start(self) -> None:
        """Begin; call once, after the links are open."""
        self._thread.start()

    def wake_on_signals(self) -> int:
        """Return the descriptor for ``signal.set_wakeup_fd``: SIGTERM then reaches this thread."""
        return self._wake_write.fileno()

    def open_window(self) -> list[bool]:
        """Return ``halt`` for a new window; every rank opens the same windows in order."""
        self.halt, self._window = [False], self._window + 1
        return self.halt

    def meet(self, name: str, payload: bytes = b"", answer: Answer | None = None) -> bytes:
        """Wait until every rank has come to the same place; no limit while heartbeats go on.

        Args:
            name: the place; each name is used once in a run.
            payload: what this rank brings.
            answer: on rank 0, what to tell all ranks, from all payloads in order of rank.

        Returns:
            The answer, b"" without one.
        """
        with self._lock:
            if self.rank == 0:
                self._answers[name] = answer or (lambda _payloads: b"")
                self._arrive(0, name, payload)
            else:
                body = len(name.encode()).to_bytes(2, "little") + name.encode() + payload
                self._send(self.links[0], wire.ARRIVED, body)
            while name not in self._passed:
                self._news.wait()
            return self._passed.pop(name)

    def exchange_clocks(self) -> None:
        """On rank 0: measure every other domain's clock now, by ``EXCHANGE_TRIPS`` round trips.

        Call it on rank 0 alone, while the other ranks wait in ``meet``: their threads then have
        the processor to themselves, and the bound is as tight as the network allows.

        Raises:
            ClockError: a domain has never answered.
        """
        with self._lock:
            self._requests += 1
            self._wake()
            while self._requests:
                self._news.wait()
            for rank in self.leaders():
                self.model(rank)

    def leaders(self) -> list[int]:
        """Return the first rank of each clock domain other than rank 0's."""
        first = {seat.domain: seat.rank for seat in reversed(self.seats)}
        return sorted(rank for rank in first.values() if rank != 0)

    def leader_of(self, rank: int) -> int:
        """Return the first rank in the clock domain of ``rank``."""
        return next(s.rank for s in self.seats if s.domain == self.seats[rank].domain)

    def model(self, rank: int) -> ClockModel:
        """On rank 0: return the clock of ``rank`` against rank 0's, from all exchanges so far.

        Raises:
            ClockError: there are none.
        """
        leader = self.leader_of(rank)
        with self._lock:
            made = self.exchanges.get(leader, [])
        if leader != 0 and not made:
            raise ClockError(
                f"the clock of {self.seats[leader]} is not known: no ping came back from it within "
                f"{pings.TRIP_TIMEOUT_S} s; is its host or the network overloaded?"
            )
        return ClockModel.fit(made)

    def fail(self, error: BaseException) -> None:
        """Tell the other ranks in a sentence why this one is about to leave."""
        end = self._failure(error)
        for link in self.links.values():
            self._send(link, wire.FAILED, json.dumps(asdict(end)).encode(), ignore=True)

    def _failure(self, error: BaseException) -> End:
        code = error.exit_code if isinstance(error, DistbenchError) else 1
        own = self.seats[self.rank]
        sentence = str(error) if isinstance(error, DistbenchError) else f"{own} failed: {error!r}"
        return End("failed", self.rank, own.host, sentence, code)

    def stop(self) -> None:
        """End the thread and close the links; the other ranks have been told, or do not matter."""
        self._stop = True
        for link in self.links.values():
            self._send(link, wire.BYE, ignore=True)
        self._wake()
        self._thread.join(timeout=SILENCE_S)
        for link in self.links.values():
            link.close()
        self._selector.close()
        self._wake_read.close()
        self._wake_write.close()

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # then bytes enough are waiting already
            self._wake_write.send(b"\0")

    # -- this thread's side ----------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._keep_watch()
        except Exception as error:  # without this thread its rank would wait forever
            if not self._stop:
                with contextlib.suppress(Exception):  # stderr may be what broke
                    traceback.print_exc()
                self._spread(wire.FAILED, self._failure(error), spare=self.rank)

    def _keep_watch(self) -> None:
        due = time.monotonic() + TICK_S
        while not self._stop:
            events = self._selector.select(max(0.0, due - time.monotonic()))
            for key, _ in events:
                if key.data is None:
                    self._woken()
                else:
                    self._read(key.data)
            if time.monotonic() >= due:
                self._tick()
                due = time.monotonic() + TICK_S

    def _woken(self) -> None:
        bytes_in = self._wake_read.recv(256)
        if signal.SIGTERM in bytes_in:
            self._terminated()
        with self._lock:
            asked = self._requests
        if asked:
            for rank in self.leaders():
                self._exchange(self.links[rank], EXCHANGE_TRIPS)
            with self._lock:
                self._requests = 0
                self._news.notify_all()

    def _read(self, link: Link) -> None:
        try:
            self._handle(link, *link.receive())
        except (LinkClosed, TimeoutError) as error:
            self._closed(link, str(error))

    def _closed(self, link: Link, reason: str) -> None:
        try:
            self._selector.unregister(link)
        except (KeyError, ValueError):
            return
        if link.seat.rank not in self._leaving and not self._stop:
            self._lost(link.seat.rank, f"its link ended ({reason})")

    def _handle(self, link: Link, kind: int, payload: bytes) -> None:
        rank = link.seat.rank
        if kind == wire.PING:
            pings.answer_pings(link, payload, self.now, self._handle)
        elif kind == wire.HEART:
            count, limit_s, halted = _HEART.unpack(payload)
            self._count(rank, count, limit_s)
            self.halt[0] |= halted == self._window > 0
        elif kind == wire.ARRIVED:
            size = int.from_bytes(payload[:2], "little")
            with self._lock:
                self._arrive(rank, payload[2 : 2 + size].decode(), payload[2 + size :])
        elif kind == wire.PASSED:
            size = int.from_bytes(payload[:2], "little")
            with self._lock:
                self._passed[payload[2 : 2 + size].decode()] = payload[2 + size :]
                self._news.notify_all()
        elif kind == wire.LOST:
            self._told(wire.LOST, payload)
        elif kind == wire.FAILED:
            self._told(wire.FAILED, payload)
        elif kind == wire.BYE:
            self._leaving.add(rank)

    def _arrive(self, rank: int, name: str, payload: bytes) -> None:
        here = self._arrived.setdefault(name, {})
        here[rank] = payload
        if len(here) < len(self.seats) or name not in self._answers:
            return
        payloads = [here[r] for r in range(len(self.seats))]
        told = self._answers.pop(name)(payloads)
        del self._arrived[name]
        body = len(name.encode()).to_bytes(2, "little") + name.encode() + told
        for link in self.links.values():
            self._send(link, wire.PASSED, body)
        self._passed[name] = told
        self._news.notify_all()

    def _send(self, link: Link, kind: int, payload: bytes = b"", ignore: bool = False) -> None:
        try:
            link.send(kind, payload)
        except LinkClosed:
            # The end of a link is acted on where it is read, by this thread.
            if not ignore:
                self._wake()

    # -- clocks ----------------------------------------------------------------------------------

    def _exchange(self, link: Link, count: int) -> None:
        try:
            trips = pings.exchange_trips(link, count, self.now, self._handle)
            measured = measure_exchange(trips) if trips else None
        except LinkClosed as error:
            self._closed(link, str(error))
            return
        except ClockError as error:
            end = End("failed", link.seat.rank, link.seat.host, str(error), error.exit_code)
            self._spread(wire.FAILED, end, spare=-1)
            return
        if measured is not None:
            with self._lock:
                self.exchanges.setdefault(link.seat.rank, []).append(measured)

    # -- once a second ---------------------------------------------------------------------------

    def _tick(self) -> None:
        now = time.monotonic()
        starved = now - self._last_tick > 2 * TICK_S + 1
        self._last_tick = now
        count, limit_s = self.progress()
        self._count(self.rank, count, limit_s)
        beat = _HEART.pack(count, limit_s, self._window if self.halt[0] else 0)
        for link in self.links.values():
            self._send(link, wire.HEART, beat, ignore=True)
        if starved:
            # This process did not run; what it did not hear says nothing about the others.
            for link in self.links.values():
                link.heard_ns = time.monotonic_ns()
        if self.rank == 0:
            for rank in self.leaders():
                self._exchange(self.links[rank], WINDOW_TRIPS)
        self._watch()
        with contextlib.suppress(OSError, ValueError):  # closed stderr
            self.on_tick()

    def _count(self, rank: int, count: int, limit_s: float) -> None:
        before = self._counts.get(rank)
        if before is None or before[:2] != (count, limit_s):
            self._counts[rank] = (count, limit_s, time.monotonic())

    def _watch(self) -> None:
        for rank, link in self.links.items():
            silent = (time.monotonic_ns() - link.heard_ns) / 1e9
            if silent > SILENCE_S and rank not in self._leaving:
                self._lost(
                    rank,
                    f"nothing was heard from it for {silent:.1f} s (host down, cable out, or a "
                    "model that holds Python's interpreter lock for as long)",
                )
        for rank, (count, limit_s, since) in list(self._counts.items()):
            still = time.monotonic() - since
            if rank in self._leaving or self.rank not in (0, rank):
                continue
            if still > limit_s:
                self._lost(
                    rank,
                    f"with work in flight its count stood at {count} for {still:.0f} s, the limit "
                    f"being {limit_s:.0f} s (--timeout sets it)",
                )

    # -- the end ---------------------------------------------------------------------------------

    def _lost(self, rank: int, reason: str) -> None:
        seat = self.seats[rank]
        sentence = (
            f"{seat} was lost: {reason}; see that rank's own output, and run "
            "`python -m distbench.salvage` on the rank folders"
        )
        self._spread(wire.LOST, End("lost", rank, seat.host, sentence, 6), spare=rank)

    def _terminated(self) -> None:
        # A launcher that lost a rank terminates the others: hear first what the links have to say.
        for key, _ in self._selector.select(0.2):
            if key.data is not None:
                self._read(key.data)
        own = self.seats[self.rank]
        sentence = f"{own} was terminated (SIGTERM) before its run had ended"
        end = End("terminated", self.rank, own.host, sentence, IncompleteError.exit_code)
        self._spread(wire.FAILED, end, spare=self.rank)

    def _told(self, kind: int, payload: bytes) -> None:
        end = End(**json.loads(payload))
        self._spread(kind, end, spare=end.rank)

    def _spread(self, kind: int, end: End, spare: int) -> None:
        """Pass the news on, rank 0 to all and others to rank 0, then end."""
        for other, link in self.links.items():
            if other != spare:
                self._send(link, kind, json.dumps(asdict(end)).encode(), ignore=True)
        self._end(end)

    def _end(self, end: End) -> None:
        if self.ending.is_set():
            return
        self.ending.set()
        watchdog = threading.Timer(END_S, _give_up, (end,))  # whatever the disk does
        watchdog.daemon = True
        watchdog.start()
        try:
            self.on_end(end)
        finally:
            watchdog.cancel()
            os._exit(end.exit_code)


def _give_up(end: End) -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(
            f"distbench: {end.sentence}; saving took more than {END_S:.0f} s and was given up\n"
        )
        sys.stderr.flush()
    os._exit(end.exit_code)
