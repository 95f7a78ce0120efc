"""How well two ranks' clocks are compared: distbench's own sockets against gloo's send and recv.

    torchrun --standalone --nproc-per-node 2 benchmarks/exchange.py
    torchrun --standalone --nproc-per-node 2 benchmarks/exchange.py --json exchange.json

Both ranks are on one host and read one clock, so the true offset is 0: what is found is the error.
Each round measures it both ways, one after the other, by the same number of round trips and the
same arithmetic (clock.measure_exchange). The bound is what a reader of a report is told; it must
hold every time. The project allows a third of gloo's bound.

Ranks of one clock exchange nothing in a run. Here rank 0 is told that rank 1 has another clock, and
does what it does between two hosts, while rank 1's side thread answers as it always does.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from common import Report, Row, parser, ratios

from distbench.clock import Exchange, measure_exchange, now_ns
from distbench.liveness import EXCHANGE_TRIPS
from distbench.start import synchronize
from distbench.world import join

if TYPE_CHECKING:
    from distbench.world import World

RATIO_LIMIT = 1 / 3


def by_socket(world: World, name: str) -> Exchange | None:
    """Exchange over distbench's link as before every window; returns it on rank 0.

    None where a trip was lost; the side thread's own short exchanges, one a second, do not count.
    """
    known = len(world.side.exchanges.get(1, []))
    synchronize(world, name)
    made = world.side.exchanges.get(1, [])[known:]
    return next((each for each in made if each.trips == EXCHANGE_TRIPS), None)


def by_gloo(world: World, name: str) -> Exchange | None:
    """Exchange over torch's send and recv; returns it on rank 0."""
    import torch
    import torch.distributed as dist

    ping, pong = torch.zeros(1, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    world.side.meet(name)
    trips = []
    for _ in range(EXCHANGE_TRIPS):
        if world.rank == 0:
            sent = now_ns()
            dist.send(ping, 1, group=world.control)
            dist.recv(pong, 1, group=world.control)
            back = now_ns()
            trips.append((sent, *pong.tolist(), back))
        else:
            dist.recv(ping, 0, group=world.control)
            pong[0] = now_ns()
            pong[1] = now_ns()
            dist.send(pong, 0, group=world.control)
    return measure_exchange(trips) if trips else None


def summary(
    report: Report, rounds: int, told: dict[str, list[Exchange]], took: dict[str, list[float]]
) -> None:
    """Print what rank 0 found in the rounds in which no trip was lost."""
    bounds = {name: [e.bound_ns / 1e3 for e in each] for name, each in told.items()}
    errors = {name: [abs(e.offset_ns) / 1e3 for e in each] for name, each in told.items()}
    trips = {name: [e.round_trip_ns / 1e3 for e in each] for name, each in told.items()}
    held = {name: sum(abs(e.offset_ns) <= e.bound_ns for e in each) for name, each in told.items()}
    rows = []
    for name, label in (("socket", "distbench's link"), ("gloo", "gloo send and recv")):
        rows += [
            Row(f"{label}: bound", bounds[name], "us"),
            Row("  error (the truth is 0)", errors[name], "us"),
            Row("  shortest round trip", trips[name], "us"),
            Row("  time for the exchange", took[name], "ms"),
        ]
    rows.append(Row("ratio of bounds", ratios(bounds["socket"], bounds["gloo"]), limit=RATIO_LIMIT))
    report.table(f"{EXCHANGE_TRIPS} round trips an exchange", rows, {"p90": 0.9})
    for name, count in held.items():
        report.say(f"the bound held in {count} of {len(told[name])} exchanges by {name}")
    if len(told["gloo"]) < rounds:
        report.say(f"{rounds - len(told['gloo'])} rounds were left out: a round trip was lost")


def main() -> None:
    """Measure and print on rank 0."""
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=100, help="exchanges of each kind (100)")
    options = made.parse_args()
    with join(device="cpu") as world:
        seats = world.side.seats
        if world.world_size != 2 or seats[0].domain != seats[1].domain:
            raise SystemExit("start two ranks on one host: elsewhere the truth is not known")
        if world.rank == 0:
            seats[1] = replace(seats[1], domain=f"{seats[1].domain} (taken for another)")
        report = Report("exchange", vars(options), silent=world.rank != 0)
        told: dict[str, list[Exchange]] = {"socket": [], "gloo": []}
        took: dict[str, list[float]] = {"socket": [], "gloo": []}
        for turn in range(-1, options.rounds):  # one round to warm up
            begin = now_ns()
            socket = by_socket(world, f"socket{turn}")
            between = now_ns()
            gloo = by_gloo(world, f"gloo{turn}")
            if turn >= 0 and socket and gloo:
                told["socket"].append(socket)
                told["gloo"].append(gloo)
                took["socket"].append((between - begin) / 1e6)
                took["gloo"].append((now_ns() - between) / 1e6)
        if world.rank == 0:
            summary(report, options.rounds, told, took)
        report.end(options.json)


if __name__ == "__main__":
    main()
