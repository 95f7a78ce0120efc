"""Collectives: all_reduce, all_gather, reduce_scatter, broadcast, send/recv. What does a link give?

    torchrun --standalone --nproc-per-node 2 -m distbench.collectives
    torchrun ... -m distbench.collectives --operations all_reduce --sizes 8B..256MiB --duration 2s

Each operation at each size runs in two ways, both from instants that all ranks agreed on: back to
back, as nccl-tests does it, for bandwidth; and one by one, as ReproMPI does it, for the latency of
a lone operation. What the ranks hold afterwards is compared with what it must be.

By default sizes go up to 16 MiB, which takes half a minute on two ranks of a small machine; 256 MiB
when they are asked for, since an operation of that size takes seconds on a slow link. There must be
two ranks at the least: one has nobody to talk to.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from itertools import repeat
from typing import TYPE_CHECKING, Any, Protocol

from distbench.cli import (
    Option,
    command_line,
    one_of,
    parse,
    positive,
    positive_duration_ns,
    read_words,
)
from distbench.clock import Now
from distbench.command import options_but, report_run, start_command
from distbench.operations import ITEM_BYTES, OPERATIONS, Asked, read_sizes
from distbench.samples import SampleLog
from distbench.settings import Settings

if TYPE_CHECKING:
    from distbench.run import Run
    from distbench.tensors import Call
    from distbench.world import World

SIZES = "8B,1KiB,64KiB..16MiB"


class Marks(Protocol):
    """What a repetition needs of the device: nothing on a CPU, events and a wait on a GPU."""

    def begin(self) -> None:
        """Mark the begin on the device."""

    def finish(self) -> None:
        """Wait until all operations have ended there."""

    def device_ns(self) -> int:
        """Return the time between both marks on the device, ns; 0 where there is none."""


def timed_loop(
    log: SampleLog,
    rows: range,
    call: Call,
    blocks: int,
    times: int,
    marks: Marks,
    wait: Callable[[int], Any],
    now: Now,
) -> None:
    """Run a cell's repetitions, from their instants: all that stands between two stamps.

    Args:
        log: ``scheduled`` of these rows is filled in; a row is a repetition.
        rows: of the cell.
        call: the operation, on its buffers.
        blocks: repetitions that follow each other from one instant.
        times: operations of a repetition.
        marks: of the device.
        wait: waits for an instant on this rank's clock.
        now: the clock.
    """
    cells, run, reset, begin, finish = log.cells(), call.run, call.reset, marks.begin, marks.finish
    scheduled, issued, completed = cells["scheduled"], cells["issued"], cells["completed"]
    device = cells["device"]
    for first in rows[::blocks]:
        reset()
        wait(scheduled[first])
        for row in range(first, first + blocks):
            issued[row] = now()
            begin()
            for _ in repeat(None, times):
                run()
            finish()
            completed[row] = now()
            device[row] = marks.device_ns()
            log.ended[0] = row + 1


def run_collectives(
    world: World | None = None,
    *,
    operations: Sequence[str] = tuple(OPERATIONS),
    sizes: Sequence[int] = read_sizes(SIZES),
    dtype: str = "fp32",
    duration_s: float = 0.4,
    repetitions: int | None = None,
    timeout_s: float | None = None,
    output_dir: str = "results",
    name: str = "",
    quiet: bool = True,
) -> Run:
    """Measure collective operations between all ranks, and return the run.

    Args:
        world: from ``distbench.join``; without it this process joins on its own.
        operations: names out of all_reduce, all_gather, reduce_scatter, broadcast, send_recv.
        sizes: bytes, as nccl-tests counts them.
        dtype: of the elements: "fp32", "fp16" or "bf16".
        duration_s: about how long each operation and size is measured, s.
        repetitions: of single operations; None: as many as half of the duration holds.
        timeout_s: how long a rank's count may stand still, s; None: by the longest repetition.
        output_dir: where the result directory goes.
        name: replaces "collectives" in the directory's name.
        quiet: no progress on stderr.

    Returns:
        The run, on every rank; ``.result()["tables"]["collectives"]`` has a row for each size.

    Raises:
        UsageError: something cannot be used as asked, on any rank; all ranks raise it.
        IncompleteError: the result could not be written.
    """
    asked = Asked(
        tuple(operations), tuple(sorted(set(sizes))), dtype, round(duration_s * 1e9), repetitions
    )
    settings = Settings(
        timeout_ns=None if timeout_s is None else round(timeout_s * 1e9),
        samples="gather",
        output_dir=output_dir,
        name=name,
        quiet=quiet,
        config={key: {"value": value, "origin": "script"} for key, value in asdict(asked).items()},
        command=shlex.join(["python", *sys.argv]),
    )
    from distbench.fabric_window import measure_collectives  # noqa: PLC0415  torch

    with ExitStack() as stack:
        if world is None:
            from distbench.world import join  # noqa: PLC0415  only the run itself needs torch

            world = stack.enter_context(join())
        return measure_collectives(world, asked, settings)


OPTIONS = (
    Option("operations", ",".join(OPERATIONS), read_words, "which ones, in order", "NAME,..."),
    Option("sizes", SIZES, read_sizes, "as nccl-tests has them; ranges in steps of 4", "SIZE,..."),
    Option("dtype", "fp32", one_of(*ITEM_BYTES), "of the elements", "|".join(ITEM_BYTES)),
    Option("duration", "400ms", positive_duration_ns, "about how long for each size", "TIME"),
    Option(
        "repetitions", None, positive, "of single operations (default: by the duration)", "N"
    ),
    *options_but(
        "model", "dtype", "batch-size", "duration", "num-samples", "warmup", "rules", "seed",
        "shares", "until", "samples",
    ),
)  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status.

    Raises:
        DistbenchError: anything that a sentence can tell.
    """
    values = parse("distbench.collectives", __doc__ or "", OPTIONS, argv)
    v = values.values
    asked = Asked(v["operations"], v["sizes"], v["dtype"], v["duration"], v["repetitions"])
    settings = Settings(
        timeout_ns=v["timeout"],
        samples="gather",
        output_dir=v["output_dir"],
        name=v["name"],
        quiet=v["quiet"],
        config=values.config(),
        command=command_line("distbench.collectives", argv),
    )
    from distbench.fabric_window import measure_collectives  # noqa: PLC0415
    from distbench.world import join  # noqa: PLC0415  --help never imports torch

    with join(backend=v["backend"], device=v["device"]) as world:
        run = measure_collectives(world, asked, settings)
        return report_run(run, world.rank, v["strict"])


if __name__ == "__main__":
    start_command(main)
