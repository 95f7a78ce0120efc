"""Distributed: one model over several ranks, as stages of a pipeline or in tensor-parallel parts.

    torchrun --standalone --nproc-per-node 2 -m distbench.distributed --shard pp
    torchrun ... -m distbench.distributed --shard tp --degree 2 --scenario server --target-qps 20
    torchrun ... -m distbench.distributed --shard pp2xtp2 --model llama,layers=8,d=512

Each replica's first rank, its leader, runs the loop of the scenario; the others follow it. Ranks
that a replica does not need hold more replicas.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distbench.cli import Option, Values, one_of, positive, positive_number
from distbench.command import options_but, run_scenario, start_command
from distbench.coordinated import LOAD
from distbench.layout import Layout, ShardPlan, parse_layout
from distbench.load import Load
from distbench.models import token_model
from distbench.offline import OFFLINE
from distbench.server import OPTIONS as SERVER_OPTIONS
from distbench.server import SERVER, paced_by_trace
from distbench.settings import Settings

if TYPE_CHECKING:
    from distbench.parallel import Placed
    from distbench.run import Run
    from distbench.windows import Windows
    from distbench.world import World

DEFAULT_LANES = 2
"""Micro-batches for each stage of a pipeline: with one alone a stage would rest while its lane's
tokens come round."""


@dataclass(frozen=True)
class Cut:
    """A model on all ranks under one layout.

    Attributes:
        placed: where this rank is.
        sut: its part.
    """

    placed: Placed
    sut: Any


class Cuts:
    """The models of all layouts that are compared; a command closes them together."""

    def __init__(self) -> None:
        self.stack = ExitStack()
        self.cuts: list[Cut] = []

    def add(self, settings: Settings, world: World, layout: Layout) -> None:
        """Build this rank's part under one more layout; all ranks call it.

        Raises:
            UsageError: the layout does not divide ranks or model.
        """
        from distbench.models.decoders import build_part  # noqa: PLC0415  torch
        from distbench.parallel import following, lay_out  # noqa: PLC0415

        assert settings.shard is not None
        model = token_model(settings.model_name, settings.group, settings.dtype)
        lanes = settings.shard.lanes or DEFAULT_LANES * layout.pp * (layout.pp > 1) or 1
        placed = lay_out(world, layout)
        sut = build_part(model, placed, lanes, world.now)
        self.stack.enter_context(following(sut, placed.world))
        self.stack.callback(sut.close)
        self.cuts.append(Cut(placed, sut))

    def close(self) -> None:
        """Let every rank that follows leave."""
        self.stack.close()


def build_cuts(settings: Settings, world: World) -> Cuts:
    """Build all layouts; raises what ``Cuts.add`` does."""
    assert settings.shard is not None
    cuts = Cuts()
    for layout in settings.shard.layouts:
        cuts.add(settings, world, layout)
    return cuts


def measure_distributed(cuts: Cuts, _world: World, settings: Settings) -> Run | Windows:
    """Take the windows; all ranks call it."""
    from distbench.window import measure  # noqa: PLC0415

    course = OFFLINE if settings.load is None else SERVER
    (only,) = cuts.cuts
    return measure(course, only.sut, only.placed.world, settings)


OPTIONS = (
    Option("shard", "pp", str, "pp, tp, pp2xtp2, replicas", "LAYOUT[,...]"),
    Option("degree", None, positive, "ranks of a replica (default: all)", "N"),
    Option("micro-batches", None, positive, "in flight (default: 2 for each stage)", "N"),
    Option("scenario", "offline", one_of("offline", "server"), "of the windows", "NAME"),
    Option("target-qps", "20", positive_number, "of Server: queries/s", "Q"),
    *(each for each in SERVER_OPTIONS if each.name in LOAD),
)


def read_shard(values: Values) -> dict[str, Any]:
    """Read the layouts and the load.

    Raises:
        UsageError: they do not go together.
    """
    v, server = values.values, values.values["scenario"] == "server"
    load = Load(
        v["target_qps"], v["arrival"], "static", v["max_batch"], v["max_wait"],
        v["latency_bound"] or (),
    )  # fmt: skip
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    layouts = tuple(parse_layout(each, v["degree"], world_size) for each in v["shard"].split(","))
    return {
        "load": paced_by_trace(load) if server else None,
        "shard": ShardPlan(layouts, v["micro_batches"] or 0),
        "name": v["name"] or "distributed",
        "batch_size": 1,
    }


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status.

    Raises:
        DistbenchError: anything that a sentence can tell.
    """
    options = (*OPTIONS, *options_but("batch-size", "shares", "until"))
    return run_scenario(
        "distbench.distributed",
        __doc__ or "",
        options,
        argv,
        measure_distributed,
        read_shard,
        build_cuts,
    )


if __name__ == "__main__":
    start_command(main)
