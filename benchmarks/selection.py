"""Exact percentiles of samples that stay on their ranks, against gathering them on rank 0.

    torchrun --standalone --nproc-per-node 2 benchmarks/selection.py
    torchrun --standalone --nproc-per-node 2 benchmarks/selection.py --samples 1000000 --rounds 15
    python benchmarks/selection.py --simulate 10000

Selection is distbench.quantiles.select over the control group. Gathering is gloo's send and receive
into slices of an array that rank 0 has ready and touched, and np.partition there, in place, for the
same positions. All ranks meet, then begin; a time is that of the slowest rank. The ways alternate,
and every round must give the same values. From 10,000,000 samples a rank on, the project allows
selection half the time of gathering, 1.2 times one local copy of memory, and a hundredth of the
traffic. Memory is what a call added to
the resident set at its peak, on the rank that added most. Traffic is what rank 0's interface
received and sent meanwhile, whoever caused it, and what the largest sender handed to the group.
Sorting a copy of the own samples is what selection by a sort would begin with.

With --simulate, one process takes the part of all ranks, in lock step, and needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from common import Report, Row, Values, parser, ratios
from gather import forget_memory, memory_bytes
from numpy.typing import NDArray

from distbench.clock import now_ns
from distbench.quantiles import select, selection

if TYPE_CHECKING:
    from distbench.world import World

TIME_LIMIT, MEMORY_LIMIT, TRAFFIC_LIMIT = 0.5, 1.2, 0.01
SAMPLES = 10_000_000
Ints = NDArray[np.int64]
QUANTILES = (0.5, 0.9, 0.95, 0.97, 0.99, 0.999)


def six(n: int) -> list[int]:
    """Return LoadGen's positions of the percentiles of a report."""
    return [int(n * q) for q in QUANTILES]


def sixty(n: int) -> list[int]:
    """Return ten positions around each percentile, as intervals need them."""
    return [int(n * (q + shift)) for q in QUANTILES for shift in np.linspace(-4e-4, 4e-4, 10)]


def latencies(rank: int, n: int) -> Ints:
    """Return latencies around 10 ms, most within a factor of two."""
    rng = np.random.default_rng(rank)
    return rng.lognormal(np.log(1e7 + 1e5 * rank), 0.3, n).astype(np.int64)


def alike(rank: int, n: int) -> Ints:
    """Return latencies within 30 us: every sample lies in the brackets that are looked into."""
    return 10**7 + np.random.default_rng(rank).integers(0, 30_000, n)


CASES: dict[str, tuple[Callable[[int, int], Ints], Callable[[int], list[int]]]] = {
    "6 percentiles": (latencies, six),
    "60 positions": (latencies, sixty),
    "6 percentiles, all within 30 us": (alike, six),
}


def interface_bytes(name: str) -> int:
    """Return the bytes that an interface has received and sent; 0 where it is not known."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        head, _, rest = line.partition(":")
        if head.strip() == name:
            numbers = rest.split()
            return int(numbers[0]) + int(numbers[8])
    return 0


def gathering(world: World, own: Ints, places: Sequence[int], room: Ints) -> tuple[list[int], int]:
    """Gather on rank 0, which has room for all, and partition there.

    Returns:
        The values, empty on other ranks, and the bytes that this rank handed over.
    """
    import torch
    import torch.distributed as dist

    if world.rank:
        dist.send(torch.from_numpy(own), dst=0, group=world.control)
        return [], own.nbytes
    room[: len(own)] = own
    for rank in range(1, world.world_size):
        slice_ = room[rank * len(own) : (rank + 1) * len(own)]
        dist.recv(torch.from_numpy(slice_), src=rank, group=world.control)
    room.partition(sorted(set(places)))
    return room[list(places)].tolist(), 0


def selecting(world: World, own: Ints, places: Sequence[int]) -> tuple[list[int], int]:
    """Select over the control group; returns like ``gathering``, the values on every rank."""
    told = select(
        own, places, lambda words: world.reduce(words, "sum"), lambda w: world.reduce(w, "max")
    )
    return list(told.values), told.sent_bytes


WAYS = ("select", "gather", "sort")


def one_round(world: World, name: str, own: Ints, places: list[int]) -> dict[str, Any]:
    """Find the values one way, once; returns what this rank saw."""
    way = name.partition(":")[0]
    network = world.interface.name if world.interface else ""
    forget_memory()
    before = memory_bytes("VmRSS")
    needed = len(own) * world.world_size if way == "gather" and world.rank == 0 else 0
    room = np.full(needed, -1, np.int64)
    world.side.meet(f"selection {name}")
    values, sent = list[int](), 0
    passed, begin = interface_bytes(network), now_ns()
    if way == "select":
        values, sent = selecting(world, own, places)
    elif way == "gather":
        values, sent = gathering(world, own, places, room)
    else:
        np.sort(own)
    took = now_ns() - begin
    added = memory_bytes("VmHWM") - before
    world.side.meet(f"selected {name}")
    passed = interface_bytes(network) - passed
    return {"ms": took / 1e6, "memory": added, "traffic": passed, "sent": sent, "values": values}


def compare(world: World, report: Report, case: str, samples: int, rounds: int) -> None:
    """Measure all ways in turn and print; all ranks call it."""
    data, positions = CASES[case]
    own = data(world.rank, samples)
    places = positions(samples * world.world_size)
    told: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for turn in range(-1, rounds):  # one round to warm up
        for way in WAYS:
            ranks = world.gather_json(one_round(world, f"{way}:{case}:{turn}", own, places))
            if turn >= 0:
                most = {key: max(r[key] for r in ranks) for key in ("ms", "memory", "sent")}
                told[way].append({**ranks[0], **most})
    pairs = zip(told["select"], told["gather"], strict=True)
    wrong = sum(one["values"] != other["values"] for one, other in pairs)
    if wrong:
        raise SystemExit(f"{wrong} of {rounds} rounds gave wrong values")
    seen: dict[str, dict[str, Values]] = {
        way: {key: [each[key] for each in told[way]] for key in told[way][0] if key != "values"}
        for way in WAYS
    }
    chosen, gathered = seen["select"], seen["gather"]
    limits = (TIME_LIMIT, MEMORY_LIMIT, TRAFFIC_LIMIT) if samples >= SAMPLES else (None,) * 3
    time_limit, memory_limit, traffic_limit = limits
    copies = ratios(chosen["memory"], [own.nbytes] * rounds)
    report.table(
        f"{world.world_size} x {samples:,} samples, {case}",
        [
            Row("selection", chosen["ms"], "ms"),
            Row("gathering on rank 0", gathered["ms"], "ms"),
            Row("sorting own samples alone", seen["sort"]["ms"], "ms"),
            Row("ratio of times", ratios(chosen["ms"], gathered["ms"]), limit=time_limit),
            Row("selection, memory added, in local copies", copies, limit=memory_limit),
            Row("gathering, memory added, in local copies",
                ratios(gathered["memory"], [own.nbytes] * rounds)),
            Row("selection, handed over by a rank", chosen["sent"], "bytes"),
            Row("ratio of what is handed over", ratios(chosen["sent"], gathered["sent"]),
                limit=traffic_limit),
            Row("selection, over the interface", chosen["traffic"], "bytes"),
            Row("ratio of what went over the interface",
                ratios(chosen["traffic"], gathered["traffic"]), limit=traffic_limit),
        ],
    )  # fmt: skip


def simulate(report: Report, ranks: int, samples: int) -> None:
    """Take the part of every rank, with shards of 0 to twice ``samples``, and print."""
    rng = np.random.default_rng(ranks)
    sizes = rng.integers(0, 2 * samples, ranks, endpoint=True)
    shards = [latencies(rank, n) for rank, n in enumerate(sizes)]
    places = sixty(int(sizes.sum()))
    begin = now_ns()
    found, sent = lockstep(shards, places)
    took = now_ns() - begin
    if found != np.sort(np.concatenate(shards))[places].tolist():
        raise SystemExit("the simulation gave wrong values")
    report.say(
        f"{ranks:,} ranks with {sizes.min()} to {sizes.max():,} samples, {sizes.sum():,} in all: "
        f"{len(places)} positions, every value exact, {len(sent)} passes, "
        f"{sum(sent):,} bytes per rank"
    )
    report.table(
        "By pass, and in all",
        [
            Row("handed over by a rank in a pass", sent, "bytes", limit=65_536),
            Row("one process for all ranks", [took / 1e9], "s"),
        ],
    )


def lockstep(shards: Sequence[Ints], places: Sequence[int]) -> tuple[list[int], list[int]]:
    """Drive a selection per shard together; returns the values and the bytes of each pass."""
    ranks = [selection(shard, places) for shard in shards]
    told: Any = None
    sent: list[int] = []
    while True:
        reduced: Any = None
        ends = []
        for rank in ranks:
            try:
                how, words = rank.send(told)
            except StopIteration as end:
                ends.append(end.value)
                continue
            if reduced is None:
                reduced = words.copy()
            else:
                (np.add if how == "sum" else np.maximum)(reduced, words, out=reduced)
        if ends:
            if len(ends) < len(ranks) or any(end != ends[0] for end in ends):
                raise SystemExit("the ranks did not all end alike")
            return list(ends[0].values), sent
        sent.append(reduced.nbytes)
        told = reduced


def main() -> None:
    """Measure and print on rank 0."""
    made = parser(__doc__)
    made.add_argument("--samples", type=int, help="of each rank (10000000; simulated 1000)")
    made.add_argument("--rounds", type=int, default=7, help="measurements of each way (7)")
    made.add_argument("--simulate", type=int, metavar="RANKS", help="so many, in one process")
    options = made.parse_args()
    if options.simulate:
        report = Report("selection", vars(options))
        simulate(report, options.simulate, options.samples or 1000)
        report.end(options.json)
        return
    from distbench.world import join

    with join(device="cpu") as world:
        if world.world_size == 1:
            raise SystemExit("start with torchrun: one rank has nothing to gather")
        report = Report("selection", vars(options), silent=world.rank != 0)
        report.say(f"{world.world_size} ranks, {len(set(world.hosts))} host(s), control group gloo")
        for case in CASES:
            compare(world, report, case, options.samples or SAMPLES, options.rounds)
        report.end(options.json)


if __name__ == "__main__":
    main()
