"""The decisions of a peak search: on systems of known capacity, and on a simulated queue."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal, localcontext

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from distbench.arrivals import poisson_ns
from distbench.early_stopping import least_queries, over_allowed
from distbench.prepare import Cue
from distbench.samples import SampleLog
from distbench.search import (
    CONFIRM,
    CONFIRM_STEPS,
    DOUBLINGS,
    FAIL,
    HALVINGS,
    LONGEST,
    PASS,
    PROBE,
    PROBE_MOST,
    RAISE_STEPS,
    UNCLEAR,
    UNKNOWN,
    End,
    Outcome,
    Plan,
    Step,
    judged,
    probe_lengths_ns,
    replay,
    search,
)
from distbench.server import COLUMNS, server_loop
from distbench.stats import least_samples, quantile_interval
from distbench.sut import Sleep, collector

MS, S = 10**6, 10**9
MOST_WINDOWS = 3 * (max(DOUBLINGS, HALVINGS) + 1 + 5) + len(CONFIRM_STEPS)
"""Three probes of each rate at most; five halvings of a bracket of 2 bring it below 3 %."""

Answer = Callable[[Step], Outcome]
Latencies = Callable[[float, int, int], NDArray[np.int64]]


def plan(first_qps: float = 100.0, **others: object) -> Plan:
    asked = {
        "probe_ns": S, "duration_ns": 60 * S, "quantiles": (0.99,), "replicas": 1, **others,
    }  # fmt: skip
    return Plan(first_qps, **asked)  # type: ignore[arg-type]


def run(asked: Plan, answer: Answer) -> tuple[End, list[Step], list[Outcome]]:
    going, steps, outcomes = search(asked), list[Step](), list[Outcome]()
    step = next(going)
    try:
        while True:
            steps.append(step)
            outcomes.append(answer(step))
            assert len(steps) <= MOST_WINDOWS
            step = going.send(outcomes[-1])
    except StopIteration as stop:
        return stop.value, steps, outcomes


def peak_of(steps: list[Step], outcomes: list[Outcome]) -> float:
    """Return the rate of the last window that confirmed."""
    kept = [
        step.target_qps
        for step, outcome in zip(steps, outcomes, strict=True)
        if (step.kind, outcome.word) == (CONFIRM, PASS)
    ]
    return kept[-1] if kept else 0.0


def until(capacity_qps: float) -> Answer:
    """Answer as a system that keeps the bounds up to its capacity, and is sure of it."""

    def answer(step: Step) -> Outcome:
        kept = step.target_qps <= capacity_qps
        return Outcome(PASS if kept else FAIL, kept)

    return answer


# One bound of one probe


@pytest.mark.parametrize("quantile", [0.9, 0.99, 0.999])
@pytest.mark.parametrize("queries", [50, 459, 460, 5_000])
def test_a_probe_passes_by_early_stopping_and_fails_likewise(quantile: float, queries: int) -> None:
    reach = min(queries, int(2 * queries * (1 - quantile)) + 60)
    words = [judged(queries, over, quantile)[0] for over in range(reach + 1)]
    assert words == sorted(words, key=[PASS, UNCLEAR, FAIL].index)
    allowed = over_allowed(queries, quantile)
    if allowed is None:  # the percentile itself decides: LoadGen's, sorted[int(n * p)]
        assert UNCLEAR not in words
        assert words.count(PASS) == queries - int(queries * quantile)
        return
    assert words.count(PASS) == allowed + 1
    # As many slow queries, or more, a system that just keeps the bound shows once in a hundred.
    fails, p = words.index(FAIL), 1 - quantile
    mean = queries * p
    assert fails > mean
    log = [
        math.lgamma(queries + 1) - math.lgamma(k + 1) - math.lgamma(queries - k + 1)
        + k * math.log(p) + (queries - k) * math.log(1 - p)
        for k in range(fails - 1, queries + 1)
    ]  # fmt: skip
    tail = sum(math.exp(each) for each in log[1:])
    assert tail <= 0.0100001 < tail + math.exp(log[0])


def test_the_percentile_itself_is_told_beside_it() -> None:
    for over in range(40):
        values = np.sort(np.r_[np.zeros(1000 - over), np.ones(over)])
        assert judged(1000, over, 0.99)[1] == (values[int(1000 * 0.99)] == 0)
    assert judged(0, 0, 0.99)[0] == UNKNOWN


# Whole searches, on systems that are sure


@pytest.mark.parametrize("capacity", [104.0, 199.0, 201.0, 731.0, 3_100.0])
def test_the_peak_is_found_to_within_the_resolution(capacity: float) -> None:
    end, steps, outcomes = run(plan(), until(capacity))
    assert end == End(True, True, False)
    assert steps[0] == Step(PROBE, 100.0, round(1.1 * 459 / 100 * S))
    found = peak_of(steps, outcomes)
    assert Step(CONFIRM, found, 60 * S) in steps
    assert capacity / (1 + RAISE_STEPS[0]) / 1.001 < found <= capacity
    # One or two that keep the bounds, and the one that does not.
    assert [step.kind for step in steps].count(CONFIRM) in (2, 3)
    assert len(steps) < 20


def test_a_system_below_the_first_rate_is_found_by_halving() -> None:
    end, steps, outcomes = run(plan(10_000.0), until(120.0))
    assert end.confirmed
    assert 116.0 < peak_of(steps, outcomes) <= 120.0


def test_no_rate_keeps_the_bound() -> None:
    end, steps, _ = run(plan(10_000.0), until(1.0))
    assert (end.found, end.confirmed) == (False, False)
    assert end.why == "every rate down to 39.05 queries/s failed"
    assert {step.kind for step in steps} == {PROBE}
    assert len(steps) == 2 * (1 + HALVINGS)


def test_a_rate_with_too_few_queries_is_not_probed() -> None:
    # 16 queries in 10 s: nothing is learnt below 1.6 queries/s.
    end, steps, _ = run(plan(10.0), until(0.5))
    assert min(step.target_qps for step in steps) == 2.5
    assert "2.5 queries/s failed" in end.why and "too few queries to judge" in end.why


def test_a_system_that_never_fails_ends_at_the_limit_and_says_so() -> None:
    end, steps, _ = run(plan(), until(math.inf))
    assert end == End(True, True, True)
    assert [step.target_qps for step in steps] == [100.0 * 2**n for n in [*range(7), 6]]


def test_where_no_probe_fails_a_confirming_window_that_does_brackets_the_peak() -> None:
    def late(step: Step) -> Outcome:
        return until(math.inf if step.kind == PROBE else 6_300.0)(step)

    end, steps, outcomes = run(plan(), late)
    assert end == End(True, True, False)
    assert [step.target_qps for step in steps[-2:]] == [6_400.0, 6_144.0]
    assert peak_of(steps, outcomes) == 6_144.0


def test_what_is_not_known_of_the_model_ends_at_once() -> None:
    end, steps, _ = run(plan(), lambda _step: Outcome(UNKNOWN, False))
    assert (end.found, len(steps)) == (False, 1)
    assert "not known of this model" in end.why


def test_one_pause_of_the_host_does_not_end_the_doubling() -> None:
    sure, failed = until(700.0), []

    def paused(step: Step) -> Outcome:
        if step.target_qps == 200.0 and not failed:
            failed.append(step)
            return Outcome(FAIL, False)
        return sure(step)

    end, steps, outcomes = run(plan(), paused)
    assert end.confirmed and 679.0 < peak_of(steps, outcomes) <= 700.0
    longer = [step.duration_ns for step in steps if step.target_qps == 200.0]
    assert len(longer) == 2 and longer[1] == 3 * longer[0]


@pytest.mark.parametrize(("capacity", "found"), [(205.0, 203.5), (213.0, 209.4), (700.0, 238.8)])
def test_what_probes_missed_by_chance_is_found_by_confirming(capacity: float, found: float) -> None:
    """Both probes of 200 queries/s fall into pauses, so that the bracket ends there."""
    sure = until(capacity)

    def paused(step: Step) -> Outcome:
        chance = step.kind == PROBE and step.target_qps == 200.0
        return Outcome(FAIL, False) if chance else sure(step)

    end, steps, outcomes = run(plan(), paused)
    assert end == End(True, True, capped=capacity == 700.0)
    assert peak_of(steps, outcomes) == pytest.approx(found, rel=1e-3)
    raised = [step.target_qps for step in steps if step.kind == CONFIRM]
    assert raised == sorted(raised) and raised[0] < 200.0
    assert {outcome.word for outcome in outcomes[-len(raised) : -1]} == {PASS}


def test_what_stays_unclear_is_decided_by_the_percentile_after_the_longest_probe() -> None:
    def unclear(step: Step) -> Outcome:
        kept = step.target_qps <= 300.0
        return Outcome(PASS if step.kind == CONFIRM and kept else UNCLEAR, kept)

    end, steps, outcomes = run(plan(probe_ns=3 * S), unclear)
    assert end.confirmed and 290.0 < peak_of(steps, outcomes) <= 300.0
    first = [step.duration_ns for step in steps if step.target_qps == 100.0]
    assert first == [round(5.049 * S), round(3 * 5.049 * S), 30 * S]


def test_the_nearer_the_bracket_the_longer_the_probes() -> None:
    _, steps, _ = run(plan(5_000.0), until(7_123.0))
    lengths = {}
    for step in steps:
        if step.kind == PROBE:
            lengths.setdefault(step.target_qps, step.duration_ns / S)
    first = [*lengths.values()]
    assert first[:3] == [1.0, 1.0, 1.0]
    assert first[3:] == pytest.approx([2.0, 4.0, 8.0, 10.0], rel=1e-2)


def test_confirming_steps_down_until_the_bound_is_kept_or_no_step_is_left() -> None:
    def kept(words: list[tuple[str, bool, bool]]) -> tuple[End, list[float]]:
        left = iter(words)
        sure = until(100.0)

        def answer(step: Step) -> Outcome:
            return sure(step) if step.kind == PROBE else Outcome(*next(left))

        end, steps, _ = run(plan(), answer)
        rates = [step.target_qps for step in steps if step.kind == CONFIRM]
        return end, rates

    sure, near = (PASS, True, True), (UNCLEAR, True, True)
    # The first one confirms: up until one does not, and the last that did is the peak.
    assert kept([sure, near]) == (End(True, True, False), [100.0, 102.0])
    assert kept([sure, sure, (FAIL, False, True)])[1] == [100.0, 102.0, 104.0]
    assert kept([sure] * 7) == (
        End(True, True, True),
        [100.0, 102.0, 104.0, 107.0, 111.0, 115.0, 122.0],
    )
    # After a step down no step goes up: there it was seen not to be kept.
    assert kept([near, near, sure])[1] == [100.0, 98.0, 96.0]
    assert kept([(UNCLEAR, False, True), sure])[1] == [100.0, 98.0]
    # Far from it: the whole interval is above, or there is none.
    assert kept([(FAIL, False, True), sure])[1] == [100.0, 96.0]
    assert kept([(UNCLEAR, True, False), sure])[1] == [100.0, 96.0]
    assert kept([(UNCLEAR, True, False)] * 5)[1] == [100.0, 96.0, 92.0, 85.0, 78.0]
    end, rates = kept([near] * len(CONFIRM_STEPS))
    assert rates == [100.0, 98.0, 96.0, 94.0, 92.0, 89.0, 85.0, 78.0]
    assert (end.found, end.confirmed, end.why) == (True, False, "8 windows were tried")


def test_a_window_with_too_few_queries_for_any_interval_is_not_repeated_at_a_lower_rate() -> None:
    sure = until(100.0)

    def answer(step: Step) -> Outcome:
        return sure(step) if step.kind == PROBE else Outcome(UNCLEAR, True, False, True)

    end, steps, _ = run(plan(), answer)
    assert [step.kind for step in steps].count(CONFIRM) == 1
    assert not end.confirmed and "a lower rate has fewer still" in end.why


def test_a_probe_is_long_enough_for_a_queue_to_grow_to_the_bound() -> None:
    asked = plan(1e6, limit_ns=S // 2)
    assert probe_lengths_ns(asked, 100.0) == [round(5.049 * S), 10 * S, 10 * S]
    # Whatever the number of queries.
    assert probe_lengths_ns(asked, 1e6) == [5 * S] * 3


@given(
    qps=st.floats(1e-2, 1e7),
    probe_ns=st.integers(10**6, 10**11),
    quantile=st.sampled_from([0.5, 0.9, 0.99, 0.999]),
    longer=st.floats(1.0, 30.0),
)
def test_probes_are_bounded(qps: float, probe_ns: int, quantile: float, longer: float) -> None:
    asked = plan(qps, probe_ns=probe_ns, quantiles=(quantile, 0.5))
    lengths = probe_lengths_ns(asked, qps, longer)
    assert lengths == sorted(lengths)
    assert lengths[-1] <= LONGEST * probe_ns
    assert lengths[-1] * qps / S <= PROBE_MOST * 1.01 + qps / S
    need = least_queries(quantile, 0)
    if lengths[0] < min(LONGEST * probe_ns, lengths[-1]):
        assert lengths[0] >= probe_ns
        assert lengths[0] * qps / S >= need


@given(st.lists(st.tuples(st.sampled_from([PASS, FAIL, UNCLEAR]), st.booleans(), st.booleans())))
def test_the_same_outcomes_ask_for_the_same_windows(words: list[tuple[str, bool, bool]]) -> None:
    outcomes = [Outcome(*each) for each in words]
    steps, follows = replay(plan(), outcomes)
    assert (steps, follows) == replay(plan(), outcomes)
    assert (len(steps) < len(outcomes)) <= isinstance(follows, End)
    for count in range(len(steps)):
        before, wanted = replay(plan(), outcomes[:count])
        assert [*before, wanted] == steps[: count + 1]


def test_windows_beyond_the_end_of_a_search_are_left_out() -> None:
    end, steps, outcomes = run(plan(), until(300.0))
    assert replay(plan(), outcomes) == (steps, end)
    assert replay(plan(), [*outcomes, outcomes[-1]]) == (steps, end)
    assert replay(plan(), outcomes[:-1]) == (steps[:-1], steps[-1])


# Queueing theory


def wait_below(load: float, services: int) -> float:
    """Return P(wait <= services) in M/D/1, for whole services.

    The terms alternate and grow, hence sixty digits.

    Source:
        Erlang (1909); Franx, "A simple solution for the M/D/c waiting time distribution",
        Operations Research Letters 29 (2001), equation for one server.
    """
    with localcontext() as context:
        context.prec = 60
        rate, total = Decimal(load), Decimal(0)
        for k in range(services + 1):
            x = rate * (k - services)
            total += x**k / math.factorial(k) * (-x).exp() if k else (-x).exp()
        return float((1 - rate) * total)


def peak_load(services: int, quantile: float = 0.99) -> float:
    """Return the load at which latency is at most so many services at the quantile."""
    low, high = 0.01, 0.9999
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if wait_below(middle, services - 1) >= quantile else (low, middle)
        )
    return low


def latencies(qps: float, duration_ns: int, seed: int, service_ns: int = MS) -> NDArray[np.int64]:
    """Return the latencies of a queue with one server and equal services, by Lindley."""
    due = poisson_ns(qps, duration_ns, 1, seed)
    places = np.arange(len(due))
    begins = np.maximum.accumulate(due - places * service_ns) + places * service_ns
    return np.asarray(begins + service_ns - due)


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_the_formula_is_the_distribution_of_a_long_simulation(load: float) -> None:
    waits = latencies(load * 1000, 2_000 * S, 1) - MS
    for services in (0, 1, 4, 9):
        share = float((waits <= services * MS).mean())
        assert share == pytest.approx(wait_below(load, services), abs=4e-3)


def queue(seed: int, limit_ns: int, latencies: Latencies = latencies) -> Answer:
    """Answer as M/D/1 with services of 1 ms; every window has a schedule of its own."""
    number = iter(range(1_000))

    def answer(step: Step) -> Outcome:
        found = latencies(step.target_qps, step.duration_ns, 1_000 * seed + next(number))
        over = int((found > limit_ns).sum())
        word, kept, _ = judged(len(found), over, 0.99)
        if step.kind == PROBE:
            return Outcome(word, kept)
        interval = quantile_interval([found], 0.99)
        if interval.low is None or interval.high is None:
            return Outcome(UNCLEAR, kept, False, len(found) < least_samples(0.99, 0.95))
        word = PASS if interval.high <= limit_ns else FAIL if interval.low > limit_ns else UNCLEAR
        return Outcome(word, kept)

    return answer


@pytest.mark.parametrize(("services", "peak"), [(5, 560.78), (20, 885.62)])
def test_the_peak_of_a_queue_is_found(services: int, peak: float) -> None:
    """M/D/1, p99 within 5 and 20 services, probes from 2 s on, confirming windows of 600 s.

    Of ten fixed seeds nine at least end confirmed, within 5 % of the analytic peak, and at a rate
    that truly keeps the bound. First rates differ, so that no grid of rates is lucky. Of 100 seeds
    99 did, of both (5 and 20 services), and all kept the bound.
    """
    assert 1000 * peak_load(services) == pytest.approx(peak, abs=0.01)
    good, windows = 0, []
    for seed in range(10):
        asked = plan(rounded_share(seed), probe_ns=2 * S, duration_ns=600 * S)
        end, steps, outcomes = run(asked, queue(seed, services * MS))
        found = peak_of(steps, outcomes)
        true = wait_below(found / 1000, services - 1) >= 0.99
        good += end.confirmed and true and 0.95 <= found / peak <= 1.05
        windows.append(len(steps))
    assert good >= 9
    assert max(windows) <= 24


class Virtual:
    """A clock that only moves when somebody sleeps; also what ``distbench.sut`` takes for time."""

    def __init__(self) -> None:
        self.at = 1_000

    def now(self) -> int:
        return self.at

    def sleep(self, seconds: float) -> None:
        self.at += max(1, round(seconds * S))

    def wait(self, until_ns: int) -> None:
        self.at = max(self.at, until_ns)


def sleeping(qps: float, duration_ns: int, seed: int, service_ns: int = MS) -> NDArray[np.int64]:
    """Return the latencies of the Sleep SUT in the Server loop itself, in virtual time."""
    clock, due = Virtual(), poisson_ns(qps, duration_ns, 1, seed)
    log = SampleLog.in_memory(len(due), COLUMNS)
    log.scheduled[:] = due + clock.at
    cue = Cue(clock.now, lambda: None, clock.wait, [False])
    sut, order = Sleep(service_ns, now=clock.now), np.zeros(len(due), np.int64)
    errors: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distbench.sut.time", clock)
        collect = collector(log, {}, errors, clock.now)
        server_loop(sut, log, order, collect, cue, 1, 0, 10**9)
    assert errors == []
    return np.asarray(log.completed - log.scheduled)


def test_the_sleep_sut_in_the_loop_is_lindleys_queue() -> None:
    for seed, qps in enumerate((200.0, 560.0, 900.0)):
        assert np.array_equal(sleeping(qps, 20 * S, seed), latencies(qps, 20 * S, seed))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_peak_of_a_sleep_sut_is_found() -> None:
    """As above, by the Server loop over the Sleep SUT itself: in nine of ten seeds at least."""
    peak, good = 1000 * peak_load(5), 0
    for seed in range(10):
        asked = plan(rounded_share(seed), probe_ns=2 * S, duration_ns=600 * S)
        end, steps, outcomes = run(asked, queue(seed, 5 * MS, sleeping))
        found = peak_of(steps, outcomes)
        print(f"seed {seed}: {found / peak:.4f} of the analytic peak, {len(steps)} windows")
        good += end.confirmed and wait_below(found / 1000, 4) >= 0.99 and found / peak >= 0.95
    assert good >= 9


def rounded_share(seed: int) -> float:
    """Return a first rate as a warm-up of 1,000 queries/s, measured to 10 %, would give it."""
    return 250.0 + 4.7 * (seed - 5)


def test_a_short_confirming_window_confirms_less_and_not_wrongly() -> None:
    """Windows of 60 s confirm rates 0 to 25 % below the peak: what their intervals can tell."""
    confirmed = 0
    for seed in range(10):
        end, steps, outcomes = run(plan(250.0, duration_ns=60 * S), queue(seed, 20 * MS))
        confirmed += end.confirmed
        if end.confirmed:
            assert 0.75 <= peak_of(steps, outcomes) / 885.62 <= 1.0
    assert confirmed >= 9
