"""Intervals of percentiles that hold when neighbouring samples are alike.

Independent samples have an exact interval between two order statistics (``order_ranks``). Measured
ones seldom are independent: a queue remembers, a GPU throttles. So every rank cuts its series, in
the order of time, into equal batches and counts in each the share at or below a threshold. How far
these shares vary, and for how long they remember, says how many independent samples a run is worth
(``inflation``). Ranks exchange only the shares and order statistics. An interval that would not
exist for so few independent samples is refused: "not resolvable: run longer".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distbench.student import normal_quantile, t_quantile

BATCHES, BATCHES_LEAST, BATCH_SAMPLES = 256, 16, 4
"""Batches of a rank's series at most and at least, and how many samples one has at least."""
GUARDS = (0.5, 0.9)
"""Quantiles below the wanted one whose memory counts too when it is asked whether one exists.

A tail of few samples shows its own memory badly; the body of the distribution shows it well.
"""
GATE_CAUTION, UPPER_CAUTION = 10.0, 20.0
"""Factors of 1/sqrt(effective n): how much more the excess of a measured inflation counts.

A run that by chance met few bursts has a percentile that is too low *and* an inflation that is too
low, so that a rule which looks at the inflation alone would print intervals for just those runs.
Hence caution in whether an interval exists, and more in how far up it reaches; both vanish for
independent samples and in long runs. Simulated for an M/D/1 queue at load 0.9, n = 4,000, p90: of
the nominal 95 % intervals that are printed 87 % cover with 0 and 0, and 95 % with 10 and 20.
"""
BURST_CAUTION = 20.0
"""Factor of 1/stretches: how much more the excess counts for the upper limit where few stretches
carry it. Of a handful of bursts a run meets one more or one less, whatever its effective n says.

Simulated with 5 % of 8,000 values three times slower, in bursts of 50 on the average: of the
intervals of p90 89 % cover with 0, and 95 % with 20.
"""
METHOD = "{:.0%} interval between order statistics, effective n from batch shares"


@dataclass(frozen=True)
class Interval:
    """A confidence interval, or why there is none.

    Attributes:
        low: lower limit, in the unit of what was measured, as ``high``; None without an interval.
        n: how many values it rests on.
        n_eff: how many independent ones those are worth; None where that cannot be told.
        method: how it was computed.
        reason: why there is none; "" where there is one.
    """

    low: float | None
    high: float | None
    n: int
    n_eff: float | None
    method: str
    reason: str = ""


@dataclass(frozen=True)
class Ranks:
    """Between which order statistics a percentile lies, or why that cannot be said.

    Attributes:
        low: zero-based position in the sorted samples, as ``high``; None without an interval.
        n_eff: how many independent samples the run is worth; without an interval, by the worth
            that refused it.
        reason: why there is no interval; "" where there is one.
    """

    low: int | None
    high: int | None
    n_eff: float
    reason: str = ""


def least_samples(q: float, conf: float) -> int:
    """Return how many independent samples a finite two-sided interval needs.

    With fewer even the largest (or smallest) is not surely beyond the quantile: q^n is too likely.

    Args:
        q: the quantile, in (0, 1).
        conf: two-sided confidence, in (0, 1).

    Example:
        >>> [least_samples(q, 0.95) for q in (0.5, 0.9, 0.95, 0.99, 0.999)]
        [6, 36, 72, 368, 3688]
    """
    return math.ceil(math.log((1 - conf) / 2) / math.log(max(q, 1 - q)))


def order_ranks(n: int, q: float, conf: float) -> tuple[int, int] | None:
    """Return the order statistics between which the q-quantile lies, for independent samples.

    Exact: of n samples B ~ binomial(n, q) are at or below the quantile, whatever the distribution.
    Each limit, sorted[low] and sorted[high], is passed with a probability of at most
    (1 - conf) / 2. LoadGen's percentile, sorted[int(n*q)], is between them.

    Args:
        n: samples, up to 1e10 and more.
        q: the quantile, in (0, 1).
        conf: two-sided confidence, in (0, 1).

    Returns:
        Zero-based positions, as ``scipy.stats.quantile_test`` has them; None where n is too small.

    Raises:
        ValueError: an argument is out of its range.

    Source:
        Conover, Practical Nonparametric Statistics, 3rd ed. (1999), section 3.2.
    """
    if n < 1 or not 0 < q < 1 or not 0 < conf < 1:
        raise ValueError(f"no interval for n = {n}, q = {q}, conf = {conf}")
    low, high = _binomial_ranks(n, q, (1 - conf) / 2)
    return (low, high) if low >= 0 and high < n else None


def _binomial_ranks(n: int, q: float, tail: float) -> tuple[int, int]:
    """Return the limits of ``order_ranks``; -1 and n where one does not exist."""
    # Where a limit exists at all, what lies farther out is less than any tail of a double.
    reach = 12 * math.sqrt(n * q * (1 - q)) + 12
    first, last = max(0, math.floor(n * q - reach)), min(n, math.ceil(n * q + reach))
    k = np.arange(first, last, dtype=np.float64)
    steps = np.log((n - k) / (k + 1)) + math.log(q / (1 - q))
    logs = np.concatenate([[0.0], np.cumsum(steps)])
    mass = np.exp(logs - logs.max())
    mass /= mass.sum()
    below = np.cumsum(mass)
    above = np.concatenate([np.cumsum(mass[::-1])[::-1][1:], [0.0]])
    return first + int(np.searchsorted(below, tail)) - 1, first + int(np.argmax(above <= tail))


def guards(q: float) -> tuple[float, ...]:
    """Return the quantiles whose inflation decides on an interval of q: some below it, and q."""
    return (*(guard for guard in GUARDS if guard < q), q)


def batch_count(sizes: Sequence[int]) -> int:
    """Return into how many batches every rank cuts its series; 0 where a size is too small."""
    batches = BATCHES
    while batches * BATCH_SAMPLES > min(sizes, default=0):
        batches //= 2
        if batches < BATCHES_LEAST:
            return 0
    return batches


def batch_shares(series: NDArray[np.int64], threshold: int, batches: int) -> NDArray[np.float64]:
    """Return the share of values at or below a threshold in each batch of one rank's series.

    Args:
        series: shape (n,), int64, in the order of time; n at least ``batches``.
        threshold: in the unit of the series.
        batches: from ``batch_count``, the same for all ranks.

    Returns:
        Shape (batches,), float64, in [0, 1].
    """
    edges = np.arange(batches + 1) * len(series) // batches
    counts = np.add.reduceat(series <= threshold, edges[:-1], dtype=np.int64)
    return np.asarray(counts / np.diff(edges))


@dataclass(frozen=True)
class Memory:
    """What neighbouring samples of a run have in common, at one threshold.

    Attributes:
        inflation: by how much the variance of a pooled share exceeds that of independent samples,
            1 or more: n samples are worth n / inflation.
        stretches: how many stretches of the run carry that variance: the square of a sum of squares
            over the sum of fourth powers. Of k equal bursts k, of k normal values a third of it.
    """

    inflation: float
    stretches: float


def inflation(
    shares: Sequence[NDArray[np.float64]], sizes: Sequence[int], conf: float = 0.95
) -> float:
    """Return ``memory``'s inflation."""
    return memory(shares, sizes, conf).inflation


def memory(
    shares: Sequence[NDArray[np.float64]], sizes: Sequence[int], conf: float = 0.95
) -> Memory:
    """Measure how alike neighbouring samples are.

    The variance comes from the batches within each rank, so that ranks which merely differ do not
    look like memory. Ranks may be slow together, so it is computed from the sum over ranks too,
    batch by batch (those of one number cover about the same time), and the larger counts. With
    it goes the square of Student's over the normal quantile, for the batches that memory leaves.

    Args:
        shares: from ``batch_shares``, one for each rank, of one threshold.
        sizes: samples of each rank, in the same order.
        conf: two-sided confidence that Student's factor is for.

    Source:
        batch means of the indicator: Heidelberger and Lewis, Operations Research 32 (1984).
    """
    table = np.stack(shares)
    weights = np.asarray(sizes, np.float64)[:, None] / sum(sizes)
    share = float(np.sum(weights[:, 0] * table.mean(axis=1)))
    if not 0 < share < 1:
        return Memory(1.0, math.inf)
    parts = weights * (table - table.mean(axis=1, keepdims=True))
    variances = [_long_run(parts, conf)]
    if len(shares) > 1:
        variances.append(_long_run(parts.sum(axis=0, keepdims=True), conf))
    variance, stretches = max(variances)
    inflated = variance * sum(sizes) / table.shape[1] / (share * (1 - share))
    return Memory(max(1.0, float(inflated)), stretches)


def _long_run(parts: NDArray[np.float64], conf: float) -> tuple[float, float]:
    """Return the sum of all autocovariances of independent series, with Student's factor squared.

    With it goes how many stretches, each as long as the memory, carry the variance.

    Pairs of autocovariances are added while they exceed what independent batches would show by
    chance, and never more than the pair before.

    Args:
        parts: shape (series, batches), each row of mean 0.
        conf: see ``inflation``.

    Source:
        initial monotone sequence: Geyer, Statistical Science 7 (1992), section 3.3.
    """
    batches = parts.shape[1]
    own = (parts * parts).mean(axis=1)
    if not own.any():
        return 0.0, math.inf
    power = (np.abs(np.fft.rfft(parts, 2 * batches)) ** 2).sum(axis=0)
    covariances = np.fft.irfft(power)[:batches] / batches
    streams = float(own.sum() ** 2 / np.sum(own * own))
    chance = covariances[0] * math.sqrt(2 / (batches * streams))
    total, pairs, last = -float(covariances[0]), 0, math.inf
    for pair in (covariances[0::2] + covariances[1::2]).tolist():
        if pairs and pair <= chance:
            break
        last = min(last, pair)
        total, pairs = total + 2 * last, pairs + 1
    spanned = 2 * pairs - 1
    # Taking off the mean takes off this part of every autocovariance that was added.
    total /= 1 - min(0.9, spanned / batches)
    p = (1 + conf) / 2
    student = t_quantile(p, max(2.0, streams * batches / spanned)) / normal_quantile(p)
    length = min(spanned, batches // 4)
    whole = parts[:, : batches // length * length]
    squares = whole.reshape(len(parts), -1, length).sum(axis=2) ** 2
    power4 = float(np.sum(squares**2))
    stretches = float(squares.sum() ** 2) / power4 if power4 > 0 else math.inf
    return float(max(0.0, total) * student**2), stretches


def quantile_ranks(
    n: int,
    q: float,
    own: float,
    worst: float,
    conf: float = 0.95,
    stretches: float = math.inf,
) -> Ranks:
    """Return between which order statistics of all ranks' samples a percentile lies.

    The binomial ranks for n / inflation samples, scaled to n, the upper one with ``UPPER_CAUTION``
    and ``BURST_CAUTION``.

    Args:
        n: samples of all ranks.
        q: the quantile, in (0, 1).
        own: ``inflation`` at the percentile.
        worst: the largest inflation at any of ``guards(q)``.
        conf: two-sided confidence.
        stretches: how many carry ``own``.

    Returns:
        The ranks. ``n_eff`` of a refused interval is what refused it: by the worst inflation, with
        ``GATE_CAUTION``.
    """
    worth = _worth(n, worst, GATE_CAUTION)
    if worth < least_samples(q, conf):
        return Ranks(None, None, worth, _not_resolvable(n, q, worst, conf))
    tail, n_eff = (1 - conf) / 2, n / own
    lower, upper = int(n_eff), int(_worth(n, own, UPPER_CAUTION, BURST_CAUTION / stretches))
    low = _binomial_ranks(lower, q, tail)[0] * n // lower
    high = -(-(_binomial_ranks(upper, q, tail)[1] + 1) * n // upper) - 1
    return Ranks(low, min(high, n - 1), n_eff)


def _worth(n: float, inflated: float, caution: float, more: float = 0.0) -> float:
    """Return how many independent samples n are worth, by a cautious inflation; at least 1."""
    excess = (inflated - 1) * (1 + caution / math.sqrt(n / inflated) + more)
    return max(1.0, n / (1 + excess))


def _not_resolvable(n: int, q: float, worst: float, conf: float) -> str:
    """Say what a run lacks for an interval, and how much longer it would have to be."""
    need, times = least_samples(q, conf), 1.1
    while _worth(n * times, worst, GATE_CAUTION) < need:
        times *= 1.05
    return (
        f"not resolvable: run longer, about {times:.1f} times or more; {n} samples are worth "
        f"{_worth(n, worst, GATE_CAUTION):.0f} independent ones, and p{100 * q:g} needs {need}"
    )


def quantile_interval(parts: Sequence[NDArray[np.int64]], q: float, conf: float = 0.95) -> Interval:
    """Return the interval of a percentile over all ranks' samples, all in one place.

    Args:
        parts: one array for each rank, int64, in the order of time; empty ones count for nothing.
        q: the quantile, in (0, 1); the percentile is LoadGen's, sorted[int(n*q)].
        conf: two-sided confidence.
    """
    parts = [part for part in parts if len(part)]
    sizes = [len(part) for part in parts]
    n, method = sum(sizes), METHOD.format(conf)
    batches = batch_count(sizes)
    if batches == 0:
        need = BATCHES_LEAST * BATCH_SAMPLES
        reason = f"not resolvable: run longer, {need} samples on each rank at the least"
        return Interval(None, None, n, None, method, reason)
    ordered = np.sort(np.concatenate(parts))
    found = []
    for guard in guards(q):
        threshold = int(ordered[int(n * guard)])
        if threshold == ordered[-1]:  # all would be at or below it
            threshold -= 1
        found.append(memory([batch_shares(x, threshold, batches) for x in parts], sizes, conf))
    own, worst = found[-1], max(each.inflation for each in found)
    ranks = quantile_ranks(n, q, own.inflation, worst, conf, own.stretches)
    if ranks.low is None or ranks.high is None:
        return Interval(None, None, n, ranks.n_eff, method, ranks.reason)
    low, high = int(ordered[ranks.low]), int(ordered[ranks.high])
    return Interval(low, high, n, ranks.n_eff, method)
