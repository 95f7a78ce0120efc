"""Schedules against LoadGen's loop, written out, and against what it recorded."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from distbench.arrivals import (
    GENERATORS,
    constant_ns,
    offline_samples,
    poisson_ns,
    single_stream_queries,
    trace_ns,
)
from distbench.errors import UsageError
from distbench.rounds import V5_0
from tests.oracle.record import load

S = 10**9
SCHEDULES = [
    entry
    for entries in load()["orders"].values()
    for entry in entries
    if entry["case"]["scenario"] == "Server" and "max_query_count" in entry["case"]["settings"]
]


def twin_ns(target_qps, min_duration_ns, min_queries, seed, multiple):
    """LoadGen's loop as it is: one query after the other, in whole ns."""
    raw = iter(np.random.RandomState(seed % 2**32)._bit_generator.random_raw(20_000).tolist())
    least = min_queries + -min_queries % multiple
    times, at, before = [], 0, 0
    while before < min_duration_ns or len(times) < least:
        times.append(at)
        before = at
        low, high = next(raw), next(raw)
        unit = (float(low) + float(high) * 4294967296.0) / 18446744073709551616.0
        at += int(-math.log(1.0 - unit) / target_qps * 1e9)
        if multiple > 1 and len(times) >= least and before < min_duration_ns:
            least += multiple
    return times


@given(
    st.floats(0.01, 1e6),
    st.integers(1, 300),
    st.integers(0, 300),
    st.integers(0, 2**64 - 1),
    st.integers(1, 90),
)
@settings(max_examples=200)
def test_the_schedule_is_that_of_loadgens_loop(qps, spans, least, seed, multiple):
    # As many mean gaps long; sometimes the duration decides, sometimes the count.
    duration_ns = int(spans / qps * S)
    found = poisson_ns(qps, duration_ns, least, seed, multiple)
    assert found.tolist() == twin_ns(qps, duration_ns, least, seed, multiple)
    assert found.dtype == np.int64


@pytest.mark.parametrize("least", [1, 2, 7, 100])
def test_without_a_duration_the_count_decides(least):
    found = poisson_ns(3.0, 0, least, 1)
    assert found.tolist() == twin_ns(3.0, 0, least, 1, 1)
    assert len(found) == least


def test_a_run_ends_with_the_first_query_at_its_duration():
    due = poisson_ns(100.0, 0, 50, 4).tolist()
    # At the instant of a query: that one is the last. A ns later: so is the next.
    assert poisson_ns(100.0, due[20], 1, 4).tolist() == due[:21]
    assert poisson_ns(100.0, due[20] + 1, 1, 4).tolist() == due[:22]
    assert poisson_ns(100.0, due[20], 30, 4).tolist() == due[:30]
    assert poisson_ns(100.0, due[20], 1, 4, multiple=11).tolist() == due[:22]
    assert poisson_ns(100.0, due[20], 1, 4, multiple=21).tolist() == due[:21]


def test_whole_runs_have_the_length_that_loadgen_recorded():
    # Every query of ten minutes and more: the count, and the sum of all gaps, to the ns.
    rates = set()
    for entry in SCHEDULES:
        given_ = entry["case"]["settings"]
        multiple = entry["case"]["resident"] if entry["case"]["equal_issue"] else 1
        args = (given_["server_target_qps"], given_["min_duration_ms"] * 10**6)
        due = poisson_ns(*args, given_["min_query_count"], given_["schedule_rng_seed"], multiple)
        assert len(due) == entry["keys"]["generated_query_count"]
        next_ns = poisson_ns(*args, len(due) + 1, given_["schedule_rng_seed"])[len(due)]
        assert next_ns == entry["keys"]["generated_query_duration"]
        rates.add((given_["server_target_qps"], len(due)))
    assert len(rates) > 6
    assert max(count for _, count in rates) >= 270_336


def test_gaps_are_exponential():
    # A p-value below 1e-4 would be an alarm: that often, were it not for the fixed seed.
    gaps = np.diff(poisson_ns(50.0, 0, 20_001, V5_0.seeds.schedule)) / S
    assert stats.kstest(gaps, stats.expon(scale=1 / 50).cdf).pvalue > 1e-4


def test_a_constant_rate_does_not_drift():
    assert constant_ns(3.0, S, 1).tolist() == [0, 333_333_333, 666_666_666, S]
    assert constant_ns(3.0, S + 1, 1).tolist() == [0, 333_333_333, 666_666_666, S, 1_333_333_333]
    assert constant_ns(1000.0, 0, 4).tolist() == [0, 10**6, 2 * 10**6, 3 * 10**6]
    assert constant_ns(2.0, S, 1, multiple=5).tolist() == [k * S // 2 for k in range(5)]
    far = constant_ns(7.0, 0, 700_001)
    assert far[-1] == 100_000 * S
    assert np.diff(far).min() >= 142_857_142


@pytest.mark.parametrize("make", [lambda *a: poisson_ns(*a, 1), constant_ns])
def test_a_schedule_that_makes_no_sense_is_refused(make):
    for qps in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(UsageError, match="is not above 0: give a rate"):
            make(qps, S, 1)
    with pytest.raises(UsageError, match="0 ns and 0 queries is empty"):
        make(1.0, 0, 0)
    with pytest.raises(UsageError, match=r"1e\+12 queries in 1 s .* above 1e\+08 queries"):
        make(1e12, S, 1)
    with pytest.raises(UsageError, match="give another rate or duration"):
        make(1e-7, 0, 1)
    with pytest.raises(UsageError, match="multiple of 0"):
        constant_ns(1.0, S, 1, 0)


def test_the_slowest_rate_fits():
    assert (np.diff(poisson_ns(1e-6, 0, 80, 1)) > 0).all()


# A trace


def written(tmp_path, text):
    path = tmp_path / "trace.txt"
    path.write_text(text)
    return path


def test_a_trace_in_seconds_and_in_ns(tmp_path):
    text = "# made by hand\n0\n0.3s\n\n.5 # half\n7e-1\n  800000001 ns\n800000001ns\n1e3\n"
    assert trace_ns(written(tmp_path, text)).tolist() == [
        0, 300_000_000, 500_000_000, 700_000_000, 800_000_001, 800_000_001, 1000 * S,
    ]  # fmt: skip
    # Finer than a ns: cut. A day with all its digits: exact.
    text = "0.0000000019\n86400.123456789\n"
    assert trace_ns(written(tmp_path, text)).tolist() == [1, 86_400_123_456_789]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0\nsoon\n", "line 2: 'soon' is no offset"),
        ("0\n\n-1\n", "line 3: '-1' is no offset"),
        ("nan\n", "line 1: 'nan' is no offset"),
        ("1.5ns\n", "line 1: '1.5ns' is no offset"),
        ("1 2\n", "line 1: '1 2' is no offset"),
        ("5ms\n", "line 1: '5ms' is no offset"),
        ("1\n0.5\n", "line 2: '0.5' is earlier than the line before it, 1000000000 ns: sort"),
        ("1e10\n", "line 1: '1e10' is above 9223372036854775807 ns"),
        ("9223372036854775808ns\n", "is above 9223372036854775807 ns"),
        ("# nothing\n\n", "has no offset: write one a line"),
        ("", "has no offset"),
    ],
)
def test_a_trace_that_cannot_be_followed_is_refused(tmp_path, text, message):
    with pytest.raises(UsageError, match=message):
        trace_ns(written(tmp_path, text))


def test_a_trace_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        trace_ns(tmp_path / "absent.txt")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="cannot be read"):
        trace_ns(tmp_path / "binary")


# Counts


def test_offline_has_a_tenth_more_than_its_duration_needs():
    assert offline_samples(24_576, 600 * S, 10.0) == 24_576
    assert offline_samples(24_576, 600 * S, 100.0) == 66_000
    assert offline_samples(24_576, 600 * S, 100.0, multiple=24_576) == 3 * 24_576
    assert offline_samples(24_576, 0, 1.0, multiple=24_576) == 24_576


def test_a_single_stream_with_equal_issue_has_whole_sets():
    # 2 * 600 s / 50 ms = 24,000; 13,368 divides neither it nor 1.
    assert single_stream_queries(100, 600 * S, 50_000_000, 13_368) == 2 * 13_368
    assert single_stream_queries(100, 0, 50_000_000, 13_368) == 13_368
    # A multiple of the set gets one set more, as in LoadGen.
    assert single_stream_queries(128, 0, 1, 64) == 192


def test_generators_have_names():
    assert GENERATORS["poisson"] == "loadgen-mt19937-exponential"
    assert set(GENERATORS) == {"poisson", "constant", "trace"}
