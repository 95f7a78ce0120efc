"""A window from warm-up to the written result, whatever the scenario; only the loop is its own.

All ranks call ``measure``: agree on the run, warm up, fix every rank's samples, open the log, agree
on an instant, run the loop in quiet, meet, measure the clocks again, check, gather, judge.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from distbench import finish, record, start
from distbench.environment import schedstat
from distbench.errors import DistbenchError, ModelError, UsageError, where
from distbench.preamble import agree_on_run, describe_after, describe_rank
from distbench.prepare import (
    ALL_COLUMNS,
    OPTIONAL,
    Loop,
    Settings,
    Warmup,
    choose_kept,
    groups_of,
    measure_harness,
    plan_samples,
    sample_order,
    share_out,
    stay_on_ranks,
    warm_up,
)
from distbench.samples import fail_rest
from distbench.steady import UNTIL_LEAST
from distbench.sut import Indices, SystemUnderTest
from distbench.windows import Windows, until
from distbench.wire import End

if TYPE_CHECKING:
    from distbench.run import Run
    from distbench.world import World

SETUP_S = 600.0
"""How long a factory, a group in warm-up or one in the accuracy pass may take, unless --timeout is
longer: weights may come over a slow disk, and a first group may be compiled."""


def setup_limit_s(settings: Settings) -> float:
    """Return how long nothing may end outside the window, s."""
    return max(SETUP_S, (settings.timeout_ns or 0) / 1e9)


@dataclass
class Course:
    """Where a command of several windows stands.

    Attributes:
        number: of the next window, from 0.
        planned: how many there are to be by the last decision; 0 for a command of one window.
        accurate: outputs of the accuracy pass, which the first window had, by sample index.
    """

    number: int = 0
    planned: int = 0
    accurate: dict[int, Any] = field(default_factory=dict)

    def told(self) -> dict[str, int] | None:
        """Return what a window's rank.json has of it; None for a command of one window."""
        return {"number": self.number, "planned": self.planned} if self.planned else None


@dataclass(frozen=True)
class _Prepared:
    """What is known before the first window, and holds for all of them."""

    scenario: str
    loop: Loop
    sut: SystemUnderTest
    settings: Settings
    warm: Warmup
    cost: dict[str, Any]
    rates: Sequence[float]
    counts: Sequence[int]
    cut: bool


def measure(
    scenario: str, loop: Loop, sut: SystemUnderTest, world: World, settings: Settings
) -> Run | Windows:
    """Take one window, or with --until several, from warm-up to the written result.

    Args:
        scenario: its name, as it stands in the result.
        loop: its timed loop.
        sut: the system under test of this rank.
        world: all ranks; all call it.
        settings: alike on all ranks.

    Returns:
        The run, with the records of all ranks, on every rank; with --until the windows.

    Raises:
        UsageError: something cannot be used as asked, on any rank; all ranks raise it.
        IncompleteError: the result could not be written.
    """
    agree_on_run(world, sut, settings)
    if settings.num_samples is not None:
        plan_samples(settings, [1.0] * world.world_size)  # too few is told before the warm-up
    start.set_timer_slack()
    cost = measure_harness(loop, sut.depth, settings.batch_size, world.now)
    start.synchronize(world, "first")
    warm = _warm(loop, sut, world, settings)
    rates = [each["rate_qps"] for each in world.gather_json({"rate_qps": warm.rate_qps})]
    counts, cut = plan_samples(settings, rates)
    _warm_tail(loop, sut, world, settings, counts[world.rank])
    prepared = _Prepared(scenario, loop, sut, settings, warm, cost, rates, counts, cut)
    folder = record.name_folder(world, settings.output_dir, scenario, settings.name)
    if settings.until is None:
        return _one(prepared, world, folder, Course())
    return _several(prepared, world, folder, settings.until)


def _several(prepared: _Prepared, world: World, folder: record.Folder, asked: float) -> Windows:
    """Take windows until throughput is known to within ``asked``; of each only its result stays."""
    course = Course(0, UNTIL_LEAST)
    results: dict[str, dict[str, Any]] = {}
    while course.number < course.planned:
        own = record.window_folder(folder, course.number, world.rank)
        run = _one(prepared, world, own, course)
        if world.rank == 0:
            results[own.path.name] = run.result()
        del run  # with the samples of all ranks, before those of the next window come
        course.number += 1
        if course.number == course.planned:
            rates = [each["metrics"]["throughput"]["value"] for each in results.values()]
            course.planned = _more(world, asked, course.planned, rates)
    return finish.write_windows(world, folder.path, results)


def _more(world: World, asked: float, made: int, rates: list[float | None]) -> int:
    """Let rank 0 say how many windows there shall be in all; it alone judges, so that all agree.

    It has judged them before it comes here: an answer may run on the side thread, whose heartbeats
    would wait for it.
    """
    reached = until(asked, rates) if world.rank == 0 else None
    told = str(made if reached is None else reached.wanted).encode()
    return int(world.side.meet("until", b"", lambda _: told))


def _one(prepared: _Prepared, world: World, folder: record.Folder, course: Course) -> Run:
    """Take one window."""
    sut, settings, warm = prepared.sut, prepared.settings, prepared.warm
    counts = prepared.counts
    record.open_folder(world, folder)
    columns = [c for c in ALL_COLUMNS if c not in OPTIONAL or c in warm.columns]
    log = record.make_log(world, folder, counts[world.rank], columns)
    order = sample_order(sut.resident, sum(counts[: world.rank]), counts[world.rank], settings.seed)
    log.index[:] = order
    before = describe_rank(
        prepared.scenario,
        world,
        sut,
        settings,
        folder,
        warm,
        prepared.cost,
        columns,
        prepared.rates,
        prepared.cut,
    )
    shard = stay_on_ranks(settings, counts)
    before |= {"window": course.told(), "samples": "shard" if shard else "gather"}
    recorder = record.Recorder(world, folder, log)
    record.write_before(world, folder, before)
    stall_ns = settings.timeout_ns or 10_000_000_000 + 20 * warm.slowest_group_ns
    recorder.watch(stall_ns / 1e9)
    try:
        kept = window(prepared.loop, sut, world, recorder, order, settings)
        recorder.after |= describe_after(world)
        raised = bool(recorder.after.get("raised"))
        with record.watched(world, setup_limit_s(settings)) as tell:
            score, accurate = finish.accuracy_pass(
                sut, world, settings.batch_size, raised, course.number > 0, tell
            )
        indices_of = {row: order[row : row + settings.batch_size].tolist() for row in kept}
        if course.number == 0:
            # Each window keeps the outputs of the same samples: no others are needed.
            wanted = {index for each in indices_of.values() for index in each}
            course.accurate = {index: accurate[index] for index in wanted & accurate.keys()}
        recorder.after["outputs"] = finish.check_outputs(kept, indices_of, course.accurate)
        recorder.after["score"] = score
        return finish.finish(world, recorder, before, shard)
    except BaseException as error:
        broken = world.world_size > 1 and not isinstance(error, DistbenchError | KeyboardInterrupt)
        # A collective that broke: the side thread knows in a moment who was lost, and ends.
        if broken and world.side.ending.wait(2.0):
            threading.Event().wait()
        recorder.save_end(_own_end(world, error))
        raise
    finally:
        recorder.release()


def _own_end(world: World, error: BaseException) -> End:
    own = where(world.rank, world.host)
    if isinstance(error, KeyboardInterrupt):
        sentence = f"{own} was interrupted (Ctrl-C) before its run had ended"
    else:
        sentence = f"{own} ended early: {str(error) or type(error).__name__}"
    return End("terminated", world.rank, world.host, sentence, 6)


def window(
    loop: Loop,
    sut: SystemUnderTest,
    world: World,
    recorder: record.Recorder,
    order: Indices,
    settings: Settings,
) -> dict[int, Any]:
    """Agree on a start, run the loop in quiet, meet the others, and measure the clocks again."""
    log, batch = recorder.log, settings.batch_size
    kept = choose_kept(len(order), batch, settings.seed + world.rank)
    errors: list[str] = []
    if world.rank == 0:
        recorder.show = record.progress_line(len(order), settings.quiet)
    spin_ns = start.measure_spin_ns(world.now)
    with start.quiet():
        # 5 ns a row: what it takes to fill one column of a touched map, with room to spare.
        plan = start.agree_start(world, "window", spin_ns, extra_ns=5 * log.capacity)
        log.scheduled[:] = plan.local_ns
        recorder.after["plan"] = {
            "reference_ns": plan.reference_ns,
            "local_ns": plan.local_ns,
            "attempts": plan.attempts,
            "rehearsals_ns": list(plan.rehearsals_ns),
            "margin_ns": plan.margin_ns,
        }
        recorder.flying = True
        switches, delay_ns = schedstat()
        groups = _from_instant(world, plan.local_ns, spin_ns, order, batch, recorder.after)
        try:
            loop(sut, log, groups, kept, errors, world.now)
        except Exception as error:  # the SUT's own; its rows fail, the other ranks go on
            errors.insert(0, f"{type(error).__name__}: {error}")
            fail_rest(log)
            recorder.after["raised"] = True
        ended = world.now()
        switches_after, delay_after_ns = schedstat()
        recorder.flying = False
    recorder.after |= {
        "ended_ns": ended,
        "errors": errors,
        "quiet": {
            "involuntary_switches": switches_after - switches,
            "run_delay_ns": delay_after_ns - delay_ns if delay_ns >= 0 else -1,
            "window_ns": ended - recorder.after["started_ns"],
        },
    }
    world.side.meet("window:end")
    start.synchronize(world, "after")
    return kept


def _from_instant(
    world: World,
    instant_ns: int,
    spin_ns: int,
    order: Indices,
    batch_size: int,
    after: dict[str, Any],
) -> Iterator[tuple[int, Indices]]:
    """Yield the groups, the first one at the agreed instant: the loop is then set up already."""
    groups = iter(groups_of(order, batch_size))
    first = next(groups)
    after["started_ns"] = start.wait_together(world, instant_ns, spin_ns)
    yield first
    yield from groups


def _warm(loop: Loop, sut: SystemUnderTest, world: World, settings: Settings) -> Warmup:
    """Load the samples and warm up; a failure on any rank stops all with its sentence."""
    size = settings.batch_size
    if settings.num_samples is not None:
        share = share_out(settings.num_samples, world.rank, None, world.world_size)
        size = min(size, share)
    order = np.arange(sut.resident, dtype=np.int64)
    problem, warm = None, Warmup(0.0, 0, 0, ())
    try:
        with record.watched(world, setup_limit_s(settings)) as tell:
            sut.load(order)
            warm = warm_up(loop, sut, size, settings.warmup_ns, order, world.now, tell)
    except Exception as error:  # the user's model: any exception is a sentence on every rank
        problem = _failed_warm_up(error)
    world.check("warm-up", problem)
    return warm


def _warm_tail(
    loop: Loop, sut: SystemUnderTest, world: World, settings: Settings, count: int
) -> None:
    """Run the shape of a last group that is not full: its first run may compile something."""
    problem, rest = None, count % settings.batch_size
    if rest and count > settings.batch_size:
        try:
            with record.watched(world, setup_limit_s(settings)) as tell:
                order = np.arange(sut.resident, dtype=np.int64)
                warm_up(loop, sut, rest, 0, order, world.now, tell)
        except Exception as error:  # likewise
            problem = _failed_warm_up(error)
    world.check("last group", problem)


def _failed_warm_up(error: Exception) -> UsageError:
    if isinstance(error, UsageError):
        return error
    problem = ModelError(f"the model failed in warm-up: {type(error).__name__}: {error}")
    problem.__cause__ = error
    return problem
