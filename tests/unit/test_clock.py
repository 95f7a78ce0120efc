"""Offsets, bounds and drift, against clocks whose truth is known; nothing here sleeps."""

import random
import socket
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from distbench.clock import (
    ClockModel,
    Exchange,
    SkewedClock,
    clock_domain,
    contradiction_ns,
    measure_exchange,
    now_ns,
)
from distbench.errors import ClockError

S = 1_000_000_000
EPOCH = 10**15
"""Where the reference clock stands when a simulation begins: eleven days after a boot."""


class Base:
    """A reference clock that stands still until it is told otherwise."""

    def __init__(self, at_ns=EPOCH):
        self.at_ns = at_ns

    def __call__(self):
        return self.at_ns


def peer_clock(offset_ns=0, ppm=0.0, **bend):
    return SkewedClock(Base(), offset_ns, ppm, EPOCH, **bend)


def trip(clock, sent_ns, there_ns, held_ns, back_ns):
    """The four stamps of one round trip that begins at ``sent_ns`` on the reference clock."""
    t1, t2 = sent_ns + there_ns, sent_ns + there_ns + held_ns
    return sent_ns, t1 + clock.offset_at(t1), t2 + clock.offset_at(t2), t2 + back_ns


def series(clock, rng, begin_ns, count, delay_ns=20_000):
    """``count`` round trips, one after the other, over a network of random, lopsided delays."""
    trips = []
    for _ in range(count):
        there, back = (delay_ns + int(rng.expovariate(1 / delay_ns)) for _ in range(2))
        trips.append(trip(clock, begin_ns, there, 3_000, back))
        begin_ns = trips[-1][3] + 2_000
    return measure_exchange(trips)


def error_ns(model, clock, at_ns):
    return abs(model.offset_ns(at_ns) - clock.offset_at(at_ns))


# One exchange


def test_one_trip_worked_by_hand():
    # At 10 on the reference clock. Request: at most 1005 - 0; reply: at least 1010 - 20. Both are
    # stated 10 ns from there, where the clocks can have drifted by less than 1 ns: 989 .. 1006.
    assert measure_exchange([(0, 1005, 1010, 20)]) == Exchange(10, 997, 10, 15, 1)


def test_a_trip_long_ago_says_little_about_now():
    # The second is the shorter one, 100 ns against 101, at 2_000_060. Of itself it says 940 - 1
    # .. 1040 + 1. The first says 999 .. 1100, of an instant that is 2 ms away: 100 ppm are 200.
    first = (0, 1_100, 1_110, 111)
    second = (2_000_000, 2_001_040, 2_001_060, 2_000_120)
    assert measure_exchange([first, second]) == Exchange(2_000_060, 990, 52, 100, 2)
    # A tenth of a microsecond away it says 999 - 1, and that is what counts.
    first = tuple(stamp + 1_999_900 for stamp in first)
    assert measure_exchange([first, second]) == Exchange(2_000_060, 1_019, 23, 100, 2)


def test_a_later_trip_narrows_the_interval():
    wide = (0, 10_000, 10_000, 12_000)  # at most 10_000, at least -2_000
    narrow = (20_000, 23_900, 23_900, 27_000)  # at most 3_900, at least -3_100
    # At 23_500: -2_000 - 2 .. 3_900 + 1, where 2 is 100 ppm of 11_500, rounded up.
    assert measure_exchange([wide, narrow]) == Exchange(23_500, 949, 2953, 7_000, 2)


@st.composite
def simulated_trips(draw):
    """Trips over any delays, with a peer of any offset and up to 50 ppm of drift."""
    clock = peer_clock(draw(st.integers(-(10**18), 10**18)), draw(st.floats(-50, 50)))
    delays = st.integers(0, 10**8) | st.integers(0, 10**4)
    trips, at = [], EPOCH + draw(st.integers(0, 10**12))
    for _ in range(draw(st.integers(1, 20))):
        trips.append(trip(clock, at, draw(delays), draw(delays), draw(delays)))
        at = trips[-1][3] + draw(st.integers(0, S))
    return clock, trips


@settings(max_examples=400)
@given(simulated_trips())
def test_the_truth_is_always_within_the_bound(simulated):
    clock, trips = simulated
    found = measure_exchange(trips)
    assert abs(found.offset_ns - clock.offset_at(found.at_ns)) <= found.bound_ns
    assert found.trips == len(trips)
    assert trips[0][0] <= found.at_ns <= trips[-1][3]


def limit(distance_ns):
    return Fraction(abs(distance_ns)) * 100 / 10**6


@settings(max_examples=400)
@given(simulated_trips())
def test_the_interval_is_the_brute_force_intersection(simulated):
    _, trips = simulated
    found = measure_exchange(trips)
    shortest = min(t3 - t0 - (t2 - t1) for t0, t1, t2, t3 in trips)
    assert found.round_trip_ns == shortest
    at = found.at_ns
    assert any((t0 + t3) // 2 == at for t0, t1, t2, t3 in trips if t3 - t0 - t2 + t1 == shortest)
    low = max(t2 - t3 - limit(t3 - at) for _, _, t2, t3 in trips)
    high = min(t1 - t0 + limit(t0 - at) for t0, t1, _, _ in trips)
    assert low <= high + 1  # the stamps are whole ns, so the exact limits may cross by one
    assert found.offset_ns - found.bound_ns <= low
    assert high <= found.offset_ns + found.bound_ns
    # Not wider than that by more than the rounding of five integers.
    assert 2 * found.bound_ns <= high - low + 6


@settings(max_examples=400)
@given(simulated_trips())
def test_more_trips_are_at_least_as_tight_as_half_the_best_round_trip(simulated):
    _, trips = simulated
    found = measure_exchange(trips)
    best = min(trips, key=lambda t: t[3] - t[0] - (t[2] - t[1]))
    # Half the round trip, half of 100 ppm of the time it was under way, and rounding.
    assert found.bound_ns <= Fraction(found.round_trip_ns, 2) + limit(best[3] - best[0]) / 2 + 4


def test_a_step_of_the_clock_is_a_contradiction():
    clock = peer_clock(5 * S)
    before = trip(clock, EPOCH, 1_000, 10, 1_000)
    stepped = peer_clock(5 * S + 50_000)
    after = trip(stepped, EPOCH + 100_000, 1_000, 10, 1_000)
    # 50_000 less 2_000 of round trip; 100 ppm of the distance are 9 or 10 and one for the cut.
    with pytest.raises(ClockError, match=r"2 exchanges .* contradict each other by 479\d\d ns"):
        measure_exchange([before, after])


@pytest.mark.parametrize("direction", [1, -1])
def test_rates_are_taken_up_to_100_ppm_and_refused_above(direction):
    for ppm, meets in ((90, True), (150, False)):
        clock = peer_clock(0, direction * ppm)
        trips = [trip(clock, EPOCH + k * S, 1_000, 0, 1_000) for k in range(2)]
        if meets:
            assert measure_exchange(trips).trips == 2
        else:
            with pytest.raises(ClockError, match="a clock was stepped"):
                measure_exchange(trips)


def test_no_trips_is_an_error():
    with pytest.raises(ClockError, match="no round trip"):
        measure_exchange([])


# A model of several exchanges

WINDOW = 60 * S
INSTANTS = [EPOCH + k * WINDOW // 5_000 + k % 7 for k in range(5_001)]


def measured(clock, seed, every_s=1, loose=()):
    """100 trips before and after a window, 3 each second in it; those in ``loose`` 5 ms slow."""
    rng = random.Random(seed)
    found = [series(clock, rng, EPOCH - 10_000_000, 100)]
    for second in range(every_s, 60, every_s):
        slow = 5_000_000 if second in loose else 20_000
        found.append(series(clock, rng, EPOCH + second * S, 3, slow))
    return [*found, series(clock, rng, EPOCH + WINDOW, 100)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ppm", [50.0, -50.0])
def test_a_steady_drift_of_50_ppm(seed, ppm):
    clock = peer_clock(7_000_000_123, ppm)
    made = measured(clock, seed)
    model = ClockModel.fit(made)
    errors = [error_ns(model, clock, at) for at in INSTANTS]
    bounds = [model.bound_ns(at) for at in INSTANTS]
    assert all(e <= b for e, b in zip(errors, bounds, strict=True))
    assert max(bounds) < 100_000
    assert abs(model.drift_ppm - ppm) <= 0.5
    start_only = ClockModel.fit(made[:1])
    assert max(errors) <= max(error_ns(start_only, clock, at) for at in INSTANTS) / 20


@pytest.mark.parametrize("every_s", [1, 60])
@pytest.mark.parametrize("bend", [2.0, -2.0])
def test_a_rate_that_bends_by_2_ppm_in_mid_window(every_s, bend):
    clock = peer_clock(-3 * S, 30.0, bend_ppm=bend, bend_after_ns=WINDOW // 2)
    model = ClockModel.fit(measured(clock, 3, every_s))
    for at in INSTANTS:
        assert error_ns(model, clock, at) <= model.bound_ns(at)


def test_without_room_for_wander_the_bound_would_not_hold_over_a_bend():
    # Two exact exchanges 60 s apart, and a bend of 2 ppm half way: the chord is off by 2 ppm of
    # 30 * 30 / 60 s = 30 us there. The bound: 1 for each exchange, 2 ppm of 30 s = 60 us.
    clock = peer_clock(0, 0.0, bend_ppm=2.0, bend_after_ns=WINDOW // 2)
    ends = [Exchange(at, clock.offset_at(at), 1, 2, 1) for at in (EPOCH, EPOCH + WINDOW)]
    model = ClockModel.fit(ends)
    middle = EPOCH + WINDOW // 2
    assert error_ns(model, clock, middle) == 30_000
    assert model.bound_ns(middle) == 60_000 + 1 + 1 + 2
    assert all(error_ns(model, clock, at) <= model.bound_ns(at) for at in INSTANTS)


def test_outside_all_exchanges_the_bound_grows_by_100_ppm():
    clock = peer_clock(S, 50.0)
    model = ClockModel.fit(measured(clock, 5))
    first, last = model.exchanges[0], model.exchanges[-1]
    for distance in (0, 1, 10_000, S, 100 * S):
        for at, near in ((first.at_ns - distance, first), (last.at_ns + distance, last)):
            assert model.offset_ns(at) == near.offset_ns
            assert model.bound_ns(at) == near.bound_ns + distance // 10_000 + (distance > 0)
            assert error_ns(model, clock, at) <= model.bound_ns(at)


def test_between_two_exchanges_worked_by_hand():
    model = ClockModel((Exchange(0, 1_000, 100, 9, 1), Exchange(S, 5_000, 300, 9, 1)))
    at = S // 4
    assert model.offset_ns(at) == 2_000
    assert model.to_peer_ns(at) == at + 2_000
    # (3 * 100 + 1 * 300) / 4 = 150, 2 ppm of a quarter of a second = 500, rounding 3.
    assert model.bound_ns(at) == 150 + 500 + 3
    assert model.bound_ns(3 * S // 4) == 250 + 500 + 3
    assert model.bound_ns(0) == 100
    assert model.bound_ns(S) == 300
    assert model.drift_ppm == pytest.approx(4.0, abs=1e-12)


def test_the_exchange_at_an_instant_is_used_for_it():
    made = [Exchange(k * S, k * k * 1_000, 10 + k, 9, 1) for k in range(5)]
    model = ClockModel(tuple(made))
    assert [model.offset_ns(k * S) for k in range(5)] == [0, 1_000, 4_000, 9_000, 16_000]
    assert model.offset_ns(3 * S + S // 2) == 12_500


def test_no_exchange_is_the_reference_clock_itself():
    model = ClockModel.fit([])
    stamps = np.array([5, EPOCH, 10**18], np.int64)
    assert (model.offset_ns(EPOCH), model.bound_ns(EPOCH)) == (0, 0)
    assert model.to_peer_ns(EPOCH) == model.to_reference_ns(EPOCH) == EPOCH
    copied = model.many_to_reference_ns(stamps)
    assert copied.tolist() == stamps.tolist()
    assert not np.shares_memory(copied, stamps)
    assert model.drift_ppm is None


def test_drift_needs_two_exchanges():
    assert ClockModel((Exchange(0, 5, 1, 1, 1),)).drift_ppm is None


# What fit keeps


def test_fit_drops_a_loose_exchange_between_tight_ones():
    tight, loose, last = (
        Exchange(0, 1_000, 500, 9, 1),
        Exchange(S, 900_000, 1_000_000, 9, 1),
        Exchange(2 * S, 1_200, 500, 9, 1),
    )
    # Bracketed by tight ones 1 s away the bound is 500 + 2000: a hundredth of the loose one's.
    assert ClockModel.fit([last, loose, tight]).exchanges == (tight, last)
    kept = Exchange(S, 1_100, 2_400, 9, 1)
    assert ClockModel.fit([last, kept, tight]).exchanges == (tight, kept, last)


def test_fit_keeps_the_first_and_the_last_however_loose():
    made = [Exchange(k * S, 0, bound, 9, 1) for k, bound in enumerate((10**6, 10, 10**6))]
    assert ClockModel.fit(made).exchanges == tuple(made)


def test_fit_drops_nothing_that_is_tighter_elsewhere():
    # At the middle exchange, 6 s after the first and 4 s before the last, the outer two give
    # 100 + 2 ppm of 4 s + 3 = 8103: not above its own. Yet half way between them, at 5 s, they
    # give 10_103, and with it the bound there is (100 + 5 * 8103) / 6 + 2 ppm of 1 s + 3 = 8772.
    first, last = Exchange(0, 0, 100, 9, 1), Exchange(10 * S, 0, 100, 9, 1)
    middle = Exchange(6 * S, 0, 8_103, 9, 1)
    assert ClockModel((first, last)).bound_ns(middle.at_ns) == middle.bound_ns
    model = ClockModel.fit([first, middle, last])
    assert model.exchanges == (first, middle, last)
    assert model.bound_ns(5 * S) == (100 * 1 + 8_103 * 5) // 6 + 1 + 2_000 + 2


exchanges = st.lists(
    st.tuples(st.integers(1, 20 * S), st.integers(1, 10**5)), min_size=1, max_size=8
).map(
    lambda steps: [
        Exchange(sum(gap for gap, _ in steps[: k + 1]), 0, bound, 9, 1)
        for k, (_, bound) in enumerate(steps)
    ]
)


@settings(max_examples=300)
@given(exchanges)
@example([Exchange(0, 0, 1, 9, 1), Exchange(6 * S, 0, 8_004, 9, 1), Exchange(10 * S, 0, 1, 9, 1)])
def test_fit_never_makes_the_bound_worse_at_any_instant(made):
    every, fitted = ClockModel(tuple(made)), ClockModel.fit(made)
    first, last = made[0].at_ns, made[-1].at_ns
    ends = [e.at_ns for e in made]
    middles = [(a + b) // 2 for a in ends for b in ends]
    grid = [first + (last - first) * k // 200 for k in range(201)]
    for at in [*ends, *middles, *grid, first - S, last + S]:
        # Each bound is rounded twice; an exchange that was left out can cost these few ns.
        assert fitted.bound_ns(at) <= every.bound_ns(at) + 2 * len(made)


def test_a_busy_second_is_dropped_and_the_bound_still_holds():
    clock = peer_clock(S, 40.0)
    busy = {7, 20, 21, 22, 50}
    made = measured(clock, 11, loose=busy)
    model = ClockModel.fit(made)
    assert {made[second] for second in busy}.isdisjoint(model.exchanges)
    assert len(model.exchanges) > 30
    for at in INSTANTS:
        assert error_ns(model, clock, at) <= model.bound_ns(at) < 100_000


# There and back


@st.composite
def models(draw):
    """Up to six exchanges over hours, rates within 100 ppm, stamps up to 1e18 ns and more."""
    at = draw(st.integers(0, 10**18))
    offset = draw(st.integers(-(10**18), 10**18))
    made = [Exchange(at, offset, 10, 9, 1)]
    for _ in range(draw(st.integers(0, 5))):
        gap = draw(st.integers(1_000, 3_600 * S))
        at, offset = at + gap, offset + int(gap * draw(st.floats(-100, 100)) / 10**6)
        made.append(Exchange(at, offset, 10, 9, 1))
    span = at - made[0].at_ns
    instants = draw(
        st.lists(st.integers(made[0].at_ns - S, at + S + span // 4), min_size=1, max_size=20)
    )
    return ClockModel(tuple(made)), instants


@settings(max_examples=300)
@given(models())
def test_to_the_peer_and_back_is_within_1_ns(case):
    model, instants = case
    for at in instants:
        assert abs(model.to_reference_ns(model.to_peer_ns(at)) - at) <= 1


@settings(max_examples=300)
@given(models())
def test_many_at_once_are_within_1_ns_of_one_by_one(case):
    model, instants = case
    peer = np.array([model.to_peer_ns(at) for at in instants], np.int64)
    before = peer.copy()
    many = model.many_to_reference_ns(peer)
    assert many.dtype == np.int64
    assert (peer == before).all()
    one_by_one = np.array([model.to_reference_ns(int(stamp)) for stamp in peer], np.int64)
    assert np.abs(many - one_by_one).max() <= 1


def test_no_nanosecond_is_lost_at_1e18():
    # float64 has steps of 128 ns there.
    model = ClockModel(
        (Exchange(10**18, 10**18 + 77, 5, 9, 1), Exchange(10**18 + S, 10**18 + 1_077, 5, 9, 1))
    )
    at = 10**18 + S // 2 + 1
    assert model.offset_ns(at) == 10**18 + 577
    assert model.to_peer_ns(at) == 2 * 10**18 + S // 2 + 578
    assert model.to_reference_ns(model.to_peer_ns(at)) == at
    stamps = np.array([model.to_peer_ns(at + k) for k in range(50)], np.int64)
    assert np.abs(model.many_to_reference_ns(stamps) - at - np.arange(50)).max() <= 1


# The clocks themselves


def test_a_skewed_clock_reads_what_it_says():
    base = Base(1_000)
    clock = SkewedClock(base, 500, 50.0, 1_000, bend_ppm=10.0, bend_after_ns=S)
    assert clock() == 1_500
    base.at_ns += S
    assert clock() == S + 1_500 + 50_000
    base.at_ns += S
    assert clock() == 2 * S + 1_500 + 110_000
    assert clock.offset_at(1_000 - S) == 500 - 50_000


def test_now_is_the_clock_that_ntp_does_not_slew():
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
    stamp = now_ns()
    assert before <= stamp <= time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)


def test_a_domain_is_the_same_in_another_process_of_this_host():
    code = "from distbench.clock import clock_domain; print(clock_domain())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parents[2],
        check=True,
    )
    assert done.stdout.strip() == clock_domain()
    boot, space = clock_domain().split("/")
    assert boot == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert space == str(Path("/proc/self/ns/time").stat().st_ino)


def test_a_domain_where_the_kernel_tells_nothing(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", refuse)
    monkeypatch.setattr(Path, "stat", refuse)
    assert clock_domain() == f"host-{socket.gethostname()}/none"


def exchanges_of(offset_at, bound_ns, seconds):
    return [Exchange(s * S, offset_at(s), bound_ns, 2 * bound_ns, 3) for s in seconds]


def test_a_steady_drift_contradicts_nothing():
    assert contradiction_ns(exchanges_of(lambda s: s * 50_000, 1_000, range(10))) == 0
    assert contradiction_ns([]) == 0


def test_a_step_between_two_exchanges_is_seen_and_sized():
    found = exchanges_of(lambda s: 50 * 10**6 * (s >= 5), 10_000, range(10))
    # 50 ms less both bounds and 100 ppm of the second between them.
    assert contradiction_ns(found) == 50 * 10**6 - 2 * 10_000 - 100_001


def test_an_exchange_that_the_others_disagree_with_is_not_dropped_in_silence():
    quiet = exchanges_of(lambda s: 0, 1_000, (0, 10))
    odd = Exchange(5 * S, 200_000, 40_000, 80_000, 3)
    assert contradiction_ns([*quiet, odd]) > 100_000
