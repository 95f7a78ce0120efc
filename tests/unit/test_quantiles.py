"""Percentiles by LoadGen's rule, against integers worked by hand and a sort.

Selection over many ranks is driven in one process, all ranks in lock step, and compared with
``np.partition`` of all data; its worst cases are counts that no data of this size could have.
"""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distbench.quantiles import (
    PASS_WORDS,
    PASSES,
    RANKS_LIMIT,
    Selection,
    percentiles_ns,
    select,
    selection,
)


@pytest.mark.parametrize(
    ("n", "quantile", "wanted"),
    [
        (100, 0.0, 1),
        (100, 0.5, 51),  # position 50 of 0..99: one above textbook nearest rank, 50
        (100, 0.9, 91),
        (100, 0.99, 100),
        (100, 0.57, 57),  # 100 * 0.57 is 56.99... in double precision, and is cut
        (10, 0.97, 10),  # position 9
        (10, 0.95, 10),
        (10, 0.89, 9),  # position 8
        (1000, 0.999, 1000),
        (1000, 0.99, 991),
        (1, 0.999, 1),
        (2, 0.5, 2),
        (3, 0.5, 2),
    ],
)
def test_worked_by_hand_on_one_to_n(n, quantile, wanted):
    shuffled = np.random.default_rng(n).permutation(np.arange(1, n + 1))
    assert percentiles_ns(shuffled, [quantile]) == [wanted]


@given(
    st.lists(st.integers(-(2**62), 2**62), min_size=1, max_size=300),
    st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=6),
)
def test_equals_a_sort_and_changes_nothing(values, quantiles):
    given_ns = np.array(values, np.int64)
    found = percentiles_ns(given_ns, quantiles)
    assert found == [sorted(values)[int(len(values) * q)] for q in quantiles]
    assert all(type(each) is int for each in found)
    assert given_ns.tolist() == values


def test_order_of_the_quantiles_is_kept():
    assert percentiles_ns(np.arange(100), [0.99, 0.1, 0.99, 0.5]) == [99, 10, 99, 50]


def test_nothing_in_gives_an_error():
    with pytest.raises(ValueError, match="no latencies"):
        percentiles_ns(np.zeros(0, np.int64), [0.5])


@pytest.mark.parametrize("quantile", [1.0, -0.01, 99, float("nan")])
def test_a_quantile_outside_its_range_gives_an_error(quantile):
    with pytest.raises(ValueError, match="not all in"):
        percentiles_ns(np.arange(10), [0.5, quantile])


# Selection over ranks


def lockstep(shards, wanted):
    """Drive all ranks' selections together; returns what every rank found, and each pass's kind."""
    ranks = [selection(shard, wanted) for shard in shards]
    told, kinds = None, []
    while True:
        reduced, asked, ended = None, set(), []
        for rank in ranks:
            try:
                how, words = rank.send(told)
            except StopIteration as end:
                ended.append(end.value)
                continue
            except ValueError as error:
                ended.append(str(error))
                continue
            asked.add((how, words.shape))
            assert words.dtype == np.int64
            assert len(words) <= PASS_WORDS
            if reduced is None:
                reduced = words.copy()
            elif how == "sum":
                reduced += words
            else:
                np.maximum(reduced, words, out=reduced)
            words[:] = -7  # a reduction in place may leave anything there
        assert len(asked) + len(set(ended)) == 1, "the ranks do not all do the same"
        if ended:
            return ended[0], kinds
        kinds.append(how)
        told = reduced
        told.flags.writeable = False


def found(shards, wanted):
    """Select in lock step, and hold the result against all data in one place."""
    shards = [np.asarray(shard, np.int64) for shard in shards]
    before = [shard.copy() for shard in shards]
    result, kinds = lockstep(shards, wanted)
    together = np.concatenate(before)
    assert isinstance(result, Selection), result
    assert list(result.values) == np.partition(together, sorted(set(wanted)))[wanted].tolist()
    assert all(type(value) is int for value in result.values)
    assert (result.count, result.passes) == (len(together), len(kinds))
    assert result.sent_bytes <= result.passes * PASS_WORDS * 8
    for shard, was in zip(shards, before, strict=True):
        np.testing.assert_array_equal(shard, was)
    return result


def log_uniform(rng, n):
    return np.exp(rng.uniform(0, 62 * np.log(2), n)).astype(np.int64)


KINDS = {
    "all equal": lambda rng, n: np.full(n, rng.integers(0, 2**62, endpoint=True)),
    "nothing but 0": lambda rng, n: np.zeros(n, np.int64),
    "few values": lambda rng, n: rng.choice(rng.integers(0, 2**62, 5, endpoint=True), n),
    "neighbours": lambda rng, n: rng.integers(0, 2**62) + rng.integers(0, 3, n),
    "small": lambda rng, n: rng.integers(0, 50, n),
    "up to 2**62": lambda rng, n: rng.integers(0, 2**62, n, endpoint=True),
    "of any size": log_uniform,
    "latencies": lambda rng, n: rng.lognormal(np.log(1e7), 0.5, n).astype(np.int64),
    "stamps": lambda rng, n: 2**60 + rng.integers(0, 10**10, n),
    "powers of two": lambda rng, n: np.int64(1) << rng.integers(0, 62, n),
    "ties in noise": lambda rng, n: np.where(
        rng.random(n) < 0.5, rng.integers(0, 2**62, n), rng.integers(0, 40, n) << 55
    ),
}


def random_case(rng):
    """Shards of one kind of data or of another kind on each rank; some empty, one sample at least.

    Half of the cases are in order of size over the ranks, the rest are dealt out.
    """
    sizes = rng.choice([0, 1, 2, 3, 10, 100, 700], rng.integers(1, 9))
    if not sizes.sum():
        sizes[rng.integers(len(sizes))] = 1
    kinds = list(KINDS.values())
    kind = rng.integers(len(kinds))
    mixed = rng.random() < 0.2
    parts = [kinds[rng.integers(len(kinds)) if mixed else kind](rng, n) for n in sizes]
    if rng.random() < 0.5:
        parts = np.split(np.sort(np.concatenate(parts)), np.cumsum(sizes)[:-1])
    n = int(sizes.sum())
    wanted = rng.integers(0, n, rng.choice([1, 2, 6, 18, 60])).tolist()
    if rng.random() < 0.3:
        wanted = [0, n - 1, *(int(n * q) for q in (0.5, 0.9, 0.99, 0.999))]
    return parts, wanted


def many_cases(count, seed):
    """Return how many passes each of the cases took."""
    rng = np.random.default_rng(seed)
    return [found(*random_case(rng)).passes for _ in range(count)]


@pytest.mark.parametrize("seed", range(4))
def test_a_thousand_cases_equal_a_partition_of_all_data_in_six_passes(seed):
    assert max(many_cases(250, seed)) <= PASSES


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ten_thousand_more():
    assert max(many_cases(10_000, 99)) <= PASSES


@pytest.mark.parametrize("kind", KINDS)
def test_sixty_of_two_hundred_thousand(kind):
    rng = np.random.default_rng(12)
    data = KINDS[kind](rng, 200_000)
    shards = np.split(data, [1, 1, 50_000, 130_000])
    wanted = np.linspace(0, len(data) - 1, 60).astype(int).tolist()
    assert found(shards, wanted).passes <= PASSES


def test_five_hundred_ranks_in_one_process():
    rng = np.random.default_rng(5)
    sizes = rng.integers(0, 400, 500)
    shards = [rng.lognormal(np.log(2e7 + 1e4 * r), 0.4, n) for r, n in enumerate(sizes)]
    n = int(sizes.sum())
    wanted = [int(n * q) for q in np.linspace(0.5, 0.9999, 60)]
    assert found(shards, wanted).passes <= PASSES


def test_worked_by_hand():
    # Sorted: 1 1 5 7 9 12.
    result, _ = lockstep([np.array([7, 1, 12]), np.array([], int), np.array([9, 1, 5])], [3, 0, 1])
    assert result.values == (7, 1, 1)
    assert result.count == 6
    # Largest and smallest; then 1 .. 12 in buckets of 2**-11 of an octave: 1 is in the first, 12 in
    # number 3 * 2048 + 1024. That is a count for each, and 2**-12 would need more than 8192.
    assert (result.passes, result.sent_bytes) == (2, 8 * 2 + 8 * (3 * 2048 + 1024 + 1))


def test_places_follow_from_the_number_of_samples_where_a_function_is_given():
    data = np.random.default_rng(0).permutation(1000)
    result, _ = lockstep(np.split(data, [300]), lambda n: [int(n * q) for q in (0.99, 0.5)])
    assert result.values == (990, 500)


def test_the_largest_value_there_is():
    assert found([[2**63 - 1], [2**63 - 2, 0]], [0, 1, 2]).values[2] == 2**63 - 1


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8, 15, 16, 31, 32, 63, 64, 255, 256, 65_536])
def test_a_count_fills_its_field_and_no_more(count):
    # One rank each of a tie, its neighbours on both sides far away in the same first bracket.
    low, tie, high = 2**40 + 1, 2**40 + 2**20, 2**40 + 2**30
    shards = [[low] * 3, [tie] * (count - count // 2), [tie] * (count // 2), [high] * 3]
    assert set(found(shards, [2, 3, count + 2, count + 3]).values) == {low, tie, high}


def test_with_no_samples_at_all_every_rank_ends_after_one_pass():
    nothing = [np.zeros(0, np.int64)] * 3
    assert lockstep(nothing, lambda n: []) == (Selection((), 0, 1, 16), ["max"])
    told, kinds = lockstep(nothing, [0])
    assert told == "positions [0] are not at most 64 positions of 0 samples"
    assert kinds == ["max"]


def test_samples_that_are_all_equal_need_no_more_than_a_count():
    assert found([[2**61 + 5] * 10, [2**61 + 5] * 3], [0, 7, 12]).passes == 2


def test_no_positions_are_no_error():
    assert lockstep([np.arange(7), np.arange(3)], [])[0].count == 10


@pytest.mark.parametrize("worst", [-1, -(2**63)])
def test_a_negative_sample_of_one_rank_ends_all_after_one_pass(worst):
    shards = [np.arange(5), np.array([3, worst, 4]), np.zeros(0, np.int64)]
    told, kinds = lockstep(shards, [0])
    assert told == f"{max(worst, 1 - 2**63)} is negative; a selection takes 0 .. 2**63 - 1"
    assert kinds == ["max"]


@pytest.mark.parametrize("wanted", [[10], [3, -1], [2**63]])
def test_a_position_that_does_not_exist_ends_all_ranks_alike(wanted):
    told, kinds = lockstep([np.arange(4), np.arange(6)], wanted)
    assert "positions of 10 samples" in told
    assert kinds == ["max", "sum"]


def test_64_positions_and_not_one_more():
    data = np.arange(1000)
    assert len(found([data], list(range(RANKS_LIMIT))).values) == RANKS_LIMIT
    assert len(found([data], list(range(RANKS_LIMIT)) * 3).values) == 3 * RANKS_LIMIT
    assert "at most 64 positions" in lockstep([data], list(range(RANKS_LIMIT + 1)))[0]


def test_select_drives_the_reductions_it_is_given():
    # Another rank that has the same samples: sums are doubled, maxima are not.
    data = np.random.default_rng(4).integers(0, 2**62, 5000)
    calls = []

    def all_sum(words):
        calls.append(words.nbytes)
        return words * 2

    def all_max(words):
        calls.append(words.nbytes)
        return words

    told = select(data, lambda n: [0, n // 2, n - 1], all_sum, all_max)
    assert told.values == tuple(np.sort(np.tile(data, 2))[[0, 5000, 9999]].tolist())
    assert (told.passes, told.sent_bytes) == (len(calls), sum(calls))


class Adversary:
    """Answers a selection with counts that leave every bracket as wide as can be.

    There are 64 brackets, in the octave below ``2**bits``, each with ``count`` samples and a wanted
    position in the midst of them. ``fields`` counts go into a word.
    """

    def __init__(self, bits, count, fields):
        self.bits, self.count, self.bins = bits, count, 128 * fields
        self.low = [(128 + part) << (bits - 8) for part in range(64)]
        self.high = [((129 + part) << (bits - 8)) - 1 for part in range(64)]

    def run(self):
        wanted = [part * self.count + self.count // 2 for part in range(64)]
        steps = selection(np.zeros(0, np.int64), wanted)
        kinds, (how, words) = [], next(steps)
        while True:
            kinds.append(how)
            try:
                how, words = steps.send(self.answer(len(kinds), how, np.zeros_like(words)))
            except StopIteration as end:
                assert end.value.values == tuple(self.low)
                return kinds

    def answer(self, passes, how, told):
        if passes == 1:
            told[:] = 2**self.bits - 1, 0
        elif passes == 2:
            assert len(told) == 1 + 128 * self.bits
            told[1 + 128 * (self.bits - 1) :][:64] = self.count
        elif how == "max":  # from one end to the other: nothing is gained
            told[:64], told[64:] = self.high, [-low for low in self.low]
        else:  # all in the first bin, which is as wide as any
            told.reshape(64, -1)[:, 0] = self.count
            for part in range(64):
                span = self.high[part] - self.low[part] + 1
                self.high[part] = self.low[part] + -(-span // self.bins) - 1
        return told


@pytest.mark.parametrize(("bits", "count", "fields"), [(40, 2**24, 2), (36, 2**40, 1)])
def test_below_18_minutes_no_data_can_force_a_seventh_pass(bits, count, fields):
    assert Adversary(bits, count, fields).run() == ["max", *["sum"] * 5]


def test_below_2_to_the_63_no_data_can_force_a_thirteenth_pass():
    kinds = Adversary(63, 2**40, 1).run()
    assert kinds == ["max", "sum", "sum", "max", "sum", "max", *["sum"] * 6]


@pytest.mark.parametrize(
    ("data", "copies"),
    [
        (lambda rng: np.full(2_000_000, 10**7 + 1) + rng.integers(0, 2, 2_000_000) * 2**50, 1.2),
        (lambda rng: rng.integers(10**7, 10**7 + 30_000, 2_000_000), 0.25),
        (lambda rng: rng.lognormal(np.log(1e7), 0.3, 2_000_000).astype(np.int64), 0.25),
    ],
)
def test_memory_is_a_copy_at_most(data, copies):
    samples = data(np.random.default_rng(8))
    tracemalloc.start()
    try:
        told, _ = lockstep([samples], [int(2e6 * q) for q in (0.5, 0.9, 0.99, 0.999)])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert told.values[0] == np.sort(samples)[1_000_000]
    assert peak <= copies * samples.nbytes, peak / samples.nbytes
