"""Log-linear histograms, against buckets worked out in Python's whole numbers."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from distbench.histogram import (
    CHUNK,
    MAX_VALUE,
    MOST_SUB_BITS,
    SUB_BITS,
    LogHistogram,
    LogRange,
    bucket_count,
    bucket_start,
    buckets,
)

INT64 = st.integers(0, MAX_VALUE)
ANY_SIZE = INT64 | st.integers(0, 63).flatmap(
    lambda bits: st.integers(max(0, 2**bits - 3), min(MAX_VALUE, 2**bits + 3))
)


def told(values, sub_bits):
    """The bucket of each value, from its octave and the part of it, without floating point."""
    found = []
    for value in values:
        octave = value.bit_length() - 1
        part = (value << sub_bits >> octave) - 2**sub_bits if value else 0
        found.append((octave << sub_bits) + part + 1 if value else 0)
    return found


@pytest.mark.parametrize("sub_bits", [0, 3, 7, 10, 20, MOST_SUB_BITS])
@given(values=st.lists(ANY_SIZE, max_size=30))
@example(values=[0, 1, 2, 3, 2**53 - 1, 2**53, 2**53 + 1, 2**54 - 1, 2**62, MAX_VALUE])
@example(values=[2**53 - 1])
@example(values=[MAX_VALUE - 1024, 2**60 - 1, 2**54 - 1, 2**54 - 2, 2**55 - 3, 5])
def test_a_bucket_is_an_octave_and_the_part_of_it(sub_bits, values):
    given_ = np.array(values, np.int64)
    assert buckets(given_, sub_bits).tolist() == told(values, sub_bits)
    assert given_.tolist() == values


@pytest.mark.parametrize("sub_bits", [0, 3, 7, 10])
def test_every_edge_lies_between_its_buckets(sub_bits):
    starts = np.array([bucket_start(number, sub_bits) for number in range(bucket_count(sub_bits))])
    assert bucket_start(bucket_count(sub_bits), sub_bits) == 2**63
    assert (np.diff(starts) >= 0).all()
    assert told([MAX_VALUE], sub_bits) == [bucket_count(sub_bits) - 1]
    filled = np.flatnonzero(np.diff(starts, append=[MAX_VALUE]))
    np.testing.assert_array_equal(buckets(starts[filled], sub_bits), filled)
    np.testing.assert_array_equal(buckets(starts[filled][1:] - 1, sub_bits), filled[:-1])


@given(ANY_SIZE, st.integers(0, MOST_SUB_BITS))
def test_a_bucket_starts_at_or_below_its_values_and_ends_above(value, sub_bits):
    (number,) = told([value], sub_bits)
    assert bucket_start(number, sub_bits) <= value < bucket_start(number + 1, sub_bits)


def histogram_of(*values):
    made = LogHistogram()
    made.add(np.array(values, np.int64))
    return made


@given(ANY_SIZE)
@example(0)
@example(2**53 - 1)
@example(2**54 - 1)
@example(MAX_VALUE)
def test_the_error_is_at_most_one_in_2048_of_any_value(value):
    found = histogram_of(value).value_at(0)
    assert abs(found - value) * 2**11 <= value
    assert 0 <= found <= MAX_VALUE
    if value < 2048:
        assert found == value


def test_the_error_is_at_most_one_in_2048_at_every_edge_of_every_bucket():
    for number in range(0, bucket_count(SUB_BITS), 197):
        begin, end = bucket_start(number, SUB_BITS), bucket_start(number + 1, SUB_BITS)
        if begin == end:
            continue
        middle = histogram_of(begin).value_at(0)
        assert middle == begin + (end - begin) // 2
        assert max(middle - begin, end - 1 - middle) * 2**11 <= begin


def test_worked_by_hand():
    # 4096 .. 8191 in 1024 buckets of four; 5000 is in 5000 .. 5003, whose middle is 5002.
    made = histogram_of(5001, 7, 5003, 2047, 4096)
    assert [made.value_at(k) for k in range(5)] == [7, 2047, 4098, 5002, 5002]
    assert made.total == 5


@settings(max_examples=25)
@given(st.lists(ANY_SIZE, min_size=1, max_size=40))
def test_a_position_is_that_of_the_sorted_values(values):
    made = histogram_of(*values)
    for k, value in enumerate(sorted(values)):
        assert made.value_at(k) == histogram_of(value).value_at(0)


@pytest.mark.parametrize("k", [-1, 3, 2**40])
def test_a_position_that_is_none_gives_an_error(k):
    with pytest.raises(ValueError, match=f"position {k} is not one of 3"):
        histogram_of(1, 2, 3).value_at(k)
    with pytest.raises(ValueError, match="position 0 is not one of 0"):
        LogHistogram().value_at(0)


def test_a_negative_value_is_refused_and_nothing_is_added():
    made = histogram_of(5)
    late = np.full(CHUNK + 5, 9)
    late[-1] = -4
    with pytest.raises(ValueError, match="-4 is negative"):
        made.add(late)
    assert made.total == 1


def test_any_order_and_any_tree_of_merges_gives_the_same_bits():
    rng = np.random.default_rng(3)
    values = np.exp(rng.uniform(0, 43, 3 * CHUNK + 17)).astype(np.int64)
    whole = LogHistogram()
    whole.add(values)
    assert whole.total == len(values)
    for _ in range(5):
        cuts = np.sort(rng.integers(0, len(values), 12))
        parts = []
        for part in np.split(rng.permutation(values), cuts):
            parts.append(LogHistogram())
            parts[-1].add(part)
        while len(parts) > 1:
            one, other = (parts.pop(rng.integers(len(parts))) for _ in range(2))
            before = one.counts.copy(), other.counts.copy()
            parts.append(one.merged(other))
            np.testing.assert_array_equal((one.counts, other.counts), before)
        assert parts[0].counts.tobytes() == whole.counts.tobytes()
        assert parts[0].counts.dtype == np.int64


def test_pieces_of_any_size_strided_or_not_count_the_same():
    values = np.random.default_rng(1).integers(0, 2**62, 2 * CHUNK + 2)
    whole, pieces = LogHistogram(), LogHistogram()
    whole.add(values)
    pieces.add(values[::2])
    pieces.add(values[1::2])
    pieces.add(values[:0])
    np.testing.assert_array_equal(whole.counts, pieces.counts)


def test_ten_million_samples_need_less_than_8_mib():
    values = np.random.default_rng(2).integers(0, 10**10, 10**7)
    values[-1] = MAX_VALUE  # the rare path, which takes one more temporary
    tracemalloc.start()
    try:
        made = LogHistogram()
        made.add(values)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert made.total == 10**7
    assert peak <= 8 << 20, peak


@given(ANY_SIZE, ANY_SIZE, st.integers(64, 9000))
@example(0, MAX_VALUE, 64)
@example(2**62, 2**62 + 10**6, 8192)
def test_a_range_has_as_many_buckets_as_fit_and_no_more(one, other, most):
    low, high = sorted((one, other))
    found = LogRange.between(low, high, most)
    assert found.size <= most
    assert found.numbers(np.array([low, high])).tolist() == [0, found.size - 1]
    assert found.start_of(0) <= low
    assert high < found.start_of(found.size)
    if found.sub_bits < MOST_SUB_BITS:
        first, last = told([low, high], found.sub_bits + 1)
        assert last - first >= most


def test_what_shares_a_bucket_is_counted_and_found():
    rng = np.random.default_rng(6)
    samples = rng.integers(1000, 1100, 2 * CHUNK + 9)
    found = LogRange.between(1000, 1099, 64)
    edges = [*range(1000, 1024), *range(1024, 1101, 2)]  # 24 buckets of one value, 38 of two
    assert [found.start_of(number) for number in range(found.size + 1)] == edges
    counts = found.counts(samples)
    np.testing.assert_array_equal(counts, np.histogram(samples, [*edges[:-1], 1099])[0])
    same = found.sharing([1010, 1091], samples, counts)
    np.testing.assert_array_equal(same, samples[np.isin(samples, [1010, 1090, 1091])])
    assert len(found.sharing([1010], samples[:0], found.counts(samples[:0]))) == 0
