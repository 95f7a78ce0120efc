"""Collective operations: distbench's times against a plain torch loop, and the line through them.

    torchrun --standalone --nproc-per-node 2 benchmarks/collectives.py
    torchrun --standalone --nproc-per-node 2 benchmarks/collectives.py --rounds 5 --json FILE

Each round measures every operation and size with ``distbench.run_collectives`` and with a loop of
its own beside it, in turn, the order reversed every other round. The loop has its own buffers: a
barrier, ``perf_counter``, operations one after the other, ``perf_counter``; of the ranks the
slowest counts. A ratio of 1 is agreement. How far two turns of the plain loop itself lie apart says
what noise is.
"""

from __future__ import annotations

import math
import tempfile
import time
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from common import Report, Row, parser, ratios

from distbench.collectives import run_collectives
from distbench.operations import OPERATIONS, read_sizes, size_text
from distbench.world import join

if TYPE_CHECKING:
    from collections.abc import Callable

    from distbench.world import World

Key = tuple[str, int]
BLOCKS = 10


def plain_call(world: World, operation: str, size: int) -> Callable[[], Any]:
    """Return one operation as a script would call it."""
    n, rank, group = world.world_size, world.rank, world.data
    device = torch.device("cuda", world.device.index) if world.backend == "nccl" else "cpu"
    whole = torch.ones(size // 4, device=device)
    part = torch.ones(size // 4 // n, device=device)
    if operation == "all_reduce":
        whole.zero_()  # which stays what it is, however often it is summed
        return lambda: dist.all_reduce(whole, group=group)
    if operation == "all_gather":
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        return lambda: gather(whole, part, group=group)
    if operation == "reduce_scatter":
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        return lambda: scatter(part, whole, group=group)
    if operation == "broadcast":
        return lambda: dist.broadcast(whole, 0, group=group)
    other = torch.ones_like(whole)

    def both() -> None:
        sending = dist.isend(whole, (rank + 1) % n, group=group)
        receiving = dist.irecv(other, (rank - 1) % n, group=group)
        assert sending is not None and receiving is not None
        sending.wait()
        receiving.wait()

    return both


def plain(world: World, operation: str, size: int, times: int) -> float:
    """Return the time of one operation, s: mean of blocks, the slowest rank of each."""
    call = plain_call(world, operation, size)
    sync = torch.cuda.synchronize if world.backend == "nccl" else (lambda: None)
    for _ in range(3):
        call()
    took = []
    for _ in range(BLOCKS):
        sync()
        dist.barrier(group=world.control)
        begin = time.perf_counter()
        for _ in range(times):
            call()
        sync()
        slowest = torch.tensor([time.perf_counter() - begin], dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX, group=world.control)
        took.append(float(slowest) / times)
    return math.fsum(took) / len(took)


def measured(world: World, options: Any) -> tuple[dict[Key, dict[str, Any]], dict[str, float]]:
    """Return distbench's rows by operation and size, and R^2 of each operation's fit."""
    with tempfile.TemporaryDirectory() as folder:
        run = run_collectives(
            world,
            operations=options.operations.split(","),
            sizes=read_sizes(options.sizes),
            duration_s=options.seconds,
            output_dir=folder,
        )
        tables = run.result()["tables"]
    found = []
    for name in ("collectives", "fit"):
        names = [each["name"] for each in tables[name]["columns"]]
        found.append([dict(zip(names, row, strict=True)) for row in tables[name]["rows"]])
    rows = {(row["operation"], row["bytes"]): row for row in found[0]}
    return rows, {row["operation"]: row["r2"] for row in found[1] if row["r2"] is not None}


def main() -> None:
    """Do all rounds and print."""
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=5, help="of all operations and sizes (5)")
    made.add_argument("--operations", default=",".join(OPERATIONS), help="which ones (all)")
    made.add_argument("--sizes", default="64KiB..16MiB", help="as distbench takes them")
    made.add_argument("--seconds", type=float, default=0.4, help="for each size (0.4)")
    options = made.parse_args()
    ours: dict[Key, list[float]] = {}
    theirs: dict[Key, list[tuple[float, float]]] = {}
    lines: dict[str, list[float]] = {}
    with join() as world:
        report = Report("collectives", vars(options), silent=world.rank != 0)
        report.say(f"{world.world_size} ranks over {world.backend}")
        rows, _ = measured(world, options)  # how many operations a block has; not counted
        for number in range(options.rounds):
            turns: dict[Key, list[float]] = {}
            for turn in range(2):
                if turn == number % 2:
                    taken, fits = measured(world, options)
                for key, row in rows.items():
                    turns.setdefault(key, []).append(plain(world, *key, row["times"]))
            for key, row in taken.items():
                if row["time"] is not None:
                    ours.setdefault(key, []).append(row["time"])
                    theirs.setdefault(key, []).append((turns[key][0], turns[key][1]))
            for name, r2 in fits.items():
                lines.setdefault(name, []).append(r2)
        told = [
            Row(
                f"{name} of {size_text(size)}",
                ratios(ours[name, size], [(a + b) / 2 for a, b in theirs[name, size]]),
                note=f"{1e6 * ours[name, size][-1]:,.0f} us",
            )
            for name, size in ours
        ]
        report.table("distbench / plain loop, time of an operation back to back", told)
        noise = [
            Row(f"{name} of {size_text(size)}", [a / b for a, b in theirs[name, size]])
            for name, size in theirs
        ]
        report.table("plain loop / plain loop, first and second turn of a round", noise)
        report.table("R^2 of time = alpha + beta * size", [Row(n, v) for n, v in lines.items()])
        report.end(options.json)


if __name__ == "__main__":
    main()
