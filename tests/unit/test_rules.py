"""Which rules, which limits, and early stopping: against LoadGen, exact sums, and scipy."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from distbench.early_stopping import _log_binomial, least_queries, over_allowed
from distbench.errors import UsageError
from distbench.rounds import MIN_DURATION_NS, ROUNDS, V5_0, V5_1, Tokens
from distbench.rules import Limits, Rules, limits, parse_rules
from tests.oracle.loadgen import check_conf
from tests.oracle.record import load

MS = 1_000_000
PERCENTILES = (Fraction(9, 10), Fraction(99, 100), Fraction(999, 1000))


# Early stopping


def test_the_counts_that_the_rules_know():
    # LoadGen's own: recorded in tests/data and asked of it in tests/oracle.
    assert [least_queries(0.9, t) for t in (0, 1, 2, 10, 100)] == [44, 64, 81, 197, 1246]
    assert [least_queries(0.99, t) for t in (0, 1, 2, 10, 100)] == [459, 662, 838, 2010, 12_571]
    assert [least_queries(0.999, t) for t in (0, 1)] == [4603, 6636]


def exact_chance(fast, over, percentile):
    """P[Binomial(fast + over, 1 - p) <= over], in whole numbers."""
    p, q = percentile.numerator, percentile.denominator - percentile.numerator
    n = fast + over
    total = sum(math.comb(n, k) * p ** (n - k) * q**k for k in range(over + 1))
    return Fraction(total, percentile.denominator**n)


@pytest.mark.parametrize("percentile", PERCENTILES)
def test_least_queries_is_the_smallest_count_by_exact_sums(percentile):
    for over in (0, 1, 2, 3, 5, 9, 16):
        least = least_queries(float(percentile), over)
        assert exact_chance(least - over, over, percentile) < Fraction(1, 100)
        assert exact_chance(least - over - 1, over, percentile) >= Fraction(1, 100)


@pytest.mark.parametrize("percentile", [0.9, 0.99, 0.999])
@pytest.mark.parametrize("over", [1, 2, 15, 16, 40])
@pytest.mark.parametrize("fast", [1, 3, 15, 16, 17, 40, 1000])
def test_the_largest_term_is_exact(percentile, over, fast):
    p = Fraction(percentile)
    exact = math.comb(fast + over, over) * p**fast * (1 - p) ** over
    # The logarithm of a fraction that a double could not hold.
    wanted = math.log(exact.numerator) - math.log(exact.denominator)
    assert abs(_log_binomial(fast, over, percentile) - wanted) < 1e-10 * (1 + abs(wanted) * 1e-3)


@pytest.mark.parametrize("percentile", PERCENTILES)
def test_least_queries_is_the_smallest_count_by_scipy(percentile):
    # scipy's beta function is good to 1e-10 here; the chances differ by 1e-7 at the least.
    random = np.random.default_rng(5)
    for over in {int(10**x) for x in random.uniform(0, 4, 60)}:
        least = least_queries(float(percentile), over)
        chance = stats.binom.cdf(over, [least, least - 1], 1 - float(percentile))
        assert chance[0] < 0.01 <= chance[1]


@given(st.sampled_from([0.5, 0.9, 0.97, 0.99, 0.999]), st.integers(0, 20_000))
@settings(max_examples=150)
def test_what_is_allowed_is_the_inverse_of_what_is_needed(percentile, queries):
    allowed = over_allowed(queries, percentile)
    if allowed is None:
        assert queries < least_queries(percentile, 0)
    else:
        assert least_queries(percentile, allowed) <= queries
        assert least_queries(percentile, allowed + 1) > queries


def test_the_budget_at_known_counts():
    counts = (458, 459, 661, 662, 1000, 5000, 10_833, 24_576, 270_336)
    allowed = [over_allowed(n, 0.99) for n in counts]
    assert allowed == [None, 0, 0, 1, 2, 33, 84, 209, 2583]


@pytest.mark.parametrize("percentile", [0.9, 0.99, 0.999])
def test_ten_million_queries(percentile):
    # The normal approximation, with its skewness term, is within 1 of the truth out here.
    n, q = 10_000_000, 1 - percentile
    z = -2.3263478740408408
    wanted = n * q + z * math.sqrt(n * q * percentile) + (percentile - q) * (z * z - 1) / 6 - 0.5
    assert abs(over_allowed(n, percentile) - wanted) <= 1.5
    assert least_queries(percentile, over_allowed(n, percentile)) <= n


def test_what_is_no_percentile_is_refused():
    for percentile, over in ((0.0, 1), (1.0, 1), (0.99, -1)):
        with pytest.raises(ValueError, match="slow queries at the percentile"):
            least_queries(percentile, over)


# Rounds


@pytest.mark.parametrize("name", sorted(ROUNDS))
def test_figures_are_those_of_the_rounds_mlperf_conf(name):
    entries = load()["conf"][name]
    for entry in entries:
        check_conf(ROUNDS[name], entry["case"], entry["found"])
    assert len(entries) >= 60


def test_what_mlperf_conf_does_not_hold():
    assert V5_0.name == "mlperf-v5.0"
    assert "llama3_1-8b" not in [model.name for model in V5_0.models]
    small = V5_1.model("llama3_1-8b")
    assert (small.server_tokens, small.interactive) == (
        Tokens(2000 * MS, 100 * MS), Tokens(500 * MS, 30 * MS),
    )  # fmt: skip
    assert [(t.reference, t.least, t.most) for t in small.quality] == [
        (38.7792, (0.99,), None), (15.9075, (0.99,), None), (24.4957, (0.99,), None),
        (35.793, (0.99,), None), (8_167_644, (0.9,), 1.1),
    ]  # fmt: skip
    resnet = V5_0.model("resnet50")
    assert resnet.quality[0].reference * resnet.quality[0].least[0] == pytest.approx(75.6954)
    assert V5_0.model("gptj").quality[0].least == (0.99, 0.999)
    assert V5_0.model("bert").scenarios == ()
    assert V5_0.model("3d-unet").scenarios == ("offline",)
    assert V5_0.model("llama3_1-405b").interactive is None
    with pytest.raises(UsageError, match=r"mlperf-v5\.1 has no model 'resnet50'"):
        V5_1.model("resnet50")
    with pytest.raises(UsageError, match="no model 'retina-net'; did you mean retinanet"):
        V5_0.model("retina-net")


# Rules and limits


def test_rules_are_read():
    assert parse_rules("none") == Rules("none", None, None)
    assert parse_rules("mlperf-v5.0") == Rules("mlperf-v5.0", V5_0, None)
    assert parse_rules(" mlperf-v5.1 , shortened=5s ") == Rules("mlperf-v5.1", V5_1, 5_000 * MS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mlperf-5.0", "did you mean mlperf-v5"),
        ("mlperf-v6.0", "rules 'mlperf-v6.0' are not one of none, mlperf-v5"),
        ("", "rules '' are not one of"),
        ("none,shortened=5s", "without rules there is nothing to shorten"),
        ("mlperf-v5.0,shortend=5s", "did you mean shortened"),
        ("mlperf-v5.0,shortened", "'shortened' is neither shortened=DURATION nor interactive"),
        ("mlperf-v5.0,", "'' is neither shortened=DURATION"),
        ("mlperf-v5.0,interctive", "did you mean interactive"),
        ("none,interactive", "without rules there is nothing to shorten or vary"),
        ("mlperf-v5.0,shortened=5", "has no unit"),
        ("mlperf-v5.0,shortened=0s", "must be above zero"),
    ],
)
def test_rules_that_do_not_exist_are_refused(text, message):
    with pytest.raises(UsageError, match=message):
        parse_rules(text)


def test_limits_of_a_rounds_models():
    rules = parse_rules("mlperf-v5.0")
    assert MIN_DURATION_NS == 600_000 * MS
    assert limits(rules, "server", "resnet50") == Limits(
        MIN_DURATION_NS, 100, 0.99, latency_ns=15 * MS
    )
    assert limits(rules, "server", "llama2-70b", interactive=True) == Limits(
        MIN_DURATION_NS, 100, 0.99, ttft_ns=450 * MS, tpot_ns=40 * MS
    )
    assert limits(rules, "offline", "gptj") == Limits(MIN_DURATION_NS, 13_368)
    assert limits(rules, "singlestream", "resnet50") == Limits(MIN_DURATION_NS, 100, 0.9)
    assert limits(rules, "multistream", "resnet50") == Limits(MIN_DURATION_NS, 662, 0.99)


def test_limits_of_a_model_that_no_round_has():
    rules = parse_rules("mlperf-v5.0,shortened=5s")
    assert limits(rules, "offline") == Limits(5_000 * MS, 24_576, shortened=True)
    assert limits(rules, "offline", dataset_size=359).min_queries == 359
    assert limits(rules, "offline", dataset_size=50_000).min_queries == 24_576
    assert limits(rules, "server", latency_ns=7).latency_ns == 7
    # A round's own limit cannot be replaced.
    assert limits(rules, "server", "bert", latency_ns=7).latency_ns == 130 * MS


@pytest.mark.parametrize(
    ("text", "scenario", "more", "message"),
    [
        ("none", "server", {}, "'none' have no limits: give a round"),
        ("mlperf-v5.0", "server", {}, "no Server limit for this model: give --latency-bound"),
        ("mlperf-v5.0", "server", {"option": "--latency"}, "this model: give --latency$"),
        ("mlperf-v5.0", "server", {"model": "rgat"}, "no Server limit for rgat"),
        ("mlperf-v5.0", "server", {"model": "resnet"}, "did you mean resnet50"),
        (
            "mlperf-v5.0", "server", {"model": "llama3_1-405b", "interactive": True},
            "has no interactive variant of llama3_1-405b",
        ),
    ],
)  # fmt: skip
def test_limits_that_do_not_exist_are_refused(text, scenario, more, message):
    with pytest.raises(UsageError, match=message):
        limits(parse_rules(text), scenario, **more)
