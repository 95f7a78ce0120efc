"""Offline: every sample is there at once; how many a second do all ranks complete together?

    torchrun --standalone --nproc-per-node 2 -m distbench.offline
    python -m distbench.offline --model mine:build --batch-size 8 --duration 60s

throughput = completed samples of all ranks / makespan, the makespan from the agreed instant to the
last completion on rank 0's clock. The number of samples is fixed before the window, so that no rank
stops on its own clock. The report goes to stdout of rank 0; the result directory holds the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from distbench.clock import Now
from distbench.command import COMMON_OPTIONS, measure_joined, run_scenario, start_command
from distbench.prepare import (
    Course,
    Cue,
    Groups,
    Part,
    closed_part,
    groups_after,
)
from distbench.samples import SampleLog
from distbench.settings import Settings, script_settings
from distbench.sut import FOREVER, Collect, Indices, SystemUnderTest

if TYPE_CHECKING:
    from distbench.run import Run
    from distbench.windows import Windows
    from distbench.world import World


def offline_loop(
    sut: SystemUnderTest, log: SampleLog, groups: Groups, collect: Collect, now: Now
) -> None:
    """Issue every group as soon as the SUT accepts it, and stamp both ends: the timed loop.

    Args:
        sut: loaded and warm, nothing in flight.
        log: its rows are stamped at each group's first row.
        groups: (first row, sample indices) in order.
        collect: stamps what has ended; returns how many groups.
        now: the clock.
    """
    cells, issue, poll, depth = log.cells(), sut.issue, sut.poll, sut.depth
    issued, counts = cells["issued"], cells["count"]
    flying = 0
    for row, indices in groups:
        counts[row] = len(indices)
        issued[row] = now()
        issue(row, indices)
        flying += 1
        while flying >= depth:
            flying -= collect(poll(FOREVER))
    while flying:
        flying -= collect(poll(FOREVER))


def drive(sut: SystemUnderTest, log: SampleLog, part: Part, collect: Collect, cue: Cue) -> None:
    """Run the loop from the agreed instant on."""
    offline_loop(sut, log, groups_after(cue.begin, part.order, part.group), collect, cue.now)


OFFLINE = Course("offline", offline_loop, offline_loop, drive, closed_part)


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
    samples: str = "",
    until: float | None = None,
    rules: str = "none",
    output_dir: str = "results",
    name: str = "",
    quiet: bool = True,
) -> Run | Windows:
    """Measure Offline on all ranks and return the run.

    Args:
        sut: a ``SystemUnderTest``, or a function from int64 sample indices to as many outputs.
        world: from ``distbench.join``; without it this process joins on its own.
        batch_size: samples a group.
        duration_s: about how long the window should last, s; sets the number of samples.
        num_samples: samples of all ranks together; replaces ``duration_s``.
        warmup_s: how long to warm up at least, s.
        seed: of the sample order and of the outputs that are kept for checking.
        shares: "even", or "rate" for shares in proportion to the warm-up rates.
        timeout_s: how long a rank's count may stand still, s; None: by the slowest warm-up group.
        samples: "gather" on rank 0, or "shard", each on its rank's disk; "": by their number.
        until: repeat whole windows until throughput is known to within this share, such as 0.01.
        rules: "none", or a round of MLPerf such as "mlperf-v5.0" whose gates are applied.
        output_dir: where the result directory goes.
        name: replaces the scenario in the directory's name.
        quiet: no progress on stderr.

    Returns:
        The run, or with ``until`` the windows, on every rank; ``.report()`` is the text.

    Raises:
        UsageError: something cannot be used as asked, on any rank; all ranks raise it.
        IncompleteError: the result could not be written.
    """
    settings = script_settings(
        duration_s,
        warmup_s,
        timeout_s,
        batch_size=batch_size,
        num_samples=num_samples,
        seed=seed,
        shares=shares,
        samples=samples,
        until=until,
        rules=rules,
        output_dir=output_dir,
        name=name,
        quiet=quiet,
    )
    return measure_joined(measure_offline, sut, world, settings)


def measure_offline(sut: SystemUnderTest, world: World, settings: Settings) -> Run | Windows:
    """Take one Offline window; all ranks call it. See ``window.measure``."""
    from distbench.window import measure  # noqa: PLC0415  torch, which --help does without

    return measure(OFFLINE, sut, world, settings)


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status.

    Raises:
        DistbenchError: anything that a sentence can tell.
    """
    purpose = __doc__ or ""
    return run_scenario("distbench.offline", purpose, COMMON_OPTIONS, argv, measure_offline)


if __name__ == "__main__":
    start_command(main)
