"""Intervals of percentiles: against scipy, binomials by hand, and queues whose truth is known.

The queue is M/D/1, service 1, first come first served; it starts empty, as a run does, and nothing
is cut off. Its stationary waiting time is known exactly. "Printed" is the share of simulated runs
that get an interval at all; coverage is counted among those.
"""

import math
from decimal import Decimal, getcontext
from functools import lru_cache
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

import distbench.stats
import distbench.student
from distbench.stats import (
    BATCHES,
    METHOD,
    batch_count,
    batch_shares,
    guards,
    inflation,
    least_samples,
    memory,
    order_ranks,
    quantile_interval,
    quantile_ranks,
)
from distbench.student import normal_quantile, t_quantile

QUANTILES = (0.5, 0.9, 0.99)
NS = 1e6
"""Simulated times are floats near 1; as int64 they keep six digits."""


# Quantiles of the normal and of Student's t


@pytest.mark.parametrize(
    "df", [1, 1.3, 2, 2.5, 3, 7.7, 29, 333.3, 5e3, 9999.5, 1e4, 10001, 3e5, 1e6]
)
def test_t_quantile_is_scipys(df):
    p = np.array([1e-10, 1e-6, 1e-3, 0.025, 0.1, 0.2499, 0.2501, 0.4, 0.49999, 0.5001, 0.6, 0.7499])
    p = np.concatenate([p, [0.7501, 0.9, 0.95, 0.975, 0.99, 0.9995, 0.999999]])
    found = [t_quantile(float(each), df) for each in p]
    np.testing.assert_allclose(found, stats.t.ppf(p, df), rtol=1e-9)


@given(st.floats(1e-9, 1 - 1e-9), st.floats(1, 1e6))
def test_t_quantile_is_scipys_anywhere(p, df):
    # 1e-12: next to the median the quantile is as small as p - 0.5, which is rounded.
    assert t_quantile(p, df) == pytest.approx(float(stats.t.ppf(p, df)), rel=1e-9, abs=1e-12)


def test_t_quantile_at_its_ends():
    assert t_quantile(0.5, 3) == 0
    assert t_quantile(0.75, 1) == pytest.approx(1, rel=1e-14)  # of Cauchy
    assert t_quantile(0.975, math.inf) == normal_quantile(0.975)


@pytest.mark.parametrize("k", range(2, 45))
def test_t_quantile_beside_the_median(k):
    # Where p - 0.5 is exact and p is not: Cauchy's quantile is tan(pi e), that of 2 is algebraic.
    e = 2.0**-k
    known = math.tan(math.pi * e), 2 * e * math.sqrt(2 / (1 - 4 * e * e))
    found = t_quantile(0.5 + e, 1), t_quantile(0.5 + e, 2)
    assert found == pytest.approx(known, rel=1e-13, abs=0)
    assert t_quantile(0.5 - e, 1) == -t_quantile(0.5 + e, 1)


@pytest.mark.parametrize("p", [0.6, 0.9, 0.975, 0.995])
def test_the_expansion_is_right_in_its_terms(p, monkeypatch):
    # At 60 degrees of freedom each coefficient up to the third term is seen, the fourth as a whole.
    monkeypatch.setattr(distbench.student, "EXPANSION_DF", 50.0)
    assert t_quantile(p, 60) == pytest.approx(float(stats.t.ppf(p, 60)), rel=3e-8)


@pytest.mark.parametrize("p", [1e-12, 0.025, 0.5, 0.8, 0.975])
def test_normal_quantile_is_scipys(p):
    assert normal_quantile(p) == pytest.approx(float(stats.norm.ppf(p)), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(
    ("p", "df"), [(0, 1), (1, 1), (-0.1, 1), (math.nan, 1), (0.5, 0), (0.9, -1)]
)
def test_no_quantile_outside_the_range(p, df):
    with pytest.raises(ValueError, match="not"):
        t_quantile(p, df)


# Ranks for independent samples


def scipys_ranks(n, q, conf):
    found = stats.quantile_test(np.arange(n), q=0, p=q).confidence_interval(conf)
    return None if math.isnan(found.low) or math.isnan(found.high) else (found.low, found.high)


@settings(max_examples=150)
@given(st.integers(1, 3000), st.floats(0.005, 0.995), st.sampled_from([0.5, 0.8, 0.95, 0.99]))
def test_order_ranks_are_scipys(n, q, conf):
    assert order_ranks(n, q, conf) == scipys_ranks(n, q, conf)


@pytest.mark.parametrize("q", [0.5, 0.9, 0.95, 0.97, 0.99])
@pytest.mark.parametrize("n", [100, 1000, 3456])
def test_order_ranks_are_scipys_at_the_percentiles_of_a_report(n, q):
    assert order_ranks(n, q, 0.95) == scipys_ranks(n, q, 0.95)


def test_order_ranks_of_eight_samples_by_hand():
    # 256 outcomes of 8 coin flips: none 1, one 8, two 28. 1/256 is below 2.5 %, 9/256 is not.
    assert order_ranks(8, 0.5, 0.95) == (0, 7)
    # 9/256 is below 5 %, 37/256 is not.
    assert order_ranks(8, 0.5, 0.9) == (1, 6)


@pytest.mark.parametrize("q", [0.5, 0.99, 0.999])
@pytest.mark.parametrize("n", [10**6, 10**10])
def test_order_ranks_of_many_samples(n, q):
    low, high = order_ranks(n, q, 0.95)
    known = stats.binom(n, q)
    assert known.cdf(low) < 0.025 <= known.cdf(low + 1)
    assert known.sf(high) <= 0.025 < known.sf(high - 1)


@pytest.mark.parametrize(
    ("q", "least"), [(0.5, 6), (0.9, 36), (0.95, 72), (0.99, 368), (0.999, 3688), (0.1, 36)]
)
def test_an_interval_exists_from_the_least_number_of_samples_on(q, least):
    assert least_samples(q, 0.95) == least
    assert order_ranks(least - 1, q, 0.95) is None
    assert order_ranks(least, q, 0.95) is not None


@pytest.mark.parametrize("q", QUANTILES)
@pytest.mark.parametrize("n", [400, 1000, 4000, 10_000])
def test_independent_samples_are_covered_by_arithmetic(n, q):
    # Of n samples B are at or below the quantile: it lies in [sorted[low], sorted[high]] if
    # low < B <= high.
    low, high = order_ranks(n, q, 0.95)
    covered = stats.binom.cdf(high, n, q) - stats.binom.cdf(low, n, q)
    assert 0.95 <= covered <= 0.985


@pytest.mark.parametrize("given_", [(0, 0.5, 0.95), (9, 0, 0.95), (9, 1, 0.95), (9, 0.5, 1)])
def test_no_ranks_outside_the_range(given_):
    with pytest.raises(ValueError, match="no interval for"):
        order_ranks(*given_)


# Batches and inflation


@pytest.mark.parametrize(
    ("sizes", "batches"),
    [
        ([1024], 256),
        ([10**9], 256),
        ([1023], 128),
        ([512, 10**6], 128),
        ([64], 16),
        ([63], 0),
        ([], 0),
    ],
)
def test_batches_are_as_many_as_the_smallest_rank_allows(sizes, batches):
    assert batch_count(sizes) == batches


def test_shares_by_hand():
    series = np.array([1, 2, 3, 4, 5, 6, 7], np.int64)  # cut before places 0, 2 and 4
    assert batch_shares(series, 4, 3).tolist() == [1, 1, 0]
    assert batch_shares(series, 5, 3).tolist() == [1, 1, pytest.approx(1 / 3)]


@given(st.lists(st.integers(0, 9), min_size=4, max_size=60), st.integers(-1, 9), st.integers(1, 4))
def test_shares_are_those_of_a_plain_loop(values, threshold, batches):
    edges = [k * len(values) // batches for k in range(batches + 1)]
    wanted = [
        sum(value <= threshold for value in values[a:b]) / (b - a) for a, b in pairwise(edges)
    ]
    assert batch_shares(np.array(values), threshold, batches).tolist() == wanted


def ar1(phi, n, rng):
    """Lognormal series whose logarithm is a stationary AR(1) of variance 1."""
    from scipy.signal import lfilter

    noise = rng.standard_normal(n) * math.sqrt(1 - phi * phi)
    noise[0] /= math.sqrt(1 - phi * phi)
    return np.exp(lfilter([1.0], [1.0, -phi], noise))


def measured(parts, q=0.5):
    ordered = np.sort(np.concatenate(parts))
    sizes = [len(part) for part in parts]
    threshold = ordered[int(len(ordered) * q)]
    return inflation([batch_shares(x, threshold, batch_count(sizes)) for x in parts], sizes)


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("phi", [0.5, 0.9])
def test_inflation_of_ar1_is_the_sum_of_its_known_correlations(phi, ranks):
    # Of two standard normals with correlation r the signs correlate by 2/pi asin r (Sheppard 1899).
    truth = 1 + 2 * sum(2 / math.pi * math.asin(phi**k) for k in range(1, 200))
    rng = np.random.default_rng(3)
    found = [measured([ar1(phi, 16_000, rng) for _ in range(ranks)]) for _ in range(30)]
    # Student's factor and the larger of two estimates are upward; their size is under 15 %. The
    # mean of 30 has a standard error of 3 % or less: 10 % below is a chance of 1 in 1,000.
    assert 0.9 * truth < np.mean(found) < 1.25 * truth


def test_independent_samples_are_worth_themselves():
    rng = np.random.default_rng(4)
    found = [measured([rng.standard_normal(10_000)]) for _ in range(50)]
    # Half of the estimates are below 1 and held there; the others are above by some 10 %.
    assert np.median(found) < 1.05
    assert min(found) == 1
    assert np.mean(found) < 1.15


def test_ranks_that_merely_differ_have_no_memory():
    rng = np.random.default_rng(5)
    parts = [rng.standard_normal(8000), 50 + rng.standard_normal(2000)]
    assert measured(parts, 0.5) < 1.2
    assert measured(parts, 0.9) < 1.2


def test_ranks_that_are_slow_together_are_worth_one():
    # Four ranks with one and the same series of signs are worth one rank: four times the variance.
    rng = np.random.default_rng(6)
    one = rng.standard_normal(10_000)
    assert measured([one] * 4) == pytest.approx(4 * measured([one]), rel=0.15)


def test_a_rank_counts_by_its_size():
    # All memory is in the rank that has one sample of ten.
    rng = np.random.default_rng(7)
    small, large = ar1(0.9, 2000, rng), np.exp(rng.standard_normal(18_000))
    assert 1.3 < measured([small, large]) < 4  # 13.5 for a tenth, 1 for the rest: 2.25


def plain_inflation(shares, sizes):
    """The same with loops, and with scipy's Student factor."""
    n, m = sum(sizes), len(shares[0])

    def long_run(rows):
        own = [sum(x * x for x in row) / m for row in rows]
        lags = [
            sum(row[i] * row[i + k] for row in rows for i in range(m - k)) / m for k in range(m)
        ]
        streams = sum(own) ** 2 / sum(x * x for x in own)
        total, used = -lags[0], []
        for k in range(0, m, 2):
            pair = lags[k] + lags[k + 1]
            if used and pair <= lags[0] * math.sqrt(2 / m / streams):
                break
            used.append(min([pair, *used[-1:]]))
        span = 2 * len(used) - 1
        total = (total + 2 * sum(used)) / (1 - min(0.9, span / m))
        return total * (stats.t.ppf(0.975, max(2, streams * m / span)) / stats.norm.ppf(0.975)) ** 2

    means = [sum(each) / m for each in shares]
    p = sum(size * mean for size, mean in zip(sizes, means, strict=True)) / n
    rows = [
        [size / n * (x - mean) for x in each]
        for each, size, mean in zip(shares, sizes, means, strict=True)
    ]
    together = [[sum(column) for column in zip(*rows, strict=True)]]
    return max(1, max(long_run(rows), long_run(together)) * n / m / (p * (1 - p)))


@pytest.mark.parametrize("seed", range(12))
def test_inflation_is_that_of_plain_loops(seed):
    rng = np.random.default_rng(seed)
    sizes = [int(n) for n in rng.integers(300, 2000, 1 + seed % 4)]
    parts = [
        seed * rank / 3 + np.log(ar1(0.6 + 0.03 * seed, n, rng)) for rank, n in enumerate(sizes)
    ]
    threshold = np.quantile(np.concatenate(parts), 0.6)
    shares = [batch_shares(part, threshold, 64) for part in parts]
    assert inflation(shares, sizes) > 1.2
    assert inflation(shares, sizes) == pytest.approx(plain_inflation(shares, sizes), rel=1e-9)


def test_autocovariances_that_rise_again_are_held_down():
    # A slow wave and one of period 4: every other pair is above the one before it.
    at = np.arange(64)
    shares = [0.5 + 0.3 * np.sin(at * math.pi / 32) + 0.1 * np.sin(at * math.pi / 2)]
    assert inflation(shares, [640]) == pytest.approx(plain_inflation(shares, [640]), rel=1e-9)


def test_ranks_that_happen_to_alternate_do_not_cancel():
    wave = np.tile(np.repeat([0.2, 0.8], 8), 8)
    assert inflation([wave, 1 - wave], [1280, 1280]) > 0.9 * inflation([wave], [1280]) > 5


@pytest.mark.parametrize(
    "shares", [np.ones(64), np.zeros(64), np.tile([0.0, 1.0], 32), np.full(64, 0.5)]
)
def test_nothing_is_worth_more_than_its_samples(shares):
    assert inflation([shares], [640]) == 1


def test_memory_over_half_the_run_leaves_next_to_nothing():
    step = np.repeat([0.0, 1.0], 64)
    assert inflation([step], [1280]) > 300


def plain_stretches(shares):
    """Of one rank, for memory that spans one batch: (sum of squares)^2 / sum of fourth powers."""
    mean = sum(shares) / len(shares)
    return sum((x - mean) ** 2 for x in shares) ** 2 / sum((x - mean) ** 4 for x in shares)


@pytest.mark.parametrize("bursts", [1, 2, 5])
def test_bursts_are_counted(bursts):
    shares = np.ones(256)
    shares[7 :: 256 // bursts][:bursts] = 0  # equal ones, far apart
    found = memory([shares], [2560]).stretches
    assert found == pytest.approx(plain_stretches(shares.tolist()))
    assert found == pytest.approx(bursts, rel=0.05)
    # Two ranks that stall together have no more of them.
    assert memory([shares, shares], [2560, 2560]).stretches == pytest.approx(found)


def test_bursts_of_several_batches_count_once():
    shares = np.ones(256)
    for begin in (20, 90, 200):
        shares[begin : begin + 6] = 0
    # Where the cut into stretches falls, a burst may count as up to two.
    assert 2.5 < memory([shares], [2560]).stretches < 6


def test_a_body_without_bursts_has_many_stretches():
    rng = np.random.default_rng(8)
    values = rng.standard_normal(10_000)
    assert memory([batch_shares(values, 0, 256)], [10_000]).stretches > 60
    assert memory([np.full(64, 0.5)], [640]).stretches == math.inf
    assert memory([np.ones(64)], [640]).stretches == math.inf


# From inflation to ranks


@settings(max_examples=100)
@given(st.integers(1, 10**7), st.sampled_from([0.1, *QUANTILES, 0.999]))
def test_without_inflation_the_ranks_are_the_exact_ones(n, q):
    exact, found = order_ranks(n, q, 0.95), quantile_ranks(n, q, 1, 1)
    assert (found.low, found.high) == (exact or (None, None))
    assert (found.reason == "") == (exact is not None)


@settings(max_examples=200)
@given(st.integers(100, 10**6), st.sampled_from(QUANTILES), st.floats(1, 500), st.floats(1, 4))
def test_ranks_hold_the_percentile_and_widen_with_memory(n, q, own, more):
    near, far = quantile_ranks(n, q, own, own), quantile_ranks(n, q, own * more, own * more)
    if near.low is None:
        assert far.low is None
        assert near.reason.startswith("not resolvable: run longer")
    else:
        assert 0 <= near.low <= int(n * q) <= near.high < n
        assert near.n_eff == pytest.approx(n / own)
        if far.low is not None:
            # One place of the smaller binomial is this many places of n.
            slack = n / far.n_eff + 1
            assert far.low <= near.low + slack
            assert far.high >= near.high - slack


def test_ranks_are_those_of_a_smaller_run_scaled_up():
    # 40,000 samples worth 400: ranks of 400, each 100 wide; the upper limit from fewer:
    # 400 / (1 + 99 * (1 + 20 / 20)) * 100 = 201.
    low, _ = order_ranks(400, 0.9, 0.95)
    _, high = order_ranks(201, 0.9, 0.95)
    found = quantile_ranks(40_000, 0.9, 100, 100)
    assert found.low == low * 100
    assert found.high == math.ceil((high + 1) * 40_000 / 201) - 1


def test_few_stretches_reach_farther_up_and_no_less_far_down():
    many, few = (quantile_ranks(40_000, 0.9, 100, 100, stretches=k) for k in (math.inf, 4))
    assert few.low == many.low
    assert few.n_eff == many.n_eff == 400
    # 400 / (1 + 99 * (1 + 20 / 20 + 20 / 4)) * 100 = 57.
    assert few.high == math.ceil((order_ranks(57, 0.9, 0.95)[1] + 1) * 40_000 / 57) - 1
    assert few.high > many.high
    # Without inflation there is nothing that stretches could carry.
    assert quantile_ranks(4000, 0.9, 1, 1, stretches=1) == quantile_ranks(4000, 0.9, 1, 1)


def test_the_threshold_with_the_longest_memory_decides():
    assert quantile_ranks(4000, 0.9, 1, 1).reason == ""
    # By 10 / sqrt(400): 4000 / (1 + 9 * 1.5) = 276; p99 needs 368.
    refused = quantile_ranks(4000, 0.99, 1, 10)
    assert refused.low is None
    assert refused.high is None
    assert refused.n_eff == pytest.approx(276, abs=0.5)  # what the sentence says
    assert "worth 276 independent ones, and p99 needs 368" in refused.reason
    # 1.27 times: 5080 / (1 + 9 * (1 + 10 / sqrt(508))) = 363, and the next step, 1.34, is enough.
    assert "about 1.3 times or more" in refused.reason
    assert quantile_ranks(int(4000 * 1.35), 0.99, 1, 10).reason == ""


def test_the_least_number_is_enough():
    assert quantile_ranks(368, 0.99, 1, 1).reason == ""
    assert quantile_ranks(367, 0.99, 1, 1).reason != ""


def test_guards_are_below_the_quantile():
    assert guards(0.5) == (0.5,)
    assert guards(0.9) == (0.5, 0.9)
    assert guards(0.97) == (0.5, 0.9, 0.97)
    assert guards(0.1) == (0.1,)


# Whole intervals


def test_an_interval_of_shuffled_numbers():
    shuffled = np.random.default_rng(1).permutation(1000)  # no memory seen: worth all 1,000
    found = quantile_interval([shuffled], 0.5)
    assert (found.low, found.high) == order_ranks(1000, 0.5, 0.95)
    assert found.n == found.n_eff == 1000
    assert found.method == METHOD.format(0.95)
    assert found.method.startswith("95%")
    assert found.reason == ""
    assert type(found.low) is int


def test_order_in_time_matters_and_order_of_ranks_does_not():
    rng = np.random.default_rng(9)
    parts = [(ar1(0.9, 4000, rng) * NS).astype(np.int64) for _ in range(3)]
    there, back = quantile_interval(parts, 0.9), quantile_interval(parts[::-1], 0.9)
    assert (there.low, there.high) == (back.low, back.high)
    mixed = quantile_interval([rng.permutation(part) for part in parts], 0.9)
    assert there.low < mixed.low < mixed.high < there.high
    assert there.n_eff < mixed.n_eff / 4


def test_effective_n_is_that_of_the_percentile_itself():
    # The p99 of this series remembers less than its median: 5.4 against 13.5.
    values = (ar1(0.9, 40_000, np.random.default_rng(11)) * NS).astype(np.int64)
    body, tail = (quantile_interval([values], q).n_eff for q in (0.5, 0.99))
    assert 1.5 * body < tail


def test_more_confidence_is_wider():
    values = (ar1(0.5, 4000, np.random.default_rng(12)) * NS).astype(np.int64)
    found = [quantile_interval([values], 0.9, conf) for conf in (0.8, 0.95, 0.99)]
    assert found[2].low < found[1].low < found[0].low
    assert found[0].high < found[1].high < found[2].high
    assert [each.method[:3] for each in found] == ["80%", "95%", "99%"]


def test_empty_ranks_count_for_nothing():
    values = np.random.default_rng(10).permutation(2000)
    empty = np.zeros(0, np.int64)
    assert quantile_interval([empty, values, empty], 0.9) == quantile_interval([values], 0.9)


def test_too_few_on_one_rank_is_told():
    found = quantile_interval([np.arange(63), np.arange(5000)], 0.5)
    assert found.low is None
    assert found.high is None
    assert found.n_eff is None
    assert found.n == 5063
    assert found.reason == "not resolvable: run longer, 64 samples on each rank at the least"
    assert quantile_interval([], 0.5).low is None


def test_a_latency_that_never_varies_is_its_own_interval():
    found = quantile_interval([np.full(4000, 7)], 0.99)
    assert (found.low, found.high, found.n_eff) == (7, 7, 4000)


def test_ties_at_the_largest_value_do_not_hide_memory():
    # One half in one stretch at the top: p99 is the largest value, so that every sample is at or
    # below it; the step shows only below it.
    step = np.repeat([1, 2], 2000)
    assert quantile_interval([step], 0.99).low is None


# Coverage


getcontext().prec = 60


def waiting_cdf(x, load):
    """P(W <= x) in the stationary M/D/1 queue of service time 1; Erlang 1909, Crommelin 1932."""
    rate, at, total, factorial = Decimal(str(load)), Decimal(repr(x)), Decimal(0), Decimal(1)
    for k in range(int(x) + 1):
        factorial *= k or 1
        y = rate * (at - k)
        total += (-y) ** k / factorial * y.exp() if y or k else Decimal(1)
    return float((1 - rate) * total)


@lru_cache
def waiting_quantile(q, load):
    if waiting_cdf(0.0, load) >= q - 1e-12:
        return 0.0
    return float(optimize.brentq(lambda x: waiting_cdf(x, load) - q, 0, 80, xtol=1e-10))


@pytest.mark.parametrize("load", [0.5, 0.8, 0.9])
def test_the_known_queue_has_the_mean_of_pollaczek_and_khinchine(load):
    x = np.linspace(0, 60, 361)
    tail = np.array([1 - waiting_cdf(float(each), load) for each in x])
    assert np.sum(tail[1:] + tail[:-1]) / 12 == pytest.approx(load / (2 * (1 - load)), rel=5e-3)


def waiting_times(load, n, rng):
    """Waiting times of the first n customers of an M/D/1 queue that starts empty (Lindley)."""
    steps = 1 - rng.exponential(1 / load, n)
    steps[0] = 0
    walk = np.cumsum(steps)
    return walk - np.minimum.accumulate(walk)


def test_the_simulated_queue_is_the_known_one():
    waits = waiting_times(0.8, 400_000, np.random.default_rng(1))
    # About 10,000 independent ones: a standard error of 0.5 %.
    assert np.mean(waits <= waiting_quantile(0.9, 0.8)) == pytest.approx(0.9, abs=0.015)


def simulate(kind, value, n, rng):
    """One rank's times, int64: "ar1" of a correlation, or responses of the queue at a load."""
    times = ar1(value, n, rng) if kind == "ar1" else 1 + waiting_times(value, n, rng)
    return np.round(times * NS).astype(np.int64)


def truth(kind, value, q):
    exact = math.exp(normal_quantile(q)) if kind == "ar1" else 1 + waiting_quantile(q, value)
    return round(exact * NS)


def coverage(kind, value, n, repeats, seed, ranks=1, quantiles=QUANTILES, conf=0.95):
    """Return by quantile (share of runs with an interval, share of those that hold the truth)."""
    rng = np.random.default_rng(seed)
    held = {q: [] for q in quantiles}
    for _ in range(repeats):
        parts = [simulate(kind, value, n, rng) for _ in range(ranks)]
        for q in quantiles:
            found = quantile_interval(parts, q, conf)
            if found.low is None:
                assert found.reason.startswith("not resolvable: run longer, about")
            else:
                held[q].append(found.low <= truth(kind, value, q) <= found.high)
    return {q: (len(h) / repeats, float(np.mean(h)) if h else None) for q, h in held.items()}


# With 250 runs and a true coverage of 96 % (measured over 1,000 and more: 95 to 99 %) less than
# 92 % has a chance of 1 in 600, less than 90 % of 1 in 50,000, more than 99.5 % of 1 in 2,500.


@pytest.mark.parametrize(("n", "printed"), [(1000, 0.9), (10_000, 1)])
def test_independent_samples_are_covered(n, printed):
    found = coverage("ar1", 0.0, n, 250, seed=20)
    for q in QUANTILES:
        assert found[q][0] >= printed
        assert 0.92 <= found[q][1] <= 0.995


@pytest.mark.parametrize(("n", "q"), [(1000, 0.5), (10_000, 0.5), (10_000, 0.99)])
@pytest.mark.parametrize(("phi", "least"), [(0.5, 0.92), (0.9, 0.88)])
def test_autocorrelated_samples_are_covered(phi, least, n, q):
    printed, held = coverage("ar1", phi, n, 250, seed=21, quantiles=(q,))[q]
    assert printed >= 0.9
    assert held >= least


PRINTED = {
    (0.5, 0.5): (1, 1), (0.5, 0.9): (0.99, 1), (0.5, 0.99): (0.8, 0.95),
    (0.8, 0.5): (0.99, 1), (0.8, 0.9): (0.8, 0.95), (0.8, 0.99): (0, 0),
    (0.9, 0.5): (0.93, 1), (0.9, 0.9): (0.1, 0.28), (0.9, 0.99): (0, 0),
}  # fmt: skip
"""Between which shares of runs of 4,000 samples an interval is printed, by load and quantile."""


@pytest.mark.parametrize("load", [0.5, 0.8, 0.9])
def test_queues_are_covered_or_refused(load):
    found = coverage("queue", load, 4000, 250, seed=22)
    for q in QUANTILES:
        least, most = PRINTED[load, q]
        assert least <= found[q][0] <= most
        # 45 intervals or so at load 0.9, p90: less than 86 % has a chance of 1 in 50 there.
        assert found[q][1] is None or found[q][1] >= (0.9 if least > 0.5 else 0.86)


def test_a_rule_that_looks_at_the_data_does_not_choose_the_lucky(monkeypatch):
    # At load 0.9, p90, most runs are refused: by luck of the run, not by its length. Those with an
    # interval are then the quiet ones, whose percentile is low. True coverage among them, from
    # 3,000 runs: 99.6 % of 546 (94.6 % without BURST_CAUTION).
    printed, held = coverage("queue", 0.9, 4000, 800, seed=23, quantiles=(0.9,))[0.9]
    assert 0.1 < printed < 0.3
    assert held >= 0.9
    # The same rule without caution (86.6 % of 1,914) is the kind that fails.
    monkeypatch.setattr(distbench.stats, "GATE_CAUTION", 0.0)
    monkeypatch.setattr(distbench.stats, "UPPER_CAUTION", 0.0)
    monkeypatch.setattr(distbench.stats, "BURST_CAUTION", 0.0)
    printed, held = coverage("queue", 0.9, 4000, 800, seed=23, quantiles=(0.9,))[0.9]
    assert 0.5 < printed < 0.8
    assert held < 0.9


def test_ranks_of_a_queue_each_are_covered():
    found = coverage("queue", 0.8, 2000, 100, seed=24, ranks=4, quantiles=(0.5, 0.9))
    # 100 runs at 97 %: less than 91 % has a chance of 1 in 250.
    assert all(printed > 0.9 and held >= 0.91 for printed, held in found.values())


def test_another_confidence_is_covered_too():
    found = coverage("queue", 0.5, 4000, 200, seed=25, quantiles=(0.5, 0.9), conf=0.8)
    # 80 % and, with caution, a little more; under 72 % of 200 runs has a chance of 1 in 200.
    assert 0.72 <= found[0.9][1] <= 0.95
    assert coverage("queue", 0.5, 4000, 100, seed=26, quantiles=(0.9,), conf=0.99)[0.9][1] >= 0.96


# Stalls: 5 % of the values three times slower, in bursts of 50 on the average


def stalls(n, rng):
    """Where a two-state chain is in its slow state, of which it spends 5 % of its time."""
    slow, runs, states, total = rng.random() < 0.05, [], [], 0
    while total < n:
        runs.append(int(rng.geometric(1 / 50 if slow else 1 / 950)))
        states.append(slow)
        total, slow = total + runs[-1], not slow
    return np.repeat(states, runs)[:n]


def stalled(n, ranks, together, rng):
    shared, parts = stalls(n, rng), []
    for rank in range(ranks):
        at = shared if together or rank == 0 else stalls(n, rng)
        parts.append(NS * np.where(at, 3, 1) * np.exp(0.05 * rng.standard_normal(n)))
    return [part.astype(np.int64) for part in parts]


def stall_coverage(n, ranks, together, q, repeats, seed):
    """As ``coverage``; slow values are above every percentile up to p95."""
    rng, held = np.random.default_rng(seed), []
    known = NS * math.exp(0.05 * normal_quantile(q / 0.95))
    for _ in range(repeats):
        found = quantile_interval(stalled(n, ranks, together, rng), q)
        if found.low is not None:
            held.append(found.low <= known <= found.high)
    return len(held) / repeats, float(np.mean(held))


@pytest.mark.parametrize(
    ("n", "ranks", "together", "least"), [(8000, 1, False, 0.92), (4000, 2, False, 0.92),
                                          (4000, 2, True, 0.83), (16_000, 1, False, 0.95)]
)  # fmt: skip
def test_stalls_are_covered_where_some_were_met(n, ranks, together, least):
    # Of 2,000 runs 95, 95, 88 and 98 % hold: each bound has a chance of 1 in 50 or less. Without
    # BURST_CAUTION it is 89, 91, 79 and 95 %.
    printed, held = stall_coverage(n, ranks, together, 0.9, 250, seed=27)
    assert printed >= 0.6
    assert held >= least


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("q", [0.5, 0.9])
@pytest.mark.parametrize(
    ("n", "ranks", "together"), [(4000, 1, False), (4000, 2, False), (4000, 2, True),
                                 (8000, 1, False), (16_000, 1, False), (16_000, 2, True)]
)  # fmt: skip
def test_table_of_stalls(n, ranks, together, q):
    printed, held = stall_coverage(n, ranks, together, q, 1000, seed=78)
    print(f"\nstalls n={n} x{ranks} together={together} p{100 * q:g}: ", end="")
    print(f"printed {printed:.3f} held {held:.3f}", end="")
    # Under some ten bursts a run seldom shows how often they come: docs/method.md has the figures.
    assert held >= (0.84 if n == 4000 and (together or ranks == 1) else 0.9)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_rare_pauses_are_not_covered():
    # Four in 4,000 values, of 20 on the average, each a queue that drains: docs/method.md.
    rng, held, repeats = np.random.default_rng(79), [], 1000

    def paused(n):
        values = NS * np.exp(0.05 * rng.standard_normal(n))
        for begin in rng.integers(0, n, rng.poisson(n / 1000)):
            part = values[begin : begin + rng.geometric(1 / 20)]
            part += 3 * NS * np.linspace(1, 0, len(part))
        return values.astype(np.int64)

    known = int(np.sort(paused(4_000_000))[int(0.99 * 4_000_000)])
    for _ in range(repeats):
        found = quantile_interval([paused(4000)], 0.99)
        if found.low is not None:
            held.append(found.low <= known <= found.high)
    print(f"\npauses p99: printed {len(held) / repeats:.3f} held {np.mean(held):.3f}", end="")
    assert 0.1 < len(held) / repeats < 0.3
    assert 0.6 < np.mean(held) < 0.9


# The whole table, for the record: pytest -m slow -s tests/unit/test_stats.py

TABLE = [
    *(("ar1", phi, n, 1) for phi in (0.0, 0.5, 0.9) for n in (1000, 4000, 10_000)),
    *(("queue", load, n, 1) for load in (0.5, 0.8, 0.9, 0.95) for n in (1000, 4000, 16_000)),
    *(("queue", load, 4000, 4) for load in (0.5, 0.8, 0.9)),
]
FLOOR = {("ar1", 0.0): 0.93, ("ar1", 0.5): 0.92, ("ar1", 0.9): 0.88}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("kind", "value", "n", "ranks"), TABLE)
def test_table_of_coverage(kind, value, n, ranks):
    repeats = 3000 if (kind, value, n) == ("queue", 0.9, 4000) else 1000
    found = coverage(kind, value, n, repeats, seed=77, ranks=ranks)
    for q, (printed, held) in found.items():
        shown = "-" if held is None else f"{held:.3f}"
        cell = f"{kind} {value} n={n} x{ranks} p{100 * q:g}"
        print(f"\n{cell}: printed {printed:.3f} held {shown}", end="")
        # Where under one run in twenty has an interval, its truth is beyond what the run has seen.
        if printed >= 0.05:
            assert held >= FLOOR.get((kind, value), 0.9)
        if (kind, value) == ("ar1", 0.0) and printed:
            assert held <= 0.985
        if kind == "queue" and n == 4000 and ranks == 1 and value < 0.95:
            assert printed == 0 or held >= 0.9


def test_the_constants_are_those_that_were_simulated():
    assert (distbench.stats.GATE_CAUTION, distbench.stats.UPPER_CAUTION, BATCHES) == (10, 20, 256)
    assert distbench.stats.BURST_CAUTION == 20
