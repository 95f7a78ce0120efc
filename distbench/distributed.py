"""Distributed: one model over several ranks, as stages of a pipeline or in tensor-parallel parts.

    torchrun --standalone --nproc-per-node 2 -m distbench.distributed --shard pp
    torchrun ... -m distbench.distributed --shard tp --degree 2 --scenario server --target-qps 20
    torchrun ... -m distbench.distributed --shard pp2xtp2 --model llama,layers=8,d=512

Each replica's first rank, its leader, runs the loop of the scenario; the others follow it. Ranks
that a replica does not need hold more replicas.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any

from distbench.cli import Option, Values, one_of, positive, positive_number
from distbench.command import options_but, run_scenario, start_command
from distbench.coordinated import LOAD
from distbench.errors import UsageError
from distbench.layout import REPLICAS, Layout, ShardPlan, parse_layout
from distbench.load import Load
from distbench.models import TOKEN_MODELS, check_model
from distbench.offline import OFFLINE
from distbench.server import OPTIONS as SERVER_OPTIONS
from distbench.server import SERVER, paced_by_trace
from distbench.settings import Settings, script_settings
from distbench.sharding import cells_of

if TYPE_CHECKING:
    from distbench.cuts import Cuts
    from distbench.windows import Windows
    from distbench.world import World


def run_distributed(
    model: str = "tinylm",
    world: World | None = None,
    *,
    plan: ShardPlan = ShardPlan((Layout(pp=2), REPLICAS)),  # noqa: B008  frozen
    dtype: str = "",
    load: Load | None = None,
    batch_size: int = 32,
    duration_s: float = 5.0,
    num_samples: int | None = None,
    warmup_s: float = 1.0,
    seed: int = 0,
    timeout_s: float | None = None,
    output_dir: str = "results",
) -> Windows:
    """Measure one token model under several layouts, and return the windows.

    Args:
        model: NAME[,key=value...] of a token model, or of ``digits`` or ``sleep`` in stages.
        world: from ``distbench.join``; without it this process joins on its own.
        plan: which layouts, how many micro-batches and rounds.
        dtype: "fp32", "bf16" or "fp16"; "" is fp32.
        load: what is offered to all replicas together, for Server; None for Offline.
        batch_size: samples a group, of a model that is none of texts.
        duration_s: about how long a window lasts, s.
        num_samples: samples of all replicas together; replaces ``duration_s``.
        warmup_s: how long to warm up at least, s.
        seed: of sample order and schedules.
        timeout_s: how long a rank's count may stand still, s; None: by the warm-up.
        output_dir: where the result directory goes.

    Returns:
        The windows, on every rank; ``.result()["tables"]["layouts"]`` compares the layouts.

    Raises:
        UsageError: something cannot be used as asked, on any rank; all ranks raise it.
        IncompleteError: the result could not be written.
    """
    with ExitStack() as stack:
        if world is None:
            from distbench.world import join  # noqa: PLC0415  only the run itself needs torch

            world = stack.enter_context(join())
        settings = script_settings(
            duration_s,
            warmup_s,
            timeout_s,
            batch_size=batch_of(model, batch_size),
            num_samples=num_samples,
            seed=seed,
            output_dir=output_dir,
            name="distributed",
            quiet=True,
            dtype=dtype,
            model_name=check_model(model),
            load=None if load is None else usable(load),
            shard=plan,
        )
        cuts = stack.enter_context(closing(_built(settings, world)))
        return measure_distributed(cuts, world, settings)


def _built(settings: Settings, world: World) -> Cuts:
    """Build all layouts, or stop all ranks with the sentence of one."""
    from distbench.cuts import build_cuts  # noqa: PLC0415  torch, which --help does without

    problem, cuts = None, None
    try:
        cuts = build_cuts(settings, world)
    except UsageError as error:
        problem = error
    world.check("model", problem)
    assert cuts is not None
    return cuts


def batch_of(model: str, asked: int) -> int:
    """Return the samples of a group: of texts one, for an engine has slots for several."""
    return 1 if model.partition(",")[0] in TOKEN_MODELS else asked


def usable(load: Load) -> Load:
    """Return the load of all replicas, at the rate of its trace where it has one.

    Raises:
        UsageError: layouts cannot be compared under it.
    """
    if load.searched:
        raise UsageError("--target-qps auto searches for a peak: give the rate of all replicas")
    if load.dispatch != "static":
        raise UsageError("layouts deal queries out before each window: give --dispatch static")
    return paced_by_trace(load)


def measure_distributed(cuts: Cuts, world: World, settings: Settings) -> Windows:
    """Take the windows of all layouts in turn; all ranks call it.

    Raises:
        UsageError: something cannot be used as asked, on any rank; all ranks raise it.
        IncompleteError: the result could not be written.
    """
    from distbench import finish, record  # noqa: PLC0415  torch
    from distbench.cuts import calibrated, reduces  # noqa: PLC0415
    from distbench.readiness import prepare  # noqa: PLC0415
    from distbench.window import Turn, one_window  # noqa: PLC0415

    course = OFFLINE if settings.load is None else SERVER
    assert settings.shard is not None
    by_name = {cut.placed.layout.name: cut for cut in cuts.every}
    plan = {
        "layouts": list(by_name),
        "rounds": settings.shard.rounds,
        "told": {name: cut.sut.layout for name, cut in by_name.items()},
        "calibration": calibrated(cuts, world),
        "reduces": reduces(cuts, world),
    }
    prepared = {
        name: prepare(course, cut.sut, cut.placed.world, settings) for name, cut in by_name.items()
    }
    folder = record.name_folder(world, settings.output_dir, course.scenario, settings.name)
    planned, results = cells_of(plan), dict[str, dict[str, Any]]()
    turns = {name: Turn(planned=len(planned)) for name in by_name}
    for number, (name, each) in enumerate(planned):
        turn = turns[name]
        turn.number = number
        turn.sharding = {"plan": plan, "cell": {"layout": name, "round": each}}
        own = record.window_folder(folder, number, world.rank)
        run = one_window(prepared[name], by_name[name].placed.world, own, turn)
        if world.rank == 0:
            found = results[own.path.name] = run.result()
            if not settings.quiet:
                _tell(own.path.name, name, each, found)
        del run  # with the samples of all ranks, before those of the next window come
    return finish.write_windows(world, folder.path, results)


def _tell(window: str, name: str, each: int, result: dict[str, Any]) -> None:
    rate = result["metrics"]["throughput"]["value"]
    shown = "unknown" if rate is None else f"{rate:,.6g} samples/s"
    sys.stderr.write(f"distbench: window {window}, round {each}, {name}: {shown}\n")


OPTIONS = (
    Option("model", "tinylm", check_model, "tinylm, llama, digits or sleep[,key=value]", "MODEL"),
    Option(
        "shard",
        "pp,replicas",
        str,
        "layouts to compare: pp, tp, such as pp2, tp2, pp2xtp2, and replicas",
        "LAYOUT[,...]",
    ),
    Option("rounds", "4", positive, "how often each layout is measured, an even number", "N"),
    Option("degree", None, positive, "ranks of a replica (default: all)", "N"),
    Option("micro-batches", None, positive, "in flight (default: 2 for each stage)", "N"),
    Option("scenario", "offline", one_of("offline", "server"), "of the windows", "NAME"),
    Option("target-qps", "20", positive_number, "of Server: queries/s", "Q"),
    *(each for each in SERVER_OPTIONS if each.name in LOAD),
)


def _refuse_foreign(values: Values, of: str, names: Sequence[str]) -> None:
    """Refuse options that were given and would do nothing."""
    for name in names:
        if values.origins[name.replace("-", "_")] != "default":
            raise UsageError(f"--{name} is of {of}: leave it out")


def read_shard(values: Values) -> dict[str, Any]:
    """Read the layouts and the load.

    Raises:
        UsageError: they do not go together.
    """
    v, server = values.values, values.values["scenario"] == "server"
    token = v["model"].partition(",")[0] in TOKEN_MODELS
    if not server:
        _refuse_foreign(values, "--scenario server", ("target-qps", *LOAD))
    if token or server:
        _refuse_foreign(values, "a model that is none of texts, in Offline", ("batch-size",))
    load = Load(
        v["target_qps"], v["arrival"], "static", v["max_batch"], v["max_wait"],
        v["latency_bound"] or (),
    )  # fmt: skip
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    layouts = tuple(parse_layout(each, v["degree"], world_size) for each in v["shard"].split(","))
    if all(each.pp == 1 for each in layouts):
        _refuse_foreign(values, "layouts with stages", ("micro-batches",))
    return {
        "load": usable(load) if server else None,
        "shard": ShardPlan(layouts, v["micro_batches"] or 0, v["rounds"]),
        "name": v["name"] or "distributed",
        "batch_size": batch_of(v["model"], v["batch_size"]),
        "samples": "gather",
    }


def _build(settings: Settings, world: World) -> Cuts:
    from distbench.cuts import build_cuts  # noqa: PLC0415  torch, which --help does without

    return build_cuts(settings, world)


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status.

    Raises:
        DistbenchError: anything that a sentence can tell.
    """
    left_out = ("model", "shares", "until", "rules", "samples")
    options = (*OPTIONS, *options_but(*left_out))
    return run_scenario(
        "distbench.distributed",
        __doc__ or "",
        options,
        argv,
        measure_distributed,
        read_shard,
        _build,
    )


if __name__ == "__main__":
    start_command(main)
