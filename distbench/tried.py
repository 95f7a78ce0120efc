"""What one window of a peak search shows, and what a search begins with.

A probe is judged by how many of its queries were above a limit, a confirming window by the interval
of what is bounded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distbench.bounds import Bound, bounds_found
from distbench.errors import UsageError
from distbench.search import (
    CONFIRM,
    FAIL,
    FIRST_SHARE,
    LONGEST,
    PASS,
    UNCLEAR,
    UNKNOWN,
    Outcome,
    Plan,
    judged,
    rounded,
)
from distbench.settings import Settings
from distbench.stats import least_samples

GIVEN_UP = {
    "overloaded": "given up: the queue grew without end",
    "samples-failed": "queries failed",
    "samples-missing": "queries never completed",
}
"""Findings on a window after which its latencies are those of some of its queries."""
WORDS = (PASS, UNCLEAR, FAIL, UNKNOWN)
"""Outcomes, the worst last."""
CONFIDENCE = 0.95
"""Of the intervals that a confirming window is judged by."""


@dataclass(frozen=True)
class Reading:
    """What one window shows: its outcome, and the bound that decided.

    Attributes:
        outcome: as ``search`` takes it.
        bound: the metric.
        queries: that completed.
        over: of these, above the limit.
        value: the percentile, s; None where nothing completed.
        why: what decided.
    """

    outcome: Outcome
    bound: str
    queries: int
    over: int
    value: float | None
    why: str


def plan_of(settings: Settings, rates: Sequence[float]) -> Plan:
    """Return the plan of a search, from what was asked and the warm-up rates of all ranks.

    Raises:
        UsageError: the longest probe would have too few queries; all ranks raise it alike.
    """
    load = settings.load
    assert load is not None
    plan = Plan(
        first_qps=rounded(FIRST_SHARE * sum(rates)),
        probe_ns=load.probe_ns,
        duration_ns=settings.duration_ns,
        quantiles=tuple(each.quantile for each in load.bounds),
        replicas=len(rates),
        limit_ns=max(each.limit_ns for each in load.bounds),
    )
    if plan.first_qps < plan.lowest_qps:
        longest_s = LONGEST * plan.probe_ns / 1e9
        error = UsageError(
            f"the search would begin at {plan.first_qps:g} queries/s, of which the longest probe, "
            f"{longest_s:g} s, has too few to judge: give --probe "
            f"{plan.probe_ns / 1e9 * plan.lowest_qps / plan.first_qps:.2g}s or longer"
        )
        error.agreed = True
        raise error
    return plan


def reading(result: Mapping[str, Any], kind: str) -> Reading:
    """Return what a window shows of the bounds; of several the one that fares worst decides.

    Args:
        result: of the window.
        kind: whether it is a probe, judged by its counts, or confirms, judged by its intervals.
    """
    codes = {found["code"] for found in result["verdict"]["findings"]}
    gone = next((why for code, why in GIVEN_UP.items() if code in codes), "")
    bounds = [Bound(**each) for each in result["window"]["load"]["bounds"]]
    every = []
    for bound, row in zip(bounds, result["tables"]["bounds"]["rows"], strict=True):
        _, limit_s, queries, over, _ = row
        if kind == CONFIRM:
            word, kept, why = _confirmed(bound, queries, result["metrics"])
        else:
            word, kept, why = judged(queries, over, bound.quantile)
        if gone:
            word, kept, why = FAIL, False, gone
        known = result["metrics"].get(bound.metric) or {}
        resolved = kind != CONFIRM or known.get("ci_high") is not None
        few = kind == CONFIRM and 0 < queries < least_samples(bound.quantile, CONFIDENCE)
        outcome = Outcome(word, kept, resolved, few and not gone)
        every.append(
            (Reading(outcome, bound.metric, queries, over, known.get("value"), why), limit_s)
        )
    worst, _ = max(
        every, key=lambda each: (WORDS.index(each[0].outcome.word), (each[0].value or 0) / each[1])
    )
    whole = Outcome(
        worst.outcome.word,
        all(each.outcome.kept for each, _ in every),
        all(each.outcome.resolved for each, _ in every),
        any(each.outcome.hopeless for each, _ in every),
    )
    return Reading(whole, worst.bound, worst.queries, worst.over, worst.value, worst.why)


def _confirmed(
    bound: Bound, queries: int, metrics: Mapping[str, Mapping[str, Any]]
) -> tuple[str, bool, str]:
    """Judge one bound by its interval, which knows of the memory between queries."""
    if queries == 0:
        return UNKNOWN, False, "no query has this time"
    found, limit_s = metrics[bound.metric], bound.limit_ns / 1e9
    kept = found["value"] is not None and found["value"] <= limit_s
    told = bounds_found([bound], metrics)
    if not told:
        return PASS, kept, f"95 % interval up to {found['ci_high']:.4g} s"
    if found["ci_high"] is None:
        return UNCLEAR, kept, "no interval: run longer"
    shown = f"95 % interval {found['ci_low']:.4g} to {found['ci_high']:.4g} s"
    return (FAIL if told[0].level == "invalid" else UNCLEAR), kept, shown
