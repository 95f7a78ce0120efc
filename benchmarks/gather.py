"""How long all-gathering the samples takes: World.gather_rows against pickling them.

    torchrun --standalone --nproc-per-node 2 benchmarks/gather.py --samples 4000000
    torchrun --standalone --nproc-per-node 2 benchmarks/gather.py --rounds 15 --json gather.json

All ranks meet, then gather; a time is that of the slowest rank, from the meeting to having every
rank's rows, with all memory taken fresh, as in a run, which gathers once. The two ways alternate,
and every result is compared with the truth, number by number. Two shapes: the latencies (one
column) and a whole log (eight columns, a quarter of the samples). The project allows half the time
of torch's all_gather_object. Memory is what a call added to the resident set at its peak, the
result included, on the rank that added most.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from common import Report, Row, parser, ratios
from numpy.typing import NDArray

from distbench.clock import now_ns
from distbench.world import join

if TYPE_CHECKING:
    from distbench.world import World

RATIO_LIMIT = 0.5
Rows = NDArray[np.int64]
Gather = Callable[[Rows], list[Rows]]


def pickled(world: World) -> Gather:
    """Return the gather that distbench does without, for comparison."""
    import torch.distributed as dist

    def gather(rows: Rows) -> list[Rows]:
        told: list[Rows] = [rows] * world.world_size
        # The only call in this repository that pickles between ranks: what it costs is the point.
        dist.all_gather_object(told, rows, group=world.control)
        return told

    return gather


def truth(rank: int, count: int, columns: int) -> Rows:
    """Return the rows of a rank: every bit of an int64 is used."""
    rng = np.random.default_rng([rank, columns])
    return rng.integers(-(2**63), 2**63 - 1, (count, columns), np.int64)


def memory_bytes(field: str) -> int:
    """Return a figure of /proc/self/status: VmRSS, or VmHWM for the peak; -1 where unknown."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return -1


def forget_memory() -> None:
    """Give free memory back, and let the kernel count the peak of the resident set from here."""
    with contextlib.suppress(AttributeError):  # a C library without it
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def one_round(world: World, name: str, gather: Gather, counts: list[int], columns: int) -> Rows:
    """Gather once.

    Returns:
        Time in ns, bytes added at the peak, and whether every number was right (1 or 0).
    """
    own = truth(world.rank, counts[world.rank], columns)
    forget_memory()
    before = memory_bytes("VmRSS")
    world.side.meet(name)
    begin = now_ns()
    parts = gather(own)
    took = now_ns() - begin
    added = memory_bytes("VmHWM") - before
    right = len(parts) == world.world_size and all(
        np.array_equal(part, truth(rank, counts[rank], columns)) for rank, part in enumerate(parts)
    )
    return np.array([took, added, right], np.int64)


def compare(world: World, report: Report, samples: int, columns: int, rounds: int) -> None:
    """Measure both ways in turn and print; all ranks call it."""
    edges = [samples * rank // world.world_size for rank in range(world.world_size + 1)]
    counts = [high - low for low, high in itertools.pairwise(edges)]
    ways = {"rows": world.gather_rows, "pickle": pickled(world)}
    told: dict[str, list[Rows]] = {name: [] for name in ways}
    for turn in range(-1, rounds):  # one round to warm up
        for name, gather in ways.items():
            measured = one_round(world, f"{columns}:{turn}:{name}", gather, counts, columns)
            if turn >= 0:
                told[name].append(measured)
    # Shape (ranks, rounds, 3): what each rank saw; the slowest and the largest count.
    seen = {name: np.array(world.gather_json(np.array(t).tolist())) for name, t in told.items()}
    wrong = sum(int((each[:, :, 2] != 1).sum()) for each in seen.values())
    if wrong:
        raise SystemExit(f"{wrong} gathers gave wrong numbers")
    times = {name: (each[:, :, 0].max(axis=0) / 1e6).tolist() for name, each in seen.items()}
    peaks = {name: (each[:, :, 1].max(axis=0) / 2**20).tolist() for name, each in seen.items()}
    size = f"{samples * columns * 8 / 1e6:.0f} MB"
    title = f"{samples:,} rows, {columns} column{'s' * (columns > 1)}: {size}"
    report.table(
        title,
        [
            Row("World.gather_rows", times["rows"], "ms"),
            Row("all_gather_object (pickle)", times["pickle"], "ms"),
            Row("ratio", ratios(times["rows"], times["pickle"]), limit=RATIO_LIMIT),
            Row("World.gather_rows, memory added", peaks["rows"], "MiB"),
            Row("all_gather_object, memory added", peaks["pickle"], "MiB"),
        ],
    )


def main() -> None:
    """Measure and print on rank 0."""
    made = parser(__doc__)
    made.add_argument(
        "--samples", type=int, default=4_000_000, help="rows of all ranks together (4000000)"
    )
    made.add_argument("--rounds", type=int, default=9, help="gathers of each kind (9)")
    options = made.parse_args()
    with join(device="cpu") as world:
        if world.world_size == 1:
            raise SystemExit("start with torchrun: one rank has nothing to gather")
        report = Report("gather", vars(options), silent=world.rank != 0)
        report.say(f"{world.world_size} ranks, {len(set(world.hosts))} host(s), {world.backend}")
        compare(world, report, options.samples, 1, options.rounds)
        compare(world, report, options.samples // 4, 8, options.rounds)
        peaks = [bytes_ / 2**20 for bytes_ in world.gather_json(memory_bytes("VmHWM"))]
        report.table("Whole process", [Row("largest resident set, by rank", peaks, "MiB")])
        report.end(options.json)


if __name__ == "__main__":
    main()
