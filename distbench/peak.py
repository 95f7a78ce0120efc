"""The windows of a peak search, one after the other; ``search`` decides, ``trail`` judges.

All ranks call ``measure_peak``. They prepare once; each window has its own rate, schedule and
agreed start. Rank 0 alone judges what a window showed, and tells the others over the links what
comes next.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from distbench import finish, record
from distbench.preamble import plain_config
from distbench.prepare import Course
from distbench.readiness import Prepared, part_of, prepare
from distbench.search import PROBE, Search, Step, search
from distbench.settings import Settings
from distbench.sut import SystemUnderTest
from distbench.tried import plan_of, reading
from distbench.window import Turn, one_window
from distbench.windows import Windows

if TYPE_CHECKING:
    from distbench.world import World


def measure_peak(course: Course, sut: SystemUnderTest, world: World, settings: Settings) -> Windows:
    """Search for the highest rate that keeps the bounds, from warm-up to the written result.

    Args:
        course: how the scenario fills a window.
        sut: the system under test of this rank.
        world: all ranks; all call it.
        settings: alike on all ranks; the load's rate is searched for.

    Returns:
        The windows, on every rank.

    Raises:
        UsageError: something cannot be used as asked, on any rank; all ranks raise it.
        IncompleteError: the result could not be written.
    """
    prepared = prepare(course, sut, world, settings, first=_first)
    plan = plan_of(settings, prepared.rates)
    going = search(plan)
    step: Step | None = next(going)
    folder = record.name_folder(world, settings.output_dir, course.scenario, settings.name)
    turn, results = Turn(), dict[str, dict[str, Any]]()
    while step is not None:
        turn.planned = turn.number + 1
        turn.search = {"plan": asdict(plan), "step": asdict(step)}
        own = record.window_folder(folder, turn.number, world.rank)
        run = one_window(_at(prepared, world, settings, step, turn), world, own, turn)
        found: dict[str, Any] = {}
        if world.rank == 0:
            found = results[own.path.name] = run.result()
        del run  # with the samples of all ranks, before those of the next window come
        step = _next(world, going, step, turn, found, settings.quiet)
        turn.number += 1
    return finish.write_windows(world, folder.path, results)


def _first(settings: Settings, rates: Sequence[float]) -> Settings:
    """Return the settings of the first probe; what was asked for stays in the record."""
    return replace(
        _of(settings, next(search(plan_of(settings, rates))), 0),
        config=settings.config or plain_config(settings),
    )


def _of(settings: Settings, step: Step, number: int) -> Settings:
    """Return the settings of one window of a search.

    A probe is not judged by the rules of a round, whose least duration it would have to last, and
    every window has a seed of its own: what was luck in one is not in the next.
    """
    assert settings.load is not None
    return replace(
        settings,
        load=settings.load.at(step.target_qps),
        duration_ns=step.duration_ns,
        seed=settings.seed + number,
        rules="none" if step.kind == PROBE else settings.rules,
    )


def _at(prepared: Prepared, world: World, settings: Settings, step: Step, turn: Turn) -> Prepared:
    """Return what a window of this step needs; all ranks draw the same schedule."""
    own = replace(_of(settings, step, turn.number), config=prepared.settings.config)
    part = part_of(prepared.course, prepared.sut, world, own, prepared.rates, prepared.slowest_ns)
    return replace(prepared, settings=own, part=part)


def _next(
    world: World, going: Search, step: Step, turn: Turn, result: dict[str, Any], quiet: bool
) -> Step | None:
    """Let rank 0 say what comes next; it alone judges, so that all ranks agree."""
    wanted: Step | None = None
    if world.rank == 0:
        found = reading(result, step.kind)
        if not quiet:
            sys.stderr.write(
                f"distbench: window {turn.number:03d}, {step.kind} at {step.target_qps:g} "
                f"queries/s for {step.duration_ns / 1e9:.3g} s: {found.outcome.word}, {found.why}\n"
            )
        try:
            wanted = going.send(found.outcome)
        except StopIteration:
            wanted = None
    # Made before ranks meet: an answer may run on the thread that keeps the heartbeats.
    told = json.dumps(None if wanted is None else asdict(wanted)).encode()
    answer = json.loads(world.side.meet("search", b"", lambda _: told))
    return None if answer is None else Step(**answer)
