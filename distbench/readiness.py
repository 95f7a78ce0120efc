"""Before the first window: agree on the run, measure the harness, warm up, fix every rank's part.

All ranks call ``prepare`` once; what it returns holds for all windows of a command.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from distbench import record, start
from distbench.errors import ModelError, UsageError
from distbench.harness import measure_harness
from distbench.load import backlog_limit
from distbench.preamble import agree_on_run
from distbench.prepare import (
    Course,
    Loop,
    Part,
    Warmup,
    shapes,
    share_out,
    warm_up,
)
from distbench.rules import parse_rules
from distbench.ruling import limits_for
from distbench.settings import Settings
from distbench.sut import SystemUnderTest

if TYPE_CHECKING:
    from distbench.world import World

SETUP_S = 600.0
"""How long a factory, a group in warm-up or one in the accuracy pass may take, unless --timeout is
longer: weights may come over a slow disk, and a first group may be compiled."""


def setup_limit_s(settings: Settings) -> float:
    """Return how long nothing may end outside the window, s."""
    return max(SETUP_S, (settings.timeout_ns or 0) / 1e9)


@dataclass(frozen=True)
class Prepared:
    """What is known before the first window, and holds for all of them.

    Attributes:
        course: how the scenario fills a window.
        sut: loaded and warm.
        settings: of the next window.
        warm: what this rank's warm-up showed.
        cost: what the harness costs on this rank.
        rates: of all ranks' warm-ups, samples/s.
        part: this rank's part of the next window.
        most_tokens: of a sample on any rank; None where no engine tells.
        slowest_ns: the longest group of all warm-ups.
    """

    course: Course
    sut: SystemUnderTest
    settings: Settings
    warm: Warmup
    cost: dict[str, Any]
    rates: Sequence[float]
    part: Part
    most_tokens: int | None
    slowest_ns: int


def prepare(
    course: Course,
    sut: SystemUnderTest,
    world: World,
    settings: Settings,
    first: Callable[[Settings, Sequence[float]], Settings] = lambda settings, _: settings,
) -> Prepared:
    """Agree on the run, measure harness and clocks, warm up, fix every rank's part.

    Args:
        course: how the scenario fills a window.
        sut: the system under test of this rank.
        world: all ranks; all call it.
        settings: alike on all ranks.
        first: gives the settings of the first window, from these and the warm-up rates.

    Raises:
        UsageError: something cannot be used as asked, on any rank; all ranks raise it.
    """
    agree_on_run(world, sut, settings)
    world.check("rules", _unjudged(course, sut, settings))
    active = leaders(world)
    searched = settings.load is not None and settings.load.searched
    drawn = settings.load is not None and not searched and settings.official is None
    if settings.num_samples is not None or drawn:
        course.part(0, sut, settings, [1.0] * len(active))  # too few is told before the warm-up
    start.set_timer_slack()
    cost = measure_harness(course.harness, sut.depth, settings.group, world.now, course.columns)
    start.synchronize(world, "first")
    warm = _warm(course, sut, world, settings)
    warm, rates, most, slowest_ns = _told_by_all(world, sut, warm)
    settings = first(settings, rates)
    ranks = None if len(active) == world.world_size else active
    part = part_of(course, sut, world, settings, rates, slowest_ns, ranks)
    _warm_shapes(course.loop, sut, world, settings, shapes(settings, len(part.order)))
    return Prepared(course, sut, settings, warm, cost, rates, part, most, slowest_ns)


def leaders(world: World) -> list[int]:
    """Return the ranks that are issued samples: the first one of each replica."""
    return list(range(0, world.world_size, world.world_size // world.replicas))


def part_of(
    course: Course,
    sut: SystemUnderTest,
    world: World,
    settings: Settings,
    rates: Sequence[float],
    slowest_ns: int,
    ranks: Sequence[int] | None = None,
) -> Part:
    """Return this rank's part of a window; all ranks call it, and draw the same schedule.

    Args:
        course: how the scenario fills a window.
        sut: the system under test of this rank.
        world: all ranks.
        settings: of the window.
        rates: of all ranks' warm-ups, samples/s.
        slowest_ns: the longest group of these.
        ranks: that have a part; the others get an empty one. None: all.

    Raises:
        UsageError: a rank would have nothing to do, or schedules differ; all ranks raise it.
    """
    active = range(world.world_size) if ranks is None else ranks
    place = active.index(world.rank) if world.rank in active else 0
    part = course.part(place, sut, settings, [rates[rank] for rank in active])
    if ranks is not None:
        rows = len(part.order) if world.rank in active else 0
        due_ns = None if part.due_ns is None else part.due_ns[:rows]
        part = replace(part, order=part.order[:rows], due_ns=due_ns, active=tuple(ranks))
    if part.made is None or settings.load is None:
        return part
    digest = {"the schedule": part.made["digest"]}
    world.agree("schedule", digest, "give every node the same trace file")
    limit = backlog_limit(settings.load, len(active), slowest_ns)
    return replace(part, made={**part.made, "backlog": limit})


def _told_by_all(
    world: World, sut: SystemUnderTest, warm: Warmup
) -> tuple[Warmup, list[float], int | None, int]:
    """Exchange what the warm-ups showed.

    Returns:
        This rank's warm-up with the columns of all, for the logs of all ranks have the same; the
        rates, samples/s; the most tokens of a sample; the slowest group, ns.
    """
    most = getattr(sut, "most_tokens", None)
    told = world.gather_json([warm.rate_qps, warm.columns, most, warm.slowest_group_ns])
    columns = tuple(sorted({name for each in told for name in each[1]}))
    known = [each[2] for each in told if each[2] is not None]
    slowest_ns = max(each[3] for each in told)
    return (
        replace(warm, columns=columns),
        [each[0] for each in told],
        max(known, default=None),
        slowest_ns,
    )


def _unjudged(course: Course, sut: SystemUnderTest, settings: Settings) -> UsageError | None:
    """Return why the rules cannot judge this run, before anything is measured; None if they can."""
    rules = parse_rules(settings.rules)
    bounds = settings.load.bounds if settings.load is not None else ()
    arrival = settings.load.arrival if settings.load is not None else "poisson"
    if rules.round is not None and arrival != "poisson":
        return UsageError(
            f"{rules.name} is of Poisson arrivals, and --arrival {arrival} is none: leave one out"
        )
    try:
        if rules.round is not None and settings.official is None:
            limits_for(rules, course.scenario, settings.model_name, sut.total, bounds)
    except UsageError as error:
        return error
    return None


def _warm(course: Course, sut: SystemUnderTest, world: World, settings: Settings) -> Warmup:
    """Load the samples and warm up; a failure on any rank stops all with its sentence."""
    size = settings.group
    if settings.num_samples is not None:
        share = share_out(settings.num_samples, world.replica, None, world.replicas)
        size = min(size, max(1, share))
    order = np.arange(sut.resident, dtype=np.int64)
    problem, warm = None, Warmup(0.0, 0, 0, ())
    try:
        with record.watched(world, setup_limit_s(settings)) as tell:
            if course.central:
                course.central.load(sut, order)
            else:
                sut.load(order)
            if world.leader:
                warm = warm_up(course.loop, sut, size, settings.warmup_ns, order, world.now, tell)
    except Exception as error:  # the user's model: any exception is a sentence on every rank
        problem = _failed_warm_up(error)
    world.check("warm-up", problem)
    return warm


def _warm_shapes(
    loop: Loop, sut: SystemUnderTest, world: World, settings: Settings, sizes: Sequence[int]
) -> None:
    """Run groups of other sizes that may come: the first run of a shape may compile something."""
    problem = None
    try:
        with record.watched(world, setup_limit_s(settings)) as tell:
            order = np.arange(sut.resident, dtype=np.int64)
            for size in sizes if world.leader else ():
                warm_up(loop, sut, size, 0, order, world.now, tell)
    except Exception as error:  # likewise
        problem = _failed_warm_up(error)
    world.check("last group", problem)


def _failed_warm_up(error: Exception) -> UsageError:
    if isinstance(error, UsageError):
        return error
    problem = ModelError(f"the model failed in warm-up: {type(error).__name__}: {error}")
    problem.__cause__ = error
    return problem
