"""Run -> findings that a rank was not, or not from the start of its window, a steady system.

Each rank's rate over its own window is held against its own rate after its own warm-up, on its own
clock: that ranks finish at different times makes no difference here.
"""

from __future__ import annotations

from collections.abc import Sequence

from distbench.findings import EFFECT_INVALID, Finding, graded
from distbench.intervals import Settling, settlings
from distbench.pool import Pool
from distbench.run import RankRecord
from distbench.steady import ERRORS_REAL, Trend
from distbench.times import RankTimes

WATCH = "watch clocks, temperature and memory while it runs"


def settled_found(
    pool: Pool, times: Sequence[RankTimes], drifts: Sequence[Trend | None]
) -> list[Finding]:
    """Return the findings on warm-ups in the window, in order of rank.

    What chance and memory may make of a steady rank is none: the times between its completions
    before and after the cut must lie apart, or, where no cut makes it steady, its batch latency
    must have changed.

    Args:
        pool: how to reach the samples.
        times: of all ranks.
        drifts: of their batch latencies.
    """
    found = []
    ranks = zip(pool.run.official, times, settlings(pool), drifts, strict=True)
    for record, t, settling, drift in ranks:
        if settling is None or not settling.begin_ns:
            continue
        changed = not settling.settled and drift is not None and drift.real
        if settling.errors >= ERRORS_REAL or changed:
            found += _settled(record, t, settling)
    return found


def _settled(record: RankRecord, t: RankTimes, settling: Settling) -> list[Finding]:
    """Return the finding on one rank, by how far its rate differs from that after the cut."""
    if t.finished_ns is None or t.scheduled_ns is None or not settling.samples:
        return []
    whole = t.ok / (t.finished_ns - t.scheduled_ns)
    effect = whole / (settling.samples / settling.length_ns) - 1
    level = graded(abs(effect))
    if level is None:
        return []
    who, rank, host = f"rank {record.rank} ({record.host})", record.rank, record.host
    more = "more" if effect > 0 else "fewer"
    rate = f"over all of it {abs(effect):.1%} {more} samples/s completed than"
    if not settling.settled:
        return [
            Finding(
                level,
                "not-steady",
                f"{who} did not become steady in the first half of its window: {rate} in "
                f"its last {settling.length_ns / 1e9:.3g} s",
                rank,
                host,
                abs(effect),
                EFFECT_INVALID,
                f"give a longer --warmup, or a longer --duration; {WATCH}",
            )
        ]
    return [
        Finding(
            level,
            "warmup-in-window",
            f"{who} became steady {(settling.begin_ns - t.scheduled_ns) / 1e9:.3g} s after the "
            f"start of its window: {rate} from then on",
            rank,
            host,
            abs(effect),
            EFFECT_INVALID,
            f"give a longer --warmup; {WATCH}",
        )
    ]
