"""``--latency-bound``: limits of the user's own on percentiles, and what a window says of them.

    15ms@p99        latency at the 99th percentile, from the scheduled instant
    ttft=500ms@p99,tpot=30ms@p99

A bound is kept only where the whole 95 % interval of the percentile lies below it, and missed only
where the whole interval lies above: a value on one side whose interval reaches across the limit
would fall on the other side in a repeat.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distbench.cli import duration_ns, nearest
from distbench.errors import UsageError
from distbench.findings import Finding
from distbench.judged import QUANTILES

SERIES = ("latency", "ttft", "tpot")
NS = 1e9


@dataclass(frozen=True)
class Bound:
    """One limit.

    Attributes:
        series: "latency", "ttft" or "tpot".
        label: of the percentile, such as "p99".
        limit_ns: what it may be at most, ns.
    """

    series: str
    label: str
    limit_ns: int

    @property
    def metric(self) -> str:
        """Name of the metric that is bounded."""
        return f"{self.series}.{self.label}"

    @property
    def quantile(self) -> float:
        """The percentile as a fraction."""
        return QUANTILES[self.label]


def parse_bounds(text: str) -> tuple[Bound, ...]:
    """Read bounds separated by commas, such as "15ms@p99,ttft=500ms@p99".

    Raises:
        UsageError: a part is no bound, or bounds one metric twice.

    Example:
        >>> parse_bounds("15ms@p99")
        (Bound(series='latency', label='p99', limit_ns=15000000),)
    """
    found = tuple(_bound(part.strip()) for part in text.split(","))
    names = [each.metric for each in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"{twice} has two bounds in {text!r}: give one")
    return found


def _bound(text: str) -> Bound:
    match = re.fullmatch(r"(?:([a-z_]+)\s*=\s*)?([^@=\s]+)\s*@\s*(\S+)", text)
    if not match:
        raise UsageError(
            f"{text!r} is no bound: write DURATION@PERCENTILE such as 15ms@p99, or ttft=500ms@p99"
        )
    name, limit, label = match.groups()
    series = name or "latency"
    if series not in SERIES:
        raise UsageError(
            f"{series!r} cannot be bounded{nearest(series, SERIES)}: {', '.join(SERIES)} can"
        )
    if label not in QUANTILES:
        raise UsageError(
            f"{label!r} is none of the percentiles {', '.join(QUANTILES)}"
            f"{nearest(label, [*QUANTILES])}"
        )
    limit_ns = duration_ns(limit)
    if limit_ns <= 0:
        raise UsageError(f"a bound of {limit} cannot be kept: give a duration above zero")
    return Bound(series, label, limit_ns)


def bounds_of(before: Mapping[str, Any]) -> tuple[Bound, ...]:
    """Return the bounds that a run was asked to keep, as rank.json has them."""
    return tuple(Bound(**each) for each in (before.get("load") or {}).get("bounds", []))


def bounds_found(
    bounds: Sequence[Bound], metrics: Mapping[str, Mapping[str, Any]]
) -> list[Finding]:
    """Return a finding for each bound that was missed, or of which the window cannot tell.

    Args:
        bounds: the user's.
        metrics: of the window.
    """
    return [found for each in bounds if (found := _judged(each, metrics.get(each.metric)))]


def _judged(bound: Bound, metric: Mapping[str, Any] | None) -> Finding | None:
    limit_s = bound.limit_ns / NS
    if metric is None or metric["value"] is None:
        return Finding(
            "undecided",
            "bound-undecided",
            f"{bound.metric} must be at most {limit_s:.6g} s, and it is not known",
            limit=limit_s,
            remedy="run longer (--duration) if too little completed, or bound what this model has",
        )
    value, low, high = metric["value"], metric["ci_low"], metric["ci_high"]
    if high is not None and high <= limit_s:
        return None
    if low is not None and low > limit_s:
        return Finding(
            "invalid",
            "bound-missed",
            f"{bound.metric} is {value:.6g} s (95 % {low:.6g} to {high:.6g} s) and must be at most "
            f"{limit_s:.6g} s",
            value=value,
            limit=limit_s,
            remedy="lower --target-qps, or give the model more batching (--max-batch) or replicas",
        )
    reach = f"its 95 % interval reaches from {low:.6g} to {high:.6g} s" if high else "no interval"
    reason = "" if high is not None else f" ({metric['reason'] or 'it does not exist'})"
    return Finding(
        "undecided",
        "bound-undecided",
        f"{bound.metric} is {value:.6g} s, must be at most {limit_s:.6g} s, and {reach}{reason}",
        value=value,
        limit=limit_s,
        remedy="run longer (--duration), or choose a rate that is not at the limit",
    )
