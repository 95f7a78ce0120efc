"""What is fixed before a window: counts, order, kept groups; warm-up, and the loop's own cost."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distbench import prepare
from distbench.clock import now_ns
from distbench.errors import UsageError
from distbench.harness import HARNESS_BATCHES, HARNESS_BLOCKS, measure_harness
from distbench.offline import offline_loop
from distbench.prepare import (
    KEPT_GROUPS,
    PLANNED_LIMIT,
    SAMPLE_LIMIT,
    choose_kept,
    groups_of,
    plan_samples,
    sample_order,
    share_out,
    stay_on_ranks,
    warm_up,
)
from distbench.samples import FAILED
from distbench.settings import Settings
from distbench.sut import Done

S = 10**9


# Shares


@given(st.integers(0, SAMPLE_LIMIT), st.integers(1, 200))
def test_even_shares_sum_to_the_total_and_differ_by_one_at_most(total, size):
    shares = [share_out(total, rank, None, size) for rank in range(size)]
    assert sum(shares) == total
    assert max(shares) - min(shares) <= 1


@given(
    st.integers(0, SAMPLE_LIMIT),
    st.lists(st.floats(0.01, 1e6), min_size=1, max_size=50),
)
def test_shares_by_rate_sum_to_the_total_and_follow_the_rates(total, rates):
    shares = [share_out(total, rank, rates, len(rates)) for rank in range(len(rates))]
    assert sum(shares) == total
    for share, rate in zip(shares, rates, strict=True):
        assert abs(share - total * rate / sum(rates)) <= 1 + 1e-6


def test_shares_worked_by_hand():
    assert [share_out(10, rank, None, 4) for rank in range(4)] == [2, 3, 3, 2]
    assert [share_out(100, rank, [1.0, 3.0], 2) for rank in range(2)] == [25, 75]
    assert [share_out(7, rank, None, 1) for rank in range(1)] == [7]


# Counts


def test_a_number_of_samples_is_shared_out():
    assert plan_samples(Settings(num_samples=101), [5.0, 1.0]) == ([50, 51], False)
    by_rate = Settings(num_samples=100, shares="rate")
    assert plan_samples(by_rate, [300.0, 100.0]) == ([75, 25], False)


def test_a_rank_without_a_sample_is_refused():
    with pytest.raises(UsageError, match="--num-samples 2 leaves rank 1 of 3 without any: give"):
        plan_samples(Settings(num_samples=2), [1.0, 1.0, 1.0])


def test_a_duration_becomes_whole_batches_at_the_rate_of_the_slowest():
    # 2 s at 100 samples/s and a tenth more: 220 samples, which are 6.9 batches of 32.
    settings = Settings(batch_size=32, duration_ns=2 * S)
    assert plan_samples(settings, [100.0, 250.0]) == ([224, 224], False)
    assert plan_samples(settings, [100.0]) == ([224], False)


def test_shares_by_rate_follow_each_rank():
    settings = Settings(batch_size=10, duration_ns=S, shares="rate")
    assert plan_samples(settings, [95.0, 1_000.0]) == ([110, 1_100], False)


def test_a_slow_model_still_gets_one_batch():
    settings = Settings(batch_size=16, duration_ns=1)
    assert plan_samples(settings, [0.001, 5.0]) == ([16, 16], False)


@given(
    st.lists(st.floats(1e-3, 1e12), min_size=1, max_size=64),
    st.integers(1, 4096),
    st.integers(1, 3600 * S),
    st.sampled_from(["even", "rate"]),
    st.sampled_from(["", "gather", "shard"]),
)
def test_no_plan_is_more_than_can_be_logged_or_gathered(rates, batch, duration_ns, shares, kept):
    settings = Settings(batch_size=batch, duration_ns=duration_ns, shares=shares, samples=kept)
    counts, cut = plan_samples(settings, rates)
    assert len(counts) == len(rates)
    assert all(count >= batch and count % batch == 0 for count in counts)
    # One batch a rank is the least there is, whatever it adds up to.
    assert max(counts) <= PLANNED_LIMIT + batch
    if kept == "gather":
        assert sum(counts) <= SAMPLE_LIMIT + batch * len(rates)
    own = rates if shares == "rate" else [min(rates)] * len(rates)
    wanted = [rate * duration_ns / 1e9 * 1.1 for rate in own]
    if cut:
        over = sum(wanted) > SAMPLE_LIMIT - batch * len(rates)
        assert max(wanted) > PLANNED_LIMIT - batch or (kept == "gather" and over)
    else:
        for count, want in zip(counts, wanted, strict=True):
            assert want * (1 - 1e-9) <= count < max(want, 1) * (1 + 1e-9) + batch


def test_a_plan_that_was_cut_says_so():
    settings = Settings(batch_size=32, duration_ns=100 * S)
    assert plan_samples(settings, [1e6, 1e6]) == ([PLANNED_LIMIT // 32 * 32] * 2, True)
    gathered = replace(settings, samples="gather")
    assert plan_samples(gathered, [1e6, 1e6]) == ([SAMPLE_LIMIT // 2 // 32 * 32] * 2, True)


@pytest.mark.parametrize(
    ("kept", "counts", "stay"),
    [
        ("", [SAMPLE_LIMIT // 2] * 2, False),
        ("", [SAMPLE_LIMIT // 2, SAMPLE_LIMIT // 2 + 1], True),
        ("", [2 * SAMPLE_LIMIT], False),  # one rank has them all
        ("shard", [1, 1], True),
        ("shard", [1], False),
        ("gather", [SAMPLE_LIMIT, 1], False),
    ],
)
def test_samples_stay_where_they_are_when_they_are_many(kept, counts, stay):
    assert stay_on_ranks(Settings(samples=kept), counts) is stay


# Order


@given(st.integers(1, 50), st.lists(st.integers(0, 60), min_size=1, max_size=5), st.integers(0, 9))
def test_the_shards_together_are_one_permutation_over_and_over(total, counts, seed):
    firsts = [sum(counts[:rank]) for rank in range(len(counts))]
    shards = [
        sample_order(total, first, count, seed) for first, count in zip(firsts, counts, strict=True)
    ]
    assert [len(shard) for shard in shards] == counts
    joined = np.concatenate(shards)
    assert joined.dtype == np.int64
    for start in range(0, len(joined), total):
        once = joined[start : start + total]
        assert len(set(once.tolist())) == len(once)
        assert set(once.tolist()) <= set(range(total))
        assert once.tolist() == joined[: len(once)].tolist()


def test_the_order_is_of_the_seed():
    one, same, other = (sample_order(1000, 0, 1000, seed).tolist() for seed in (1, 1, 2))
    assert one == same
    assert one != other
    assert one != sorted(one)


@given(st.integers(0, 100), st.integers(1, 12))
def test_groups_are_views_of_the_order_in_its_order(count, batch):
    order = np.arange(100, 100 + count)
    groups = list(groups_of(order, batch))
    assert [row for row, _ in groups] == list(range(0, count, batch))
    assert [x for _, group in groups for x in group.tolist()] == order.tolist()
    assert all(len(group) == batch for _, group in groups[:-1])
    assert all(np.shares_memory(group, order) for _, group in groups)


@given(st.integers(1, 20_000), st.integers(0, 5))
def test_places_whose_outputs_are_kept_are_spread_over_the_rows(rows, seed):
    places = choose_kept(rows, seed)
    parts = min(rows, KEPT_GROUPS)
    for part, place in enumerate(places):  # one in each part
        assert rows * part // parts <= place < rows * (part + 1) // parts
    assert all(0 <= place < rows and type(place) is int for place in places)
    assert places == choose_kept(rows, seed)
    assert rows < 1_000 or places != choose_kept(rows, seed + 1)


# Warm-up


class Clock:
    """A clock that moves by 10 ns a reading, and where a SUT works."""

    def __init__(self):
        self.at_ns = 10**15

    def __call__(self):
        self.at_ns += 10
        return self.at_ns


class Works:
    """Takes ``per_sample_ns`` a sample and ``first_ns`` more for the first group of each size."""

    total = resident = 1000
    depth = 1

    def __init__(self, now, per_sample_ns, first_ns=0, stamps=False, device_ns=0, fails=()):
        self.now, self.per_sample_ns, self.first_ns = now, per_sample_ns, first_ns
        self.stamps, self.device_ns, self.fails = stamps, device_ns, fails
        self.groups, self.seen, self.flying = [], [], []

    def issue(self, row, indices, data=None):
        self.flying.append((row, indices))
        assert len(self.flying) <= self.depth

    def poll(self, until_ns):
        row, indices = self.flying.pop(0)
        started = self.now.at_ns
        self.now.at_ns += len(indices) * self.per_sample_ns
        if len(indices) not in self.groups:
            self.now.at_ns += self.first_ns
        self.groups.append(len(indices))
        self.seen += indices.tolist()
        error = "out of memory" if len(indices) in self.fails else ""
        own = (started, self.now.at_ns) if self.stamps else (0, 0)
        return [Done(row, len(indices), indices, error, *own, self.device_ns)]


def warm(sut, size=8, least_ns=S, order=None, tell=lambda: None):
    order = np.arange(20) if order is None else order
    return warm_up(offline_loop, sut, size, least_ns, order, sut.now, tell)


@pytest.mark.parametrize("per_sample_ns", [1_000, 1_000_000, 300_000_000])
def test_the_warm_up_rate_is_that_of_the_steady_model(per_sample_ns):
    clock = Clock()
    begin = clock.at_ns
    sut = Works(clock, per_sample_ns, first_ns=S // 2)
    found = warm(sut)
    assert clock.at_ns - begin >= S
    # 10 ns a reading of the clock, two of them a group, are the loop's; the first group's
    # compilation is not in it.
    assert found.rate_qps == pytest.approx(1e9 / per_sample_ns, rel=0.01)
    assert found.slowest_group_ns == pytest.approx(8 * per_sample_ns + S // 2, rel=1e-3)
    assert found.groups == len(sut.groups)
    assert sut.flying == []


def test_a_model_slower_than_the_warm_up_still_gives_a_rate():
    sut = Works(Clock(), 10 * S)
    found = warm(sut, least_ns=1)
    assert found.rate_qps == pytest.approx(0.1, rel=1e-3)
    assert found.groups >= 2  # the first of a shape is no measure


def test_no_warm_up_time_at_all_still_runs_and_measures():
    sut = Works(Clock(), 1_000, first_ns=S)
    found = warm(sut, least_ns=0)
    assert len(sut.groups) >= 2
    # The first group, which may compile something, is not in the rate.
    assert found.rate_qps == pytest.approx(1e6, rel=0.01)


def test_every_stretch_of_the_warm_up_is_told_so_that_a_hang_shows():
    told = []
    sut = Works(Clock(), 20_000_000)
    warm(sut, tell=lambda: told.append(len(sut.groups)))
    assert told == sorted(set(told))
    assert told[0] == 1 and told[-1] == len(sut.groups)


def test_a_batch_larger_than_the_data_repeats_it():
    sut = Works(Clock(), 10_000_000)
    warm(sut, size=50, order=np.arange(20))
    assert set(sut.groups) == {50}
    assert sut.seen[:50] == [*range(20), *range(20), *range(10)]


@pytest.mark.parametrize(
    ("stamps", "device_ns", "columns"),
    [
        (False, 0, ()),
        (True, 0, ("finished", "started")),
        (False, 7, ("device",)),
        (True, 7, ("device", "finished", "started")),
    ],
)
def test_the_columns_that_a_system_fills_are_found(stamps, device_ns, columns):
    sut = Works(Clock(), 1_000_000, stamps=stamps, device_ns=device_ns)
    assert warm(sut).columns == columns


@pytest.mark.parametrize("size", [8, 5])
def test_a_failure_in_warm_up_names_the_batch_size_and_the_error(size):
    sut = Works(Clock(), 1_000_000, fails={size})
    with pytest.raises(UsageError) as caught:
        warm(sut, size=size)
    assert str(caught.value) == (f"the model failed in warm-up at batch size {size}: out of memory")


# The harness


@pytest.mark.parametrize("depth", [1, 4])
def test_the_cost_of_the_harness_is_measured_and_positive(depth):
    found = measure_harness(offline_loop, depth, 8, now_ns)
    assert found["batches"] == found["reads"] == HARNESS_BATCHES
    for name in ("loop_ns", "clock_ns"):
        assert len(found[name]) == HARNESS_BLOCKS
        assert all(type(took) is int and took > 0 for took in found[name])
    # Two readings of the clock are a part of what the loop does for a batch.
    assert sorted(found["loop_ns"])[HARNESS_BLOCKS // 2] > min(found["clock_ns"])


def test_what_the_harness_costs_on_a_clock_that_is_known():
    found = measure_harness(offline_loop, 1, 8, Clock())
    # 400 batches: a reading at each issue and at each end, and the one that ends the block.
    assert found["loop_ns"] == [(2 * 400 + 1) * 10] * HARNESS_BLOCKS
    assert found["clock_ns"] == [(400 + 1) * 10] * HARNESS_BLOCKS


def test_the_loop_over_nothing_ends_every_row():
    seen = []

    def loop(sut, log, groups, collect, now):
        offline_loop(sut, log, groups, collect, now)
        failed = int((log.completed == FAILED).sum())
        seen.append((log.ended[0], failed, int(log.count.sum())))
        sut.load(np.arange(1))
        sut.unload(np.arange(1))
        sut.close()

    measure_harness(loop, 3, 8, now_ns)
    # One row a group, whatever its size: a large batch must not cost the run memory.
    rows = HARNESS_BATCHES * 8
    assert seen == [(rows * (k + 1), 0, rows) for k in range(HARNESS_BLOCKS)]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"batch_size": 0}, "a batch size of 0 is below 1"),
        ({"duration_ns": 0}, "the duration must be above zero"),
        ({"warmup_ns": -1}, "the warm-up not negative"),
        ({"num_samples": 0}, "0 samples are fewer than 1"),
        ({"num_samples": 10_000_001, "samples": "gather"}, "10000001 samples are more than 10000"),
        ({"samples": "all"}, "samples 'all' are neither gather nor shard"),
        ({"until": 0.0}, "not between 0 and 100 %"),
        ({"rules": "mlperf-v4"}, "mlperf-v4"),
        ({"shares": "fair"}, "shares 'fair' are neither even nor rate"),
    ],
)
def test_settings_out_of_range_are_sentences(values, sentence):
    with pytest.raises(UsageError) as caught:
        Settings(**values)
    assert sentence in str(caught.value)


def test_settings_at_their_limits_are_taken():
    low = Settings(batch_size=1, duration_ns=1, warmup_ns=0, num_samples=1, shares="rate")
    assert (low.batch_size, low.duration_ns, low.warmup_ns, low.num_samples) == (1, 1, 0, 1)
    most = Settings(num_samples=SAMPLE_LIMIT, samples="gather")
    assert most.num_samples == SAMPLE_LIMIT


def test_settings_stand_for_the_documented_defaults():
    settings = Settings()
    assert (settings.duration_ns, settings.warmup_ns) == (5 * S, S)
    assert (settings.seed, settings.shares, settings.num_samples) == (0, "even", None)
    assert prepare.HEADROOM == 1.1
