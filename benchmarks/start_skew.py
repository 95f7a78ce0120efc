"""How far apart ranks begin: after a barrier, and at distbench's agreed instant.

    torchrun --standalone --nproc-per-node 2 benchmarks/start_skew.py --rounds 200
    torchrun --standalone --nproc-per-node 4 benchmarks/start_skew.py --json start_skew.json

All ranks are on one host and read one clock, so the skew (latest minus earliest stamp) is known
exactly. Each round has a barrier of torch's gloo and an agreed start, one after the other. A start
is on time when no rank was later than the limit that a run is judged by; skews are compared over
these, and how often they happen stands beside. The project allows a twentieth of the barrier's
skew where ranks have a processor each. Then one rank is held back for 50 ms, and the run's own
judgement must name it every time.
"""

from __future__ import annotations

import os
import time
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from common import Report, Row, parser
from numpy.typing import NDArray

from distbench.metrics import start_section
from distbench.run import RankRecord, Run
from distbench.start import (
    agree_start,
    measure_spin_ns,
    quiet,
    set_timer_slack,
    wait_together,
)
from distbench.times import LATE_NS, RankTimes
from distbench.world import join

if TYPE_CHECKING:
    from distbench.world import World

RATIO_LIMIT = 1 / 20
LEAST_SHARE = 0.1
"""Share of starts on time below which their skew is not compared."""
LATE_ROUNDS, HOLD_S = 10, 0.05
TAIL = {"p90": 0.9, "p99": 0.99}
BARRIER, AGREED, STAMP, ATTEMPTS = range(4)
Stamps = NDArray[np.int64]


def one_round(world: World, name: str, hold_s: float = 0.0) -> list[int]:
    """Start twice, after a barrier and at an agreed instant.

    Args:
        world: all ranks.
        name: of the round.
        hold_s: how long past the agreed instant this rank is kept from it.

    Returns:
        Stamp after the barrier, agreed instant, stamp at the agreed start, rehearsals.
    """
    import torch.distributed as dist

    world.side.meet(f"{name}:here")
    dist.barrier(group=world.control)
    barrier = world.now()
    spin_ns = measure_spin_ns(world.now)
    plan = agree_start(world, name, spin_ns)
    if hold_s:
        time.sleep(hold_s + (plan.local_ns - world.now()) / 1e9)
    stamp = wait_together(world, plan.local_ns, spin_ns)
    return [barrier, plan.local_ns, stamp, plan.attempts]


def judged(starts: Stamps) -> dict[str, Any]:
    """Return what a run's report says about one start; ``starts`` holds a row for each rank."""
    times = [
        RankTimes(
            rank=rank,
            scheduled_ns=int(row[AGREED]),
            started_ns=int(row[STAMP]),
            finished_ns=None,
            started_ref_ns=int(row[STAMP]),
            finished_ref_ns=None,
            bound_ns=0,
            ok=0,
            failed=0,
            pending=0,
        )
        for rank, row in enumerate(starts)
    ]
    plan = {"attempts": int(starts[0, ATTEMPTS])}
    records = (RankRecord(rank, {}, {"plan": plan}, None) for rank in range(len(starts)))
    return start_section(Run(len(starts), tuple(records)), times)


def summary(report: Report, rounds: Stamps, held: Stamps) -> None:
    """Print what all ranks stamped; both arrays have the shape (rounds, ranks, 4)."""
    told = [judged(each) for each in rounds]
    barrier = (np.ptp(rounds[:, :, BARRIER], axis=1) / 1e3).tolist()
    agreed = [each["skew_s"] * 1e6 for each in told]
    on_time = [i for i, each in enumerate(told) if not each["late_ranks"]]
    enough = len(on_time) >= LEAST_SHARE * len(told)
    lack = "" if enough else f"not measurable: {len(on_time)} of {len(told)} were on time"
    report.table(
        "Skew of a start",
        [
            Row("after dist.barrier (gloo)", barrier, "us"),
            Row("agreed, all", agreed, "us"),
            Row("agreed, on time", [agreed[i] for i in on_time] if enough else [], "us", note=lack),
        ],
        TAIL,
    )
    latest = ((rounds[:, :, STAMP] - rounds[:, :, AGREED]).max(axis=1) / 1e3).tolist()
    ratio = [median(agreed[i] for i in on_time) / median(barrier)] if enough else []
    report.table(
        "Agreed starts",
        [
            Row("lateness of the latest rank", latest, "us"),
            Row("rehearsals", [each["attempts"] for each in told]),
            Row("ratio of medians, on time / barrier", ratio, limit=RATIO_LIMIT, note=lack),
        ],
        TAIL,
    )
    report.say(
        f"{len(on_time)} of {len(told)} agreed starts were on time ({len(on_time) / len(told):.0%}"
        f"; late is more than {LATE_NS / 1e3:.0f} us)"
    )
    last = held.shape[1] - 1
    flagged = sum(last in judged(each)["late_ranks"] for each in held)
    report.say(f"rank {last}, held back by {HOLD_S * 1e3:.0f} ms: flagged {flagged} of {len(held)}")


def main() -> None:
    """Measure and print on rank 0."""
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=200, help="starts of each kind (200)")
    options = made.parse_args()
    with join(device="cpu") as world:
        if world.world_size == 1 or len({seat.domain for seat in world.side.seats}) > 1:
            raise SystemExit("start two ranks or more, on one host: else there is no truth to tell")
        report = Report("start_skew", vars(options), silent=world.rank != 0)
        crowded = world.world_size > len(os.sched_getaffinity(0))
        report.say(
            f"{world.world_size} ranks on one host, "
            + ("more than it has processors" if crowded else "a processor for each")
        )
        set_timer_slack()
        hold_s = HOLD_S if world.rank == world.world_size - 1 else 0.0
        with quiet():
            one_round(world, "warm-up")
            rounds = [one_round(world, f"round{i}") for i in range(options.rounds)]
            held = [one_round(world, f"held{i}", hold_s) for i in range(LATE_ROUNDS)]
        gathered = world.gather_rows(np.array(rounds + held, np.int64))
        every = np.stack(gathered, axis=1)
        summary(report, every[: options.rounds], every[options.rounds :])
        report.end(options.json)


if __name__ == "__main__":
    main()
