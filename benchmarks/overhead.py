"""What the harness costs per batch: distbench's Offline loop against clock reads and a bare loop.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --rounds 3000 --json overhead.json

Three measurements, each in blocks that alternate. A block is a fraction of a millisecond, and the
blocks that are compared are about equally long: on a busy machine a long block is interrupted more
often than a short one, and their ratio would tell of the scheduler.

1. The Offline loop over a system that does nothing, with all columns of a real log, in memory and
   in a mapped file (each block on rows of its own), with and without kept outputs. The time per
   batch is divided by that of one clock read in the same round; the project allows a ratio of 20.
   The system that does nothing has to answer, too: what its two calls cost without the loop stands
   in a row of its own. The last row is the figure that every run publishes about itself.
2. The same batches of one torch linear layer on one thread: by a loop as a person writes it, by
   distbench's engine in a bare loop, and by that engine in the Offline loop with a log.
3. What Python's allocator holds more after a loop than before (sys.getallocatedblocks).
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import Report, Row, interleave, parser, ratios

from distbench.clock import now_ns
from distbench.harness import measure_harness
from distbench.offline import offline_loop
from distbench.prepare import ALL_COLUMNS, groups_of
from distbench.samples import PENDING, SampleLog
from distbench.start import quiet
from distbench.sut import FOREVER, Done, Indices, SystemUnderTest, collector

RATIO_LIMIT = 20
GROUPS, BATCH, READS = 100, 32, 2000
BLOCK_ROWS = GROUPS * BATCH
FILE_ROWS = 256 * BLOCK_ROWS
LAYERS = {16: 24, 256: 8, 768: 2}
"""Width of the layer: batches in a block."""
KEPT = "  the outputs of every group kept as well"
"""No limit applies: a run keeps 256 groups, whatever its length."""


class Nothing:
    """Says at once that a group is done."""

    total = resident = 1

    def __init__(self, depth: int = 1) -> None:
        self.depth = depth
        self.rows: list[Done] = []

    def load(self, indices: Indices) -> None:
        """Nothing to bring in."""

    def unload(self, indices: Indices) -> None:
        """Nothing to let go."""

    def issue(self, row: int, indices: Indices, data: Sequence[bytes] | None = None) -> None:
        """Be done."""
        self.rows.append(Done(row, len(indices), indices))

    def poll(self, until_ns: int) -> Sequence[Done]:
        """Say so."""
        ended, self.rows = self.rows, []
        return ended

    def close(self) -> None:
        """Nothing to release."""


class Stamped(Nothing):
    """Fills what an engine may fill as well."""

    def issue(self, row: int, indices: Indices, data: Sequence[bytes] | None = None) -> None:
        """Be done."""
        self.rows.append(Done(row, len(indices), indices, "", 1, 2, 3))


def per_batch(block: Callable[[], Any], batches: int) -> Callable[[], float]:
    """Return a function that times a block and gives ns per batch."""

    def timed() -> float:
        begin = now_ns()
        block()
        return (now_ns() - begin) / batches

    return timed


def loop(
    sut: SystemUnderTest, log: SampleLog, *, kept: range = range(0), groups: int = GROUPS
) -> Callable[[], None]:
    """Return the Offline loop, each call on the next rows of a log.

    Args:
        sut: what to measure.
        log: a multiple of ``groups`` groups long.
        kept: rows whose groups' outputs are kept.
        groups: of a call.
    """
    rows = groups * BATCH
    order = np.arange(rows)
    places = list(kept)
    parts = [
        SampleLog(log.rows[first : first + rows], log.columns)
        for first in range(0, log.capacity, rows)
    ]
    turn = itertools.cycle(parts)

    def block() -> None:
        part = next(turn)
        part.completed[::BATCH] = PENDING
        collect = collector(part, {}, [], now_ns, places)
        offline_loop(sut, part, groups_of(order, BATCH), collect, now_ns)

    return block


def read_clock() -> None:
    """Read the clock as often as takes about the time of a block."""
    for _ in range(READS):
        now_ns()


def call_only() -> None:
    """Call a system that does nothing as often as the loop does, without the loop."""
    sut, order = Nothing(), np.arange(BLOCK_ROWS)
    for row, indices in groups_of(order, BATCH):
        sut.issue(row, indices)
        sut.poll(FOREVER)


def harness(report: Report, rounds: int, log: SampleLog) -> None:
    """Measure the loop over nothing; ``log`` is the one in a file."""
    memory = SampleLog.in_memory(BLOCK_ROWS, ALL_COLUMNS)
    every = range(0, BLOCK_ROWS, BATCH)
    cases = {
        "Offline loop, log in memory": loop(Nothing(), memory),
        "Offline loop, log in a file": loop(Nothing(), log),
        "  two groups in flight": loop(Nothing(2), log),
        "  engine's stamps and device time as well": loop(Stamped(), log),
        KEPT: loop(Stamped(), log, kept=every),
    }
    timed = {name: per_batch(block, GROUPS) for name, block in cases.items()}
    told = interleave(
        rounds, clock=per_batch(read_clock, READS), calls=per_batch(call_only, GROUPS), **timed
    )
    clock, calls = told.pop("clock"), told.pop("calls")
    report.table(
        "1. Harness, per batch",
        [
            Row("one clock read", clock, "ns"),
            Row("calls of a system that does nothing, no loop", calls, "ns"),
            *(Row(name, values, "ns") for name, values in told.items()),
        ],
    )
    own = [measure_harness(offline_loop, 1, BATCH, now_ns) for _ in range(max(1, rounds // 100))]
    published = [
        min(each["loop_ns"]) / each["batches"] / (min(each["clock_ns"]) / each["reads"])
        for each in own
    ]
    report.table(
        "   divided by one clock read in the same round",
        [
            Row("calls of a system that does nothing, no loop", ratios(calls, clock)),
            *(
                Row(name, ratios(values, clock), limit=None if name == KEPT else RATIO_LIMIT)
                for name, values in told.items()
            ),
            Row("as a run measures it of itself", published, limit=RATIO_LIMIT),
        ],
    )


def layers(report: Report, rounds: int) -> None:
    """Measure a bare loop over a linear layer against the same through distbench."""
    import torch

    from distbench.engines.eager import EagerOnCpu

    torch.set_num_threads(1)
    rows = []
    for width, groups in LAYERS.items():
        module = torch.nn.Linear(width, width).eval()
        samples = torch.rand((1024, width), generator=torch.Generator().manual_seed(0))
        order = np.random.default_rng(0).integers(0, 1024, groups * BATCH)
        sut = EagerOnCpu(module, samples)
        log = SampleLog.in_memory(len(order), ALL_COLUMNS)

        def bare(module: Any = module, samples: Any = samples, order: Any = order) -> None:
            with torch.inference_mode():
                for _, indices in groups_of(order, BATCH):
                    chosen = samples.index_select(0, torch.from_numpy(indices))
                    module(chosen).numpy()

        def engine(sut: Any = sut, order: Any = order) -> None:
            for row, indices in groups_of(order, BATCH):
                sut.issue(row, indices)
                sut.poll(FOREVER)

        def ours(sut: Any = sut, log: SampleLog = log, order: Any = order) -> None:
            log.completed[::BATCH] = PENDING
            collect = collector(log, {}, [], now_ns)
            offline_loop(sut, log, groups_of(order, BATCH), collect, now_ns)

        blocks = {"bare": bare, "engine": engine, "ours": ours}
        cases = {name: per_batch(block, groups) for name, block in blocks.items()}
        interleave(2, **cases)  # warm
        told = interleave(rounds, **cases)
        rows += [
            Row(f"width {width}: bare loop", [ns / 1e3 for ns in told["bare"]], "us"),
            Row("  engine in a bare loop", [ns / 1e3 for ns in told["engine"]], "us"),
            Row("  engine in distbench's loop, with log", [ns / 1e3 for ns in told["ours"]], "us"),
            Row("  ratio distbench / engine", ratios(told["ours"], told["engine"])),
            Row("  ratio distbench / bare loop", ratios(told["ours"], told["bare"])),
        ]
    report.table(f"2. One linear layer, batches of {BATCH}, per batch", rows)


def allocations(report: Report, rounds: int, log: SampleLog) -> None:
    """Count the blocks that a loop leaves behind."""

    def left(block: Callable[[], None]) -> Callable[[], float]:
        def counted() -> float:
            before = sys.getallocatedblocks()
            block()
            return sys.getallocatedblocks() - before

        counted()
        return counted

    groups = log.capacity // BATCH
    plain = left(loop(Nothing(), log, groups=groups))
    stamped = left(loop(Stamped(), log, groups=groups))
    told = interleave(rounds, plain=plain, stamped=stamped)
    report.table(
        f"3. Blocks left behind by a loop of {groups:,} groups",
        [
            Row("log in a file", told["plain"]),
            Row("log in a file, engine's stamps as well", told["stamped"]),
        ],
    )


def main() -> None:
    """Measure and print."""
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=1000, help="blocks of each kind (1000)")
    made.add_argument("--folder", default=".", help="where the file of the log is made (.)")
    options = made.parse_args()
    report = Report("overhead", vars(options))
    with tempfile.TemporaryDirectory(prefix=".overhead-", dir=options.folder) as folder, quiet():
        log = SampleLog.create(Path(folder) / "samples.npy", FILE_ROWS, ALL_COLUMNS)
        harness(report, options.rounds, log)
        layers(report, options.rounds)
        allocations(report, max(2, options.rounds // 100), log)
    report.end(options.json)


if __name__ == "__main__":
    main()
