"""LoadGen's random streams, against what LoadGen issued, the standard, and counts by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from distbench.errors import UsageError
from distbench.loadgen_rng import (
    CAPPED,
    LEMIRE,
    REJECT,
    VARIANTS,
    WHOLE,
    Stream,
    loadable_set,
    multistream_order,
    offline_order,
    sample_order,
)
from tests.oracle.loadgen import BUILDS, check_order
from tests.oracle.record import load

RECORDED = load()["orders"]


@pytest.mark.parametrize("version", sorted(RECORDED))
def test_orders_and_schedules_are_those_that_loadgen_made(version):
    for entry in RECORDED[version]:
        check_order(entry["case"], entry, version)
    assert len(RECORDED[version]) == 71


def differs(entry, variant, subset, monkeypatch):
    monkeypatch.setitem(BUILDS, "other", (variant, subset))
    try:
        check_order(entry["case"], entry, "other")
    except AssertionError:
        return True
    return False


def test_the_record_tells_the_libraries_and_the_subsets_apart(monkeypatch):
    # Small sets come out alike in both libraries, almost always; large ones do not.
    for version, (variant, subset) in (("5.0.13", BUILDS["5.0.13"]), ("6.0.17", BUILDS["6.0.17"])):
        (library,) = set(VARIANTS) - {variant}
        (choice,) = {WHOLE, CAPPED} - {subset}
        entries = RECORDED[version]
        assert sum(differs(entry, library, subset, monkeypatch) for entry in entries) >= 10
        assert sum(differs(entry, variant, choice, monkeypatch) for entry in entries) >= 10


def test_the_schedule_does_not_depend_on_the_library():
    pairs = zip(RECORDED["5.0.13"], RECORDED["6.0.17"], strict=True)
    due = [
        [entry["columns"]["scheduled_ns"] for entry in pair]
        for pair in pairs
        if pair[0]["case"]["scenario"] == "Server"
    ]
    assert len(due) == 27
    assert all(old == new for old, new in due)


# The engine


def test_the_engine_is_that_of_the_standard():
    # ISO C++17, [rand.predef]: the 10,000th output of mt19937 with its default seed 5489.
    assert Stream(5489).raw(10_000)[-1] == 4_123_659_995


def test_the_seed_counts_modulo_2_to_the_32():
    big = 15036839855038426416
    assert Stream(big).raw(5).tolist() == Stream(big % 2**32).raw(5).tolist()
    assert Stream(0).raw(5).tolist() != Stream(1).raw(5).tolist()
    # By the recurrence that numpy itself seeds with.
    legacy = np.random.RandomState(big % 2**32)._bit_generator
    assert Stream(big).raw(2000).tolist() == legacy.random_raw(2000).tolist()


@given(st.lists(st.integers(0, 3000), max_size=6), st.lists(st.booleans(), max_size=6))
@settings(max_examples=60)
def test_the_stream_is_one_however_it_is_drawn_from(counts, singles):
    whole = Stream(7).raw(30_000).tolist()
    stream, at = Stream(7), 0
    for place, count in enumerate(counts):
        assert stream.raw(count).tolist() == whole[at : at + count]
        at += count
        if place < len(singles) and singles[place]:
            # The whole range but one: below() is then the draw itself, up to a rejection.
            assert stream.below(2**31) == whole[at] >> 1
            at += 1


# Bounded integers


def fed(variant, *outputs):
    """A stream that goes on with these outputs of the engine."""
    stream = Stream(1, variant)
    stream._ahead = list(outputs)[::-1]
    return stream


def test_a_bounded_draw_by_the_multiplication_worked_by_hand():
    # 2**32 - 3e9 = 1294967296 of the 2**32 products are too many: those with low words below it.
    assert fed(LEMIRE, 0, 1).below(3_000_000_000) == 0  # 0 is rejected, 3e9 >> 32 = 0
    assert fed(LEMIRE, 2).below(3_000_000_000) == 1  # 6e9 = 2**32 + 1705032704
    # 2**32 % 10 = 6: low words 0 .. 5 are too many; 3865470567 * 10 = 9 * 2**32 + 6 is not.
    assert fed(LEMIRE, 0, 3_865_470_567).below(10) == 9
    # 7 * 429496729 * 10 has the low word 2**32 - 42 of the quotient 6.
    assert fed(LEMIRE, 7 * 429_496_729).below(10) == 6


def test_a_bounded_draw_by_buckets_worked_by_hand():
    # Buckets of one: everything from 3e9 on is rejected.
    assert fed(REJECT, 3_000_000_000, 2_999_999_999).below(3_000_000_000) == 2_999_999_999
    # Ten buckets of 429496729 hold all but 4294967290 .. 4294967295.
    assert fed(REJECT, 4_294_967_290, 4_294_967_289).below(10) == 9
    assert fed(REJECT, 7 * 429_496_729).below(10) == 7
    # (2**32 - 1) // 1: only the last output is rejected.
    assert fed(REJECT, 4_294_967_295, 5).below(1) == 0


def test_the_same_edges_where_many_are_drawn_at_once():
    assert fed(LEMIRE, 0, 1, 2).many_below(3_000_000_000, 2).tolist() == [0, 1]
    assert fed(LEMIRE, 0, 3_865_470_567).many_below(10, 1).tolist() == [9]
    assert fed(REJECT, 4_294_967_290, 4_294_967_289).many_below(10, 1).tolist() == [9]


@given(st.sampled_from(VARIANTS), st.integers(1, 2**32 - 1), st.integers(0, 200), st.integers())
@settings(max_examples=200)
def test_many_draws_are_the_same_draws(variant, bound, count, seed):
    one, many = Stream(seed, variant), Stream(seed, variant)
    assert many.many_below(bound, count).tolist() == [one.below(bound) for _ in range(count)]
    # Neither has drawn more than the other.
    assert many.raw(3).tolist() == one.raw(3).tolist()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_bounded_draw_is_uniform(variant):
    # A p-value below 1e-4 would be an alarm: that often, were it not for the fixed seed.
    counts = np.bincount(Stream(3, variant).many_below(13, 130_000), minlength=13)
    assert stats.chisquare(counts).pvalue > 1e-4


# Orders


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 5, 64, 65])
def test_a_shuffle_is_a_permutation(variant, size):
    items = list(range(size))
    Stream(5, variant).shuffle(items)
    assert sorted(items) == list(range(size))


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_orders_of_a_shuffle_are_alike(variant):
    # 24 orders of four, 48,000 times; a p-value below 1e-4 would be an alarm.
    stream, counts = Stream(11, variant), {}
    for _ in range(48_000):
        items = [0, 1, 2, 3]
        stream.shuffle(items)
        counts[tuple(items)] = counts.get(tuple(items), 0) + 1
    assert len(counts) == 24
    assert stats.chisquare(list(counts.values())).pvalue > 1e-4


def test_the_loaded_set():
    whole, capped = (loadable_set(100, 20, 3, LEMIRE, subset) for subset in (WHOLE, CAPPED))
    assert len(set(whole.tolist())) == len(set(capped.tolist())) == 20
    assert whole.max() >= 20
    assert sorted(capped.tolist()) == list(range(20))
    # More room than samples: all of them, in the same order both ways.
    for subset in (WHOLE, CAPPED):
        assert loadable_set(20, 100, 3, LEMIRE, subset).tolist() == capped.tolist()


def test_equal_issue_gives_each_sample_as_often_as_any_other():
    loaded = loadable_set(50, 30, 3)
    order = sample_order(loaded, 90, 70, 5, equal_issue=True)
    for part in order.reshape(3, 30):
        assert sorted(part.tolist()) == sorted(loaded.tolist())
    assert order[:30].tolist() != order[30:60].tolist()
    # 70 queries need three permutations; then they repeat.
    longer = sample_order(loaded, 130, 70, 5, equal_issue=True)
    assert longer[90:].tolist() == order[:40].tolist()
    assert offline_order(loaded, 60, 5, equal_issue=True).reshape(2, 30)[1].tolist() != (
        loaded.tolist()
    )
    assert offline_order(loaded, 70, 5).tolist() == (loaded.tolist() * 3)[:70]


def test_the_minimum_count_moves_the_stream():
    loaded = loadable_set(50, 50, 3)
    assert sample_order(loaded, 9, 50, 5).tolist() == sample_order(loaded, 9, 1, 5).tolist()
    assert sample_order(loaded, 9, 51, 5).tolist() != sample_order(loaded, 9, 50, 5).tolist()


def test_a_multistream_query_has_neighbours():
    loaded = loadable_set(50, 10, 3)
    order = multistream_order(loaded, 200, 662, 5)
    places = {sample: place for place, sample in enumerate(loaded.tolist())}
    for query in order.tolist():
        first = places[query[0]]
        assert [places[sample] for sample in query] == [(first + k) % 10 for k in range(8)]
    assert {query[0] for query in order.tolist()} == set(loaded.tolist())


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(UsageError, match="'mersenne' is not one of libstdcxx-lemire, libstdcxx-"):
        Stream(1, "mersenne")
    with pytest.raises(UsageError, match="subset 'part' is not one of whole, capped"):
        loadable_set(5, 5, 1, LEMIRE, "part")
    for total, resident in ((0, 5), (5, 0)):
        with pytest.raises(UsageError, match="at least 1 must be loaded"):
            loadable_set(total, resident, 1)
    with pytest.raises(UsageError, match="31 samples are not a multiple of the 30 in the set"):
        offline_order(loadable_set(30, 30, 1), 31, 1, equal_issue=True)
    with pytest.raises(UsageError, match="minimum query count of at least 1"):
        sample_order(loadable_set(30, 30, 1), 31, 0, 1, equal_issue=True)
