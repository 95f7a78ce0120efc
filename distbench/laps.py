"""Which rank is a straggler: how long each takes per sample by its own clock, before they meet.

Ranks that wait for each other all take as long as the slowest, so that a straggler shows only in
what each does by itself. A rank's groups are cut, in the order of time, into equal laps; how far
their times per sample vary says how well the rank's mean is known. Each rank is held against the
fastest, not against a mean or a median, which with two ranks hide half of what one loses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distbench.findings import Finding
from distbench.run import RankRecord, Run
from distbench.samples import FAILED
from distbench.scenarios import scenario
from distbench.steady import memory
from distbench.student import t_quantile
from distbench.times import RankTimes, possible

LAPS, LEAST_LAPS, LAP_GROUPS = 64, 8, 2
"""Laps at most and at least, and groups of a lap at least."""
CONFIDENCE = 0.95
ERROR = 0.01
"""Chance that any of equal ranks is named: shared by all pairs, since the fastest is chosen among
them by what was measured."""
LEAST_SLOWER = 0.01
"""Only a rank that is surely slower by this is named: ranks that pass for alike differ by less."""


def laps(record: RankRecord) -> dict[str, Any] | None:
    """Cut one rank's groups into laps.

    Returns:
        ``samples`` and ``took_ns`` of each lap, and ``ends_ns``, when each ended since the agreed
        instant, where a rank works without waiting; None with too few groups, or where a group
        failed, whose time would count without its samples. A lap's time is that from the end of the
        one before, or, where queries come by a schedule, the sum of the engine's times. Those say
        nothing of a rank's pace, so that there is None, where queries are batched or overlap in the
        engine, since both depend on the load, and where the engine does not stamp each of them.
    """
    columns = {name: record.first_rows(name) for name in ("issued", "completed", "count")}
    order = np.argsort(columns["completed"], kind="stable")
    issued, completed, counts = (columns[name][order] for name in columns)
    number = min(LAPS, len(order) // LAP_GROUPS)
    if number < LEAST_LAPS or (record.column("completed") == FAILED).any():
        return None
    edges: NDArray[np.int64] = np.arange(number + 1) * len(order) // number
    samples = np.add.reduceat(counts, edges[:-1])
    if scenario(record.before["scenario"]).open_loop:
        each = _served_ns(record, order, counts)
        if each is None:
            return None
        took = np.add.reduceat(each, edges[:-1])
        return {"samples": samples.tolist(), "took_ns": took.tolist(), "ends_ns": None}
    ends = completed[edges[1:] - 1]
    took = np.diff(ends, prepend=issued.min())
    instant = int((record.after or {}).get("plan", {}).get("local_ns") or issued.min())
    return {
        "samples": samples.tolist(),
        "took_ns": took.tolist(),
        "ends_ns": (ends - instant).tolist(),
    }


def _served_ns(
    record: RankRecord, order: NDArray[np.int64], counts: NDArray[np.int64]
) -> NDArray[np.int64] | None:
    """Return the engine's time for each query, in order; None where it is no pace."""
    started, finished = (record.first_rows(name) for name in ("started", "finished"))
    if len(started) != len(order) or not possible(record.first_rows, started).all():
        return None
    started, finished = started[order], finished[order]
    if (counts != 1).any() or (started[1:] < finished[:-1]).any():
        return None
    return np.asarray(finished - started)


@dataclass(frozen=True)
class Lag:
    """How far a rank is behind the fastest.

    Attributes:
        fastest: that rank.
        slower: time per sample / that of the fastest - 1.
        low: lower limit of it, 95 %.
        high: upper limit.
        named: whether it is a straggler: surely slower by ``LEAST_SLOWER``.
        last: share of the laps after which it was the last of all; None where queries come by a
            schedule.
        later_s: how much later it ended than at the pace of the fastest; likewise.
    """

    fastest: int
    slower: float
    low: float
    high: float
    named: bool
    last: float | None
    later_s: float | None


def lags(times: Sequence[RankTimes]) -> list[Lag | None]:
    """Hold every rank against the fastest.

    Args:
        times: of all ranks.

    Returns:
        Of each rank in order; None for the fastest, and where there are too few laps.
    """
    known = {place: t.laps for place, t in enumerate(times) if t.laps and sum(t.laps["took_ns"])}
    if len(known) < 2:
        return [None] * len(times)
    paces = {place: _pace(each) for place, each in known.items()}
    best = min(paces, key=lambda place: paces[place][0])
    pairs = len(known) * (len(known) - 1) / 2
    shares = _last(known)
    found: list[Lag | None] = [None] * len(times)
    for place, (mean, error, freedom) in paces.items():
        if place == best:
            continue
        fast, its, its_freedom = paces[best]
        ratio = mean / fast
        apart = ratio * math.hypot(error / mean, its / fast)
        df = min(freedom, its_freedom)
        half = t_quantile((1 + CONFIDENCE) / 2, df) * apart
        sure = ratio - 1 - t_quantile(1 - ERROR / pairs / 2, df) * apart
        own = known[place]
        samples = sum(own["samples"])
        found[place] = Lag(
            times[best].rank,
            ratio - 1,
            ratio - 1 - half,
            ratio - 1 + half,
            sure > LEAST_SLOWER,
            shares.get(place),
            None if own["ends_ns"] is None else (mean - fast) * samples / 1e9,
        )
    return found


def _pace(found: dict[str, Any]) -> tuple[float, float, int]:
    """Return the mean time per sample, ns, its standard error, and degrees of freedom."""
    samples, took = (np.asarray(found[name], np.float64) for name in ("samples", "took_ns"))
    mean = float(took.sum() / samples.sum())
    each = took / samples
    error = float(np.std(each, ddof=1)) * math.sqrt(memory(each, 1) / len(each))
    return mean, error, len(each) - 1


def _last(known: dict[int, dict[str, Any]]) -> dict[int, float]:
    """Return how often each was the last of all to end a lap; none where laps are not alike."""
    numbers = {len(each["ends_ns"] or ()) for each in known.values()}
    if len(numbers) > 1 or 0 in numbers:
        return {}
    ends = np.array([each["ends_ns"] for each in known.values()])
    last = np.argmax(ends, axis=0)
    return {place: float(np.mean(last == row)) for row, place in enumerate(known)}


def stragglers_found(run: Run, times: Sequence[RankTimes]) -> list[Finding]:
    """Return a finding for each straggler, in order of rank.

    Args:
        run: of the window.
        times: of all its ranks.
    """
    hosts = {record.rank: record.host for record in run.present}
    found = []
    for t, lag in zip(times, lags(times), strict=True):
        if lag is None or not lag.named:
            continue
        more = ""
        if lag.last is not None and lag.later_s is not None:
            more = (
                f"; it was the last of all after {lag.last:.0%} of its laps, and ended "
                f"{lag.later_s:.3g} s later than at that pace"
            )
        found.append(
            Finding(
                "info",
                "straggler",
                f"rank {t.rank} ({hosts.get(t.rank, '?')}) takes {lag.slower:.1%} (95 % "
                f"{lag.low:.1%} to {lag.high:.1%}) longer per sample than rank {lag.fastest} "
                f"({hosts.get(lag.fastest, '?')}), the fastest{more}",
                t.rank,
                hosts.get(t.rank, "?"),
                lag.slower,
                LEAST_SLOWER,
                "look at that host's clocks, temperature and other load; `launch/ssh.py --swap` "
                "tells a slow host from the cost of being rank 0",
            )
        )
    return found
