"""Server: queries come by a schedule, whatever became of those before; how long do users wait?

    python -m distbench.server --target-qps 200 --duration 10s
    torchrun --standalone --nproc-per-node 2 -m distbench.server --latency-bound 15ms@p99
    torchrun --standalone --nproc-per-node 2 -m distbench.server --dispatch central
    python -m distbench.server --target-qps auto --latency-bound 15ms@p99 --duration 60s

Every latency counts from the instant at which its query was scheduled, so a system that stalls is
charged for all who wait meanwhile. One schedule is drawn from one seed before the window. With
--dispatch static, the default, its queries are dealt to the replicas by a second draw, and nothing
is sent between ranks in the window; with --dispatch central a driver process issues each one, when
it is due, to the replica that has the fewest outstanding.
With --target-qps auto the highest rate that keeps the bounds is searched for: short windows first,
then one of the whole --duration that confirms it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distbench.arrivals import trace_ns
from distbench.batching import next_batch
from distbench.bounds import parse_bounds
from distbench.cli import (
    Option,
    Values,
    duration_ns,
    nearest,
    one_of,
    positive,
    positive_duration_ns,
    positive_number,
)
from distbench.clock import Now
from distbench.command import measure_joined, options_but, run_scenario, start_command
from distbench.errors import UsageError
from distbench.load import (
    DISPATCHES,
    PAYLOADS,
    Load,
    Schedule,
    backlog_limit,
    check_arrival,
    check_trace,
    schedule,
)
from distbench.offline import offline_loop
from distbench.prepare import ALL_COLUMNS, Course, Cue, Groups, Part
from distbench.rules import parse_rules
from distbench.samples import SampleLog
from distbench.settings import SAMPLE_LIMIT, Settings, script_settings
from distbench.sut import FOREVER, Collect, Indices, SystemUnderTest

if TYPE_CHECKING:
    from distbench.run import Run
    from distbench.windows import Windows
    from distbench.world import World


def server_loop(
    sut: SystemUnderTest,
    log: SampleLog,
    order: Indices,
    collect: Collect,
    cue: Cue,
    max_batch: int,
    max_wait_ns: int,
    backlog: int,
) -> None:
    """Issue queries when they are due and the SUT accepts them: the timed loop.

    Args:
        sut: loaded and warm, nothing in flight.
        log: ``scheduled`` is filled; the loop fills the first row of each group.
        order: sample index of each row.
        collect: stamps what has ended; returns how many groups.
        cue: the clock, the agreed start, how to wait, and whether the window is given up.
        max_batch: queries of a group at most.
        max_wait_ns: how long the oldest query of a group waits for others at most.
        backlog: so many queries due and not completed give the window up.
    """
    cells, issue, poll, depth = log.cells(), sut.issue, sut.poll, sut.depth
    due, ready, issued, counts = (cells[n] for n in ("scheduled", "ready", "issued", "count"))
    now, wait, halt, idle = cue.now, cue.wait, cue.halt, log.idle
    # A loop that begins late was free from the start: that is lateness, and no one's queue.
    row, rows, flying, free, worked, ended = 0, len(order), 0, 0, False, log.ended
    cue.begin()
    while row < rows or flying:
        stamp, until = now(), FOREVER
        if worked:
            free = stamp
        if halt[0] or (ended[0] + backlog < rows and due[ended[0] + backlog] <= stamp):
            halt[0], rows = True, row
            if not flying:
                break
        elif row < rows and flying < depth:
            size, until = next_batch(due, row, rows, stamp, max_batch, max_wait_ns)
            if size:
                counts[row] = size
                ready[row] = free if free > until else until
                issued[row] = now()
                issue(row, order[row : row + size])
                row, flying, worked = row + size, flying + 1, True
                continue
        worked = flying > 0
        if worked:
            flying -= collect(poll(until))
        else:
            idle[0] = True
            wait(until)
            idle[0] = False


def drive(sut: SystemUnderTest, log: SampleLog, part: Part, collect: Collect, cue: Cue) -> None:
    """Run the loop with what the part tells of batching and backlog."""
    made = part.made or {}
    server_loop(
        sut,
        log,
        part.order,
        collect,
        cue,
        part.group,
        made["max_wait_ns"],
        made["backlog"],
    )


def draw(sut: SystemUnderTest, settings: Settings, replicas: int) -> Schedule:
    """Draw the schedule, the same on every rank, with what the loops need beside it.

    Raises:
        UsageError: the load cannot be used; all ranks raise it alike.
    """
    load = settings.load
    assert load is not None
    check_trace(load, settings.num_samples)
    drawn = schedule(
        load,
        parse_rules(settings.rules),
        duration_ns=settings.duration_ns,
        num_queries=settings.num_samples,
        seed=settings.seed,
        model=settings.model_name.partition(",")[0],
        total=sut.total,
        resident=sut.resident,
        replicas=replicas,
    )
    more = {"max_wait_ns": load.max_wait_ns, "backlog": backlog_limit(load, replicas)}
    return replace(drawn, made=drawn.made | more)


def open_part(rank: int, sut: SystemUnderTest, settings: Settings, rates: Sequence[float]) -> Part:
    """Return this rank's queries of the schedule; raises what ``draw`` does."""
    drawn, replicas = draw(sut, settings, len(rates)), len(rates)
    own = drawn.replica == rank
    if settings.samples == "gather" and len(drawn.due_ns) > SAMPLE_LIMIT:
        error = UsageError(
            f"{len(drawn.due_ns)} queries are more than {SAMPLE_LIMIT}, which is as many as are "
            "gathered: leave --samples gather out, and they stay on their ranks"
        )
        error.agreed = True
        raise error
    counts = [int((drawn.replica == each).sum()) for each in range(replicas)]
    due_ns = drawn.due_ns[own]
    return Part(drawn.index[own], counts, settings.group, due_ns=due_ns, made=drawn.made)


def at_once(
    sut: SystemUnderTest, log: SampleLog, groups: Groups, collect: Collect, now: Now
) -> None:
    """Run the loop over queries that are all due: what it costs, waiting left out."""
    del groups  # its own, one query each
    order = np.arange(log.capacity)
    cue = Cue(now, lambda: None, lambda _until: None, [False])
    server_loop(sut, log, order, collect, cue, 1, 0, log.capacity)


COLUMNS = ("index", "scheduled", "ready", *ALL_COLUMNS[2:])
SERVER = Course("server", offline_loop, at_once, drive, open_part, COLUMNS)


DEFAULT_LOAD = Load(200.0)


def run_server(
    sut: SystemUnderTest | Callable[[Indices], Sequence[Any]],
    world: World | None = None,
    *,
    load: Load = DEFAULT_LOAD,
    duration_s: float = 5.0,
    num_samples: int | None = None,
    warmup_s: float = 1.0,
    seed: int = 0,
    timeout_s: float | None = None,
    samples: str = "",
    rules: str = "none",
    output_dir: str = "results",
    name: str = "",
    quiet: bool = True,
) -> Run | Windows:
    """Measure Server on all ranks and return the run.

    Args:
        sut: a ``SystemUnderTest``, or a function from int64 sample indices to as many outputs.
        world: from ``distbench.join``; without it this process joins on its own.
        load: what is offered: rate, arrivals, batching, the user's bounds; ``Load.auto`` searches
            for the peak.
        duration_s: how long queries come, s; of a search, in the window that confirms its peak.
        num_samples: queries of all ranks together; replaces ``duration_s``.
        warmup_s: how long to warm up at least, s.
        seed: of schedule, sample order and the outputs that are kept for checking.
        timeout_s: how long a rank's count may stand still, s; None: by the slowest warm-up group.
        samples: "gather" on rank 0, or "shard", each on its rank's disk; "": by their number.
        rules: "none", or a round of MLPerf such as "mlperf-v5.0" whose gates are applied.
        output_dir: where the result directory goes.
        name: replaces the scenario in the directory's name.
        quiet: no progress on stderr.

    Returns:
        The run, on every rank, or the windows of a search; ``.report()`` is the text.

    Raises:
        UsageError: something cannot be used as asked, on any rank; all ranks raise it.
        IncompleteError: the result could not be written.
    """
    settings = script_settings(
        duration_s,
        warmup_s,
        timeout_s,
        num_samples=num_samples,
        seed=seed,
        samples=samples,
        rules=rules,
        output_dir=output_dir,
        name=name,
        quiet=quiet,
        load=paced_by_trace(load),
    )
    return measure_joined(measure_server, sut, world, settings)


def measure_server(sut: SystemUnderTest, world: World, settings: Settings) -> Run | Windows:
    """Take one Server window, or search for the peak; all ranks call it. See ``window.measure``."""
    if settings.load is not None and settings.load.searched:
        from distbench.peak import measure_peak  # noqa: PLC0415  likewise

        return measure_peak(SERVER, sut, world, settings)
    from distbench.central import open_dispatch  # noqa: PLC0415
    from distbench.courses import central_course  # noqa: PLC0415
    from distbench.window import measure  # noqa: PLC0415  torch, which --help does without

    if settings.load is None or settings.load.dispatch == "static":
        return measure(SERVER, sut, world, settings)
    with open_dispatch(world, settings) as dispatch:
        run = measure(central_course(dispatch), sut, world, settings)
        if not dispatch.lost:
            dispatch.unload(sut, np.arange(sut.resident, dtype=np.int64))
        return run


def paced_by_trace(load: Load) -> Load:
    """Return a load whose rate is that of its trace, where it has one.

    Raises:
        UsageError: the trace cannot be read.
    """
    if not load.arrival.startswith("trace:"):
        return load
    due_ns = trace_ns(Path(load.arrival.partition(":")[2]))
    lasts_s = max(int(due_ns[-1]), 1) / 1e9
    return replace(load, target_qps=max(len(due_ns) - 1, 1) / lasts_s)


def rate_or_auto(text: str) -> float:
    """Read a rate; "auto", for which the peak is searched, is 0.

    Raises:
        UsageError: it is neither.
    """
    if text == "auto":
        return 0.0
    try:
        return positive_number(text)
    except UsageError as error:
        raise UsageError(f"{error}, and not auto{nearest(text, ['auto'])}") from None


OPTIONS = (
    Option(
        "target-qps",
        "200",
        rate_or_auto,
        "queries/s over all ranks, or auto: the most that keep --latency-bound",
        "Q|auto",
    ),
    Option("probe", "2s", positive_duration_ns, "a probe of --target-qps auto, at least", "TIME"),
    Option("arrival", "poisson", check_arrival, "poisson, constant or trace:FILE", "KIND"),
    Option("latency-bound", None, parse_bounds, "such as 15ms@p99[,ttft=500ms@p99]", "BOUNDS"),
    Option("max-batch", "1", positive, "queries of a group at most", "N"),
    Option("max-wait", "0s", duration_ns, "the oldest query waits for others so long", "TIME"),
    Option(
        "dispatch",
        "static",
        one_of(*DISPATCHES),
        "of queries to replicas: dealt out before, or by a driver to the one with the least",
        "static|central",
    ),
    Option("payload", "index", one_of(*PAYLOADS), "what a driver sends", "index|data"),
    Option("driver", "", str, "of central dispatch: one started by hand", "ADDR:PORT"),
    Option("driver-token", "", str, "the file of its token, on rank 0's host", "FILE"),
)


def read_load(values: Values) -> dict[str, Any]:
    """Read the options of the load.

    Raises:
        UsageError: they do not go together.
    """
    v = values.values
    auto = v["target_qps"] == 0
    if not auto and values.origins["probe"] != "default":
        raise UsageError("--probe is of a peak search: give --target-qps auto as well")
    load = Load(
        v["target_qps"],
        v["arrival"],
        v["dispatch"],
        v["max_batch"],
        v["max_wait"],
        v["latency_bound"] or (),
        payload=v["payload"],
        driver=v["driver"],
        driver_token=v["driver_token"],
        probe_ns=v["probe"] if auto else 0,
    )
    return {"load": paced_by_trace(load)}


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status.

    Raises:
        DistbenchError: anything that a sentence can tell.
    """
    options = (*OPTIONS, *options_but("batch-size", "shares", "until"))
    return run_scenario("distbench.server", __doc__ or "", options, argv, measure_server, read_load)


if __name__ == "__main__":
    start_command(main)
