"""The Server loop in virtual time: against a brute-force twin, and against queueing theory.

Nothing sleeps: the clock moves only when the loop waits or the system under test works, so every
stamp is known to the nanosecond.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distbench.arrivals import constant_ns, poisson_ns
from distbench.batching import next_batch
from distbench.load import Load, backlog_limit, schedule
from distbench.prepare import Cue
from distbench.rules import parse_rules
from distbench.samples import FAILED, PENDING, SampleLog
from distbench.server import COLUMNS, server_loop
from distbench.stats import t_quantile
from distbench.sut import FOREVER, Done, collector

MS, S = 10**6, 10**9


class World:
    """A clock that only moves when something happens, and what happens on it."""

    def __init__(self, start_ns: int = 1_000) -> None:
        self.at = start_ns
        self.waits: list[int] = []

    def now(self) -> int:
        return self.at

    def wait(self, until_ns: int) -> None:
        self.waits.append(until_ns)
        self.at = max(self.at, until_ns)


class Machine:
    """Works ``size -> ns`` on one group at a time, in the order of issue; ``depth`` may wait."""

    total = resident = 1024

    def __init__(self, world: World, works: Any, depth: int = 1) -> None:
        self.world, self.works, self.depth = world, works, depth
        self.queue: deque[tuple[int, Any]] = deque()
        self.ends: dict[int, int] = {}
        self.free, self.polls = 0, 0

    def issue(self, row: int, indices: Any, data: Any = None) -> None:
        begin = max(self.free, self.world.at)
        self.free = self.ends[row] = begin + self.works(row, len(indices))
        self.queue.append((row, indices))
        assert len(self.queue) <= self.depth

    def poll(self, until_ns: int) -> Sequence[Done]:
        self.polls += 1
        row, indices = self.queue[0]
        if self.ends[row] > until_ns:
            self.world.at = max(self.world.at, until_ns)
            return ()
        self.queue.popleft()
        self.world.at = max(self.world.at, self.ends[row])
        return [Done(row, len(indices), indices)]


def run(
    due: Any,
    works: Any,
    *,
    depth: int = 1,
    max_batch: int = 1,
    max_wait_ns: int = 0,
    backlog: int = 10**9,
    halt: list[bool] | None = None,
) -> SampleLog:
    world = World()
    log = SampleLog.in_memory(len(due), COLUMNS)
    log.scheduled[:] = np.asarray(due) + world.at
    begun: list[int] = []
    cue = Cue(world.now, lambda: begun.append(world.at), world.wait, halt or [False])
    order = np.arange(len(due))
    collect = collector(log, {}, [], world.now)
    server_loop(
        Machine(world, works, depth), log, order, collect, cue, max_batch, max_wait_ns, backlog
    )
    assert begun == [1_000], "the agreed instant is waited for once"
    assert not log.idle[0]
    return log


def twin(
    due: Any, works: Any, depth: int, max_batch: int, max_wait_ns: int
) -> list[tuple[int, int, int, int]]:
    """Simulate the same by events: (first row, size, issued, completed) of each group."""
    due = [int(t) + 1_000 for t in due]
    groups: list[tuple[int, int, int, int]] = []
    ends: list[int] = []
    row, free, server = 0, 1_000, 0
    while row < len(due):
        full = row + max_batch - 1
        ready = due[row] + max_wait_ns
        if full < len(due):
            ready = min(ready, due[full])
        at = max(ready, free)
        if len(ends) >= depth:  # the group issued ``depth`` before must have ended
            at = max(at, ends[len(ends) - depth])
        size = sum(1 for t in due[row : row + max_batch] if t <= at)
        server = max(server, at) + works(row, size)
        groups.append((row, size, at, server))
        ends.append(server)
        row += size
    return groups


sizes = st.integers(1, 7)


@settings(max_examples=300, deadline=None)
@given(
    gaps=st.lists(st.integers(0, 50), min_size=1, max_size=60),
    work=st.integers(0, 90),
    per_sample=st.integers(0, 20),
    depth=st.integers(1, 3),
    max_batch=sizes,
    max_wait_ns=st.integers(0, 120),
)
def test_groups_are_those_of_an_event_simulation(
    gaps: list[int], work: int, per_sample: int, depth: int, max_batch: int, max_wait_ns: int
) -> None:
    due = np.cumsum(gaps)

    def works(_row: int, size: int) -> int:
        return work + per_sample * size

    log = run(due, works, depth=depth, max_batch=max_batch, max_wait_ns=max_wait_ns)
    firsts = np.flatnonzero(log.count > 0)
    got = [(int(r), int(log.count[r]), int(log.issued[r]), int(log.completed[r])) for r in firsts]
    assert got == twin(due, works, depth, max_batch, max_wait_ns)
    assert log.count.sum() == log.ended[0] == len(due)
    # In virtual time the loop is never late: it issues what is ready at once.
    assert np.array_equal(log.issued[firsts], log.ready[firsts])


@given(
    times=st.lists(st.integers(0, 100), min_size=1, max_size=30).map(sorted),
    first=st.integers(0, 29),
    now=st.integers(0, 300),
    max_batch=sizes,
    max_wait_ns=st.integers(0, 80),
)
def test_a_batch_is_due_when_full_or_when_its_oldest_has_waited(
    times: list[int], first: int, now: int, max_batch: int, max_wait_ns: int
) -> None:
    first = min(first, len(times) - 1)
    size, due = next_batch(times, first, len(times), now, max_batch, max_wait_ns)
    waiting = [t for t in times[first : first + max_batch] if t <= now]
    is_due = times[first] + max_wait_ns <= now or len(waiting) == max_batch
    assert size == (len(waiting) if is_due else 0)
    assert (now >= due) == is_due
    # Whatever lies ahead of the clock may change when the batch is due, never what is done now.
    past = [t for t in times if t <= now]
    if first < len(past):
        assert next_batch(past, first, len(past), now, max_batch, max_wait_ns)[0] == size


def test_the_loop_waits_without_work_and_polls_with_it() -> None:
    world = World(0)
    log = SampleLog.in_memory(3, COLUMNS)
    log.scheduled[:] = 100, 120, 500
    machine = Machine(world, lambda _row, _size: 50)
    cue = Cue(world.now, lambda: None, world.wait, [False])
    server_loop(machine, log, np.arange(3), collector(log, {}, [], world.now), cue, 1, 0, 9)
    # Idle before the first and the third query; the second came while the first was served.
    assert world.waits == [100, 500]
    assert machine.polls == 3
    assert log.completed.tolist() == [150, 200, 550]


def test_a_stall_is_charged_to_all_who_come_meanwhile() -> None:
    # 100 queries/s for 30 s; the system stands still for 500 ms at 10 s. Analytic: queries that
    # come within the stall wait for the rest of it, then for those before them.
    due = np.arange(3_000) * 10 * MS
    work = MS

    def works(row: int, _size: int) -> int:
        return 500 * MS if row == 1_000 else work

    log = run(due, works)
    latency = log.completed - log.scheduled
    sent = log.completed - log.issued
    behind = np.arange(60)
    expected = np.maximum(500 * MS + behind * work - behind * 10 * MS, work)
    assert np.array_equal(latency[1_000:1_060], expected)
    assert (latency > work).sum() == 56
    # What a send-time figure shows of the same: one slow query.
    assert (sent > work).sum() == 1
    assert np.sort(latency)[int(3_000 * 0.99)] == np.sort(expected)[-30]
    assert np.sort(sent)[int(3_000 * 0.99)] == work


@pytest.mark.parametrize("halted", [False, True])
def test_too_long_a_queue_gives_the_window_up_and_keeps_what_completed(halted: bool) -> None:
    halt = [halted]
    log = run(np.arange(1_000) * 10, lambda _row, _size: 25, backlog=64, halt=halt)
    assert halt == [True]
    done = log.completed != PENDING
    if halted:  # another rank's loop had given up
        assert done.sum() == 0
        return
    # Row r ends at 25 (r + 1), when 2.5 (r + 1) are due: 64 are outstanding from row 42 on.
    assert 40 <= done.sum() <= 46
    assert not done[int(done.sum()) :].any()
    assert (log.completed[done] != FAILED).all()
    assert log.ended[0] == done.sum()


@pytest.mark.parametrize("depth", [1, 8, 100_000])
def test_what_is_in_flight_counts_as_outstanding(depth: int) -> None:
    # 2,000 queries/s offered, 500 completed: an engine that accepts all hides no queue.
    due = np.arange(20_000) * (S // 2_000)
    log = run(due, lambda _row, _size: 2 * MS, depth=depth, backlog=4_000)
    done = log.completed != PENDING
    last_s = (log.completed.max() - 1_000) / S
    assert done.sum() < 20_000
    # Given up after 4,000 / 1,500 s; what was accepted by then is waited for.
    assert log.issued.max() < 1_000 + 2.8 * S
    assert last_s < (2.8 if depth < 10 else 12)


def test_a_loop_that_begins_late_is_late_for_its_first_query() -> None:
    world = World(0)
    log = SampleLog.in_memory(2, COLUMNS)
    log.scheduled[:] = 100, 200

    def begin() -> None:
        world.at = 5_000

    cue = Cue(world.now, begin, world.wait, [False])
    machine = Machine(world, lambda _row, _size: 50)
    server_loop(machine, log, np.arange(2), collector(log, {}, [], world.now), cue, 1, 0, 9)
    assert log.ready[0] == 100
    assert log.issued[0] == 5_000


def test_a_window_given_up_with_nothing_in_flight_ends() -> None:
    log = run([0, 0, 0], lambda _row, _size: 25, backlog=1)
    assert log.ended[0] <= 3


# Queueing theory


def waits(load: float, seed: int, queries: int, mean_ns: int = MS) -> Any:
    due = poisson_ns(load / mean_ns * S, 0, queries, seed)
    log = run(due, lambda _row, _size: mean_ns)
    return (log.completed - log.scheduled - mean_ns).astype(float)


def contains(values: Any, truth: float, conf: float) -> bool:
    """Tell whether the batch-means interval holds the truth: 30 batches, Student's t."""
    means = np.array([part.mean() for part in np.array_split(values, 30)])
    half = t_quantile(1 - (1 - conf) / 2, 29) * means.std(ddof=1) / np.sqrt(30)
    return bool(abs(means.mean() - truth) <= half)


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_the_mean_wait_is_pollaczek_khinchines(load: float) -> None:
    """M/D/1: the mean wait is load / (2 (1 - load)) services.

    Twenty fixed seeds of 20,000 queries; a right loop has 95 % of the intervals hold, so fewer than
    16 of 20 happen by chance once in 400, and one outside 99.9 % once in 50 (seeds are fixed).
    """
    truth = load / (2 * (1 - load)) * MS
    told = [waits(load, seed, 20_000)[500:] for seed in range(20)]
    assert sum(contains(each, truth, 0.95) for each in told) >= 16
    assert all(contains(each, truth, 0.999) for each in told)


def test_two_replicas_under_static_dispatch_are_two_queues() -> None:
    """Independent draws split a Poisson process: each replica is an M/D/1 at the same load."""
    load, truth = 0.6, 0.6 / (2 * 0.4) * MS
    held = 0
    for seed in range(20):
        drawn = schedule(
            Load(2 * load * 1000.0),
            parse_rules("none"),
            duration_ns=S,
            num_queries=20_000,
            seed=seed,
            model="sleep",
            total=1024,
            resident=1024,
            replicas=2,
        )
        both = []
        for replica in (0, 1):
            log = run(drawn.due_ns[drawn.replica == replica], lambda _row, _size: MS)
            both.append((log.completed - log.scheduled - MS).astype(float)[200:])
        held += all(contains(each, truth, 0.95) for each in both)
        assert all(contains(each, truth, 0.999) for each in both)
    assert held >= 14  # of 20 pairs, each of which holds with 0.9


def test_taking_turns_would_not_be_poisson() -> None:
    """What the independent draw is for: every second query of a Poisson process waits less."""
    due = poisson_ns(1200.0, 0, 40_000, 3)
    log = run(due[::2], lambda _row, _size: MS)
    turns = (log.completed - log.scheduled - MS).mean()
    assert turns < 0.75 * 0.6 / (2 * 0.4) * MS


# The load


def test_one_schedule_is_dealt_out_whole() -> None:
    asked = {
        "rules": parse_rules("none"), "duration_ns": 2 * S, "num_queries": None, "seed": 4,
        "model": "echo", "total": 100, "resident": 100,
    }  # fmt: skip
    alone = schedule(Load(500.0), replicas=1, **asked)
    three = schedule(Load(500.0), replicas=3, **asked)
    assert np.array_equal(alone.due_ns, three.due_ns)
    assert np.array_equal(alone.index, three.index)
    assert sorted(set(three.replica.tolist())) == [0, 1, 2]
    assert np.array_equal(alone.due_ns, poisson_ns(500.0, 2 * S, 1, 4))
    assert three.made["generator"] == "loadgen-mt19937-exponential"


def test_a_rounds_seeds_and_least_duration_are_used() -> None:
    drawn = schedule(
        Load(2.0),
        parse_rules("mlperf-v5.0"),
        duration_ns=5 * S,
        num_queries=None,
        seed=99,
        model="mine",
        total=64,
        resident=64,
        replicas=1,
    )
    assert drawn.due_ns[-1] >= 600 * S
    assert np.array_equal(drawn.due_ns, poisson_ns(2.0, 600 * S, 100, 9933818062894767841))
    assert (drawn.made["round"], drawn.made["variant"]) == ("mlperf-v5.0", "libstdcxx-reject")


def test_a_trace_is_not_stretched_and_its_digest_is_that_of_its_queries(tmp_path: Any) -> None:
    from distbench.errors import UsageError
    from distbench.load import check_trace

    path = tmp_path / "t.txt"
    path.write_text("0\n0.5\n1\n")
    load = Load(2.0, f"trace:{path}")
    check_trace(load, 3)
    with pytest.raises(UsageError, match="has 3 queries, and --num-samples asks for 4"):
        check_trace(load, 4)
    asked = {
        "rules": parse_rules("none"), "duration_ns": S, "num_queries": None, "seed": 0,
        "model": "echo", "total": 10, "resident": 10, "replicas": 1,
    }  # fmt: skip
    one = schedule(load, **asked).made["digest"]
    assert schedule(load, **asked).made["digest"] == one
    path.write_text("0\n0.5\n1.5\n")
    assert schedule(load, **asked).made["digest"] != one


def test_times_of_day_are_no_offsets(tmp_path: Any) -> None:
    from distbench.arrivals import trace_ns
    from distbench.errors import UsageError

    path = tmp_path / "t.txt"
    path.write_text("1764115200.0\n")
    with pytest.raises(UsageError, match=r"line 1: .* not times of day"):
        trace_ns(path)


def test_a_constant_rate_and_a_number_of_queries() -> None:
    drawn = schedule(
        Load(100.0, "constant"),
        parse_rules("none"),
        duration_ns=5 * S,
        num_queries=7,
        seed=0,
        model="",
        total=10,
        resident=10,
        replicas=1,
    )
    assert drawn.due_ns.tolist() == constant_ns(100.0, 0, 7).tolist()
    assert len(drawn.index) == 7


@pytest.mark.parametrize(
    ("load", "replicas", "limit"),
    [
        (Load(1.0), 1, 64),
        (Load(1_000.0), 1, 2_000),
        (Load(1_000.0), 4, 500),
        (Load(1.0, max_batch=100), 1, 200),
    ],
)
def test_the_queue_that_gives_a_window_up(load: Load, replicas: int, limit: int) -> None:
    assert backlog_limit(load, replicas) == limit


def test_no_poll_is_forever_while_queries_are_to_come() -> None:
    untils: list[int] = []

    class Watched(Machine):
        def poll(self, until_ns: int) -> Sequence[Done]:
            untils.append(until_ns)
            return super().poll(until_ns)

    world = World(0)
    log = SampleLog.in_memory(2, COLUMNS)
    log.scheduled[:] = 0, 30
    machine = Watched(world, lambda _row, _size: 100, depth=2)
    cue = Cue(world.now, lambda: None, world.wait, [False])
    server_loop(machine, log, np.arange(2), collector(log, {}, [], world.now), cue, 1, 0, 9)
    assert untils == [30, FOREVER, FOREVER]
