"""Pool -> intervals of percentiles and of the steady rate, wherever the samples lie.

Two exchanges between ranks for all percentiles of a series: order statistics, and each rank's batch
shares (see ``stats``). Where all samples are in one place the same steps are plain numpy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distbench.pool import Pool, series
from distbench.run import RankRecord
from distbench.scenarios import scenario
from distbench.stats import (
    BATCH_SAMPLES,
    BATCHES_LEAST,
    METHOD,
    Interval,
    batch_count,
    batch_shares,
    guards,
    memory,
    quantile_ranks,
)
from distbench.steady import Trend, block_bootstrap, rate_interval, trend, warmup
from distbench.times import RankTimes

CONFIDENCE = 0.95
SLOTS = 30
"""Equal slots of the steady stretch; Student's factor for 30 is within 5 % of the normal one."""
GROUPS_LEAST = 4 * SLOTS
"""Groups that a rank must end in the steady stretch: of fewer a slot's rate is mostly rounding."""


def percentile_intervals(
    pool: Pool, name: str, sizes: Sequence[int], largest: int, quantiles: Mapping[str, float]
) -> dict[str, tuple[int, Interval]]:
    """Return LoadGen's percentiles of a series over all ranks, each with its interval.

    Args:
        pool: how to reach the samples.
        name: of the series.
        sizes: how many values each rank has; at least one in all.
        largest: the largest value.
        quantiles: by label.

    Returns:
        By label the percentile and its 95 % interval, ns, or why there is none.
    """
    n, method = sum(sizes), METHOD.format(CONFIDENCE)
    wanted = sorted({g for q in quantiles.values() for g in guards(q)} | set(quantiles.values()))
    values = dict(zip(wanted, pool.order(name, [int(n * q) for q in wanted]), strict=True))
    batches = batch_count([size for size in sizes if size])
    if batches == 0:
        need = BATCHES_LEAST * BATCH_SAMPLES
        reason = f"not resolvable: run longer, {need} values on each rank at the least"
        none = Interval(None, None, n, None, method, reason)
        return {label: (values[q], none) for label, q in quantiles.items()}
    # At the largest value all would be at or below it.
    thresholds = [min(value, largest - 1) for value in values.values()]

    def shares(record: RankRecord) -> list[list[float]]:
        own = series(record, name)
        return [batch_shares(own, t, batches).tolist() for t in thresholds] if len(own) else []

    told = [np.array(each) for each in pool.gather(shares) if each]
    held = [size for size in sizes if size]
    found = {q: memory([each[i] for each in told], held, CONFIDENCE) for i, q in enumerate(wanted)}
    ranks = {
        label: quantile_ranks(
            n,
            q,
            found[q].inflation,
            max(found[g].inflation for g in guards(q)),
            CONFIDENCE,
            found[q].stretches,
        )
        for label, q in quantiles.items()
    }
    ends = [end for each in ranks.values() for end in (each.low, each.high) if end is not None]
    ordered = dict(zip(ends, pool.order(name, ends), strict=True))
    return {
        label: (
            values[quantiles[label]],
            Interval(None, None, n, each.n_eff, method, each.reason)
            if each.low is None or each.high is None
            else Interval(ordered[each.low], ordered[each.high], n, each.n_eff, method),
        )
        for label, each in ranks.items()
    }


@dataclass(frozen=True)
class Steady:
    """The rate of the stretch in which all ranks are warm and none has finished.

    Attributes:
        rate_qps: samples/s; None where there is no such stretch.
        interval: of the rate, samples/s.
        bootstrap: the block bootstrap's limits for the same slots, samples/s, as a cross-check;
            None without an interval.
        samples: completed in the stretch.
        cut_s: from the agreed instant to its begin, s.
        length_s: of it, s.
        reason: why there is none; "" where there is.
    """

    rate_qps: float | None
    interval: Interval | None
    samples: int
    cut_s: float
    length_s: float
    reason: str = ""
    bootstrap: tuple[float, float] | None = None


def steady_rate(pool: Pool, times: Sequence[RankTimes], start_ns: int | None) -> Steady:
    """Return the steady rate over all ranks, on rank 0's clock.

    Each rank's warm-up is found in the times between its completions; the stretch begins when the
    last rank is warm, and ends with the first rank's last completion.

    Args:
        pool: how to reach the samples.
        times: of all ranks.
        start_ns: the agreed instant on rank 0's clock; None where the makespan is unknown.
    """
    run = pool.run
    if start_ns is None or any(t.finished_ref_ns is None for t in times):
        return Steady(None, None, 0, 0.0, 0.0, "the makespan is unknown")
    warm = settlings(pool)
    slow = [str(t.rank) for t, s in zip(times, warm, strict=True) if s and not s.settled]
    if slow:
        reason = (
            f"not steady: rank {', '.join(slow[:8])} had no warm-up that ends in its first half"
        )
        return Steady(None, None, 0, 0.0, 0.0, reason)
    models = {record.rank: run.clock(record) for record in run.official}
    begin = start_ns
    for t, each in zip(times, warm, strict=True):
        model = models[t.rank]
        if model is not None and each is not None and each.begin_ns:
            begin = max(begin, model.to_reference_ns(each.begin_ns))
    end = min(t.finished_ref_ns or 0 for t in times)
    # Slots leave out what completes at their begin and take in what does at their end: k groups in
    # k intervals. All are 1 ns late, so that rounding between two clocks moves neither the group
    # that the stretch begins with into it, nor the one that it ends with out of it.
    edges = [begin + 1 + (end - begin) * k // SLOTS for k in range(SLOTS + 1)]

    def counts(record: RankRecord) -> list[int]:
        model = models[record.rank]
        own = [model.to_peer_ns(edge) if model else edge for edge in edges]
        at, rows = _completions(record)
        places = np.searchsorted(at, own, side="right")
        done = np.concatenate([[0], np.cumsum(rows)])[places]
        return [*np.diff(done).tolist(), int(places[-1] - places[0])]

    told = pool.gather(counts)
    if end <= begin or min(each[-1] for each in told) < GROUPS_LEAST:
        reason = f"not resolvable: run longer, {GROUPS_LEAST} groups a rank while all are busy"
        return Steady(None, None, 0, 0.0, 0.0, reason)
    slots = np.array([each[:-1] for each in told], np.int64).sum(axis=0)
    length_s, done = (end - begin) / 1e9, int(slots.sum())
    slot_s = length_s / SLOTS
    found, limits = rate_interval(slots, slot_s, CONFIDENCE), None
    if found.low is not None:
        low, high = block_bootstrap(slots.astype(np.float64), CONFIDENCE)
        limits = low / slot_s, high / slot_s
    cut_s = (begin - start_ns) / 1e9
    return Steady(done / length_s, found, done, cut_s, length_s, bootstrap=limits)


def _completions(record: RankRecord) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return when one rank's groups completed, in that order, and how many samples each had."""
    at = record.first_rows("completed")
    order = np.argsort(at, kind="stable")
    return at[order], record.first_rows("count")[order]


@dataclass(frozen=True)
class Settling:
    """Where one rank became steady, by the times between its completions.

    Attributes:
        settled: whether that was in its first half.
        begin_ns: the completion after which it was, or would best be called so, own clock; 0 where
            nothing is to be cut.
        samples: completed after it.
        length_ns: from it to the last completion.
        errors: how many standard errors the times before and after it lie apart.
    """

    settled: bool
    begin_ns: int
    samples: int
    length_ns: int
    errors: float


def settlings(pool: Pool) -> list[Settling | None]:
    """Return where each rank became steady; None: too few groups to tell."""

    def own(record: RankRecord) -> list[float | int] | None:
        at, rows = _completions(record)
        found = warmup(np.diff(at)) if len(at) >= GROUPS_LEAST else None
        if found is None:
            return None
        cut = found.cut
        begin, left = int(at[cut]) if cut else 0, int(rows[cut + 1 :].sum())
        return [found.settled, begin, left, int(at[-1] - at[cut]), found.errors]

    return [None if each is None else Settling(*each) for each in pool.gather(own)]


def trends(pool: Pool) -> list[Trend | None]:
    """Return how each rank's batch latency rose or fell over its window; None: too few groups.

    Under a schedule it is the latency itself: a queue that grows is a rate that cannot be kept.
    """
    name = "latency" if scenario(pool.run.scenario).open_loop else "batch_latency"

    def own(record: RankRecord) -> list[float | int | None] | None:
        found = trend(series(record, name))
        if found is None:
            return None
        return [found.change, found.slope, found.p, found.lag1, found.points, found.errors]

    return [None if each is None else Trend(*each) for each in pool.gather(own)]
