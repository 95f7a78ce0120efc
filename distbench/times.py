"""When each rank began and ended, on its own clock and on that of rank 0; the makespan of all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distbench.errors import DRIVER
from distbench.run import RankRecord, Rows, Run

LATE_NS = 100_000
"""A loop that begins later than this after the agreed instant was not on time.

A rank that spins over the instant is under 1 us late; one that the scheduler held back is late by a
slice, hundreds of us or more.
"""


@dataclass(frozen=True)
class RankTimes:
    """One rank's window, on its own clock and on rank 0's, ns.

    Attributes:
        rank: global rank.
        scheduled_ns: agreed instant, own clock.
        started_ns: when its loop began, own clock; None when unknown.
        finished_ns: last completion, own clock; None when nothing completed.
        started_ref_ns: ``started_ns`` on rank 0's clock; None without a clock model.
        finished_ref_ns: ``finished_ns`` likewise.
        bound_ns: how wrong the mapping to rank 0's clock can be in the window.
        ok: samples that completed.
        failed: samples that failed.
        pending: samples that never ended.
        whole: whether its samples are there.
        issued_ns: when its first group was issued, own clock; None when unknown.
        groups: groups that ended well.
        last_due_ns: schedule of its last query, in a stream its issue, own clock.
        last_done_ns: completion of its last query, own clock; None where that did not complete.
        tokens: of its completed queries; None where the model has none.
        short: completed queries with fewer than two tokens, or without a first.
        own: its own latencies at some percentiles, ns, by the metric's name.
        series: number, largest and sum of each series, ns.
        laps: its times per sample, lap by lap; see ``laps``.
        contradicting: groups whose stamps by the engine cannot be true; no series has them.
    """

    rank: int
    scheduled_ns: int | None
    started_ns: int | None
    finished_ns: int | None
    started_ref_ns: int | None
    finished_ref_ns: int | None
    bound_ns: int | None
    ok: int
    failed: int
    pending: int
    whole: bool = True
    issued_ns: int | None = None
    groups: int = 0
    last_due_ns: int | None = None
    last_done_ns: int | None = None
    tokens: int | None = None
    short: int = 0
    own: Mapping[str, int] = field(default_factory=dict)
    series: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)
    contradicting: int = 0
    laps: dict[str, Any] | None = None


def rank_times(run: Run, record: RankRecord, found: dict[str, Any]) -> RankTimes:
    """Put one rank's facts on its own clock and on rank 0's.

    Args:
        run: the record's.
        record: of the rank.
        found: from ``pool.facts``.
    """
    after = record.after or {}
    instant = after.get("plan", {}).get("local_ns")
    if instant is None:  # a rank that was killed left its log alone
        instant = found["scheduled_ns"]
    finished = found["finished_ns"]
    started = after.get("started_ns")
    if started is None:
        started = found["issued_ns"]
    model = run.clock(record)
    begin = end = bound = None
    if model is not None:
        begin = model.to_reference_ns(started) if started is not None else None
        end = model.to_reference_ns(finished) if finished is not None else None
        known = [t for t in (begin, end) if t is not None]
        bound = max((model.bound_ns(t) for t in known), default=None)
    return RankTimes(
        rank=record.rank,
        scheduled_ns=instant,
        started_ns=started,
        finished_ns=finished,
        started_ref_ns=begin,
        finished_ref_ns=end,
        bound_ns=bound,
        ok=found["ok"],
        failed=found["failed"],
        pending=found["pending"],
        whole=found["whole"],
        issued_ns=found["issued_ns"],
        groups=found["groups"],
        last_due_ns=found["last_due_ns"],
        last_done_ns=found["last_done_ns"],
        tokens=found["tokens"],
        short=found["short"],
        own=found["own"],
        series={name: (n, most, total) for name, (n, most, total) in found["series"].items()},
        contradicting=found["contradicting"],
        laps=found["laps"],
    )


def since_start_ns(t: RankTimes) -> int:
    """Return when a rank's last query was due, in a stream issued, since the agreed instant, ns."""
    return 0 if t.last_due_ns is None or t.scheduled_ns is None else t.last_due_ns - t.scheduled_ns


@dataclass(frozen=True)
class Makespan:
    """From the agreed instant to the last completion of all ranks, on rank 0's clock.

    Attributes:
        value_ns: None where it cannot be known; then ``reason`` says why.
        bound_ns: how wrong it can be.
        start_ns: the agreed instant.
        reason: "" when known.
    """

    value_ns: int | None
    bound_ns: int | None
    start_ns: int | None
    reason: str


def makespan(run: Run, times: list[RankTimes]) -> Makespan:
    """Compute the makespan over all ranks.

    The latest end is at least max(end - bound) and at most max(end + bound); the second is never
    nearer to max(end) than the first, so its distance is the bound.
    """
    absent = run.missing + [t.rank for t in times if not t.whole]
    if absent:
        return Makespan(None, None, None, f"samples of {_list(absent)} are missing")
    cut = [r.rank for r in run.official if r.after is None or r.after.get("ended_ns") is None]
    if cut:
        return Makespan(None, None, None, f"the window of {_list(cut)} was cut short")
    unclocked = [t.rank for t in times if t.finished_ref_ns is None or t.bound_ns is None]
    if unclocked:
        return Makespan(
            None,
            None,
            None,
            f"{_list(unclocked)} completed nothing or its clock was not measured",
        )
    starts = [r.after["plan"]["reference_ns"] for r in run.official if r.after]
    start = starts[0]
    ends = [(t.finished_ref_ns or 0, t.bound_ns or 0) for t in times]
    last = max(end for end, _ in ends)
    if last <= start:
        return Makespan(None, None, None, "the last completion is not after the agreed instant")
    high = max(end + bound for end, bound in ends)
    return Makespan(last - start, high - last, start, "")


def _list(ranks: list[int]) -> str:
    if DRIVER in ranks:
        return "the driver"
    shown = "rank " + ", ".join(str(r) for r in sorted(set(ranks))[:8])
    return shown + (" and others" if len(set(ranks)) > 8 else "")


def possible(stamps: Callable[[str], Rows], started: Rows) -> NDArray[np.bool_]:
    """Tell which groups, or which samples, have stamps of the engine that can be true.

    A group is handed over before the engine starts it, and has ended there before it completes:
    issued <= started <= finished <= completed. Stamps of another clock, or swapped, break that.

    Args:
        stamps: returns a column by its name.
        started: one of them; empty where the log has none.
    """
    finished = stamps("finished")
    if len(started) == 0 or len(finished) == 0:
        return np.zeros(len(started), np.bool_)
    inside = (stamps("issued") <= started) & (finished <= stamps("completed"))
    return np.asarray(inside & (started <= finished) & (started != 0) & (finished != 0))
