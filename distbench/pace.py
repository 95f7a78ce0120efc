"""Run -> findings on the pace: the start, lateness, what the harness took, how long the window was.

An effect is held against what the scenario judges: a share of the window where that is throughput,
a share of the latency where it is a latency, which one clock alone measures.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distbench import metrics as m
from distbench.bounds import bounds_of
from distbench.findings import EFFECT_INVALID, Finding, graded
from distbench.metrics import harness
from distbench.pool import Pool
from distbench.run import Run
from distbench.scenarios import Scenario, scenario
from distbench.times import LATE_NS, Makespan, RankTimes

BRIEF_NS = 100_000_000
"""Of a shorter window one slice of the scheduler, some ms, is several per cent."""
LAUNCH_BOUND_BUSY = 0.70
"""A device that computed for less of the window than this waited for its host."""
WINDOW_SHORT = 0.5
"""A window below this share of --duration: the warm-up rate was not the window's rate."""


def pace_found(
    pool: Pool, times: list[RankTimes], span: Makespan, figures: Mapping[str, Mapping[str, Any]]
) -> list[Finding]:
    """Return all findings on the pace of a run.

    Args:
        pool: how to reach the samples; every rank makes the same calls of it.
        times: of all ranks.
        span: their makespan.
        figures: the run's metrics.
    """
    run, kind = pool.run, scenario(pool.run.scenario)
    found: list[Finding] = []
    if kind.open_loop:
        found += _overloaded(run, times) + _lateness(pool, times)
    if kind.headline != "throughput":
        found += _cost_of_latency(run, figures)
    if not span.value_ns:
        return found
    if run.driver is None:  # else queries wait for a late rank, and their latencies tell
        found += _start_late(run, times, span.value_ns)
    if kind.headline == "throughput":
        found += _clock_bound(span) + _cost_of_time(run, times, span.value_ns)
    if kind.open_loop or run.driver is not None:  # LoadGen says how long its run was
        return found
    found += _issue_late(run, times, span)
    return found + _window(run, span) + _launch_bound(run, times, span, kind)


def _overloaded(run: Run, times: list[RankTimes]) -> list[Finding]:
    """Return the finding that a window was given up: what was offered is more than is completed."""
    halted = [r for r in run.official if (r.after or {}).get("halted")]
    if not halted:
        return []
    load, made = run.first.before["load"], run.first.before["schedule"]
    rates = [
        t.ok / (t.finished_ns - t.scheduled_ns) * m.NS
        for t in times
        if t.finished_ns is not None and t.scheduled_ns is not None
    ]
    capacity_qps = sum(rates)
    waiting = (
        "due and not done on one replica" if run.driver is None else "outstanding at every replica"
    )
    return [
        Finding(
            "invalid",
            "overloaded",
            f"{load['target_qps']:g} queries/s were offered and {capacity_qps:.4g} completed, so "
            f"that more than {made['backlog']} were {waiting}: the window was given up with "
            f"{sum(t.pending for t in times):,} of {made['queries']:,} queries left",
            value=capacity_qps,
            limit=load["target_qps"],
            remedy="offer less than what is completed (--target-qps), let groups be larger "
            "(--max-batch), or use more replicas",
        )
    ]


def _start_late(run: Run, times: list[RankTimes], span_ns: int) -> list[Finding]:
    """Return the finding that loops began late, which latencies from a schedule contain.

    What came due meanwhile is late by up to as much. As a share of the window that is an effect on
    throughput; on a percentile it is one as a share of the queries beyond it.
    """
    start = m.start_section(run, times)
    if not start["late_ranks"]:
        return []
    worst = max(x for x in start["lateness_s"] if x is not None)
    effect, of = worst * m.NS / span_ns, "the window"
    if scenario(run.scenario).open_loop:
        beyond = 1 - max(quantile for _, _, quantile in judged_of(run))
        effect, of = effect / beyond, f"the {beyond:.3g} of the queries that decide"
    who = ", ".join(str(r) for r in start["late_ranks"][:8])
    return [
        Finding(
            "invalid" if effect > EFFECT_INVALID else "doubtful",
            "start-late",
            f"rank {who} began up to {worst * 1e3:.3f} ms after the agreed instant "
            f"({effect:.2%} of {of}, after {start['attempts']} attempts)",
            start["late_ranks"][0],
            "",
            worst,
            LATE_NS / m.NS,
            "stop other work on the host; with more ranks than cores use fewer ranks",
        )
    ]


def judged_of(run: Run) -> list[tuple[str, str, float]]:
    """Return the latencies that are judged: name of the metric, its series, the percentile.

    Those that the user bounded, else what the scenario judges.
    """
    kind, bounds = scenario(run.scenario), bounds_of(run.first.before)
    if bounds:
        return [(each.metric, each.series, each.quantile) for each in bounds]
    return [(kind.headline, "latency", kind.percentile)]


def _clock_bound(span: Makespan) -> list[Finding]:
    effect = (span.bound_ns or 0) / (span.value_ns or 1)
    level = graded(effect)
    if level is None:
        return []
    return [
        Finding(
            level,
            "clock-bound",
            f"the makespan is known to +-{(span.bound_ns or 0) / 1e3:.1f} us only "
            f"({effect:.2%} of it)",
            value=effect,
            limit=EFFECT_INVALID,
            remedy="measure for longer (--duration), or mend the network's latency",
        )
    ]


def _cost_of_time(run: Run, times: list[RankTimes], span_ns: int) -> list[Finding]:
    """Return the finding that the harness took a part of the window."""
    batches = max((t.groups for t in times), default=0)
    effect = harness(run)["cost_per_batch_s"] * m.NS * batches / span_ns
    level = graded(effect)
    if level is None:
        return []
    return [
        Finding(
            level,
            "harness-cost",
            f"the loop over a SUT that does nothing takes {effect:.1%} of this window's time "
            f"({batches} batches on the busiest rank)",
            value=effect,
            limit=EFFECT_INVALID,
            remedy="use a larger --batch-size, or a model that does some work",
        )
    ]


def _cost_of_latency(run: Run, figures: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """Return the finding that the harness took a part of a latency that is judged."""
    cost_s = harness(run)["cost_per_batch_s"]
    values = {name: figures[name]["value"] for name, _, _ in judged_of(run) if name in figures}
    effects = {name: cost_s / value for name, value in values.items() if value}
    name = max(effects, key=lambda name: effects[name], default="")
    level = graded(effects.get(name, 0.0))
    if level is None:
        return []
    return [
        Finding(
            level,
            "harness-cost",
            f"the loop over a SUT that does nothing takes {cost_s * 1e6:.2f} us for a group, "
            f"{effects[name]:.1%} of {name}",
            value=effects[name],
            limit=EFFECT_INVALID,
            remedy="measure a model that does some work: this latency is partly the harness's own",
        )
    ]


IN_TIME = {"latency": "in_time", "ttft": "ttft_in_time"}
"""Series of the same latencies, each less its own query's lateness."""


def _lateness(pool: Pool, times: list[RankTimes]) -> list[Finding]:
    """Return the findings that a judged latency would have been lower, had the harness kept time.

    Every latency counts from its schedule, so what the harness was late is in it. The judged
    percentile is taken once more of the latencies without their own lateness; later queries of a
    queue would have gained from earlier ones too, so this is the least that is the harness's.
    """
    found = []
    for name, series, quantile in judged_of(pool.run):
        n = sum(t.series.get(series, (0, 0, 0))[0] for t in times)
        if n == 0 or series not in IN_TIME:
            continue
        place = int(n * quantile)
        (with_it,), (without,) = (
            pool.order(series, [place]),
            pool.order(IN_TIME[series], [place]),
        )
        effect = (with_it - without) / with_it if with_it else 0.0
        level = graded(effect)
        if level is not None:
            found.append(_late(level, name, with_it, without, effect))
    return found


def _late(level: str, name: str, with_ns: int, without_ns: int, effect: float) -> Finding:
    return Finding(
        level,
        "issue-lateness",
        f"{name} is {with_ns / 1e6:.4g} ms, and {without_ns / 1e6:.4g} ms had every query been "
        f"issued when it was ready: {effect:.1%} of it is the harness's lateness",
        value=effect,
        limit=EFFECT_INVALID,
        remedy="leave a processor free for each rank's loop, and one for the driver of central "
        "dispatch, stop other work on the host, or lower --target-qps",
    )


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


def _launch_bound(
    run: Run, times: list[RankTimes], span: Makespan, kind: Scenario
) -> list[Finding]:
    found = []
    remedy = "use a larger --batch-size, or an engine with fewer launches"
    if kind.stream:  # whose queries are of one size
        remedy = "use an engine with fewer launches"
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
                    remedy,
                )
            )
    return found
