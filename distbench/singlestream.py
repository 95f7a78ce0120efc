"""SingleStream: one query at a time; how long does a lone user wait?

    python -m distbench.singlestream --duration 10s
    torchrun --standalone --nproc-per-node 2 -m distbench.singlestream --model mine:build

Each replica is a stream of its own from the agreed instant on: a query is issued when the one
before has ended. MLPerf's headline is early stopping's estimate of the 90th percentile. LoadGen
knows one stream; what is pooled over several replicas says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from distbench.clock import Now
from distbench.command import measure_joined, options_but, run_scenario, start_command
from distbench.prepare import Course, Cue, Groups, Part, closed_part, groups_after
from distbench.samples import SampleLog
from distbench.settings import Settings, script_settings
from distbench.sut import FOREVER, Collect, Indices, SystemUnderTest

if TYPE_CHECKING:
    from distbench.run import Run
    from distbench.windows import Windows
    from distbench.world import World


def stream_loop(
    sut: SystemUnderTest, log: SampleLog, groups: Groups, collect: Collect, now: Now
) -> None:
    """Issue a query when the one before has ended, and stamp both ends: the timed loop.

    Args:
        sut: loaded and warm, nothing in flight.
        log: its rows are stamped at each query's first row.
        groups: (first row, sample indices) of each query, in order.
        collect: stamps what has ended; returns how many queries.
        now: the clock.
    """
    cells, issue, poll = log.cells(), sut.issue, sut.poll
    issued, counts = cells["issued"], cells["count"]
    for row, indices in groups:
        counts[row] = len(indices)
        issued[row] = now()
        issue(row, indices)
        while not collect(poll(FOREVER)):
            pass


def drive(sut: SystemUnderTest, log: SampleLog, part: Part, collect: Collect, cue: Cue) -> None:
    """Run the loop from the agreed instant on."""
    stream_loop(sut, log, groups_after(cue.begin, part.order, part.group), collect, cue.now)


SINGLE_STREAM = Course("singlestream", stream_loop, stream_loop, drive, closed_part)


def run_singlestream(
    sut: SystemUnderTest | Callable[[Indices], Sequence[Any]],
    world: World | None = None,
    *,
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
    """Measure SingleStream on all ranks and return the run.

    Args:
        sut: a ``SystemUnderTest``, or a function from int64 sample indices to as many outputs.
        world: from ``distbench.join``; without it this process joins on its own.
        duration_s: about how long the window should last, s; sets the number of queries.
        num_samples: queries of all ranks together; replaces ``duration_s``.
        warmup_s: how long to warm up at least, s.
        seed: of the sample order and of the outputs that are kept for checking.
        timeout_s: how long a rank's count may stand still, s; None: by the slowest warm-up query.
        samples: "gather" on rank 0, or "shard", each on its rank's disk; "": by their number.
        rules: "none", or a round of MLPerf such as "mlperf-v5.0" whose gates are applied.
        output_dir: where the result directory goes.
        name: replaces the scenario in the directory's name.
        quiet: no progress on stderr.

    Returns:
        The run, on every rank; ``.report()`` is the text.

    Raises:
        UsageError: something cannot be used as asked, on any rank; all ranks raise it.
        IncompleteError: the result could not be written.
    """
    settings = script_settings(
        duration_s,
        warmup_s,
        timeout_s,
        batch_size=1,
        num_samples=num_samples,
        seed=seed,
        samples=samples,
        rules=rules,
        output_dir=output_dir,
        name=name,
        quiet=quiet,
    )
    return measure_joined(measure_singlestream, sut, world, settings)


def measure_singlestream(sut: SystemUnderTest, world: World, settings: Settings) -> Run | Windows:
    """Take one SingleStream window; all ranks call it. See ``window.measure``."""
    from distbench.window import measure  # noqa: PLC0415  torch, which --help does without

    return measure(SINGLE_STREAM, sut, world, settings)


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status.

    Raises:
        DistbenchError: anything that a sentence can tell.
    """
    return run_scenario(
        "distbench.singlestream",
        __doc__ or "",
        options_but("batch-size", "shares", "until"),
        argv,
        measure_singlestream,
        lambda _values: {"batch_size": 1},
    )


if __name__ == "__main__":
    start_command(main)
