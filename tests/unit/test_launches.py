"""What repeated launches say, against scipy and against simulation."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from scipy import optimize, stats

from distbench.launches import (
    FACTORS,
    MOST_LAUNCHES,
    chi2_quantile,
    detectable,
    launches_needed,
    spread,
    spread_interval,
    variance,
    welch,
)

# Welch


@pytest.mark.parametrize("seed", range(40))
def test_welch_is_scipys(seed):
    rng = np.random.default_rng(seed)
    n, m = rng.integers(2, 12, 2)
    base = rng.normal(3, rng.uniform(0.01, 2), n)
    new = rng.normal(3.1, rng.uniform(0.01, 2), m)
    change, half, df = welch(base.tolist(), new.tolist())
    wanted = stats.ttest_ind(new, base, equal_var=False)
    low, high = wanted.confidence_interval(0.95)
    assert change == pytest.approx(new.mean() - base.mean(), abs=1e-12)
    assert (change - half, change + half) == pytest.approx((low, high), rel=1e-9, abs=1e-12)
    assert df == pytest.approx(wanted.df, rel=1e-12)


def test_welch_by_hand():
    # Means 2 and 5, variances 1 and 4: 1/3 + 4/3 = 5/3; df = (25/9) / (1/18 + 16/18) = 50/17.
    change, half, df = welch([1.0, 2.0, 3.0], [3.0, 5.0, 7.0])
    assert (change, df) == (3.0, pytest.approx(50 / 17))
    assert half == pytest.approx(stats.t.ppf(0.975, 50 / 17) * math.sqrt(5 / 3))


def test_one_launch_has_no_interval():
    assert welch([1.0], [2.0, 3.0, 4.0]) == (2.0, None, None)
    assert welch([1.0, 3.0], [2.5]) == (0.5, None, None)


def test_launches_that_are_all_equal():
    assert welch([2.0, 2.0], [3.0, 3.0, 3.0]) == (1.0, 0.0, 3.0)
    # One side alone without variance leaves the other's degrees of freedom.
    assert welch([2.0, 2.0, 2.0], [3.0, 4.0, 5.0])[2] == pytest.approx(2.0)


# What can be resolved


def exact_power(launches, factor):
    """Return the power of Welch's test for a difference of so many of its standard errors.

    Given the share r of one sample variance in both, Welch's degrees of freedom are fixed, and the
    pooled variance is independent of r: power is the mean over r and over the pooled variance.
    """
    a = (launches - 1) / 2
    nodes, weights = np.polynomial.legendre.leggauss(120)
    angle = np.pi * (nodes + 1) / 8
    r = np.sin(angle) ** 2
    density = stats.beta.pdf(r, a, a) * 2 * np.sin(angle) * np.cos(angle) * np.pi / 8 * weights
    df = (launches - 1) / (r * r + (1 - r) ** 2)
    critical = stats.t.ppf(0.975, df)
    middle = (np.arange(4000) + 0.5) / 4000
    scale = np.sqrt(stats.chi2.ppf(middle, 2 * launches - 2) / (2 * launches - 2))
    found = [
        (stats.norm.sf(c * scale - factor) + stats.norm.cdf(-c * scale - factor)).mean()
        for c in critical
    ]
    return 2 * float(density @ found)


@pytest.mark.parametrize("launches", sorted(FACTORS))
def test_the_exact_factors(launches):
    wanted = optimize.brentq(lambda factor: exact_power(launches, factor) - 0.8, 2, 40, xtol=1e-7)
    assert FACTORS[launches] == pytest.approx(wanted, rel=3e-4)


@pytest.mark.parametrize("launches", [7, 8, 10, 20, 50])
def test_the_formula_is_near_the_exact_factor(launches):
    factor = detectable(1.0, launches) / math.sqrt(2 / launches)
    wanted = optimize.brentq(lambda f: exact_power(launches, f) - 0.8, 2, 40, xtol=1e-7)
    assert 0 <= wanted / factor - 1 <= 0.013


@pytest.mark.parametrize("launches", [2, 3, 5, 10])
def test_a_difference_that_can_be_resolved_is_found_in_80_percent(launches):
    # 40,000 pairs: a standard error of 0.2 %. Within 1 % is 5 of those: 1 false alarm in 10^6.
    rng = np.random.default_rng(launches)
    sd = 0.007
    base = rng.normal(0, sd, (40_000, launches))
    new = rng.normal(detectable(sd, launches), sd, (40_000, launches))
    found = stats.ttest_ind(new, base, axis=1, equal_var=False).pvalue < 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.01)


def test_detectable_grows_with_the_spread_and_shrinks_with_launches():
    values = [detectable(0.01, k) for k in range(2, 60)]
    assert values == sorted(values, reverse=True)
    assert len(set(values)) == len(values)
    assert detectable(0.02, 5) == pytest.approx(2 * detectable(0.01, 5))


def test_launches_needed_by_trying_each():
    for_one = {k: detectable(1.0, k) for k in range(2, 200)}
    for ratio in (0.3, 0.32, 0.33, 0.5, 0.9, 1.0, 1.7, 2.5, 2.6, 10.0, 12.0):
        wanted = next(k for k, least in for_one.items() if 0.01 * least <= 0.01 * ratio)
        assert launches_needed(0.01, 0.01 * ratio) == wanted


def test_launches_needed_at_its_ends():
    assert launches_needed(0.0, 0.01) == 2
    exact = detectable(0.01, MOST_LAUNCHES)
    assert launches_needed(0.01, exact) == MOST_LAUNCHES
    assert launches_needed(0.01, exact * 0.9999) is None


# The spread itself


@pytest.mark.parametrize("df", [1, 2, 3, 4, 5, 9, 30, 99, 999, 2.5])
@pytest.mark.parametrize("p", [0.001, 0.025, 0.5, 0.975, 0.999])
def test_chi_squared_is_scipys(p, df):
    assert chi2_quantile(p, df) == pytest.approx(stats.chi2.ppf(p, df), rel=1e-9)


def test_the_interval_of_a_spread():
    # Of 5 values: sqrt(4 / 11.143) = 0.599 and sqrt(4 / 0.4844) = 2.87, as in tables.
    assert spread_interval(1.0, 5) == pytest.approx((0.5991, 2.8736), abs=1e-4)
    # It holds the truth in 95 % of 20,000 samples of 5: a standard error of 0.15 %, 5 of them.
    rng = np.random.default_rng(1)
    low, high = spread_interval(1.0, 5)
    sds = rng.normal(0, 1, (20_000, 5)).std(axis=1, ddof=1)
    assert ((sds * low <= 1) & (sds * high >= 1)).mean() == pytest.approx(0.95, abs=0.0077)


def test_variance_is_the_standard_librarys():
    values = [1.5, 2.25, -3.0, 8.0]
    assert variance(values) == pytest.approx(statistics.variance(values))


def launch(value, **more):
    metrics = {"throughput": {"value": value, "ci_low": None, "ci_high": None, "reason": "why"}}
    return {"metrics": metrics | more}


def steady(value, half):
    return {"value": value, "ci_low": value - half, "ci_high": value + half, "reason": ""}


def test_the_spread_of_launches():
    found = spread([launch(math.exp(x)) for x in (4.0, 5.0, 6.0)], "throughput")
    assert (found.launches, found.between) == (3, pytest.approx(1.0))
    assert found.mean == pytest.approx(math.exp(5))
    assert (found.low, found.high) == pytest.approx(spread_interval(1.0, 3))
    assert (found.within, found.reason) == (None, "why")


def test_the_spread_of_one_launch_is_unknown():
    found = spread([launch(100.0)], "throughput")
    assert (found.mean, found.between, found.low, found.high) == (pytest.approx(100), *[None] * 3)


def test_within_a_launch_the_steady_interval_counts():
    # Half-widths of 1.96, 3.92 and 9.8 % are standard errors of 1, 2 and 5 %: the median is 2 %.
    z = stats.norm.ppf(0.975)
    launches = [
        launch(90.0, **{"throughput.steady": steady(100.0, z * k)}) for k in (2.0, 1.0, 5.0)
    ]
    found = spread(launches, "throughput")
    assert (found.within, found.reason) == (pytest.approx(0.02), "")
    # In one launch it could not be told.
    launches[1]["metrics"]["throughput.steady"] |= {"ci_low": None, "reason": "too short"}
    found = spread(launches, "throughput")
    assert (found.within, found.reason) == (None, "too short")
    # Its own interval, over several windows, serves as well, where all launches have one.
    launches[0]["metrics"]["throughput"] = steady(50.0, z)
    assert spread(launches, "throughput").within is None
    for each in launches:
        each["metrics"]["throughput"] = steady(50.0, z)
    assert spread(launches, "throughput").within == pytest.approx(0.02)


def test_within_a_launch_its_own_interval_counts_without_a_steady_one():
    z = stats.norm.ppf(0.975)
    launches = [launch(1.0), launch(1.0)]
    for each in launches:
        each["metrics"]["throughput"] = steady(50.0, z)
    assert spread(launches, "throughput").within == pytest.approx(0.02)
