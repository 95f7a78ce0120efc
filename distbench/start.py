"""Starting together: clocks are measured, an instant is agreed, and every rank wakes for it.

A barrier lets ranks go one after the other, as its messages arrive. Here rank 0 names an instant a
little ahead, each rank is told it on its own clock, sleeps until shortly before and spins over it.
A rehearsal comes first: a rank that the scheduler held back makes it be repeated, up to
``MAX_ATTEMPTS`` times; what the real start was is recorded in any case.

Source: the window and round-time schemes of ReproMPI; Schuchart, Hunold and Bosilca, EuroMPI 2023.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from distbench.times import LATE_NS
from distbench.waiting import measure_spin_ns, quiet, set_timer_slack, wait_until

if TYPE_CHECKING:
    from distbench.clock import ClockModel
    from distbench.world import World

__all__ = ["measure_spin_ns", "quiet", "set_timer_slack", "wait_until"]

MAX_ATTEMPTS = 5
MARGIN_NS = 50_000_000
RELEASE_NS = 150_000
"""A thread is let go from its processor so long before the instant: the call takes some 30 us,
which would delay the first issue, and a thread that spins is not moved so soon."""


@dataclass(frozen=True)
class StartPlan:
    """The agreed instant.

    Attributes:
        reference_ns: on rank 0's clock.
        local_ns: on this rank's clock.
        attempts: rehearsals that were held.
        rehearsals_ns: this rank's lateness in each.
        margin_ns: how far ahead the instant was when it was named.
    """

    reference_ns: int
    local_ns: int
    attempts: int
    rehearsals_ns: tuple[int, ...]
    margin_ns: int


@contextmanager
def own_processor(world: World) -> Iterator[None]:
    """Keep this thread on a processor of its own while it waits for an instant, then let it go.

    Two ranks of one host that wake for the same instant are often put on the same processor, where
    one spins and the other begins up to 2 ms late. Ranks take processors far apart from each other;
    nothing is done where the host has one rank, or more ranks than processors.

    Args:
        world: this rank's place on its host.
    """
    every = sorted(os.sched_getaffinity(0))
    ranks = world.local_world_size
    if not 1 < ranks <= len(every):
        yield
        return
    os.sched_setaffinity(0, {every[world.local_rank * len(every) // ranks]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, every)


def wait_together(world: World, instant_ns: int, spin_ns: int) -> int:
    """Wait for an instant that other ranks wait for too, on an own processor until just before.

    Args:
        world: this rank's place on its host, and its clock.
        instant_ns: on this rank's clock.
        spin_ns: from ``measure_spin_ns``.

    Returns:
        The clock after the instant, ns.
    """
    with own_processor(world):
        wait_until(instant_ns - RELEASE_NS, world.now, spin_ns)
    return wait_until(instant_ns, world.now, spin_ns)


def synchronize(world: World, name: str) -> None:
    """Measure all clocks against rank 0's now; every rank calls it and waits for the others.

    Args:
        world: all ranks.
        name: names the place; used once in a run.
    """
    world.side.meet(f"{name}:here")
    if world.rank == 0:
        world.side.exchange_clocks()
    world.side.meet(f"{name}:measured")


def agree_start(world: World, name: str, spin_ns: int, extra_ns: int = 0) -> StartPlan:
    """Agree on the instant at which all ranks begin, after a rehearsal that was on time.

    Args:
        world: all ranks; all call it.
        name: names the window; used once in a run.
        spin_ns: from ``measure_spin_ns``.
        extra_ns: what this rank still has to do between the agreement and the instant.

    Returns:
        The plan; the caller waits for ``local_ns``.
    """
    synchronize(world, f"{name}:clocks")
    instant, _ = _name_instant(world, f"{name}:0", [], extra_ns, final=False)
    rehearsals: list[int] = []
    while True:
        rehearsals.append(wait_together(world, instant, spin_ns) - instant)
        attempt = len(rehearsals)
        instant, told = _name_instant(
            world, f"{name}:{attempt}", rehearsals, extra_ns, final=attempt == MAX_ATTEMPTS
        )
        if told["final"]:
            return StartPlan(told["at"], instant, attempt, tuple(rehearsals), told["margin"])


def name_instants(world: World, place: str, ahead_ns: int, span_ns: int) -> tuple[int, int]:
    """Let rank 0 name an instant and another one behind it, without a rehearsal; all ranks call it.

    For many short stretches that follow each other, of which each one records how late it began.

    Args:
        world: all ranks.
        place: names the stretch; used once in a run.
        ahead_ns: how far ahead of now the first instant is.
        span_ns: from the first to the second one, on rank 0's clock.

    Returns:
        Both instants on this rank's clock, ns.
    """

    def answer(_payloads: list[bytes]) -> bytes:
        models = _models(world)
        at = world.now() + ahead_ns
        told = [[model.to_peer_ns(at), model.to_peer_ns(at + span_ns)] for model in models]
        return json.dumps(told).encode()

    told = json.loads(world.side.meet(place, b"", answer))
    first, second = told[world.rank]
    return first, second


def _models(world: World) -> list[ClockModel]:
    """On rank 0: return the clock of every rank."""
    side = world.side
    by_leader = {leader: side.model(leader) for leader in (0, *side.leaders())}
    return [by_leader[side.leader_of(rank)] for rank in range(world.world_size)]


def _name_instant(
    world: World, place: str, rehearsals: list[int], extra_ns: int, *, final: bool
) -> tuple[int, dict[str, int]]:
    """Let rank 0 name the next instant; it is final when no rank was late in the rehearsal."""
    side = world.side

    def answer(payloads: list[bytes]) -> bytes:
        brought = [json.loads(p) for p in payloads]
        late = any(lateness > LATE_NS for lateness, _ in brought)
        margin = MARGIN_NS + max(extra for _, extra in brought)
        models = _models(world)
        at = world.now() + margin  # named last: fitting many clocks takes a while
        held = bool(rehearsals)
        return json.dumps(
            {
                "at": at,
                "local": [model.to_peer_ns(at) for model in models],
                "final": held and (final or not late),
                "margin": margin,
            }
        ).encode()

    brought = json.dumps([rehearsals[-1] if rehearsals else 0, extra_ns]).encode()
    told = json.loads(side.meet(place, brought, answer))
    return told["local"][world.rank], told
