"""Offline: every sample is there at once; how many a second do all ranks complete together?

    torchrun --standalone --nproc-per-node 2 -m distbench.offline
    python -m distbench.offline --model mine:build --batch-size 8 --duration 60s

throughput = completed samples of all ranks / makespan, the makespan from the agreed instant to the
last completion on rank 0's clock. The number of samples is fixed before the window, so that no rank
stops on its own clock. The report goes to stdout of rank 0; the result directory holds the rest.
"""

from __future__ import annotations

import shlex
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np

from distbench.cli import (
    Option,
    Values,
    command_line,
    duration_ns,
    one_of,
    parse,
    positive,
    positive_duration_ns,
    run_command,
    whole,
)
from distbench.clock import Now
from distbench.errors import (
    EXIT_INCOMPLETE,
    EXIT_OK,
    EXIT_STRICT,
    DistbenchError,
    UsageError,
    where,
)
from distbench.liveness import End
from distbench.models import check_model, load_model
from distbench.prepare import (
    ALL_COLUMNS,
    OPTIONAL,
    Settings,
    Warmup,
    choose_kept,
    groups_of,
    measure_harness,
    plan_samples,
    sample_order,
    share_out,
    warm_up,
)
from distbench.samples import FAILED, SampleLog, check_groups, fail_rest
from distbench.sut import FOREVER, Done, First, FromCallable, Indices, SystemUnderTest

if TYPE_CHECKING:
    from distbench.record import Recorder
    from distbench.run import Run
    from distbench.world import World

KEPT_ERRORS = 8


def offline_loop(
    sut: SystemUnderTest,
    log: SampleLog,
    groups: Iterable[tuple[int, Indices]],
    kept: dict[int, Any],
    errors: list[str],
    now: Now,
) -> None:
    """Issue every group as soon as the SUT accepts it, and stamp both ends: the timed loop.

    Args:
        sut: loaded and warm, nothing in flight.
        log: its rows are stamped at each group's first row.
        groups: (first row, sample indices) in order.
        kept: keys are the rows whose outputs are kept.
        errors: takes the first few messages of failed groups.
        now: the clock.
    """
    cells, issue, depth = log.cells(), sut.issue, sut.depth
    issued = cells["issued"]
    flying = 0
    for row, indices in groups:
        issued[row] = now()
        issue(row, indices)
        flying += 1
        while flying >= depth:
            flying -= collect(sut.poll(FOREVER), cells, kept, errors, now)
    while flying:
        flying -= collect(sut.poll(FOREVER), cells, kept, errors, now)


def collect(
    ended: Sequence[Done | First],
    cells: dict[str, memoryview],
    kept: dict[int, Any],
    errors: list[str],
    now: Now,
) -> int:
    """Stamp the groups that the SUT says are done; returns how many."""
    groups = 0
    for done in ended:
        stamp = now()
        if isinstance(done, First):
            continue
        row, count, outputs, error, started_ns, finished_ns, device_ns, _ = done
        cells["completed"][row] = stamp
        cells["count"][row] = count
        if started_ns and "started" in cells:
            cells["started"][row] = started_ns
            cells["finished"][row] = finished_ns
        if device_ns and "device" in cells:
            cells["device"][row] = device_ns
        if error or len(outputs) != count:
            cells["completed"][row] = FAILED
            if len(errors) < KEPT_ERRORS:
                errors.append(f"{error}" or f"{len(outputs)} outputs for {count} samples")
        elif row in kept:
            kept[row] = outputs
        groups += 1
    return groups


def run_offline(
    sut: SystemUnderTest | Callable[[Indices], Sequence[Any]],
    world: World | None = None,
    *,
    batch_size: int = 32,
    duration_s: float = 5.0,
    num_samples: int | None = None,
    warmup_s: float = 1.0,
    seed: int = 0,
    shares: str = "even",
    timeout_s: float | None = None,
    output_dir: str = "results",
    name: str = "",
    quiet: bool = True,
) -> Run:
    """Measure Offline on all ranks and return the run.

    Args:
        sut: a ``SystemUnderTest``, or a function from an int64 array of sample indices to a
            sequence of outputs.
        world: from ``distbench.join``; without it this process joins on its own.
        batch_size: samples a group.
        duration_s: about how long the window should last, s; sets the number of samples.
        num_samples: samples of all ranks together; replaces ``duration_s``.
        warmup_s: how long to warm up at least, s.
        seed: of the sample order and of the outputs that are kept for checking.
        shares: "even", or "rate" for shares in proportion to the warm-up rates.
        timeout_s: how long a rank's count may stand still; by default 10 s plus 20 times the
            slowest warm-up group.
        output_dir: where the result directory goes.
        name: replaces the scenario in the directory's name.
        quiet: no progress on stderr.

    Returns:
        The run, with the records of all ranks, on every rank; ``run.report()`` is the text.

    Raises:
        UsageError: something cannot be used as asked, on any rank; all ranks raise it.
        IncompleteError: the result could not be written.
    """
    settings = Settings(
        batch_size=batch_size,
        duration_ns=round(duration_s * 1e9),
        num_samples=num_samples,
        warmup_ns=round(warmup_s * 1e9),
        seed=seed,
        shares=shares,
        timeout_ns=None if timeout_s is None else round(timeout_s * 1e9),
        output_dir=output_dir,
        name=name,
        quiet=quiet,
        command=shlex.join(["python", *sys.argv]),
    )
    with ExitStack() as stack:
        if world is None:
            from distbench.world import join  # noqa: PLC0415  only the run itself needs torch

            world = stack.enter_context(join())
        return measure(_adapted(sut), world, settings)


def _adapted(sut: Any) -> SystemUnderTest:
    if hasattr(sut, "issue") and hasattr(sut, "poll"):
        return sut  # type: ignore[no-any-return]
    return FromCallable(sut)


def measure(sut: SystemUnderTest, world: World, settings: Settings) -> Run:
    """Take one Offline window from warm-up to the written result; all ranks call it."""
    from distbench import finish, record, start  # noqa: PLC0415
    from distbench.preamble import agree_on_run, describe_after, describe_rank  # noqa: PLC0415

    agree_on_run(world, sut, settings)
    start.set_timer_slack()
    cost = measure_harness(offline_loop, sut.depth, settings.batch_size, world.now)
    start.synchronize(world, "first")
    warm = _warm(sut, world, settings)
    rates = [each["rate_qps"] for each in world.gather_json({"rate_qps": warm.rate_qps})]
    counts, cut = plan_samples(settings, rates)
    folder = record.open_folder(world, settings.output_dir, "offline", settings.name)
    columns = [c for c in ALL_COLUMNS if c not in OPTIONAL or c in warm.columns]
    log = record.make_log(world, folder, counts[world.rank], columns)
    order = sample_order(sut.resident, sum(counts[: world.rank]), counts[world.rank], settings.seed)
    log.index[:] = order
    before = describe_rank(world, sut, settings, folder, warm, cost, columns, rates, cut)
    recorder = record.Recorder(world, folder, log, settings.batch_size)
    record.write_before(world, folder, before)
    stall_ns = settings.timeout_ns or 10_000_000_000 + 20 * warm.slowest_group_ns
    recorder.watch(stall_ns / 1e9)
    try:
        kept = window(sut, world, recorder, order, settings)
        raised = bool(recorder.after.get("raised"))
        score, accurate = finish.accuracy_pass(sut, world, settings.batch_size, raised)
        indices_of = {row: order[row : row + settings.batch_size].tolist() for row in kept}
        recorder.after["outputs"] = finish.check_outputs(kept, indices_of, accurate)
        recorder.after["score"] = score
        recorder.after |= describe_after(world)
        return finish.finish(world, recorder, before)
    except BaseException as error:
        broken = world.world_size > 1 and not isinstance(error, DistbenchError | KeyboardInterrupt)
        # A collective that broke: the side thread knows in a moment who was lost, and ends.
        if broken and world.side.ending.wait(2.0):
            threading.Event().wait()
        own = where(world.rank, world.host)
        recorder.save_end(End("terminated", world.rank, world.host, f"{own}: {error!r}", 6))
        raise
    finally:
        recorder.release()


def window(
    sut: SystemUnderTest, world: World, recorder: Recorder, order: Indices, settings: Settings
) -> dict[int, Any]:
    """Agree on a start, run the loop in quiet, meet the others, and measure the clocks again."""
    from distbench import start  # noqa: PLC0415
    from distbench.environment import schedstat  # noqa: PLC0415
    from distbench.record import progress_line  # noqa: PLC0415

    log, batch = recorder.log, settings.batch_size
    kept = choose_kept(len(order), batch, settings.seed + world.rank)
    errors: list[str] = []
    if world.rank == 0:
        recorder.show = progress_line(len(order), settings.quiet)
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
        with start.own_processor(world):
            started = start.wait_until(plan.local_ns, world.now, spin_ns)
        try:
            offline_loop(sut, log, groups_of(order, batch), kept, errors, world.now)
        except Exception as error:  # the SUT's own; its rows fail, the other ranks go on
            errors.insert(0, f"{type(error).__name__}: {error}")
            fail_rest(log, batch)
            recorder.after["raised"] = True
        ended = world.now()
        switches_after, delay_after_ns = schedstat()
        recorder.flying = False
    check_groups(log, batch, errors)
    recorder.after |= {
        "started_ns": started,
        "ended_ns": ended,
        "errors": errors,
        "quiet": {
            "involuntary_switches": switches_after - switches,
            "run_delay_ns": delay_after_ns - delay_ns if delay_ns >= 0 else -1,
            "window_ns": ended - started,
        },
    }
    world.side.meet("window:end")
    start.synchronize(world, "after")
    return kept


def _warm(sut: SystemUnderTest, world: World, settings: Settings) -> Warmup:
    """Load the samples and warm up; a failure on any rank stops all with its sentence."""
    shapes = [settings.batch_size]
    if settings.num_samples is not None:
        share = share_out(settings.num_samples, world.rank, None, world.world_size)
        rest = share % settings.batch_size
        shapes = [min(settings.batch_size, max(share, 1)), *([rest] if rest else [])]
    order = np.arange(sut.resident, dtype=np.int64)
    problem, warm = None, Warmup(0.0, 0, 0, ())
    try:
        sut.load(order)
        warm = warm_up(offline_loop, sut, shapes, settings.warmup_ns, order, world.now)
    except UsageError as error:
        problem = error
    except Exception as error:  # the user's model: any exception is a sentence on every rank
        problem = UsageError(f"the model failed in warm-up: {type(error).__name__}: {error}")
        problem.__cause__ = error
    world.check("warm-up", problem)
    return warm


OPTIONS = (
    Option("model", "digits", check_model, "NAME[,key=value...] or MODULE:FACTORY", "MODEL"),
    Option("device", "auto", one_of("auto", "cpu", "cuda"), "auto, cpu or cuda"),
    Option("backend", "auto", one_of("auto", "nccl", "gloo"), "of the data group"),
    Option("batch-size", "32", positive, "samples a group", "N"),
    Option("duration", "5s", positive_duration_ns, "about how long to measure", "TIME"),
    Option("num-samples", None, positive, "samples of all ranks, in place of a duration", "N"),
    Option("warmup", "1s", duration_ns, "warm up for at least so long", "TIME"),
    Option("seed", "0", whole, "of sample order and kept outputs", "N"),
    Option("shares", "even", one_of("even", "rate"), "samples a rank: even, or by warm-up rate"),
    Option(
        "timeout", None, positive_duration_ns, "a rank that stands still so long is lost", "TIME"
    ),
    Option("output-dir", "results", str, "where the result directory goes", "DIR"),
    Option("name", "", str, "replaces the scenario in the directory's name", "NAME"),
    Option("strict", None, None, "exit 3 unless the measurement is VALID"),
    Option("quiet", None, None, "no progress on stderr"),
)


def settings_from(values: Values, argv: Sequence[str]) -> Settings:
    """Turn a command line into settings; raises what ``Settings`` does."""
    v = values.values
    return Settings(
        batch_size=v["batch_size"],
        duration_ns=v["duration"],
        num_samples=v["num_samples"],
        warmup_ns=v["warmup"],
        seed=v["seed"],
        shares=v["shares"],
        timeout_ns=v["timeout"],
        output_dir=v["output_dir"],
        name=v["name"],
        quiet=v["quiet"],
        config=values.config(),
        command=command_line("distbench.offline", argv),
        model_name=v["model"],
    )


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status.

    Raises:
        DistbenchError: anything that a sentence can tell.
    """
    values = parse("distbench.offline", __doc__ or "", OPTIONS, argv)
    settings = settings_from(values, argv)
    from distbench.world import join  # noqa: PLC0415  --help never imports torch

    with join(backend=values.values["backend"], device=values.values["device"]) as world:
        problem, sut = None, None
        try:
            sut = load_model(settings.model_name, world, settings.batch_size)
        except UsageError as error:
            problem = error
        world.check("model", problem)
        assert sut is not None
        try:
            run = measure(sut, world, settings)
        finally:
            sut.close()
        if world.rank != 0:
            return EXIT_OK
        result = run.result()
        print(run.report(), end="", flush=True)  # noqa: T201  the report is the output
        print(f"results  {run.folder}", flush=True)  # noqa: T201
    verdict = result["verdict"]["status"]
    if verdict == "INCOMPLETE":
        return EXIT_INCOMPLETE
    return EXIT_STRICT if values.values["strict"] and verdict != "VALID" else EXIT_OK


def _record_error(error: BaseException) -> None:
    from distbench.world import record_error  # noqa: PLC0415

    record_error(error)


if __name__ == "__main__":
    run_command(main, _record_error)
