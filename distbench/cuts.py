"""One model on all ranks under every layout that is compared: built, checked, and foreseen."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any

from distbench.errors import UsageError
from distbench.findings import Finding
from distbench.layout import REPLICAS, Layout, check_shape, check_world, lanes_of
from distbench.models import TOKEN_MODELS, split_model, token_model
from distbench.models.decoders import TORCH_DTYPES, DecoderModel, build_part
from distbench.models.one_shots import (
    OneShotModel,
    build_one_shot,
    check_one_shot,
    compare_one_shot,
    digits,
    sleep,
)
from distbench.models.parity import compare, fits_alone, fits_beside, twin
from distbench.models.speed import time_layers
from distbench.parallel import Placed, following, lay_out, time_links
from distbench.readiness import setup_limit_s
from distbench.record import watched
from distbench.shards import timed_reduces

if TYPE_CHECKING:
    from distbench.settings import Settings
    from distbench.world import World


@dataclass(frozen=True)
class Cut:
    """A model on all ranks under one layout.

    Attributes:
        placed: where this rank is.
        sut: its part.
        lanes: micro-batches in flight.
    """

    placed: Placed
    sut: Any
    lanes: int


@dataclass(frozen=True)
class Cuts:
    """The models of all layouts that are compared.

    Attributes:
        model: what they compute.
        batch_size: samples of a group.
        every: in the order in which they were asked for.
        stack: lets every rank that follows leave.
    """

    model: DecoderModel | OneShotModel
    batch_size: int
    every: list[Cut]
    stack: ExitStack

    def close(self) -> None:
        """Let every rank that follows leave."""
        self.stack.close()


def build_cuts(settings: Settings, world: World) -> Cuts:
    """Build this rank's part of the model under every layout; all ranks call it.

    Raises:
        UsageError: a layout does not divide ranks or model, or has no room, on any rank.
    """
    assert settings.shard is not None
    asked, layouts = settings.shard.lanes, settings.shard.layouts
    told = {
        "--model": settings.model_name,
        "--dtype": settings.dtype,
        "--shard": [layout.name for layout in layouts],
        "--micro-batches": asked,
        "samples a group": settings.group,
    }
    # Before anything is sent between parts, whose shapes follow from these.
    world.agree("layouts", told, "start every node with the same command line")
    cuts = Cuts(_model(settings), settings.group, [], ExitStack())
    world, layouts = _with_room(cuts.model, world, layouts)
    for layout in layouts:
        check_world(layout, world.world_size)
        lanes = lanes_of(layout, asked, _divided(cuts))
        if isinstance(cuts.model, DecoderModel):
            check_shape(layout, cuts.model.config, lanes, cuts.model.slots)
        else:
            check_one_shot(layout, cuts.model, lanes, cuts.batch_size)
    with ExitStack() as leaving:  # where a later layout is refused, the others' ranks must leave
        leaving.callback(cuts.close)
        for layout in layouts:
            placed = lay_out(world, layout)
            lanes = lanes_of(layout, asked, _divided(cuts))
            with watched(world, setup_limit_s(settings)):
                cuts.every.append(_build(cuts, placed, lanes))
        leaving.pop_all()
    return cuts


def _with_room(
    model: DecoderModel | OneShotModel, world: World, layouts: tuple[Layout, ...]
) -> tuple[World, tuple[Layout, ...]]:
    """Leave out whole replicas where they do not fit, with a note; all ranks call it.

    Raises:
        UsageError: nothing else was asked for.
    """
    if REPLICAS not in layouts or not isinstance(model, DecoderModel):
        return world, layouts
    if all(world.gather_json(fits_alone(model, world))):
        return world, layouts
    others = tuple(layout for layout in layouts if layout != REPLICAS)
    needed = f"a whole model of {model.config.weights:,} parameters does not fit one rank's device"
    remedy = "give --shard pp or tp, fewer slots or a smaller --dtype"
    if not others:
        raise UsageError(f"{needed}: {remedy}")
    note = Finding("info", "replicas-left-out", f"{needed}: replicas were left out", remedy=remedy)
    return replace(world, findings=(*world.findings, note)), others


def _model(settings: Settings) -> DecoderModel | OneShotModel:
    name = settings.model_name.partition(",")[0]
    if name in TOKEN_MODELS:
        return token_model(settings.model_name, settings.group, settings.dtype)
    one_shot = {"digits": digits, "sleep": sleep}
    if name not in one_shot:
        raise UsageError(
            f"--model {settings.model_name} cannot be cut over ranks: give one of "
            f"{', '.join((*TOKEN_MODELS, *one_shot))}"
        )
    if settings.dtype not in ("", "fp32"):
        raise UsageError(
            f"model {name} is cut in fp32 alone, not in {settings.dtype}: leave --dtype out"
        )
    return one_shot[name](split_model(settings.model_name)[1])


def _divided(cuts: Cuts) -> int:
    """Return what micro-batches divide: the slots of a token model, or a group."""
    return cuts.model.slots if isinstance(cuts.model, DecoderModel) else cuts.batch_size


def _build(cuts: Cuts, placed: Placed, lanes: int) -> Cut:
    """Build one layout, and hold its answers against those of the whole model."""
    world, model = placed.world, cuts.model
    found: dict[str, Any] | None = None
    cut = placed.layout.degree > 1
    fits = not isinstance(model, DecoderModel) or fits_beside(model, placed)
    if isinstance(model, DecoderModel) and cut and not min(world.gather_json(fits)):
        small = twin(model, placed.layout.pp)
        part = _part(placed, "twin of ", lambda: build_part(small, placed, lanes))
        with closing(part), following(part, world):
            found = _compared(placed, lambda: compare(part, small, placed.device))
    if isinstance(model, DecoderModel):
        sut = _part(placed, "", lambda: build_part(model, placed, lanes, world.now))
    else:
        make = partial(build_one_shot, model, placed, lanes, cuts.batch_size, world.now)
        sut = _part(placed, "", make)
    cuts.stack.enter_context(following(sut, world))
    cuts.stack.callback(sut.close)
    if cut and found is None:
        if isinstance(model, DecoderModel):
            found = _compared(placed, lambda: compare(sut, model, placed.device))
        else:
            found = _compared(placed, lambda: compare_one_shot(sut, model, lanes))
    sut.layout["parity"] = found or None
    return Cut(placed, sut, lanes)


def _part(placed: Placed, what: str, make: Callable[[], Any]) -> Any:
    """Make this rank's part, or stop all ranks with the sentence of one: before any talks."""
    problem, sut = None, None
    try:
        sut = make()
    except UsageError as error:
        problem = error
    placed.world.check(f"{what}layout {placed.layout.name}", problem)
    return sut


def _compared(placed: Placed, compare_: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Let leaders compare while the others follow; every rank has the word of its leader."""
    world = placed.world
    told = world.gather_json(compare_() if world.leader else {})
    found: dict[str, Any] = told[world.replica * placed.layout.degree]
    return found


FORCED = 8
"""Decode steps whose all-reduces are timed."""


def reduces(cuts: Cuts, world: World) -> dict[str, list[list[Any]]]:
    """Time each all-reduce of layouts with parts, apart from any window; all ranks call it.

    Returns:
        Of each layout, by the first replica: layer, what it follows, bytes and ns of each call, in
        a prefill and some decode steps.
    """
    made: dict[str, list[list[Any]]] = {}
    for cut in cuts.every:
        if cut.placed.layout.tp == 1:
            continue
        with timed_reduces(cut.sut.rank.net) as took:
            world.side.meet("reduces")
            if cut.placed.world.leader:
                prompts = cut.sut.prompts[: cut.sut.rank.slots]
                steps = min(FORCED, cut.sut.length - max(map(len, prompts)))
                cut.sut.logits(0, prompts, [prompt[:1] * steps for prompt in prompts])
            world.side.meet("reduced")
        rows = [
            [int(name.split(".")[1]), name.split(".")[2], *call]
            for name, calls in took.items()
            for call in calls
        ]
        # The first part of each stage of the first replica: of all parts the same.
        firsts = range(0, cut.placed.layout.degree, cut.placed.layout.tp)
        told = world.gather_json(rows)
        made[cut.placed.layout.name] = [row for rank in firsts for row in told[rank]]
    return made


def calibrated(cuts: Cuts, world: World) -> dict[str, Any]:
    """Time layers and links, of which ``predict`` foresees what layouts do; all ranks call it.

    Returns:
        Rank 0's times of token models; of others nothing.
    """
    model = cuts.model
    if not isinstance(model, DecoderModel):
        return {}
    rows = [model.slots // cut.lanes for cut in cuts.every]
    prompt, item = fmean(map(len, model.prompts)), TORCH_DTYPES[model.dtype].itemsize
    token = model.config.width * item
    sizes = (min(rows) * token, round(max(prompt, *rows)) * token)
    links = {
        cut.placed.layout.name: time_links(cut.placed, sizes, world.now)
        for cut in cuts.every
        if cut.placed.layout.degree > 1
    }
    raw = {
        "config": asdict(model.config),
        "item_bytes": item,
        "prompt": prompt,
        "output": float(model.output_lengths.mean()),
        "slots": model.slots,
        "layers": time_layers(model, rows, cuts.every[0].placed.device, world.now),
        "links": links,
    }
    first: dict[str, Any] = world.gather_json(raw)[0]
    return first
