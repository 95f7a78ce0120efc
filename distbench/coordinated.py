"""Coordinated: the same work on 1 .. N ranks, in turn; how much of N times one rank is left?

    torchrun --standalone --nproc-per-node 2 -m distbench.coordinated
    torchrun ... -m distbench.coordinated --world-sizes 1,2 --rounds 10 --scaling strong
    torchrun ... -m distbench.coordinated --scenario server --target-qps 100

In one torchrun job each rank is measured alone and ranks 0 .. n-1 together, window by window, every
other round in reverse. efficiency = throughput of n ranks / sum of what each does alone, within a
round, with an interval over rounds. The loss is told by its parts: imbalance, ranks that end or
begin apart, and interference, by which ranks are slower together than alone.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from distbench.cells import KINDS, Cell, Plan, cells, sized
from distbench.cli import Option, Values, one_of, positive, positive_duration_ns, positive_number
from distbench.command import measure_joined, options_but, run_scenario, start_command
from distbench.errors import UsageError
from distbench.load import Load
from distbench.offline import OFFLINE
from distbench.server import OPTIONS as SERVER_OPTIONS
from distbench.server import SERVER, paced_by_trace
from distbench.settings import SAMPLE_LIMIT, Settings, script_settings
from distbench.sut import Indices, SystemUnderTest

if TYPE_CHECKING:
    from distbench.readiness import Prepared
    from distbench.windows import Windows
    from distbench.world import World

LOAD = ("arrival", "latency-bound", "max-batch", "max-wait")


def run_coordinated(
    sut: SystemUnderTest | Callable[[Indices], Sequence[Any]],
    world: World | None = None,
    *,
    plan: Plan = Plan(),  # noqa: B008  frozen
    load: Load | None = None,
    batch_size: int = 32,
    duration_s: float = 2.0,
    warmup_s: float = 1.0,
    seed: int = 0,
    timeout_s: float | None = None,
    output_dir: str = "results",
    name: str = "",
    quiet: bool = True,
) -> Windows:
    """Measure how the same work scales over the ranks, and return the windows.

    Args:
        sut: a ``SystemUnderTest``, or a function from int64 sample indices to as many outputs.
        world: from ``distbench.join``; without it this process joins on its own.
        plan: which numbers of ranks, how often, weak or strong scaling.
        load: what is offered to each rank, for Server; None for Offline.
        batch_size: samples a group, of Offline.
        duration_s: about how long a window of one rank lasts, s.
        warmup_s: how long to warm up at least, s.
        seed: of sample order and schedules; each round adds its number.
        timeout_s: how long a rank's count may stand still, s; None: by the slowest warm-up group.
        output_dir: where the result directory goes.
        name: replaces the scenario in the directory's name.
        quiet: no progress on stderr.

    Returns:
        The windows, on every rank; ``.result()["metrics"]["efficiency"]`` on rank 0.

    Raises:
        UsageError: something cannot be used as asked, on any rank; all ranks raise it.
        IncompleteError: the result could not be written.
    """
    settings = script_settings(
        duration_s,
        warmup_s,
        timeout_s,
        samples="gather",
        batch_size=batch_size,
        seed=seed,
        output_dir=output_dir,
        name=name or "coordinated",
        quiet=quiet,
        load=None if load is None else usable(load, plan.kind),
        scaling=plan,
    )
    return measure_joined(measure_coordinated, sut, world, settings)  # type: ignore[return-value]


def measure_coordinated(sut: SystemUnderTest, world: World, settings: Settings) -> Windows:
    """Take all windows of the plan; all ranks call it.

    Raises:
        UsageError: something cannot be used as asked, on any rank; all ranks raise it.
        IncompleteError: the result could not be written.
    """
    from distbench import finish, record  # noqa: PLC0415  torch, which --help does without
    from distbench.readiness import prepare  # noqa: PLC0415
    from distbench.window import Turn, one_window  # noqa: PLC0415

    course = OFFLINE if settings.load is None else SERVER
    assert settings.scaling is not None
    problem, plan = None, settings.scaling
    try:
        plan = sized(settings.scaling, world.world_size)
    except UsageError as error:
        problem = error
    world.check("world sizes", problem)
    planned = cells(plan)
    if settings.load is not None:  # too few queries for a rank are told before the warm-up
        for cell in planned:
            drawn = of_cell(settings, plan, cell, ())
            course.part(0, sut, drawn, [1.0] * len(cell.ranks))
    every = Cell(tuple(range(world.world_size)), 0)
    first = settings if settings.load is None else of_cell(settings, plan, every, ())
    prepared = prepare(course, sut, world, first)
    folder = record.name_folder(world, settings.output_dir, course.scenario, settings.name)
    turn, results = Turn(planned=len(planned)), dict[str, dict[str, Any]]()
    for cell in planned:
        turn.scaling = {"plan": asdict(plan), "cell": asdict(cell)}
        own = record.window_folder(folder, turn.number, world.rank)
        run = one_window(at_cell(prepared, world, settings, plan, cell), world, own, turn)
        if world.rank == 0:
            found = results[own.path.name] = run.result()
            if not settings.quiet:
                _tell(own.path.name, cell, found)
        del run  # with the samples of all ranks, before those of the next window come
        turn.number += 1
    return finish.write_windows(world, folder.path, results)


def at_cell(
    prepared: Prepared, world: World, settings: Settings, plan: Plan, cell: Cell
) -> Prepared:
    """Return what a window of some ranks needs; all ranks call it, and draw the same schedule."""
    from distbench.readiness import part_of  # noqa: PLC0415

    own = of_cell(settings, plan, cell, prepared.rates)
    own = replace(own, config=prepared.settings.config)
    slowest = prepared.slowest_ns
    part = part_of(prepared.course, prepared.sut, world, own, prepared.rates, slowest, cell.ranks)
    return replace(prepared, settings=own, part=part)


def of_cell(settings: Settings, plan: Plan, cell: Cell, rates: Sequence[float]) -> Settings:
    """Return the settings of one window.

    In Offline a rank alone gets what the slowest one does in ``--duration``; in whole groups, so
    that all windows use one shape, for strong scaling in a number of them that all sizes divide. In
    Server a rank alone is offered ``--target-qps``.

    Args:
        settings: of the command.
        plan: likewise.
        cell: of the window.
        rates: of all ranks' warm-ups, samples/s; Server's windows need none.
    """
    size, seed = len(cell.ranks), settings.seed + cell.round
    if settings.load is not None:
        qps = settings.load.target_qps * (size if plan.kind == "weak" else 1)
        return replace(settings, load=settings.load.at(qps), seed=seed)
    batch = settings.batch_size
    groups = max(1, round(min(rates) * settings.duration_ns / 1e9 / batch))
    most = SAMPLE_LIMIT // batch
    if plan.kind == "weak":
        return replace(settings, num_samples=min(groups, most // size) * batch * size, seed=seed)
    once = math.lcm(*plan.sizes)  # the same number of groups in every window, and on every rank
    total = max(1, round(min(groups, most) / once)) * once
    return replace(settings, num_samples=total * batch, seed=seed)


def usable(load: Load, kind: str) -> Load:
    """Return the load of a rank alone, at the rate of its trace where it has one.

    Raises:
        UsageError: it cannot be scaled.
    """
    if load.searched:
        raise UsageError("--target-qps auto searches for a peak: give the rate of one rank")
    if load.dispatch != "static":
        raise UsageError("scaling deals queries out before each window: give --dispatch static")
    if load.arrival.startswith("trace:") and kind == "weak":
        raise UsageError(
            "a trace has one rate, which several ranks share: give --scaling strong with it"
        )
    return paced_by_trace(load)


def _tell(name: str, cell: Cell, result: dict[str, Any]) -> None:
    rate = result["metrics"]["throughput"]["value"]
    shown = "unknown" if rate is None else f"{rate:,.6g} samples/s"
    ranks = ", ".join(map(str, cell.ranks))
    sys.stderr.write(f"distbench: window {name}, round {cell.round}, ranks {ranks}: {shown}\n")


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(positive(each) for each in text.split(","))


OPTIONS = (
    Option("world-sizes", None, _sizes, "numbers of ranks (default: 1, 2, 4 ... all)", "N,..."),
    Option("rounds", "6", positive, "how often each window is taken, an even number", "N"),
    Option("scaling", "weak", one_of(*KINDS), "the same work for each rank, or in all", "KIND"),
    Option("scenario", "offline", one_of("offline", "server"), "of the windows", "NAME"),
    Option("duration", "2s", positive_duration_ns, "about how long a window of a rank", "TIME"),
    Option("target-qps", "200", positive_number, "of Server: queries/s of a rank alone", "Q"),
    *(each for each in SERVER_OPTIONS if each.name in LOAD),
)


def read_plan(values: Values) -> dict[str, Any]:
    """Read the options of the plan and of the load.

    Raises:
        UsageError: they do not go together.
    """
    v, server = values.values, values.values["scenario"] == "server"
    foreign = (
        ["batch_size"] if server else [each.replace("-", "_") for each in ("target-qps", *LOAD)]
    )
    for name in foreign:
        if values.origins[name] != "default":
            other = "offline" if server else "server"
            raise UsageError(f"--{name.replace('_', '-')} is of --scenario {other}: leave it out")
    load = Load(
        v["target_qps"], v["arrival"], "static", v["max_batch"], v["max_wait"],
        v["latency_bound"] or (),
    )  # fmt: skip
    return {
        "load": usable(load, v["scaling"]) if server else None,
        "scaling": Plan(v["world_sizes"] or (), v["rounds"], v["scaling"]),
        "name": v["name"] or "coordinated",
        "samples": "gather",
    }


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status.

    Raises:
        DistbenchError: anything that a sentence can tell.
    """
    left_out = ("duration", "num-samples", "rules", "shares", "until", "samples")
    options = (*OPTIONS, *options_but(*left_out))
    return run_scenario(
        "distbench.coordinated", __doc__ or "", options, argv, measure_coordinated, read_plan
    )


if __name__ == "__main__":
    start_command(main)
