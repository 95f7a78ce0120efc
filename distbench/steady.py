"""Is a run steady, and how well is its rate known: warm-up cut, trend, intervals of a rate.

All of it works on one series in the order of time, or on counts per equal slot of the common clock.
Nothing here touches ``throughput`` or a figure of MLPerf: those take the whole window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from numpy.typing import NDArray

from distbench.stats import Interval
from distbench.student import normal_quantile, t_quantile

Floats = NDArray[np.float64]

GROUP = 5
"""Values whose median is one point of the warm-up cut: one spike among them does not move it."""
WARMUP_POINTS = 20
"""Fewer points than this say nothing of a warm-up."""
CLIP_SPREADS = 4.0
"""Points are clipped so many robust standard deviations around the end's median.

A burst of spikes then weighs little, while a warm-up, which is many points, still stands out.
"""
GAIN = 0.9
"""A cut must lower the squared standard error of the mean by this factor, or nothing is cut.

Without it chance cuts into short steady series: more than 5 % was cut from 6 in 100 of 500 values.
"""
TREND_POINTS, TREND_LEAST = 60, 10
"""Medians that a trend is sought in, at most and at least; each of 5 values or more."""
THIRDS_LEAST = 24
"""Fewer medians, 8 a third, do not tell their own memory."""
TREND_P = 1e-3
"""A trend must be less likely than this by chance: a run tests every rank."""
ERRORS_REAL, ERRORS_MOST = 15.0, 1e6
"""Standard errors that two parts of a series must lie apart to be called different; the most told.

Few points show their memory badly, hence so many. Simulated, 1,000 runs each of 200 to 5,000
values: independent ones, spikes, AR(1) of 0.5 and 0.9: none. Times in a queue at load 0.8: 0.5 %
for up to 500 values and none from 1,000 on; at load 0.9, 2 % for 200 and 0.2 % for 1,000. A step of
10 % in noise of 1 % is 19 and more from 200 values on.
"""
TAIL_BATCHES, TAIL_LEAST = 20, 4
"""Batches of what is left after a cut that tell the error of its mean, at most and at least."""
LAG1_LIMIT = 0.2
"""Slots whose rates are more alike than this with their neighbours are merged in pairs."""
SLOTS_LEAST = 12
"""Fewer slots than this, or as few after merging, give no interval of a rate."""
UNTIL_LEAST, UNTIL_MOST = 4, 64
"""Windows at the first look and at the last."""
LOOKS = 2
"""How many times the chance of error is shared out, since every look may be the one that errs.

Simulated with windows of a standard deviation of 0.2 to 3 %, up to 128 of them, and 1 % asked for:
the truth was within it in at least 98.1 % of runs (1,500 for each standard deviation), and with a
correlation of 0.3 between windows in at least 95.7 %.
"""


def lag1(series: Floats) -> float:
    """Return the correlation of a series with itself one place on; 0 for a constant one.

    Args:
        series: shape (n,), any unit.

    Source:
        Box, Jenkins, Reinsel, Time Series Analysis, 4th ed. (2008), equation 2.1.11.
    """
    apart = np.asarray(series, np.float64) - np.mean(series)
    power = float(np.sum(apart * apart))
    return float(np.sum(apart[1:] * apart[:-1])) / power if power > 0 else 0.0


def memory(series: Floats, fitted: int) -> float:
    """Return by how much the variance of a mean (1 fitted), or a trend (2), grows by memory.

    That of a first-order autoregression, (1 + r) / (1 - r). The estimate of r is low by about
    (f + (f + 2) r) / n where f parameters were fitted, 1 for a mean and 2 for a line, which is put
    back: Shaman and Stine, Journal of the American Statistical Association 83 (1988).
    """
    found = lag1(series)
    r = min(max(found + (fitted + (fitted + 2) * found) / len(series), 0.0), 0.95)
    return (1 + r) / (1 - r)


def _errors(apart: float, error: float) -> float:
    """Return how many standard errors are between two values; finite, so that it can be sent."""
    return min(apart / error, ERRORS_MOST) if error > 0 else ERRORS_MOST * (apart > 0)


@dataclass(frozen=True)
class Warmup:
    """Where a series becomes steady.

    Attributes:
        cut: values to leave out at its beginning, a multiple of 5.
        settled: whether those are half of it at most.
        errors: how many standard errors the means before and after the cut lie apart; 0 without a
            cut, or where too little is left to tell.
    """

    cut: int
    settled: bool
    errors: float


def warmup(series: Floats | NDArray[np.int64]) -> Warmup | None:
    """Find the warm-up of a series.

    MSER-5 on medians: of all cuts, the one with the smallest sum of squares around the mean of what
    is left, divided by its squared number. Cuts of up to three quarters compete, so that a series
    which never settles shows itself by a best cut beyond one half.

    Args:
        series: shape (n,), in the order of time, such as the duration of each batch.

    Returns:
        The best cut; None where there are fewer than 100 values.

    Source:
        White, Simulation 69 (1997); medians, clipping and the least gain are distbench's.
    """
    points = len(series) // GROUP
    if points < WARMUP_POINTS:
        return None
    grouped = np.asarray(series[: points * GROUP], np.float64).reshape(points, GROUP)
    medians = np.median(grouped, axis=1)
    end = medians[points // 2 :]
    middle = float(np.median(end))
    spread = CLIP_SPREADS * 1.4826 * float(np.median(np.abs(end - middle)))
    values = medians - middle
    if spread > 0:
        values = np.clip(values, -spread, spread)
    left = np.arange(points, 0, -1)
    sums, squares = (np.cumsum(each[::-1])[::-1] for each in (values, values * values))
    errors = ((squares - sums * sums / left) / left**2)[: points * 3 // 4 + 1]
    best = int(np.argmin(errors))
    if best == 0 or errors[best] > GAIN * errors[0]:
        return Warmup(0, True, 0.0)
    return Warmup(best * GROUP, 2 * best <= points, _cut_errors(medians[:best], medians[best:]))


def _cut_errors(head: Floats, tail: Floats) -> float:
    """Return how many standard errors the means of head and tail of a series lie apart.

    The error is from batches of the tail, grown by their memory, as if the head varied likewise.
    """
    batches = min(TAIL_BATCHES, len(tail) // 2)
    if batches < TAIL_LEAST:
        return 0.0
    means = np.array([part.mean() for part in np.array_split(tail, batches)])
    shares = len(tail) / batches / len(head) + 1 / batches
    variance = float(np.var(means, ddof=1)) * memory(means, 1) * shares
    return _errors(abs(float(head.mean() - tail.mean())), math.sqrt(variance))


def warmup_cut(series: Floats | NDArray[np.int64]) -> int | None:
    """Return how many values at the beginning belong to the ``warmup``.

    None when more than half would have to go, so that the series is not steady, or when there are
    fewer than 100 values.
    """
    found = warmup(series)
    return found.cut if found is not None and found.settled else None


@dataclass(frozen=True)
class Trend:
    """Whether a series rises or falls.

    Attributes:
        change: median of the last third over that of the first, minus 1; None where that is 0.
        slope: of Theil and Sen, over the whole series, in its unit.
        p: how likely a Mann-Kendall statistic as large is without a trend.
        lag1: correlation of the neighbouring medians that remain without the slope.
        points: medians it was computed from.
        errors: how many standard errors the medians of the first and the last third lie apart; 0
            for fewer than 120 values.
    """

    change: float | None
    slope: float
    p: float
    lag1: float
    points: int
    errors: float = 0.0

    @property
    def real(self) -> bool:
        """Whether chance and memory do not make such a trend, or such a shift."""
        return self.p < TREND_P or self.errors >= ERRORS_REAL


def trend(series: Floats | NDArray[np.int64]) -> Trend | None:
    """Test a series for a trend, and its last third against its first.

    The series becomes at most 60 medians, so that millions of values cost no more than a pass and
    most memory is within a median. The variance of Mann and Kendall's statistic is for independent
    points, corrected for ties, and grows by the memory that is left around a straight line. To that
    test a step or a bend looks like memory: what is left around the line is then a sawtooth. So the
    thirds are compared too (``errors``), by what varies within each.

    Args:
        series: shape (n,), in the order of time.

    Returns:
        The trend; None for fewer than 50 values.

    Source:
        Kendall, Rank Correlation Methods, 4th ed. (1975), chapter 4; Sen, Journal of the American
        Statistical Association 63 (1968); memory: Yue and Wang, Water Resources Management 18
        (2004).
    """
    points = min(TREND_POINTS, len(series) // GROUP)
    if points < TREND_LEAST:
        return None
    thirds = np.array_split(np.asarray(series), 3)
    first, last = float(np.median(thirds[0])), float(np.median(thirds[2]))
    values = np.array([np.median(part) for part in np.array_split(np.asarray(series), points)])
    early, late = np.triu_indices(points, 1)
    apart = values[late] - values[early]
    score = float(np.sum(np.sign(apart)))
    ties = np.unique(values, return_counts=True)[1].astype(np.float64)
    variance = points * (points - 1) * (2 * points + 5) / 18
    variance -= float(np.sum(ties * (ties - 1) * (2 * ties + 5))) / 18
    step = float(np.median(apart / (late - early)))
    rest = values - step * np.arange(points)
    variance *= memory(rest, 2)
    p = math.erfc(abs(score) / math.sqrt(2 * variance)) if variance > 0 else 1.0
    change = last / first - 1 if first else None
    errors = _thirds_errors(values) if points >= THIRDS_LEAST else 0.0
    return Trend(change, step * points, p, lag1(rest), points, errors)


def _thirds_errors(values: Floats) -> float:
    """Return how many standard errors the medians of the first and the last third lie apart.

    Noise and memory are those within a third, around its own line, and of the three thirds the
    middle value: where one step falls, or one bend, that third is put aside.
    """
    thirds = np.array_split(values, 3)
    rests = []
    for third in thirds:
        at = np.arange(len(third)) - (len(third) - 1) / 2
        level = third - third.mean()
        rests.append(level - at * float(at @ level) / float(at @ at))
    noise = median(float(rest @ rest) / (len(rest) - 2) for rest in rests)
    kept = median(memory(rest, 2) for rest in rests)
    shares = 1 / len(thirds[0]) + 1 / len(thirds[2])
    apart = abs(float(np.median(thirds[2]) - np.median(thirds[0])))
    return _errors(apart, math.sqrt(noise * kept * shares))


def rate_interval(counts: NDArray[np.int64], slot_s: float, conf: float = 0.95) -> Interval:
    """Return the batch-means interval of a rate from what was completed in equal slots of time.

    The slots' rates vary from one to the next; Student's interval of their mean follows, if they
    are independent. Where neighbours are alike (lag-1 correlation above 0.2) slots are merged in
    pairs until they are not. What that check cannot see is still in longer slots, so the widest of
    three intervals counts: of the slots, of pairs and of fours. It speaks of this window alone, and
    not of the next start.

    Args:
        counts: shape (slots,), completions over all ranks in each slot; 30 slots or more, after
            the warm-up cut.
        slot_s: duration of a slot, s.
        conf: two-sided confidence.

    Returns:
        The interval, 1/s; ``n`` is the number of slots, ``n_eff`` that after merging.

    Source:
        batch means: Law, Simulation Modeling and Analysis, 5th ed. (2015), section 9.5.3.
    """
    slots, method = len(counts), f"{conf:.0%} Student's t over batch means, within this run"
    rates = np.asarray(counts, np.float64) / slot_s
    while len(rates) >= SLOTS_LEAST and lag1(rates) > LAG1_LIMIT:
        rates = _pairs(rates)
    if len(rates) < SLOTS_LEAST:
        reason = (
            f"not resolvable: run longer; the rates of {slots} slots of {slot_s:.3g} s resemble "
            f"their neighbours', and fewer than {SLOTS_LEAST} longer ones would be left"
        )
        if slots < SLOTS_LEAST:
            reason = f"not resolvable: run longer; {slots} slots are fewer than {SLOTS_LEAST}"
        return Interval(None, None, slots, None, method, reason)
    mean = float(np.sum(counts)) / (slots * slot_s)
    half = max(_half_width(each, conf) for each in (rates, _pairs(rates), _pairs(_pairs(rates))))
    return Interval(mean - half, mean + half, slots, float(len(rates)), method)


def _pairs(values: Floats) -> Floats:
    """Return the means of neighbours, two by two; an odd one at the end is left out."""
    return np.asarray(values[: len(values) // 2 * 2].reshape(-1, 2).mean(axis=1))


def _half_width(values: Floats, conf: float) -> float:
    """Return half of Student's interval of the mean of independent values."""
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return t_quantile((1 + conf) / 2, len(values) - 1) * error


def block_bootstrap(
    values: Floats, conf: float = 0.95, block: int | None = None, repeats: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile interval of a mean by the circular block bootstrap.

    A cross-check of ``rate_interval`` that assumes no distribution. With few values it is a little
    too narrow, as the plain bootstrap is.

    Args:
        values: shape (n,), in the order of time, such as a rate for each slot.
        conf: two-sided confidence.
        block: values that stay together; the root of n, rounded, unless given.
        repeats: resamples.
        seed: of the resamples, so that the same values give the same interval.

    Source:
        Politis and Romano, "A circular block-resampling procedure" (1992).
    """
    n = len(values)
    block = block or round(math.sqrt(n))
    # RandomState, for its stream is frozen (NEP 19): verify recomputes it with any numpy.
    starts = np.random.RandomState(seed).randint(n, size=(repeats, -(-n // block)))
    places = (starts[:, :, None] + np.arange(block)) % n
    means = np.sort(np.asarray(values)[places.reshape(repeats, -1)[:, :n]].mean(axis=1))
    low = math.floor((1 - conf) / 2 * repeats)
    return float(means[low]), float(means[-1 - low])


@dataclass(frozen=True)
class Until:
    """Whether enough windows were run.

    Attributes:
        done: the interval is as narrow as asked.
        wanted: windows to have at the next look; ``windows`` when there is none.
        windows: how many there are.
        half_width: half the interval over the mean; None for one window.
        low: lower limit, in the unit of the rates, as ``high``; None for one window.
        need: windows after which the interval would be narrow enough, if they go on to vary as
            they did; None for one window.
    """

    done: bool
    wanted: int
    windows: int
    half_width: float | None
    low: float | None
    high: float | None
    need: int | None


def until_decision(
    rates: Sequence[float], rel: float, conf: float = 0.95, most: int = UNTIL_MOST
) -> Until:
    """Decide from the rates of whole windows whether to run more of them.

    Looks are at 4, 8, 16 ... windows only, and at ``most``: each is another chance to stop by luck,
    so there are few, and each has but half the error allowed (``LOOKS``). The unit is the window,
    which has its own start. Windows that follow each other may be alike; their lag-1 correlation
    widens the interval.

    Args:
        rates: of every window so far, in order; all above 0.
        rel: half-width asked for, relative to the mean.
        conf: two-sided confidence.
        most: windows after which there is no next look.

    Returns:
        The decision. Between looks ``done`` is False, whatever the interval.

    Raises:
        ValueError: no rates, or one that is not a number above 0.
    """
    n = len(rates)
    if n == 0 or not all(0 < rate < math.inf for rate in rates):
        raise ValueError(f"rates {list(rates)[:5]} are not numbers above 0")
    look = UNTIL_LEAST * 2 ** max(0, math.ceil(math.log2(n / UNTIL_LEAST)))
    if n == 1:
        return Until(False, look, 1, None, None, None, None)
    values = np.asarray(rates, np.float64)
    mean = float(np.mean(values))
    error = float(np.std(values, ddof=1)) * math.sqrt(memory(values, 1) / n)
    half = t_quantile(1 - (1 - conf) / (2 * LOOKS), n - 1) * error
    done = n in (look, most) and half <= rel * mean
    last = done or n >= most
    wanted = n if last else min(most, look if n < look else 2 * n)
    z = normal_quantile(1 - (1 - conf) / (2 * LOOKS))
    need = max(UNTIL_LEAST, math.ceil(n * (z * error / (rel * mean)) ** 2))
    return Until(done, wanted, n, half / mean, mean - half, mean + half, need)
