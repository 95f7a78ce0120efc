"""MLPerf's early stopping: how many queries a number of slow ones takes, and the estimates.

A run may end early if a system that just misses its percentile would have looked as good with a
probability below 0.01. LoadGen computes the same with a series in double precision; the tests hold
both together.

Source: MLPerf inference rules, "Early Stopping"; mlcommons/inference, loadgen/early_stopping.cc and
results.cc, in mlcommons-loadgen 5.0.13 and 6.0.17.
"""

from __future__ import annotations

import math

import numpy as np

CHANCE = 1 - 0.99
"""Early stopping's chance of passing a system that misses its percentile; C++'s own 1 - 0.99."""


def least_queries(percentile: float, over: int) -> int:
    """Return how many queries a run with ``over`` slow ones needs to pass early stopping.

    That is h + t, where t = ``over`` and h is the smallest number of fast queries for which a
    system that is just too slow, P(slow) = 1 - percentile, would show t or fewer slow ones among
    h + t with a probability below 0.01.

    Args:
        percentile: in (0, 1), such as 0.99.
        over: queries above the latency limit, at least 0.

    Raises:
        ValueError: an argument is out of range.

    Source:
        MLPerf inference rules, "Early Stopping"; loadgen/early_stopping.cc.

    Example:
        >>> [least_queries(0.99, t) for t in (0, 1, 2)]
        [459, 662, 838]
    """
    if not 0 < percentile < 1 or over < 0:
        raise ValueError(f"{over} slow queries at the percentile {percentile}")
    # At the mean the probability is about one half: too few.
    low, step = int(over * percentile / (1 - percentile)), 64
    while not _passes(low + step, over, percentile):
        step *= 2
    high = low + step
    while high - low > 1:
        middle = (low + high) // 2
        if _passes(middle, over, percentile):
            high = middle
        else:
            low = middle
    return high + over


def over_allowed(queries: int, percentile: float) -> int | None:
    """Return how many slow queries a run may have and still pass early stopping.

    Args:
        queries: of the run.
        percentile: in (0, 1).

    Returns:
        The largest t with ``least_queries(percentile, t) <= queries``; None if not even 0 passes.
    """
    if queries < least_queries(percentile, 0):
        return None
    low, high = 0, int(queries * (1 - percentile)) + 2
    while high - low > 1:
        middle = (low + high) // 2
        if _passes(queries - middle, middle, percentile):
            low = middle
        else:
            high = middle
    return low


def _passes(fast: int, over: int, percentile: float) -> bool:
    """Say whether P[Binomial(fast + over, 1 - percentile) <= over] is below ``CHANCE``."""
    if fast < 1:
        return False
    # The largest term, and the others as multiples of it; those left out are below exp(-50).
    terms = np.arange(min(over, int(10 * math.sqrt(over)) + 50), dtype=np.float64)
    ratio = (over - terms) / (fast + 1 + terms) * (percentile / (1 - percentile))
    total = 1.0 + float(np.cumprod(ratio).sum())
    return math.exp(_log_binomial(fast, over, percentile)) * total < CHANCE


def _log_binomial(fast: int, over: int, percentile: float) -> float:
    """Return the log of P[Binomial(fast + over, 1 - percentile) = over].

    Through deviances and Stirling's series: the log gamma function of 1e7 alone is off by 1e-8,
    which for one in a thousand counts moves the result by one query.

    Source: Loader, "Fast and accurate computation of binomial probabilities" (2000); the series:
    DLMF 5.11.1.
    """
    if over == 0:
        return fast * math.log(percentile)
    n, slow = fast + over, 1 - percentile
    found = _stirling_error(n) - _stirling_error(over) - _stirling_error(fast)
    found -= _deviance(over, n * slow) + _deviance(fast, n * percentile)
    return found + 0.5 * math.log(n / (2 * math.pi * over * fast))


def _stirling_error(n: int) -> float:
    if n < 16:
        return math.lgamma(n + 1) - (n + 0.5) * math.log(n) + n - 0.5 * math.log(2 * math.pi)
    square = float(n) * n
    return (1 / 12 - (1 / 360 - (1 / 1260 - 1 / 1680 / square) / square) / square) / n


def _deviance(x: float, mean: float) -> float:
    return x * math.log1p((x - mean) / mean) - (x - mean)
