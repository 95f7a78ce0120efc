"""A window from warm-up to the written result, whatever the scenario; only the loop is its own.

All ranks call ``measure``: agree on the run, warm up, fix every rank's samples, open the log, agree
on an instant, run the loop in quiet, meet, measure the clocks again, check, gather, judge.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from distbench import finish, record, start
from distbench.environment import schedstat
from distbench.errors import DistbenchError, End, where
from distbench.preamble import describe_after, describe_rank
from distbench.prepare import (
    OPTIONAL,
    Central,
    Course,
    Cue,
    Part,
    choose_kept,
    stay_on_ranks,
)
from distbench.readiness import Prepared, prepare, setup_limit_s
from distbench.samples import SampleLog, fail_rest
from distbench.scenarios import scenario
from distbench.settings import Settings
from distbench.steady import UNTIL_LEAST
from distbench.suite import encoder
from distbench.sut import SystemUnderTest, collector
from distbench.waiting import disturbed
from distbench.windows import Windows, until

if TYPE_CHECKING:
    from distbench.engines.stopwatch import Stopwatch
    from distbench.run import Run
    from distbench.world import World


@dataclass
class Turn:
    """Where a command of several windows stands.

    Attributes:
        number: of the next window, from 0.
        planned: how many there are to be by the last decision; 0 for a command of one window.
        accurate: outputs of the accuracy pass, which the first window had, by sample index.
        search: of a peak search, its plan and what this window is in it.
        scaling: of a scaling run, likewise.
        sharding: of a run of several layouts, likewise.
        scored: whether an earlier window had the accuracy pass.
    """

    number: int = 0
    planned: int = 0
    accurate: dict[int, Any] = field(default_factory=dict)
    search: dict[str, Any] | None = None
    scaling: dict[str, Any] | None = None
    sharding: dict[str, Any] | None = None
    scored: bool = False

    def told(self) -> dict[str, Any] | None:
        """Return what a window's rank.json has of it; None for a command of one window."""
        place = {"number": self.number, "planned": self.planned}
        more = {"search": self.search, "scaling": self.scaling, "sharding": self.sharding}
        return {**place, **more} if self.planned else None


def measure(
    course: Course, sut: SystemUnderTest, world: World, settings: Settings
) -> Run | Windows:
    """Take one window, or with --until several, from warm-up to the written result.

    Args:
        course: how the scenario fills a window.
        sut: the system under test of this rank.
        world: all ranks; all call it.
        settings: alike on all ranks.

    Returns:
        The run, with the records of all ranks, on every rank; with --until the windows.

    Raises:
        UsageError: something cannot be used as asked, on any rank; all ranks raise it.
        IncompleteError: the result could not be written.
    """
    prepared = prepare(course, sut, world, settings)
    folder = record.name_folder(world, settings.output_dir, course.scenario, settings.name)
    if settings.until is None:
        return one_window(prepared, world, folder, Turn())
    return _several(prepared, world, folder, settings.until)


def _several(prepared: Prepared, world: World, folder: record.Folder, asked: float) -> Windows:
    """Take windows until throughput is known to within ``asked``; of each only its result stays."""
    turn = Turn(0, UNTIL_LEAST)
    results: dict[str, dict[str, Any]] = {}
    while turn.number < turn.planned:
        own = record.window_folder(folder, turn.number, world.rank)
        run = one_window(prepared, world, own, turn)
        if world.rank == 0:
            results[own.path.name] = run.result()
        del run  # with the samples of all ranks, before those of the next window come
        turn.number += 1
        if turn.number == turn.planned:
            rates = [each["metrics"]["throughput"]["value"] for each in results.values()]
            turn.planned = _more(world, asked, turn.planned, rates)
    return finish.write_windows(world, folder.path, results)


def _more(world: World, asked: float, made: int, rates: list[float | None]) -> int:
    """Let rank 0 say how many windows there shall be in all; it alone judges, so that all agree.

    It has judged them before it comes here: an answer may run on the side thread, whose heartbeats
    would wait for it.
    """
    reached = until(asked, rates) if world.rank == 0 else None
    told = str(made if reached is None else reached.wanted).encode()
    return int(world.side.meet("until", b"", lambda _: told))


def one_window(prepared: Prepared, world: World, folder: record.Folder, turn: Turn) -> Run:
    """Take one window."""
    course, sut, settings = prepared.course, prepared.sut, prepared.settings
    warm, part = prepared.warm, prepared.part
    record.open_folder(world, folder)
    columns = [c for c in course.columns if c not in OPTIONAL or c in warm.columns]
    log = record.make_log(world, folder, len(part.order), columns)
    log.index[:] = part.order
    most = prepared.most_tokens if "tokens" in columns else None
    record.make_tokens(world, folder, log, most)
    before = describe_rank(
        course.scenario,
        world,
        sut,
        settings,
        folder,
        warm,
        prepared.cost,
        columns,
        prepared.rates,
        part,
    )
    shard = stay_on_ranks(settings, part.counts)
    before |= {
        "most_tokens": most,
        "window": turn.told(),
        "layout": getattr(sut, "layout", None),
        "samples": "shard" if shard else "gather",
    }
    recorder = record.Recorder(world, folder, log)
    record.write_before(world, folder, before)
    if course.central:
        course.central.open(folder, before)
    stall_ns = settings.timeout_ns or 10_000_000_000 + 20 * warm.slowest_group_ns
    if course.central:
        recorder.before_judging = course.central.cut
    recorder.watch(stall_ns / 1e9)
    try:
        kept = window(course, sut, world, recorder, part, settings)
        recorder.after |= describe_after(world)
        driver = course.central.record(recorder.after) if course.central else None
        _check_accuracy(prepared, world, recorder, kept, turn)
        if course.central and settings.official is not None:
            _measure_floor(course.central, part, recorder)
        return finish.finish(world, recorder, before, shard, driver)
    except BaseException as error:
        broken = world.world_size > 1 and not isinstance(error, DistbenchError | KeyboardInterrupt)
        # A collective that broke: the side thread knows in a moment who was lost, and ends.
        if broken and world.side.ending.wait(2.0):
            threading.Event().wait()
        recorder.save_end(own_end(world, error))
        raise
    finally:
        recorder.release()


def _check_accuracy(
    prepared: Prepared,
    world: World,
    recorder: record.Recorder,
    kept: dict[int, Any],
    turn: Turn,
) -> None:
    """Score the model, and hold the window's kept outputs against the accuracy pass."""
    sut, settings, log = prepared.sut, prepared.settings, recorder.log
    raised = bool(recorder.after.get("raised"))
    with record.watched(world, setup_limit_s(settings)) as tell:
        score, accurate = finish.accuracy_pass(
            sut, world, settings.group, raised, turn.scored, tell
        )
        recorder.after["text"] = finish.text_pass(sut, world, raised, turn.scored, tell)
    indices_of = {row: log.index[row : row + log.count[row]].tolist() for row in kept}
    if not turn.scored:
        turn.scored = True
        # Windows keep outputs of the same rows: those of other samples are not needed. Not so where
        # a rank may rest in the first one, and each round has its own order.
        group = prepared.part.group
        near = {i for row in kept for i in log.index[row : row + group].tolist()}
        near = near if turn.scaling is None and turn.sharding is None else set(accurate)
        turn.accurate = {index: accurate[index] for index in near & accurate.keys()}
    recorder.after["outputs"] = finish.check_outputs(
        kept, indices_of, turn.accurate, finish.tolerance(sut)
    )
    recorder.after["score"] = score
    if settings.official is not None:
        encode = encoder(settings.official.benchmark)
        whole = {} if raised else kept  # what a codec cannot read has raised in the loop already
        recorder.after["answers"] = finish.hash_answers(whole, indices_of, encode)


def _measure_floor(central: Central, part: Part, recorder: record.Recorder) -> None:
    """Have LoadGen drive what does nothing, once all else of an official run is saved."""
    assert part.made is not None
    official = part.made["official"]
    with suppress(OSError):  # such as a full disk, which is told when the run is written
        recorder.save_after()
    if official["mode"] != "accuracy" and not central.lost:
        recorder.after["floor"] = central.floor(official)


def own_end(world: World, error: BaseException) -> End:
    """Return the end that this rank makes of an error of its own."""
    own = where(world.rank, world.host)
    if isinstance(error, KeyboardInterrupt):
        sentence = f"{own} was interrupted (Ctrl-C) before its run had ended"
    else:
        sentence = f"{own} ended early: {str(error) or type(error).__name__}"
    return End("terminated", world.rank, world.host, sentence, 6)


def window(
    course: Course,
    sut: SystemUnderTest,
    world: World,
    recorder: record.Recorder,
    part: Part,
    settings: Settings,
) -> dict[int, Any]:
    """Agree on a start, run the loop in quiet, meet the others, and measure the clocks again."""
    log, halt = recorder.log, world.side.open_window()
    kept: dict[int, Any] = {}
    wanted = choose_kept(len(part.order), settings.seed + world.rank)
    errors: list[str] = []
    if world.rank == 0:
        recorder.show = record.progress_line(len(part.order), settings.quiet)
    spin_ns = start.measure_spin_ns(world.now)
    with start.quiet():
        # 5 ns a row: what it takes to fill one column of a touched map, with room to spare.
        plan = start.agree_start(world, "window", spin_ns, extra_ns=5 * log.capacity)
        log.scheduled[:] = plan.local_ns if part.due_ns is None else plan.local_ns + part.due_ns
        recorder.after["plan"] = {**asdict(plan), "rehearsals_ns": list(plan.rehearsals_ns)}
        watch = _open_stage(sut, world, recorder, plan.local_ns)

        def begin() -> None:
            recorder.after["started_ns"] = start.wait_together(world, plan.local_ns, spin_ns)

        wait = partial(start.wait_until, now=world.now, spin_ns=spin_ns)
        cue = Cue(world.now, begin, wait, halt, plan.local_ns)
        collect = collector(log, kept, errors, world.now, wanted)
        recorder.flying = True
        first = schedstat()
        try:
            if part.active is None or world.rank in part.active:
                course.drive(sut, log, part, collect, cue)
        except Exception as error:  # the SUT's own; its rows fail, the other ranks go on
            errors.insert(0, f"{type(error).__name__}: {error}".rstrip(": "))
            fail_rest(log)
            recorder.after["raised"] = True
        ended = world.now()
        last = schedstat()
        recorder.flying = False
        # In quiet still: a rank that follows has no loop, and works until its leader ends.
        world.side.meet("window:end")
        recorder.stage = None
    if scenario(course.scenario).stream:
        _schedule_is_issue(log)
    recorder.after |= {
        "ended_ns": ended,
        "errors": errors,
        "halted": halt[0],
        "quiet": disturbed(first, last, ended, recorder.after["started_ns"] or ended),
    }
    _close_stage(watch, recorder)
    start.synchronize(world, "after")
    return kept


def _open_stage(
    sut: SystemUnderTest, world: World, recorder: record.Recorder, start_ns: int
) -> Stopwatch | None:
    """Begin to sum up what this rank does of a model that is cut over several."""
    watch: Stopwatch | None = getattr(sut, "watch", None)
    if watch is not None:
        watch.open(start_ns)
        recorder.stage = None if world.leader else watch
    return watch


def _close_stage(watch: Stopwatch | None, recorder: record.Recorder) -> None:
    """Note what this rank did of a model that is cut over several."""
    if watch is not None:
        recorder.after["stage"] = watch.read()
        if watch.thread is not None:  # its main thread has been resting
            recorder.after["quiet"] = watch.quiet()


def _schedule_is_issue(log: SampleLog) -> None:
    """Fill in when a stream's queries were due: when they were issued, which none knew before."""
    begun = log.count > 0
    issued = np.repeat(log.issued[begun], log.count[begun])
    log.scheduled[: len(issued)] = issued
