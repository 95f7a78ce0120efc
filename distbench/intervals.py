"""Pool -> intervals of percentiles and of the steady rate, wherever the samples lie.

Two exchanges between ranks for all percentiles of a series: order statistics, and each rank's batch
shares (see ``stats``). Where all samples are in one place the same steps are plain numpy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from distbench.pool import Pool, series
from distbench.run import RankRecord
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
from distbench.steady import Trend, rate_interval, trend, warmup_cut
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
    warm = pool.gather(_warm_ns)
    if any(each is None for each in warm):
        slow = [str(t.rank) for t, each in zip(times, warm, strict=True) if each is None]
        reason = (
            f"not steady: rank {', '.join(slow[:8])} had no warm-up that ends in its first half"
        )
        return Steady(None, None, 0, 0.0, 0.0, reason)
    models = {record.rank: run.clock(record) for record in run.present}
    begin = start_ns
    for t, local in zip(times, warm, strict=True):
        model = models[t.rank]
        if model is not None and local:
            begin = max(begin, model.to_reference_ns(local))
    end = min(t.finished_ref_ns or 0 for t in times)
    edges = [begin + (end - begin) * k // SLOTS for k in range(SLOTS + 1)]

    def counts(record: RankRecord) -> list[int]:
        model = models[record.rank]
        own = [model.to_peer_ns(edge) if model else edge for edge in edges]
        at, rows = record.first_rows("completed"), record.first_rows("count")
        ended = int(((at >= own[0]) & (at <= own[-1])).sum())
        if own[-1] <= own[0]:
            return [0] * SLOTS + [0]
        slots = np.histogram(at, np.array(own), weights=rows)[0]
        return [*(int(n) for n in slots), ended]

    told = pool.gather(counts)
    if end <= begin or min(each[-1] for each in told) < GROUPS_LEAST:
        reason = f"not resolvable: run longer, {GROUPS_LEAST} groups a rank while all are busy"
        return Steady(None, None, 0, 0.0, 0.0, reason)
    slots = np.array([each[:-1] for each in told], np.int64).sum(axis=0)
    length_s, done = (end - begin) / 1e9, int(slots.sum())
    found = rate_interval(slots, length_s / SLOTS, CONFIDENCE)
    return Steady(done / length_s, found, done, (begin - start_ns) / 1e9, length_s)


def _warm_ns(record: RankRecord) -> int | None:
    """Return when one rank was warm, own clock; 0: from the start, None: not in its first half."""
    at = np.sort(record.first_rows("completed"))
    if len(at) < GROUPS_LEAST:
        return 0  # too few to tell, and too few for a rate: that is said elsewhere
    cut = warmup_cut(np.diff(at))
    return None if cut is None else int(at[cut]) if cut else 0


def trends(pool: Pool) -> list[Trend | None]:
    """Return how each rank's batch latency rose or fell over its window; None: too few groups."""

    def own(record: RankRecord) -> list[float | int | None] | None:
        found = trend(series(record, "batch_latency"))
        if found is None:
            return None
        return [found.change, found.slope, found.p, found.lag1, found.points]

    return [None if each is None else Trend(*each) for each in pool.gather(own)]
