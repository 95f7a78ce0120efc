"""What repeated launches say: their spread, the difference of two sides, how many are needed.

All on the logarithms of a metric, so that a difference is a ratio.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from distbench.run import JUDGED_BY_ALL
from distbench.student import normal_quantile, t_quantile

CONFIDENCE, POWER = 0.95, 0.8
MOST_LAUNCHES = 1_000
"""An estimate above it only says that nobody will run so many."""
LEAST, BETTER = 2, 5
"""Launches a side: without a second there is no variance; five tell it within a factor of 3."""
FACTORS = {2: 10.392, 3: 4.2957, 4: 3.5548, 5: 3.2956, 6: 3.1669}
"""Difference of two means in units of its standard error that Welch's test at 5 % finds with 80 %
power, by launches a side, equal variances. Integrated over the ratio of the two sample variances,
on which Welch's degrees of freedom depend; the plain formula of ``detectable`` says 5.36 for 2."""
NOT_RECOMPUTED = (
    "figures of launches whose samples stay on their ranks are those that all ranks judged "
    "together: they are not recomputed here"
)


def not_recomputed(result: dict[str, Any]) -> bool:
    """Tell whether a result was taken as it was judged, since not all samples are here."""
    return any(found["code"] == JUDGED_BY_ALL for found in result["verdict"]["findings"])


@dataclass(frozen=True)
class Spread:
    """How far launches of one thing fall apart.

    Attributes:
        launches: their number.
        mean: geometric mean of the metric.
        between: standard deviation between launches, as a fraction; None from a single launch.
        low: of its 95 % interval.
        high: of the interval.
        within: standard error of one launch's figure by its own interval, as a fraction, the
            median over launches; None without such intervals.
        reason: why ``within`` is None.
    """

    launches: int
    mean: float
    between: float | None
    low: float | None
    high: float | None
    within: float | None
    reason: str


def welch(base: Sequence[float], new: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Return the difference of two means, its 95 % half-width and the degrees of freedom.

    Args:
        base: values of one side.
        new: of the other.

    Returns:
        mean(new) - mean(base); None for the others where a side has a single value. Where no value
        of either side differs from its mean, the half-width is 0.

    Source:
        Welch, "The generalization of 'Student's' problem when several different population
        variances are involved", Biometrika 34 (1947); degrees of freedom by Satterthwaite (1946).
    """
    n, m = len(base), len(new)
    change = math.fsum(new) / m - math.fsum(base) / n
    if min(n, m) < LEAST:
        return change, None, None
    a, b = variance(base) / n, variance(new) / m
    if a + b == 0:
        return change, 0.0, float(n + m - 2)
    df = (a + b) ** 2 / (a * a / (n - 1) + b * b / (m - 1))
    return change, t_quantile((1 + CONFIDENCE) / 2, df) * math.sqrt(a + b), df


def detectable(spread: float, launches: int) -> float:
    """Return the smallest difference that so many launches a side find with 80 % power at 5 %.

    (t(0.975, 2k-2) + t(0.8, 2k-2)) * spread * sqrt(2 / k) for k launches a side, which is within
    1.3 % of the exact value from k = 7 on; below, the exact ``FACTORS``.

    Args:
        spread: standard deviation between launches.
        launches: of each side, at least 2.
    """
    df = 2 * launches - 2
    factor = FACTORS.get(launches)
    if factor is None:
        factor = t_quantile((1 + CONFIDENCE) / 2, df) + t_quantile(POWER, df)
    return factor * spread * math.sqrt(2 / launches)


def launches_needed(spread: float, difference: float) -> int | None:
    """Return the launches a side for which ``detectable`` is at most ``difference``.

    None where that is more than ``MOST_LAUNCHES``.
    """
    low, high = LEAST, MOST_LAUNCHES + 1
    while low < high:
        middle = (low + high) // 2
        if detectable(spread, middle) <= difference:
            high = middle
        else:
            low = middle + 1
    return low if low <= MOST_LAUNCHES else None


def variance(values: Sequence[float]) -> float:
    """Return the sample variance of two values or more."""
    mean = math.fsum(values) / len(values)
    return math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)


def spread_interval(spread: float, launches: int) -> tuple[float, float]:
    """Return the 95 % interval of a standard deviation that so many launches gave.

    sqrt((n-1) s^2 / chi2(p, n-1)) for p = 0.975 and 0.025, the launches being normal.

    Args:
        spread: sample standard deviation.
        launches: at least 2.
    """
    df = launches - 1
    tail = (1 - CONFIDENCE) / 2
    low, high = (spread * math.sqrt(df / chi2_quantile(p, df)) for p in (1 - tail, tail))
    return low, high


def chi2_quantile(p: float, df: float) -> float:
    """Return a quantile of chi-squared, by bisection on its logarithm.

    Args:
        p: probability, in (0, 1).
        df: degrees of freedom, above 0.

    Source:
        the distribution as the regularized lower incomplete gamma function of df/2 and x/2 by its
        series, DLMF 8.7.1.
    """

    def below(x: float) -> float:
        term = total = 1.0
        for k in range(1, 100_000):
            term *= x / 2 / (df / 2 + k)
            total += term
            if term < 1e-17 * total:
                break
        log_front = df / 2 * math.log(x / 2) - x / 2 - math.lgamma(df / 2 + 1)
        return math.exp(log_front + math.log(total))

    # Ten standard deviations above the mean, and more where there are few degrees of freedom.
    low, high = -700.0, math.log(df + 10 * math.sqrt(2 * df) + 100)
    for _ in range(200):
        middle = (low + high) / 2
        if below(math.exp(middle)) < p:
            low = middle
        else:
            high = middle
    return math.exp(low)


def spread(launches: Sequence[dict[str, Any]], metric: str) -> Spread:
    """Return how far launches of one thing fall apart in a metric.

    Args:
        launches: results or excerpts, all with a value above 0.
        metric: its name; the interval within a launch is that of METRIC.steady, or else its own.
    """
    logs = [math.log(launch["metrics"][metric]["value"]) for launch in launches]
    between = low = high = None
    if len(logs) >= LEAST:
        between = math.sqrt(variance(logs))
        low, high = spread_interval(between, len(logs))
    within, reason = _within(launches, metric)
    mean = math.exp(math.fsum(logs) / len(logs))
    return Spread(len(logs), mean, between, low, high, within, reason)


def _within(launches: Sequence[dict[str, Any]], metric: str) -> tuple[float | None, str]:
    """Return the standard error that a launch gives its own figure, or why there is none."""
    reason = ""
    for name in (f"{metric}.steady", metric):
        found = [launch["metrics"].get(name) for launch in launches]
        known = [each for each in found if each and each["value"] and each["ci_low"] is not None]
        if len(known) == len(found):
            wide = 2 * normal_quantile((1 + CONFIDENCE) / 2)
            return median((e["ci_high"] - e["ci_low"]) / wide / e["value"] for e in known), ""
        absent = next((each for each in found if each and each["ci_low"] is None), None)
        reason = reason or (absent or {}).get("reason", "")
    return None, reason or f"{metric} has no interval"
