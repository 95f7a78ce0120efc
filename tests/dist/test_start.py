"""The agreed start, with clocks that are wrong in known ways."""

from __future__ import annotations

import time
from typing import Any

import pytest

from distbench.clock import SkewedClock, now_ns
from distbench.times import LATE_NS
from tests.support import run_ranks

pytestmark = pytest.mark.timeout(90)


def _starts(delay_s: float, rounds: int) -> list[tuple[Any, ...]]:
    """Agree on starts; rank 1 is held back by ``delay_s`` before each real one."""
    from distbench.start import agree_start, measure_spin_ns, wait_until
    from distbench.world import join

    told = []
    with join(device="cpu", timeout_s=30) as world:
        spin_ns = measure_spin_ns(world.now)
        for i in range(rounds):
            plan = agree_start(world, f"s{i}", spin_ns)
            if delay_s and world.rank == 1:
                time.sleep(delay_s + (plan.local_ns - world.now()) / 1e9)
            stamp = wait_until(plan.local_ns, world.now, spin_ns)
            told.append((plan.reference_ns, plan.local_ns, stamp, plan.attempts))
    return told


def test_all_ranks_of_one_clock_are_given_the_same_instant_and_never_begin_before_it() -> None:
    zero, one = run_ranks(_starts, 2, 0.0, 5)
    for (reference, local, stamp, _), (reference_1, local_1, stamp_1, _) in zip(
        zero, one, strict=True
    ):
        assert reference == reference_1 == local == local_1
        assert stamp >= local and stamp_1 >= local


def test_a_rank_that_is_50_ms_late_shows_it_every_time() -> None:
    zero, one = run_ranks(_starts, 2, 0.05, 10)
    for (_, local, _, _), (_, local_1, stamp_1, _) in zip(zero, one, strict=True):
        assert local == local_1
        assert stamp_1 - local_1 > 50_000_000 > LATE_NS


def _late_rehearsals() -> tuple[int, list[int]]:
    """Rank 1 oversleeps every rehearsal: its clock says it is later than it is when it wakes."""
    from distbench import start
    from distbench.world import join

    original = start.wait_until
    with join(device="cpu", timeout_s=30) as world:
        if world.rank == 1:

            def oversleep(instant_ns: int, now: Any, spin_ns: int) -> int:
                return original(instant_ns, now, spin_ns) + 2 * LATE_NS

            start.wait_until = oversleep
        plan = start.agree_start(world, "s", 200_000)
        return plan.attempts, list(plan.rehearsals_ns)


def test_a_late_rehearsal_is_repeated_up_to_the_limit_and_counted() -> None:
    for attempts, rehearsals in run_ranks(_late_rehearsals, 2):
        assert attempts == 5
        assert len(rehearsals) == 5


OFFSET_NS, PPM = 7_000_123_456, 50.0


def _skewed() -> tuple[Any, ...]:
    """Rank 1 pretends to be another clock domain: 7 s ahead and 50 ppm fast."""
    import os

    from distbench import seating
    from distbench.start import agree_start, synchronize, wait_until
    from distbench.world import join

    rank = int(os.environ["RANK"])
    clock: Any = now_ns
    if rank == 1:
        clock = SkewedClock(now_ns, OFFSET_NS, PPM, now_ns())
        seating.clock_domain = lambda: "another/1"
    with join(device="cpu", timeout_s=30, now=clock) as world:
        synchronize(world, "a")
        time.sleep(1.0)
        plan = agree_start(world, "s", 200_000)
        stamp = wait_until(plan.local_ns, world.now, 200_000)
        synchronize(world, "b")
        model = world.side.model(1) if rank == 0 else None
        origin = (clock.origin_ns, clock.offset_ns) if rank == 1 else None
        return plan.reference_ns, plan.local_ns, stamp, model, origin


def test_an_instant_is_named_to_a_skewed_rank_within_the_bound_of_its_clock() -> None:
    zero, one = run_ranks(_skewed, 2)
    model, (origin_ns, offset_ns) = zero[3], one[4]
    truth = SkewedClock(now_ns, offset_ns, PPM, origin_ns)
    assert len(model.exchanges) >= 2
    at = zero[0]
    assert one[0] == at
    assert abs(model.offset_ns(at) - truth.offset_at(at)) <= model.bound_ns(at)
    assert model.bound_ns(at) < 1_000_000
    assert abs(one[1] - (at + truth.offset_at(at))) < 1_000_000
    assert abs(model.drift_ppm - PPM) < 5
    # The published skew is true within its bound: stamps mapped back to the true clock.
    true_start_1 = one[2] - truth.offset_at(one[2] - truth.offset_at(at))
    shown = model.to_reference_ns(one[2])
    assert abs(shown - true_start_1) <= model.bound_ns(shown) + 2
