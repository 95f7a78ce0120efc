"""Run -> findings on the measurement: how far clocks, start, harness and host can be trusted."""

from __future__ import annotations

from distbench import metrics as m
from distbench.clock import WANDER_PPM, contradiction_ns
from distbench.findings import EFFECT_INVALID, Finding, graded
from distbench.intervals import trends
from distbench.metrics import harness
from distbench.pool import Pool
from distbench.run import RankRecord, Run
from distbench.settled import WATCH, settled_found
from distbench.steady import TREND_P, Trend
from distbench.times import LATE_NS, Makespan, RankTimes

BRIEF_NS = 100_000_000
"""Of a shorter window one slice of the scheduler, some ms, is several per cent."""
LAUNCH_BOUND_BUSY = 0.70
"""A device that computed for less of the window than this waited for its host."""
WINDOW_SHORT = 0.5
"""A window below this share of --duration: the warm-up rate was not the window's rate."""


def measurement_found(pool: Pool, times: list[RankTimes], span: Makespan) -> list[Finding]:
    """Return all findings on the measurement of a run."""
    run = pool.run
    found: list[Finding] = []
    drifts = trends(pool)
    for record, drift in zip(run.present, drifts, strict=True):
        found += _trend(record, drift)
    found += settled_found(pool, times, drifts)
    for record, t in zip(run.present, times, strict=True):
        found += _interference(record, t)
        found += _clock(run, record)
    return found + _timing(run, times, span)


def _trend(record: RankRecord, found: Trend | None) -> list[Finding]:
    """Return the finding that one rank became slower or faster in the window.

    Half the change counts: by so much the average of the window differs from what its end shows.
    """
    if found is None or found.change is None or not found.real:
        return []
    effect = abs(found.change) / 2
    level = graded(effect)
    if level is None:
        return []
    by = f"p {found.p:.1g}" if found.p < TREND_P else f"{found.errors:.0f} standard errors apart"
    return [
        Finding(
            level,
            "trend",
            f"rank {record.rank} ({record.host}): batches took {abs(found.change):.1%} "
            f"{'longer' if found.change > 0 else 'less time'} in the last third of the window than "
            f"in the first ({by}), so the window averages a system that was changing",
            record.rank,
            record.host,
            effect,
            EFFECT_INVALID,
            f"give a longer --warmup; {WATCH}",
        )
    ]


def _clock(run: Run, record: RankRecord) -> list[Finding]:
    """Return the finding that a clock did what the bounds assume it does not."""
    if record.before["clock"]["leader"] != record.rank or record.rank == 0:
        return []
    excess_ns = contradiction_ns(run.exchanges(record))
    if excess_ns <= 0:
        return []
    return [
        Finding(
            "invalid",
            "clock-contradiction",
            f"rank {record.rank} ({record.host}): exchanges with its clock contradict each other "
            f"by {excess_ns / 1e3:.1f} us beyond their bounds, so a clock was stepped or its rate "
            f"moved by more than {WANDER_PPM:g} ppm, and no bound of this run holds",
            record.rank,
            record.host,
            excess_ns / 1e9,
            0,
            "run again; if it comes back, see whether a virtual machine is paused or moved, or "
            "something sets the clock",
        )
    ]


def _interference(record: RankRecord, t: RankTimes) -> list[Finding]:
    quiet = (record.after or {}).get("quiet")
    if not quiet or quiet["run_delay_ns"] < 0 or not quiet["window_ns"]:
        return []
    effect = quiet["run_delay_ns"] / quiet["window_ns"]
    level = graded(effect)
    if level is None:
        return []
    return [
        Finding(
            level,
            "interference",
            f"rank {t.rank} ({record.host}): the loop was ready to run but waited for a "
            f"processor for {effect:.1%} of its window "
            f"({quiet['involuntary_switches']} involuntary switches)",
            t.rank,
            record.host,
            effect,
            EFFECT_INVALID,
            "stop other work on the host, or start fewer ranks or threads than it has cores",
        )
    ]


def _timing(run: Run, times: list[RankTimes], span: Makespan) -> list[Finding]:
    found: list[Finding] = []
    if not span.value_ns:
        return found
    start = m.start_section(run, times)
    if start["late_ranks"]:
        worst = max(x for x in start["lateness_s"] if x is not None)
        effect = worst * m.NS / span.value_ns
        who = ", ".join(str(r) for r in start["late_ranks"][:8])
        found.append(
            Finding(
                "invalid" if effect > EFFECT_INVALID else "doubtful",
                "start-late",
                f"rank {who} began up to {worst * 1e3:.3f} ms after the agreed instant "
                f"({effect:.2%} of the window, after {start['attempts']} attempts)",
                start["late_ranks"][0],
                "",
                worst,
                LATE_NS / m.NS,
                "stop other work on the host; with more ranks than cores use fewer ranks",
            )
        )
    effect = (span.bound_ns or 0) / span.value_ns
    level = graded(effect)
    if level:
        found.append(
            Finding(
                level,
                "clock-bound",
                f"the makespan is known to +-{(span.bound_ns or 0) / 1e3:.1f} us only "
                f"({effect:.2%} of it)",
                value=effect,
                limit=EFFECT_INVALID,
                remedy="measure for longer (--duration), or mend the network's latency",
            )
        )
    batches = max((t.groups for t in times), default=0)
    effect = harness(run)["cost_per_batch_s"] * m.NS * batches / span.value_ns
    level = graded(effect)
    if level:
        found.append(
            Finding(
                level,
                "harness-cost",
                f"the loop over a SUT that does nothing takes {effect:.1%} of this window's time "
                f"({batches} batches on the busiest rank)",
                value=effect,
                limit=EFFECT_INVALID,
                remedy="use a larger --batch-size, or a model that does some work",
            )
        )
    found += _issue_late(run, times, span)
    return found + _window(run, span) + _launch_bound(run, times, span)


def _issue_late(run: Run, times: list[RankTimes], span: Makespan) -> list[Finding]:
    """Return the findings that a loop was on time and its first issue was not."""
    found = []
    for record, t in zip(run.present, times, strict=True):
        if t.issued_ns is None or t.scheduled_ns is None or t.started_ns is None:
            continue
        late_ns = t.issued_ns - t.started_ns
        if late_ns <= LATE_NS:
            continue
        effect = late_ns / (span.value_ns or 1)
        found.append(
            Finding(
                "invalid" if effect > EFFECT_INVALID else "doubtful",
                "issue-late",
                f"rank {t.rank} ({record.host}) issued its first group {late_ns / 1e6:.3f} ms "
                f"after its loop began ({effect:.2%} of the window)",
                t.rank,
                record.host,
                late_ns / 1e9,
                LATE_NS / m.NS,
                "stop other work on the host, or measure for longer (--duration)",
            )
        )
    return found


def _window(run: Run, span: Makespan) -> list[Finding]:
    asked = run.first.before.get("duration_ns")
    if not span.value_ns:
        return []
    if span.value_ns < BRIEF_NS:
        return [
            Finding(
                "doubtful",
                "window-brief",
                f"the window lasted {span.value_ns / 1e6:.3g} ms, so one slice of the scheduler is "
                "a large part of it",
                value=span.value_ns / 1e9,
                limit=BRIEF_NS / 1e9,
                remedy="measure for longer (--duration or --num-samples)",
            )
        ]
    if not asked or span.value_ns >= WINDOW_SHORT * asked:
        return []
    return [
        Finding(
            "doubtful",
            "window-short",
            f"the window lasted {span.value_ns / 1e9:.2f} s of the {asked / 1e9:g} s asked "
            "for: the warm-up was slower than the window",
            value=span.value_ns / asked,
            limit=WINDOW_SHORT,
            remedy="give a longer --warmup, or --num-samples",
        )
    ]


def _launch_bound(run: Run, times: list[RankTimes], span: Makespan) -> list[Finding]:
    found = []
    for row in m.per_rank(run, times, span):
        busy = row["metrics"]["device_busy"]
        if busy is not None and busy < LAUNCH_BOUND_BUSY:
            found.append(
                Finding(
                    "info",
                    "launch-bound",
                    f"LAUNCH_BOUND: the device of rank {row['rank']} ({row['host']}) computed "
                    f"for {busy:.0%} of the window and waited for its host otherwise",
                    row["rank"],
                    row["host"],
                    busy,
                    LAUNCH_BOUND_BUSY,
                    "use a larger --batch-size, or an engine with fewer launches",
                )
            )
    return found
