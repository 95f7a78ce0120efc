"""MultiStream: queries of eight samples, one at a time; how long until the last of eight is done?

    python -m distbench.multistream --duration 10s
    torchrun --standalone --nproc-per-node 2 -m distbench.multistream --model mine:build

Each replica is a stream of its own, as in SingleStream; a query is one group of eight samples, and
its latency is that of the last one. MLPerf's headline is early stopping's estimate of the 99th
percentile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from distbench.command import measure_joined, options_but, run_scenario, start_command
from distbench.errors import UsageError
from distbench.prepare import Course, Part, closed_part
from distbench.rounds import SAMPLES_PER_QUERY
from distbench.settings import Settings, script_settings
from distbench.singlestream import drive, stream_loop
from distbench.sut import Indices, SystemUnderTest

if TYPE_CHECKING:
    from distbench.run import Run
    from distbench.windows import Windows
    from distbench.world import World


def eights(rank: int, sut: SystemUnderTest, settings: Settings, rates: Sequence[float]) -> Part:
    """Return this rank's part, whole queries only.

    Raises:
        UsageError: the number of samples asked for does not make whole queries on every rank.
    """
    part = closed_part(rank, sut, settings, rates)
    odd = [count for count in part.counts if count % SAMPLES_PER_QUERY]
    if odd:
        error = UsageError(
            f"--num-samples {settings.num_samples} leaves a rank {odd[0]} samples, and a query of "
            f"MultiStream has {SAMPLES_PER_QUERY}: give a multiple of "
            f"{SAMPLES_PER_QUERY * len(rates)}"
        )
        error.agreed = True
        raise error
    return part


MULTI_STREAM = Course("multistream", stream_loop, stream_loop, drive, eights)


def run_multistream(
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
    """Measure MultiStream on all ranks and return the run.

    Args:
        sut: a ``SystemUnderTest``, or a function from int64 sample indices to as many outputs.
        world: from ``distbench.join``; without it this process joins on its own.
        duration_s: about how long the window should last, s; sets the number of queries.
        num_samples: samples of all ranks together, eight a query; replaces ``duration_s``.
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
        batch_size=SAMPLES_PER_QUERY,
        num_samples=num_samples,
        seed=seed,
        samples=samples,
        rules=rules,
        output_dir=output_dir,
        name=name,
        quiet=quiet,
    )
    return measure_joined(measure_multistream, sut, world, settings)


def measure_multistream(sut: SystemUnderTest, world: World, settings: Settings) -> Run | Windows:
    """Take one MultiStream window; all ranks call it. See ``window.measure``."""
    from distbench.window import measure  # noqa: PLC0415  torch, which --help does without

    return measure(MULTI_STREAM, sut, world, settings)


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status.

    Raises:
        DistbenchError: anything that a sentence can tell.
    """
    return run_scenario(
        "distbench.multistream",
        __doc__ or "",
        options_but("batch-size", "shares", "until"),
        argv,
        measure_multistream,
        lambda _values: {"batch_size": SAMPLES_PER_QUERY},
    )


if __name__ == "__main__":
    start_command(main)
