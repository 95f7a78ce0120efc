"""The window of ``collectives``: how long operations take, how often each runs, all the cells."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from distbench import finish, record, start, tensors
from distbench.clock import Now
from distbench.collectives import Marks, timed_loop
from distbench.environment import schedstat
from distbench.errors import DistbenchError, UsageError
from distbench.operations import BACK_TO_BACK, Asked, Cell, Part, cells_of, parts
from distbench.preamble import agree_on_run, describe_after, describe_rank
from distbench.prepare import Part as Rows
from distbench.prepare import Warmup
from distbench.probe import transport
from distbench.samples import SampleLog
from distbench.settings import Settings
from distbench.window import own_end

if TYPE_CHECKING:
    from distbench.run import Run
    from distbench.tensors import Call
    from distbench.world import World

COLUMNS = ("index", "scheduled", "issued", "completed", "device", "count")
WARM_NS, MOST_WARM = 50_000_000, 200
"""How long an operation runs before it is planned, and how often at most."""
AHEAD_NS, SLACK_NS = 5_000_000, 500_000
"""How far ahead an instant is named; what a rank needs to settle for the next one."""
SETUP_S = 600.0
"""How long nothing may end before the window; an operation itself has torch's timeout of 30 s."""


@dataclass(frozen=True)
class Operations:
    """What a rank tells of the operations where others tell of a model."""

    dtype: str
    total: int
    depth: int = 1
    digest: str = ""


def measure_collectives(world: World, asked: Asked, settings: Settings) -> Run:
    """Take all cells, from the first look at how long they take to the written result.

    Args:
        world: all ranks; all call it.
        asked: what to measure, alike on all ranks.
        settings: where the result goes, likewise.

    Raises:
        UsageError: something cannot be used as asked, on any rank; all ranks raise it.
        IncompleteError: the result could not be written.
    """
    world.check("ranks", _alone(world))
    subject = Operations(asked.dtype, len(parts(asked, world.world_size)))
    agree_on_run(world, subject, settings)  # type: ignore[arg-type]
    start.set_timer_slack()
    start.synchronize(world, "first")
    cost = loop_cost(world.now)
    way = transport(world)
    cells = plan(world, asked)
    rows = sum(cell.repetitions for cell in cells)
    folder = record.name_folder(world, settings.output_dir, "collectives", settings.name)
    record.open_folder(world, folder)
    log = record.make_log(world, folder, rows, COLUMNS)
    slowest_ns = max(cell.times * cell.expected_ns for cell in cells)
    part = Rows(log.index, [rows] * world.world_size, 1)
    warm, rates = Warmup(0.0, slowest_ns, len(cells), ()), [0.0] * world.world_size
    before = describe_rank(
        "collectives",
        world,
        subject,  # type: ignore[arg-type]
        settings,
        folder,
        warm,
        cost,
        COLUMNS,
        rates,
        part,
    )
    before["model"]["name"] = "collectives"
    before |= {"cells": [asdict(cell) for cell in cells], "transport": way, "samples": "gather"}
    recorder = record.Recorder(world, folder, log)
    record.write_before(world, folder, before)
    stall_ns = settings.timeout_ns or 10_000_000_000 + 20 * slowest_ns
    recorder.watch(stall_ns / 1e9)
    if world.rank == 0:
        recorder.show = record.progress_line(rows, settings.quiet)
    return _kept(world, recorder, before, cells)


def _alone(world: World) -> UsageError | None:
    if world.world_size > 1:
        return None
    return UsageError(
        "one rank has nobody to talk to: start two or more (torchrun --nproc-per-node 2, or "
        "--nnodes 2)"
    )


def _kept(
    world: World, recorder: record.Recorder, before: dict[str, Any], cells: Sequence[Cell]
) -> Run:
    """Take the window and finish; whatever happens, what was measured until then is kept."""
    try:
        window(world, recorder, cells, before["model"]["dtype"])
        recorder.after |= describe_after(world)
        return finish.finish(world, recorder, before)
    except BaseException as error:
        # A collective that broke: the side thread knows in a moment who was lost, and ends.
        broken = not isinstance(error, DistbenchError | KeyboardInterrupt)
        if broken and world.side.ending.wait(2.0):
            threading.Event().wait()
        recorder.save_end(own_end(world, error))
        raise
    finally:
        recorder.release()


def plan(world: World, asked: Asked) -> list[Cell]:
    """See how long each operation takes, and fix how often it runs; all ranks agree.

    It runs once untimed, once timed, and then for ``WARM_NS``: the slowest rank's time counts.

    Raises:
        UsageError: a rank has no memory, or its backend cannot do it; all ranks raise it.
    """
    spin_ns = max(world.gather_json(start.measure_spin_ns(world.now)))
    found: list[Cell] = []
    with record.watched(world, SETUP_S) as tell:
        for number, part in enumerate(parts(asked, world.world_size)):
            problem, call = None, None
            try:
                call = tensors.build(part, asked.dtype, world)
                call.fill(0)
            except UsageError as error:
                problem = error
            world.check(f"buffers:{number}", problem)
            assert call is not None
            marks = tensors.marks_of(world, timed=False)
            try:
                took_ns(call, 1, marks, world.now)
                once_ns = max(world.gather_json(took_ns(call, 1, marks, world.now)))
                times = min(max(WARM_NS // max(once_ns, 1), 1), MOST_WARM)
                block_ns = took_ns(call, times, marks, world.now)
            except RuntimeError as error:
                if world.side.ending.wait(2.0):  # not this operation's fault: a rank was lost
                    threading.Event().wait()
                raise UsageError(
                    f"{world.backend} cannot do {part.operation} of {part.bytes} B in "
                    f"{asked.dtype}: {str(error).splitlines()[0]}"
                ) from error
            begin = world.now()
            call.reset()
            told = world.gather_json([block_ns, world.now() - begin])
            between_ns = 2 * max(each[1] for each in told) + spin_ns + SLACK_NS
            found += cells_of(part, asked, max(each[0] for each in told) // times, between_ns)
            tell()
    return found


def took_ns(call: Call, times: int, marks: Marks, now: Now) -> int:
    """Return how long an operation takes so often, ns, untold to any log."""
    log = SampleLog.in_memory(1, COLUMNS)
    timed_loop(log, range(1), call, 1, times, marks, lambda _instant: None, now)
    return int(log.completed[0] - log.issued[0])


def window(world: World, recorder: record.Recorder, cells: Sequence[Cell], dtype: str) -> None:
    """Take every cell's repetitions, and compare what the ranks hold after each cell."""
    log, after, row = recorder.log, recorder.after, 0
    after["checks"] = []
    spin_ns = start.measure_spin_ns(world.now)
    log.index[:] = np.repeat(np.arange(len(cells)), [cell.repetitions for cell in cells])
    log.idle[0] = recorder.flying = True
    call: Call | None = None

    def wait(instant_ns: int) -> int:
        return start.wait_together(world, instant_ns, spin_ns)

    with start.quiet():
        begun = world.now()
        switches, delay_ns = schedstat()
        for number, cell in enumerate(cells):
            if cell.mode == BACK_TO_BACK:  # the first of both, which share their buffers
                call = None
                call = tensors.build(Part(cell.operation, cell.bytes, cell.elements), dtype, world)
            assert call is not None
            call.fill(number + 1)
            marks = tensors.marks_of(world, timed=cell.mode == BACK_TO_BACK)
            rows = range(row, row + cell.repetitions)
            set_instants(world, log, rows, f"cell:{number}", cell)
            blocks = 1 if cell.window_ns else cell.repetitions
            log.idle[0] = False
            timed_loop(log, rows, call, blocks, cell.times, marks, wait, world.now)
            log.idle[0] = True
            after["checks"].append([number, *call.check(number + 1, blocks * cell.times)])
            row = rows.stop
        switches_after, delay_after_ns = schedstat()
    recorder.flying = False
    delay_ns = delay_after_ns - delay_ns if delay_ns >= 0 else -1
    quiet = {"involuntary_switches": switches_after - switches, "run_delay_ns": delay_ns}
    after |= {
        "plan": {
            "reference_ns": int(log.scheduled[0]) if world.rank == 0 else None,
            "local_ns": int(log.scheduled[0]),
            "attempts": 1,
        },
        "started_ns": int(log.issued[0]),
        "ended_ns": world.now(),
        "quiet": {**quiet, "window_ns": world.now() - begun},
    }
    world.side.meet("window:end")
    start.synchronize(world, "after")


def set_instants(world: World, log: SampleLog, rows: range, place: str, cell: Cell) -> None:
    """Fill in when each of a cell's repetitions is due, on this rank's clock; all ranks agree."""
    span_ns = (len(rows) - 1) * cell.window_ns
    first, last = start.name_instants(world, place, AHEAD_NS + cell.settle_ns, span_ns)
    steps = np.arange(len(rows), dtype=np.int64) * (last - first)
    log.scheduled[rows.start : rows.stop] = first + steps // max(len(rows) - 1, 1)
    log.count[rows.start : rows.stop] = 1


def loop_cost(now: Now, batches: int = 400, blocks: int = 15) -> dict[str, Any]:
    """Time the loop over an operation that does nothing, as ``harness.measure_harness`` does.

    Returns:
        Raw block times in ns (``loop_ns``, ``clock_ns``) with ``batches`` and ``reads`` a block.
    """
    call = tensors.Call(lambda: None, lambda: None, lambda _: None, lambda _salt, _runs: (0, 0))
    log = SampleLog.in_memory(batches, COLUMNS)
    loops, clocks = [], []
    for _ in range(blocks):
        begin = now()
        timed_loop(
            log, range(batches), call, batches, 1, tensors.HostMarks(), lambda _instant: None, now
        )
        loops.append(now() - begin)
        begin = now()
        for _ in range(batches):
            now()
        clocks.append(now() - begin)
    return {"loop_ns": loops, "clock_ns": clocks, "batches": batches, "reads": batches}
