"""A replica's side of central dispatch: take queries off the wire, batch, issue, poll, answer.

The loop runs until the driver says that no more queries come. Its stamps are on this rank's clock
and stay in its own log; the driver's log has the official ones. Here a query's ``scheduled`` is
when it was read off the wire.
"""

from __future__ import annotations

import select
import time
from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np

from distbench.batching import next_batch
from distbench.clock import Now
from distbench.frames import (
    DONE,
    DONES,
    END,
    FAILED_TOKENS,
    FIRST,
    FRAME,
    LEFT,
    LOAD,
    LOADED,
    LOST,
    NAME,
    NAMED,
    QUERIES,
    QUERY,
    RAISED,
    SILENCE_S,
    UNLOAD,
    WAIT_S,
    WHOLE,
    Channel,
    ChannelLost,
    packed,
)
from distbench.prepare import Cue, Groups
from distbench.samples import FAILED, SampleLog
from distbench.sut import FOREVER, Collect, Done, First, Indices, SystemUnderTest

SLICE_NS = 200_000
"""An engine that works beside the loop is left for so long at a time: queries are taken in between.
One that computes in ``poll`` returns when it has computed."""
SPIN_NS = 50_000
"""Before a batch is due the loop looks again and again for so long."""
LEAVE_S = 10.0


Encode = Callable[[Sequence[Any]], list[bytes]]
"""Outputs of a group to the bytes of each."""


class Inbox:
    """The queries that came over a channel, in the rows of a log.

    Attributes:
        rows: how many may be issued: all that came, or once halted those that were issued.
        since: when each row can have come at the earliest: what came while an engine kept the loop
            from reading counts from when it was last looked for.
        order: sample index of each row.
        data: each row's sample, where samples cross the wire.
        code: what ended the window, once ``over``.
        over: whether no more queries come, or LoadGen has a word first.
        word: that word, a frame; None without one. Nothing is in flight then.
        begun: rows of earlier stretches, before a word.
        problem: why the driver was lost; "" where it was not.
    """

    def __init__(self, channel: Channel, log: SampleLog, now: Now) -> None:
        self.channel, self.log, self.now = channel, log, now
        self.rows, self.over, self.code, self.problem = 0, False, WHOLE, ""
        self.word: tuple[int, bytes] | None = None
        self.begun = 0
        log.used[0], log.query[:] = 0, -1
        self.since = memoryview(array("q", bytes(8 * log.capacity)))
        self.order: Indices = log.index
        self.data: list[bytes] = []
        cells = log.cells()
        self._index, self._came, self._query = cells["index"], cells["scheduled"], cells["query"]

    def begin(self) -> None:
        """Forget how long nothing was heard before the window."""
        self.channel.heard = time.monotonic()

    def read(self, since_ns: int | None = None, wait_s: float = 0.0) -> None:
        """Take what has arrived.

        Args:
            since_ns: when it can have come at the earliest; None: now.
            wait_s: for something to arrive, so long at most; 0 does not wait.
        """
        try:
            frames = self.channel.await_frames(wait_s) if wait_s else self.channel.read()
            if not frames:
                if self.channel.silent(time.monotonic()):
                    raise ChannelLost(f"nothing was heard from it for {SILENCE_S:.0f} s")
                return
        except ChannelLost as error:
            self.over, self.code, self.problem = True, LOST, str(error)
            return
        stamp = self.now()
        row = self.log.used[0]
        for kind, one, other, data in frames:
            if kind == QUERY:
                self._query[row], self._index[row], self._came[row] = one, other, stamp
                self.since[row] = stamp if since_ns is None else since_ns
                if data:
                    self.data.append(data)
                row += 1
            elif kind == QUERIES:
                row = self._take(row, one, other, data, stamp if since_ns is None else since_ns)
            elif kind == END:
                self.over, self.code = True, one
            elif kind in (LOAD, UNLOAD, NAME):
                self.over, self.word = True, (kind, data)
        self.rows = self.log.used[0] = row

    def _take(self, row: int, seq: int, count: int, data: bytes, since_ns: int) -> int:
        """Take queries that came in one piece; returns the next free row."""
        end, log = row + count, self.log
        log.query[row:end] = np.arange(seq, seq + count)
        log.index[row:end] = np.frombuffer(data, "<i8")
        log.scheduled[row:end] = self.now()
        self.since[row:end] = array("q", [since_ns]) * count
        return end

    def wait(self, until_ns: int) -> None:
        """Wait for what arrives, until an instant at most, and take it."""
        if until_ns == FOREVER:
            self.read(wait_s=WAIT_S)
            return
        left_s = (until_ns - self.now() - SPIN_NS) / 1e9
        self.read(wait_s=max(0.0, min(left_s, WAIT_S / 2)))


def worker_loop(
    sut: SystemUnderTest,
    log: SampleLog,
    inbox: Inbox,
    collect: Collect,
    report: Callable[[Sequence[Done | First]], None],
    cue: Cue,
    max_batch: int,
    max_wait_ns: int,
) -> None:
    """Serve queries until the driver ends the window: the timed loop.

    Args:
        sut: loaded and warm, nothing in flight.
        log: the inbox fills the rows, the loop the first row of each group.
        inbox: takes queries off the wire.
        collect: stamps what has ended; returns how many groups.
        report: tells the driver.
        cue: the clock and the agreed start.
        max_batch: queries of a group at most.
        max_wait_ns: how long the oldest query of a group waits for others at most.
    """
    cells, issue, poll, depth = log.cells(), sut.issue, sut.poll, sut.depth
    ready, issued, counts = (cells[name] for name in ("ready", "issued", "count"))
    since, order, now, flying, free, worked = inbox.since, log.index, cue.now, 0, 0, True
    row = inbox.begun
    cue.begin()
    inbox.begin()
    while flying or not inbox.over or (row < inbox.rows and inbox.code == WHOLE):
        stamp, until = now(), FOREVER
        if worked:
            free = stamp
        if row < inbox.rows and flying < depth and inbox.code == WHOLE:
            size, until = next_batch(since, row, inbox.rows, stamp, max_batch, max_wait_ns)
            if size:
                counts[row] = size
                ready[row] = free if free > until else until
                issued[row] = now()
                data = inbox.data[row : row + size] if inbox.data else None
                issue(row, order[row : row + size], data)
                row, flying, worked = row + size, flying + 1, True
                continue
        worked = flying > 0
        if worked:
            ended = poll(min(until, stamp + SLICE_NS))
            flying -= collect(ended)
            report(ended)
            inbox.read(stamp)
        else:
            log.idle[0] = True
            inbox.wait(until)
            log.idle[0] = False


def reporter(
    channel: Channel, log: SampleLog, encode: Encode | None = None
) -> Callable[[Sequence[Done | First]], None]:
    """Return the function that tells the driver what has ended; a First crosses at once.

    Args:
        channel: to the driver.
        log: of the queries.
        encode: makes bytes of a group's outputs, which cross too, under LoadGen; None: no outputs.
    """
    cells = log.cells()
    query, counts, completed = cells["query"], cells["count"], cells["completed"]

    def report(ended: Sequence[Done | First]) -> None:
        for each in ended:
            row = each.row
            if isinstance(each, First):
                told = encode is not None and each.token >= 0
                token = encode([[each.token]])[0] if encode and told else b""
                channel.post(FIRST, query[row], each.token_ns, token)
                continue
            count, first, failed = counts[row], query[row], completed[row] == FAILED
            tokens = FAILED_TOKENS if failed else len(each.token_ns)
            answers = [b""] * count if encode is None or failed else encode(each.outputs)
            together = encode is not None and query[row + count - 1] - first == count - 1
            if together and count > 1 and not failed:
                channel.post(DONES, first, count, packed(answers))
                continue
            for member, answer in zip(range(row, row + count), answers, strict=True):
                channel.post(DONE, query[member], tokens, answer)
        with suppress(ChannelLost):  # the inbox notices it, and says why
            channel.flush()

    return report


def serve(
    sut: SystemUnderTest,
    log: SampleLog,
    channel: Channel,
    collect: Collect,
    cue: Cue,
    max_batch: int,
    max_wait_ns: int,
    encode: Encode | None = None,
    name: str = "",
) -> str:
    """Run the loop, and leave it in a way that the driver understands.

    Args:
        sut: loaded and warm; under LoadGen it is told what to load.
        log: of the queries that come.
        channel: to the driver.
        collect: stamps what has ended.
        cue: the clock and the agreed start.
        max_batch: queries of a group at most.
        max_wait_ns: how long the oldest query of a group waits for others at most.
        encode: under LoadGen makes bytes of a group's outputs.
        name: of what serves here, for LoadGen.

    Returns:
        Why the driver was lost; "" where it was not.

    Raises:
        Exception: the system under test raised; the driver was told, and has ended the window.
    """
    inbox = Inbox(channel, log, cue.now)
    report = reporter(channel, log, encode)
    try:
        worker_loop(sut, log, inbox, collect, report, cue, max_batch, max_wait_ns)
        while inbox.word is not None and not inbox.problem:
            log.idle[0] = True  # a model may take long to load: nothing is in flight
            _obey(inbox, sut, name)
            log.idle[0] = False
            again = replace(cue, begin=lambda: None)
            worker_loop(sut, log, inbox, collect, report, again, max_batch, max_wait_ns)
    except Exception:
        cue.halt[0] = True
        _leave(channel, inbox, RAISED)
        raise
    cue.halt[0] |= inbox.code != WHOLE
    _leave(channel, inbox, WHOLE)
    return inbox.problem


def _obey(inbox: Inbox, sut: SystemUnderTest, name: str) -> None:
    """Do what LoadGen wants between two stretches of queries, untimed, and say that it is done."""
    assert inbox.word is not None
    kind, data = inbox.word
    inbox.word, inbox.over, inbox.begun = None, False, inbox.rows
    if kind == NAME:
        inbox.channel.post(NAMED, 0, 0, name.encode())
    else:
        indices = np.frombuffer(data, "<i8").astype(np.int64)
        (sut.load if kind == LOAD else sut.unload)(indices)
        inbox.channel.post(LOADED, len(indices), 0)
    with suppress(ChannelLost):  # likewise
        inbox.channel.drain(LEAVE_S)


def _leave(channel: Channel, inbox: Inbox, code: int) -> None:
    """Tell the driver that the loop is over; after an exception wait for it to end the window."""
    try:
        channel.post(LEFT, inbox.rows, code)
        channel.drain(LEAVE_S)
    except ChannelLost as error:
        inbox.problem = inbox.problem or str(error)
    while not inbox.over:
        inbox.read(wait_s=WAIT_S)


def await_word(channel: Channel, within_s: float) -> bytes:
    """Wait for the driver's word to load or unload samples; returns their indices as bytes.

    Raises:
        ChannelLost: none came in time, or the driver is gone.
    """
    while select.select([channel], [], [], within_s)[0]:
        for kind, _, _, data in channel.read():
            if kind in (LOAD, UNLOAD):
                return data  # a pulse may come before it
    raise ChannelLost(f"nothing came from the driver within {within_s:.0f} s")


class Preloaded:
    """A channel on which all queries have come at once: what the loop over it takes is its own."""

    def __init__(self, queries: int) -> None:
        self.heard, self._frames = 0.0, [(QUERY, seq, seq, b"") for seq in range(queries)]
        self._frames.append((END, WHOLE, 0, b""))

    def read(self) -> list[tuple[int, int, int, bytes]]:
        """Return them, once."""
        frames, self._frames = self._frames, []
        return frames

    def silent(self, now: float) -> bool:
        """Never."""
        return now < 0

    def post(self, kind: int, one: int, other: int, data: bytes = b"") -> None:
        """Do what packing a frame costs."""
        FRAME.pack(kind, 0, one, other)

    def flush(self) -> bool:
        """Nothing is sent."""
        return True


def loaded(
    sut: SystemUnderTest, log: SampleLog, groups: Groups, collect: Collect, now: Now
) -> None:
    """Run the loop over queries that have all come: what it costs, waiting and sending left out."""
    del groups  # its own, one query each
    cue = Cue(now, lambda: None, lambda _until: None, [False])
    channel: Any = Preloaded(log.capacity)
    inbox = Inbox(channel, log, now)
    inbox.read()
    worker_loop(sut, log, inbox, collect, reporter(channel, log), cue, 1, 0)
