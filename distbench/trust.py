"""Run -> findings on the measurement: how far clocks and hosts can be trusted; and ``pace``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distbench.clock import WANDER_PPM, contradiction_ns
from distbench.errors import where
from distbench.findings import EFFECT_INVALID, Finding, graded
from distbench.intervals import trends
from distbench.joined import worker_times
from distbench.pace import pace_found
from distbench.pool import Pool
from distbench.run import RankRecord, Run
from distbench.scenarios import scenario
from distbench.settled import WATCH, settled_found
from distbench.steady import TREND_P, Trend
from distbench.times import Makespan, RankTimes


def measurement_found(
    pool: Pool, times: list[RankTimes], span: Makespan, figures: Mapping[str, Mapping[str, Any]]
) -> list[Finding]:
    """Return all findings on the measurement of a run, each by its effect on the headline.

    Args:
        pool: how to reach the samples.
        times: of all ranks.
        span: their makespan.
        figures: the run's metrics.
    """
    run = pool.run
    found: list[Finding] = []
    drifts = trends(pool)
    for record, drift in zip(run.official, drifts, strict=True):
        if not (record.after or {}).get("halted"):  # whose queue grew, as another finding says
            found += _trend(record, drift)
    if "throughput.steady" in figures:  # under a schedule the pace is that of the queries
        found += settled_found(pool, times, drifts)
    own: list[RankTimes | None] = list(times if run.driver is None else worker_times(run))
    active = set(run.active)
    others = [r for r in run.workers if r.rank not in active] + _driver(run)
    for record, t in [*zip(run.present, own, strict=True), *((each, None) for each in others)]:
        found += interference_found(record, t, scenario(run.scenario).open_loop)
    for record in [*run.left, *_driver(run)]:  # a rank without a part may lend its clock to others
        found += clock_found(run, record)
    return found + pace_found(pool, times, span, figures)


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
            f"{where(record.rank, record.host)}: batches took {abs(found.change):.1%} "
            f"{'longer' if found.change > 0 else 'less time'} in the last third of the window than "
            f"in the first ({by}), so the window averages a system that was changing",
            record.rank,
            record.host,
            effect,
            EFFECT_INVALID,
            f"give a longer --warmup; {WATCH}",
        )
    ]


def clock_found(run: Run, record: RankRecord) -> list[Finding]:
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
            f"{where(record.rank, record.host)}: exchanges with its clock contradict each other "
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


def _driver(run: Run) -> list[RankRecord]:
    """Return the driver's record, where there is one."""
    return [] if run.driver is None else [run.driver]


def interference_found(
    record: RankRecord, t: RankTimes | None = None, open_loop: bool = False
) -> list[Finding]:
    """Return the finding that a process waited for a processor.

    Under a schedule a loop is idle for much of its window. What it waited for while idle is
    lateness, which is judged as such; the rest is held against the time with work in flight.
    """
    quiet = (record.after or {}).get("quiet")
    if not quiet or quiet["run_delay_ns"] < 0 or not quiet["window_ns"]:
        return []
    waited_ns, of_ns, of = quiet["run_delay_ns"], quiet["window_ns"], "its window"
    if open_loop and t is not None:
        waited_ns = max(0, waited_ns - t.series["lateness"][2])
        of_ns = min(of_ns, t.series["batch_latency"][2])
        of = "the time that it had work in flight"
        if "query" in record.before["columns"]:  # waking for what a driver sends is in no lateness
            of_ns, of = t.series["latency"][2], "the time that its queries took"
    if of_ns <= 0:
        return []  # of a driver that was lost with all its rows: nothing was waited with
    effect = waited_ns / of_ns
    level = graded(effect)
    if level is None:
        return []
    return [
        Finding(
            level,
            "interference",
            f"{where(record.rank, record.host)}: the loop was ready to run but waited for a "
            f"processor for {effect:.1%} of {of} "
            f"({quiet['involuntary_switches']} involuntary switches)",
            record.rank,
            record.host,
            effect,
            EFFECT_INVALID,
            "stop other work on the host, or start fewer ranks or threads than it has cores",
        )
    ]
