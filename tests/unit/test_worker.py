"""A worker's loop in virtual time: it batches as static dispatch does, and ends as it is told."""

from __future__ import annotations

import socket
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distbench import worker
from distbench.clock import now_ns
from distbench.courses import COURSE_COLUMNS
from distbench.frames import (
    DONE,
    END,
    FIRST,
    HALTED,
    LEFT,
    LOST,
    PULSE,
    QUERY,
    RAISED,
    WHOLE,
    Channel,
    ChannelLost,
)
from distbench.prepare import Cue
from distbench.samples import FAILED, PENDING, SampleLog
from distbench.server import COLUMNS, server_loop
from distbench.sut import Done, Echo, First, collector
from distbench.worker import Inbox, Preloaded, reporter, serve, worker_loop

pytestmark = pytest.mark.timeout(60)


class Clock:
    """A clock that only moves when something happens."""

    def __init__(self, at: int = 1_000) -> None:
        self.at = at

    def now(self) -> int:
        return self.at


class Wire:
    """A channel on which queries come at known instants of a clock; then the end."""

    def __init__(
        self, clock: Clock, due: Any, code: int = WHOLE, ends_at: int | None = None
    ) -> None:
        self.clock, self.heard = clock, 0.0
        self.coming = deque((int(at), (QUERY, k, k % 7, b"")) for k, at in enumerate(due))
        last = int(due[-1]) if len(due) else clock.at
        self.coming.append((last if ends_at is None else ends_at, (END, code, 0, b"")))
        self.told: list[tuple[int, int, int]] = []
        self.flushed = 0

    def read(self) -> list[Any]:
        told = []
        while self.coming and self.coming[0][0] <= self.clock.at:
            told.append(self.coming.popleft()[1])
        return told

    def silent(self, _now: float) -> bool:
        return False

    def post(self, kind: int, one: int, other: int, data: bytes = b"") -> None:
        self.told.append((kind, one, other))

    def flush(self) -> bool:
        self.flushed = len(self.told)
        return True


class VirtualInbox(Inbox):
    """Waits on the clock in place of the socket."""

    def wait(self, until_ns: int) -> None:
        wire: Any = self.channel
        coming = wire.coming[0][0] if wire.coming else until_ns
        wire.clock.at = max(wire.clock.at, min(until_ns, coming))
        self.read()


class Machine:
    """Works a known time on one group at a time; computes in ``poll``, as an inline engine does."""

    total = resident = 1024

    def __init__(self, clock: Clock, work: int, per_sample: int, depth: int) -> None:
        self.clock, self.work, self.per_sample, self.depth = clock, work, per_sample, depth
        self.queue: deque[tuple[int, Any]] = deque()

    def issue(self, row: int, indices: Any, data: Any = None) -> None:
        self.queue.append((row, indices))
        assert len(self.queue) <= self.depth

    def poll(self, until_ns: int) -> Sequence[Any]:
        row, indices = self.queue.popleft()
        self.clock.at += self.work + self.per_sample * len(indices)
        return [Done(row, len(indices), indices)]


def run(
    due: Any,
    wire: Any = None,
    sut: Any = None,
    max_batch: int = 1,
    max_wait_ns: int = 0,
    **how: Any,
) -> tuple[SampleLog, Any]:
    clock = wire.clock if wire else Clock()
    wire = wire or Wire(clock, due)
    log = SampleLog.in_memory(max(len(due), 1), COURSE_COLUMNS)
    inbox = VirtualInbox(wire, log, clock.now)
    cue = Cue(clock.now, lambda: None, lambda _until: None, [False])
    sut = sut or Machine(clock, how.get("work", 10), how.get("per_sample", 0), how.get("depth", 1))
    report = reporter(wire, log)
    collect = collector(log, {}, [], clock.now)
    worker_loop(sut, log, inbox, collect, report, cue, max_batch, max_wait_ns)
    assert not log.idle[0]
    assert wire.flushed == len(wire.told)
    return log, wire


@settings(max_examples=200, deadline=None)
@given(
    gaps=st.lists(st.integers(0, 50), min_size=1, max_size=50),
    work=st.integers(1, 90),
    per_sample=st.integers(0, 20),
    max_batch=st.integers(1, 7),
)
def test_groups_are_those_of_static_dispatch(
    gaps: list[int], work: int, per_sample: int, max_batch: int
) -> None:
    """The same arrivals, the same machine: the same groups at the same instants."""
    due = np.cumsum(gaps) + 1_000
    log, wire = run(due, work=work, per_sample=per_sample, max_batch=max_batch)
    clock = Clock()
    other = SampleLog.in_memory(len(due), COLUMNS)
    other.scheduled[:] = due

    def wait(until_ns: int) -> None:
        clock.at = max(clock.at, until_ns)

    server_loop(
        Machine(clock, work, per_sample, 1), other, np.arange(len(due)),
        collector(other, {}, [], clock.now), Cue(clock.now, lambda: None, wait, [False]),
        max_batch, 0, 10**9,
    )  # fmt: skip
    for name in ("count", "issued", "completed"):
        assert getattr(log, name).tolist() == getattr(other, name).tolist(), name
    assert sorted(wire.told) == [(DONE, k, 0) for k in range(len(due))]
    assert log.query.tolist() == list(range(len(due)))
    assert log.used == log.ended == [len(due)]


def test_the_oldest_of_a_group_waits_no_longer_than_it_may() -> None:
    # The engine has the first from 1,050 to 1,150; the second comes meanwhile and is read after it,
    # when it may have waited for its 50 ns already.
    log, _ = run([1_000, 1_060, 2_000], work=100, max_batch=8, max_wait_ns=50)
    assert log.issued.tolist() == [1_050, 1_150, 2_050]
    assert log.scheduled.tolist() == [1_000, 1_150, 2_000]


def test_a_batch_waits_for_its_fill_and_then_for_its_time() -> None:
    due = [1_000, 1_010, 1_500]
    log, _ = run(due, work=1, max_batch=2, max_wait_ns=300)
    assert log.issued.tolist() == [1_010, 0, 1_800]
    assert log.ready.tolist() == [1_010, 0, 1_800]


@pytest.mark.parametrize("code", [HALTED])
def test_a_window_that_is_given_up_drops_what_was_not_issued(code: int) -> None:
    clock = Clock()
    wire = Wire(clock, [1_000] * 50, code, ends_at=1_045)
    log, wire = run([0] * 50, wire, work=10)
    done = (log.completed != PENDING).sum()
    assert done == 5
    assert len(wire.told) == 5
    assert log.used == [50]


class TokenMachine:
    """Says that a first token is out, and one poll later that the text is."""

    total = resident = depth = 1

    def __init__(self, clock: Clock) -> None:
        self.clock, self.row, self.steps = clock, -1, 0

    def issue(self, row: int, indices: Any, data: Any = None) -> None:
        self.row, self.steps, self.indices = row, 0, indices

    def poll(self, until_ns: int) -> Sequence[Any]:
        self.clock.at += 10
        self.steps += 1
        if self.steps == 1:
            return [First(self.row, self.clock.at)]
        error = "no" if self.row == 1 else ""
        return [Done(self.row, 1, self.indices, error, token_ns=(1, 2, 3))]


def test_a_first_crosses_before_the_rest_and_tokens_are_counted() -> None:
    clock = Clock()
    wire = Wire(clock, [1_000, 1_001])
    log, wire = run([0, 0], wire, TokenMachine(clock))
    assert wire.told == [(FIRST, 0, 1_010), (DONE, 0, 3), (FIRST, 1, 1_030), (DONE, 1, -1)]
    assert log.completed.tolist() == [1_020, FAILED]


def test_under_loadgen_the_first_token_crosses_with_its_first() -> None:
    posted: list[Any] = []
    channel: Any = type("Channel", (), {"post": lambda _, *told: posted.append(told)})()
    channel.flush = lambda: True
    log = SampleLog.in_memory(2, COURSE_COLUMNS)
    log.query[:] = [7, 8]
    report = reporter(channel, log, lambda outputs: [bytes(each) for each in outputs])
    report([First(0, 5, 65), First(1, 6)])
    assert posted == [(FIRST, 7, 5, b"A"), (FIRST, 8, 6, b"")]


def test_the_harness_is_measured_without_a_wire() -> None:
    log = SampleLog.in_memory(400, COURSE_COLUMNS)
    channel: Any = Preloaded(400)
    inbox = Inbox(channel, log, now_ns)
    inbox.read()
    assert (inbox.rows, inbox.over) == (400, True)
    cue = Cue(now_ns, lambda: None, lambda _until: None, [False])
    collect = collector(log, {}, [], now_ns)
    worker_loop(Echo(), log, inbox, collect, reporter(channel, log), cue, 1, 0)
    assert (log.completed > 0).all()


# Over sockets


def served(script: Any, sut: Any = None) -> tuple[str, SampleLog, list[Any], Cue, Any]:
    """Serve what a scripted driver says; returns what is left of it."""
    here, there = socket.socketpair()
    channel, far = Channel(here, "the driver (jw1)"), Channel(there, "x")
    log = SampleLog.in_memory(64, COURSE_COLUMNS)
    cue = Cue(now_ns, lambda: None, lambda _until: None, [False])
    errors: list[str] = []
    thread = threading.Thread(target=script, args=(far,))
    thread.start()
    raised, problem = None, ""
    try:
        problem = serve(sut or Echo(), log, channel, collector(log, {}, errors, now_ns), cue, 4, 0)
    except RuntimeError as error:
        raised = error
    thread.join(20)
    told: list[Any] = []
    try:
        while True:
            got = far.read()
            told += got
            if not got:
                break
    except (ChannelLost, OSError):
        pass
    here.close()
    there.close()
    return problem, log, told, cue, raised


def test_a_window_over_a_socket() -> None:
    def script(far: Channel) -> None:
        for k in range(10):
            far.post(QUERY, k, 100 + k)
            far.post(PULSE, 0, 0)
            far.drain(5)
        far.post(END, WHOLE, 0)
        far.drain(5)

    problem, log, told, cue, _ = served(script)
    assert problem == ""
    assert cue.halt == [False]
    assert told[-1][:3] == (LEFT, 10, WHOLE)
    assert [each[:2] for each in told[:-1]] == [(DONE, k) for k in range(10)]
    assert log.index[:10].tolist() == list(range(100, 110))
    assert log.used == [10]


def test_a_driver_that_goes_away_is_told_of_and_what_is_in_flight_ends() -> None:
    def script(far: Channel) -> None:
        far.post(QUERY, 0, 1)
        far.drain(5)
        far.close()

    problem, log, _, cue, _ = served(script)
    assert problem.startswith("the link to the driver (jw1) ")
    assert cue.halt == [True]
    assert log.used == [1] or log.used == [0]


def test_a_driver_that_falls_silent_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distbench.frames.SILENCE_S", 0.2)
    monkeypatch.setattr(worker, "SILENCE_S", 0.2)
    problem, _, _, cue, _ = served(lambda _far: None)
    assert problem == "nothing was heard from it for 0 s"
    assert cue.halt == [True]


class Raises(Echo):
    def poll(self, until_ns: int) -> list[Done]:
        raise RuntimeError("out of tiles")


def test_a_system_that_raises_tells_the_driver_and_waits_for_the_end() -> None:
    heard: list[Any] = []

    def script(far: Channel) -> None:
        far.post(QUERY, 0, 1)
        far.drain(5)
        far.connection.setblocking(True)
        while not heard:
            heard.extend(far.read())
        far.connection.setblocking(False)
        far.post(QUERY, 1, 2)
        far.post(END, HALTED, 0)
        far.drain(5)

    _, log, _, cue, raised = served(script, Raises())
    assert str(raised) == "out of tiles"
    assert heard[0][0] == LEFT and heard[0][2] == RAISED
    assert cue.halt == [True]
    assert log.used[0] == 2
    assert LOST not in {each[0] for each in heard}
