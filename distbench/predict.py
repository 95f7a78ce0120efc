"""What a layout should do, by the model's shape, what its layers take, and what the links give.

A text of a prompt and so many tokens is read once and written in as many steps. With B texts a
replica, and C(r) what the whole model takes for a step of r texts, P for one prompt, on one rank:

    replicas   tokens x C(B) / B + P
    tp         (tokens x (C(B) / t + 2 L R(B d)) / B + P / t + 2 L R(prompt d)), t parts, L layers
    pp         the longest of: the slowest stage, w (tokens x C(n) / n + P), w its share of the
               work, n texts of each of m micro-batches; the link, (tokens + prompt) d / rate, for
               messages that follow one another overlap in their latencies; and a micro-batch's way
               round, tokens x (C(n) + p X(n d)) / (m n)

R is an all-reduce, X a send, each latency + bytes / rate; d the width in bytes. It is a model of
what must happen one after the other, so rather too good: what the harness and Python take is not in
it. Both together: of pp the stage's share as tp has it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from distbench.layout import Layout, stages
from distbench.shape import NetConfig


@dataclass(frozen=True)
class Link:
    """What an operation on a link takes: ``latency_s`` + bytes / ``bytes_per_s``."""

    latency_s: float
    bytes_per_s: float

    def time_s(self, size: float) -> float:
        """Return what it takes for so many bytes, s."""
        return self.latency_s + size / self.bytes_per_s


@dataclass(frozen=True)
class Speed:
    """What the whole model takes on one rank.

    Attributes:
        step_s: of a decode step, s, by its number of texts.
        prompt_s: of one prompt, s.
    """

    step_s: Mapping[int, float]
    prompt_s: float


@dataclass(frozen=True)
class Work:
    """What is to be written.

    Attributes:
        config: of the model.
        item_bytes: of one element of an activation.
        prompt: tokens, mean.
        output: tokens, mean.
        slots: texts that a replica writes together.
    """

    config: NetConfig
    item_bytes: int
    prompt: float
    output: float
    slots: int


def reduce_of(link: Link, ranks: int) -> Link:
    """Return what an all-reduce takes, where only its links are known.

    In a ring of n ranks 2 (n - 1) messages of 1/n of the data follow one another. Source: Patarasuk
    and Yuan, Bandwidth optimal all-reduce algorithms, 2009, section 4.
    """
    turns = 2 * (ranks - 1)
    return Link(turns * link.latency_s, link.bytes_per_s * ranks / max(turns, 1))


@dataclass(frozen=True)
class Foreseen:
    """What one text takes of a replica's time at full load.

    Attributes:
        text_s: all of it, s.
        held_by: what it is spent on the most, or what the pipeline waits for.
        share: of that in ``text_s``.
    """

    text_s: float
    held_by: str
    share: float


def foresee(
    layout: Layout, lanes: int, work: Work, speed: Speed, send: Link, reduce: Link
) -> Foreseen:
    """Work out what a layout should do.

    Args:
        layout: of the replica.
        lanes: its micro-batches.
        work: what is written.
        speed: of the whole model on one rank; knows ``slots / lanes`` texts.
        send: between two stages.
        reduce: an all-reduce over the parts of a stage.
    """
    config, rows = work.config, work.slots // lanes
    width, tp, pp = config.width * work.item_bytes, layout.tp, layout.pp
    compute = (work.output * speed.step_s[rows] / rows + speed.prompt_s) / tp
    per_step = 2 * config.layers * reduce.time_s(rows * width) * (tp > 1)
    reduces = work.output * per_step / rows
    reduces += 2 * config.layers * reduce.time_s(work.prompt * width) * (tp > 1)
    most = max(((compute, "computing"), (reduces, "all-reduces")))
    whole = compute + reduces
    if pp == 1:
        return Foreseen(whole, most[1], most[0] / whole)
    link = (work.output + work.prompt) * width / send.bytes_per_s
    turn = speed.step_s[rows] / tp + per_step + pp * send.time_s(rows * width)
    bound, held_by = max(
        (
            (largest_share(config, pp) * whole, f"the slowest stage's {most[1]}"),
            (link, "the link between stages"),
            (work.output * turn / (lanes * rows), "micro-batches on their way round"),
        )
    )
    return Foreseen(bound, held_by, 1.0)


def largest_share(config: NetConfig, count: int) -> float:
    """Return the share of all multiplied weights that the largest stage has."""
    total, most = 0, 0
    for begin, end in stages(config, count):
        own = sum(
            config.attention_weights if half % 2 == 0 else config.feed_weights
            for half in range(begin, end)
        )
        own += config.embedding_weights * (end == 2 * config.layers)
        total, most = total + own, max(most, own)
    return most / total


COLD = 2
"""First repeats that are left out."""
Raw = Sequence[Any]
"""Of one shape or size, what it is and ns of each repeat."""


def link_of(raw: Sequence[Raw], ways: int = 1) -> Link:
    """Return the line through what the smallest and the largest message took.

    Args:
        raw: (bytes, ns of each repeat) of two sizes.
        ways: that a repeat goes over the link.

    Returns:
        Latency alone, with an unlimited rate, where the larger message takes no longer than by the
        spread of both: no rate is made up of noise.
    """
    (small, fast), (large, slow) = ((size, _warm(times)) for size, times in raw)
    gap = median(slow) - median(fast)
    spread = sum(median(abs(each - median(times)) for each in times) for times in (fast, slow))
    if gap <= spread:
        return Link(max(median(fast), median(slow)) / 1e9 / ways, math.inf)
    rate = (large - small) / (gap / 1e9) * ways
    return Link(max(median(fast) / 1e9 / ways - small / rate, 0.0), rate)


def speed_of(raw: Mapping[str, Sequence[Raw]], layers: int) -> Speed:
    """Work out what a whole model takes from networks of one layer and of three.

    What the three take more is two layers, and what the one takes beyond its layer is embedding,
    head and Python.

    Args:
        raw: by the number of layers, (texts, tokens of each, ns of each repeat) of the same shapes.
        layers: of the whole.
    """
    steps, prompt_s = dict[int, float](), 0.0
    for (rows, tokens, short), (_, _, long) in zip(raw["1"], raw["3"], strict=True):
        one, three = (median(_warm(times)) / 1e9 for times in (short, long))
        layer = max((three - one) / 2, 0.0)
        whole = max(one - layer, 0.0) + layers * layer
        if tokens == 1:
            steps[rows] = whole
        else:
            prompt_s = whole
    return Speed(steps, prompt_s)


def _warm(times: Sequence[int]) -> Sequence[int]:
    return times[COLD:] or times


def foresee_all(
    raw: Mapping[str, Any], layouts: Mapping[str, tuple[Layout, int]], world_size: int
) -> dict[str, tuple[float, str]]:
    """Work out what every layout should do, from what was timed before the windows.

    Args:
        raw: as ``cuts.calibrated`` left it; empty for a model of which nothing is foreseen.
        layouts: with their micro-batches, by name.
        world_size: ranks.

    Returns:
        Samples/s, and what each is held by.
    """
    if not raw:
        return {}
    config = NetConfig(**raw["config"])
    work = Work(config, *(raw[name] for name in ("item_bytes", "prompt", "output", "slots")))
    speed, none, made = speed_of(raw["layers"], config.layers), Link(0.0, math.inf), {}
    for name, (layout, lanes) in layouts.items():
        links = raw["links"].get(name)
        send = link_of(links["send"], ways=2) if links else none
        reduce = link_of(links["reduce"]) if links else none
        told = foresee(layout, lanes, work, speed, send, reduce)
        made[name] = (world_size / layout.degree / told.text_s, told.held_by)
    return made
