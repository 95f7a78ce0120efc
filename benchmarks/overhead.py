"""What the harness costs per batch: distbench's Offline loop against clock reads and a bare loop.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --rounds 301 --json overhead.json

Three measurements, each in blocks that alternate:

1. The Offline loop over a system that does nothing, with all columns of a real log, in memory and
   in a mapped file, with and without kept outputs. The time per batch is divided by that of one
   clock read in the same round; the project allows a ratio of 20. The system that does nothing has
   to answer, too: what its two calls cost without the loop stands in a row of its own.
2. The same batches of one torch linear layer on one thread, by a loop as a person writes it, and
   through distbench's engine, loop and log: the ratio of their times.
3. What Python's allocator holds more after a loop than before (sys.getallocatedblocks).
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import Report, Row, interleave, parser, ratios

from distbench.clock import now_ns
from distbench.offline import offline_loop
from distbench.prepare import ALL_COLUMNS, groups_of, measure_harness
from distbench.samples import SampleLog
from distbench.start import quiet
from distbench.sut import FOREVER, Done, Indices, SystemUnderTest

RATIO_LIMIT = 20
GROUPS, BATCH = 2000, 32
LAYERS = {16: 1000, 256: 300, 768: 40}
"""Width of the layer: batches in a block, for blocks of about 20 to 50 ms."""


class Nothing:
    """Says at once that a group is done; ``stamped`` also fills what an engine may fill."""

    total = resident = 1

    def __init__(self, depth: int = 1, *, stamped: bool = False) -> None:
        self.depth = depth
        self.stamps = (1, 2, 3) if stamped else (0, 0, 0)
        self.rows: list[Done] = []

    def load(self, indices: Indices) -> None:
        """Nothing to bring in."""

    def unload(self, indices: Indices) -> None:
        """Nothing to let go."""

    def issue(self, row: int, indices: Indices, data: Sequence[bytes] | None = None) -> None:
        """Be done."""
        self.rows.append(Done(row, len(indices), indices, "", *self.stamps))

    def poll(self, until_ns: int) -> Sequence[Done]:
        """Say so."""
        ended, self.rows = self.rows, []
        return ended

    def close(self) -> None:
        """Nothing to release."""


def per_batch(block: Callable[[], Any], batches: int) -> Callable[[], float]:
    """Return a function that times a block and gives ns per batch."""

    def timed() -> float:
        begin = now_ns()
        block()
        return (now_ns() - begin) / batches

    return timed


def loop(sut: SystemUnderTest, log: SampleLog, kept: range = range(0)) -> Callable[[], None]:
    """Return the Offline loop over a whole log, outputs kept for the groups at rows ``kept``."""
    order = np.arange(log.capacity)

    def block() -> None:
        offline_loop(sut, log, groups_of(order, BATCH), dict.fromkeys(kept), [], now_ns)

    return block


def read_clock() -> None:
    """Read the clock once for each group."""
    for _ in range(GROUPS):
        now_ns()


def call_only() -> None:
    """Call a system that does nothing as often as the loop does, without the loop."""
    sut, order = Nothing(), np.arange(GROUPS * BATCH)
    for row, indices in groups_of(order, BATCH):
        sut.issue(row, indices)
        sut.poll(FOREVER)


def harness(report: Report, rounds: int, log: SampleLog) -> None:
    """Measure the loop over nothing; ``log`` is the one in a file."""
    memory = SampleLog.in_memory(log.capacity, ALL_COLUMNS)
    every = range(0, log.capacity, BATCH)
    own = measure_harness(offline_loop, 1, BATCH, now_ns)
    cases = {
        "Offline loop, log in memory": loop(Nothing(), memory),
        "Offline loop, log in a file": loop(Nothing(), log),
        "  two groups in flight": loop(Nothing(2), log),
        "  engine's stamps and device time as well": loop(Nothing(stamped=True), log),
        "  the outputs of every group kept as well": loop(Nothing(stamped=True), log, every),
    }
    blocks = {"clock": read_clock, "calls": call_only, **cases}
    told = interleave(rounds, **{name: per_batch(b, GROUPS) for name, b in blocks.items()})
    clock, calls = told.pop("clock"), told.pop("calls")
    report.table(
        "1. Harness, ns per batch",
        [
            Row("one clock read", clock, "ns"),
            Row("calls of a system that does nothing, no loop", calls, "ns"),
            *(Row(name, values, "ns") for name, values in told.items()),
        ],
    )
    as_shown = ratios(
        [ns / own["batches"] for ns in own["loop_ns"]], [ns / own["reads"] for ns in own["clock_ns"]]
    )
    report.table(
        "   ... divided by one clock read in the same round",
        [
            *(Row(n, ratios(v, clock), limit=RATIO_LIMIT) for n, v in told.items()),
            Row("as a run measures it of itself", as_shown, limit=RATIO_LIMIT),
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

        def ours(sut: Any = sut, log: SampleLog = log, order: Any = order) -> None:
            offline_loop(sut, log, groups_of(order, BATCH), {}, [], now_ns)

        cases = {"bare": per_batch(bare, groups), "ours": per_batch(ours, groups)}
        interleave(2, **cases)  # warm
        told = interleave(rounds, **cases)
        added = [b - a for a, b in zip(told["bare"], told["ours"], strict=True)]
        rows += [
            Row(f"width {width}: bare loop", [ns / 1e3 for ns in told["bare"]], "us"),
            Row(f"width {width}: through distbench", [ns / 1e3 for ns in told["ours"]], "us"),
            Row(f"width {width}: added", [ns / 1e3 for ns in added], "us"),
            Row(f"width {width}: ratio", ratios(told["ours"], told["bare"])),
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

    plain = left(loop(Nothing(), log))
    stamped = left(loop(Nothing(stamped=True), log))
    told = interleave(rounds, plain=plain, stamped=stamped)
    report.table(
        f"3. Blocks left behind by a loop of {GROUPS:,} groups",
        [
            Row("log in a file", told["plain"]),
            Row("log in a file, engine's stamps as well", told["stamped"]),
        ],
    )


def main() -> None:
    """Measure and print."""
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=101, help="blocks of each kind (101)")
    made.add_argument("--folder", default=".", help="where the file of the log is made (.)")
    options = made.parse_args()
    report = Report("overhead", vars(options))
    with tempfile.TemporaryDirectory(prefix=".overhead-", dir=options.folder) as folder, quiet():
        log = SampleLog.create(Path(folder) / "samples.npy", GROUPS * BATCH, ALL_COLUMNS)
        harness(report, options.rounds, log)
        layers(report, options.rounds)
        allocations(report, options.rounds, log)
    report.end(options.json)


if __name__ == "__main__":
    main()
