"""How one model lies on several ranks: stages of a pipeline, tensor-parallel parts, or replicas.

    --shard pp --degree 2      a pipeline of 2 stages; the other ranks hold more such replicas
    --shard tp --degree 2      every matrix in 2 parts
    --shard pp2xtp2            a pipeline of 2 stages, each in 2 parts: 4 ranks a replica
    --shard replicas           the whole model on every rank

The ranks are numbered replica by replica, stage by stage, part by part, so that the parts of a
stage, which talk the most, are neighbours. A replica's first rank is its leader.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from distbench.errors import UsageError
from distbench.shape import NetConfig

DEFAULT_LANES = 2
"""Micro-batches for each stage of a pipeline: with one alone a stage would rest while its lane's
tokens come round."""
_WORD = re.compile(r"(pp|tp)(\d*)")


@dataclass(frozen=True)
class Layout:
    """How a model is cut.

    Attributes:
        pp: stages of the pipeline.
        tp: tensor-parallel parts of each.
    """

    pp: int = 1
    tp: int = 1

    @property
    def degree(self) -> int:
        """Ranks of a replica."""
        return self.pp * self.tp

    @property
    def name(self) -> str:
        """As it is given to --shard."""
        parts = [f"pp{self.pp}"] * (self.pp > 1) + [f"tp{self.tp}"] * (self.tp > 1)
        return "x".join(parts) or "replicas"

    def stage(self, rank: int) -> int:
        """Return the stage of a rank, from 0."""
        return rank % self.degree // self.tp

    def part(self, rank: int) -> int:
        """Return the tensor-parallel part of a rank, from 0."""
        return rank % self.tp

    def leaders(self, world_size: int) -> list[int]:
        """Return the first rank of each replica."""
        return list(range(0, world_size, self.degree))


@dataclass(frozen=True)
class ShardPlan:
    """What is measured.

    Attributes:
        layouts: compared with each other, the one that the run is about first.
        lanes: micro-batches in flight; 0: two for each stage.
        rounds: how often each is measured.
    """

    layouts: tuple[Layout, ...]
    lanes: int = 0
    rounds: int = 4

    def __post_init__(self) -> None:
        names = [each.name for each in self.layouts]
        if len(set(names)) < len(names):
            raise UsageError(f"--shard names a layout twice: {', '.join(names)}")
        if self.rounds < 2 or self.rounds % 2:
            raise UsageError(
                f"{self.rounds} rounds are not 2, 4, 6 ...: every other one runs in reverse "
                "(--rounds)"
            )


REPLICAS = Layout()
"""The whole model on every rank."""


def parse_layout(text: str, degree: int | None, ranks: int) -> Layout:
    """Read one layout of --shard.

    >>> parse_layout("pp", 2, 4), parse_layout("pp2xtp2", None, 4).name
    (Layout(pp=2, tp=1), 'pp2xtp2')

    Args:
        text: pp, tp or replicas; pp and tp with a number, or both with an x between.
        degree: ranks of a replica, of --degree; None where it was not given.
        ranks: of the run, which a replica has where no number is given.

    Raises:
        UsageError: it is none of these, or has no number or two.
    """
    if text == "replicas":
        return REPLICAS
    cut = [_WORD.fullmatch(part) for part in text.split("x")]
    kinds = [found[1] for found in cut if found]
    if None in cut or kinds not in (["pp"], ["tp"], ["pp", "tp"]):
        raise UsageError(
            f"--shard {text!r} is none of pp, tp, replicas, nor such as pp2, tp2 or pp2xtp2"
        )
    numbers = [int(found[2]) for found in cut if found and found[2]]
    if len(cut) == 2 and len(numbers) < 2:
        raise UsageError(f"--shard {text}: give both numbers, such as pp2xtp2")
    if numbers and degree not in (None, math.prod(numbers)):
        raise UsageError(f"--shard {text} and --degree {degree} contradict: leave one out")
    sizes = dict(zip(kinds, numbers or [degree or ranks], strict=True))
    if min(sizes.values()) < 2:
        raise UsageError(
            f"--shard {text} of {min(sizes.values())} is no shard: give 2 parts or more, which "
            "needs as many ranks (torchrun --nproc-per-node, --nnodes), or --shard replicas"
        )
    return Layout(**sizes)


def check_world(layout: Layout, world_size: int) -> None:
    """Refuse a number of ranks that is no multiple of a replica's.

    Raises:
        UsageError: it is none; names the nearest numbers and degrees that are.
    """
    if world_size % layout.degree == 0:
        return
    less = world_size // layout.degree * layout.degree
    ranks = " or ".join(str(each) for each in (less, less + layout.degree) if each)
    fits = [each for each in range(2, world_size + 1) if world_size % each == 0]
    degrees = _nearest(fits, layout.degree)
    raise UsageError(
        f"{world_size} ranks do not make replicas of {layout.degree} ({layout.name}): start {ranks}"
        + (f", or give --degree {degrees}" if degrees and 1 in (layout.pp, layout.tp) else "")
    )


def check_shape(layout: Layout, config: NetConfig, lanes: int, slots: int) -> None:
    """Refuse a layout that does not divide a decoder.

    Args:
        layout: to be checked.
        config: of the decoder.
        lanes: micro-batches in flight.
        slots: texts of a replica, of which each lane has as many.

    Raises:
        UsageError: it does not; names the value, the limit and the nearest valid setting.
    """
    if config.layers < layout.pp:
        raise UsageError(
            f"a model of {config.layers} layers has no {layout.pp} stages: give --shard "
            f"pp{config.layers} or fewer stages"
        )
    for name, size in (
        ("key and value heads", config.kv_heads),
        ("heads", config.heads),
        ("hidden units", config.hidden),
    ):
        if size % layout.tp:
            sizes = (config.kv_heads, config.heads, config.hidden)
            fits = [n for n in range(1, config.kv_heads + 1) if not any(s % n for s in sizes)]
            near = _nearest(fits, layout.tp)
            raise UsageError(
                f"{size} {name} do not divide into {layout.tp} tensor-parallel parts: give "
                + (f"--shard tp{near}" if near != 1 else "--shard pp, which cuts between layers")
            )
    if slots % lanes or slots < lanes:
        near = _nearest([n for n in range(1, slots + 1) if slots % n == 0], lanes)
        raise UsageError(
            f"{slots} slots do not divide into {lanes} micro-batches: give --micro-batches {near}, "
            f"or slots={-(-slots // lanes) * lanes}"
        )


def lanes_of(layout: Layout, asked: int, divided: int) -> int:
    """Return the micro-batches of a replica.

    Args:
        layout: of it; without stages all is one.
        asked: by --micro-batches; 0: up to two for each stage.
        divided: what they must divide.
    """
    if layout.pp == 1:
        return 1
    most = range(1, DEFAULT_LANES * layout.pp + 1)
    return asked or max(each for each in most if divided % each == 0)


def _nearest(values: Sequence[int], wanted: int) -> int:
    """Return the value that is nearest to the wanted one, of two the smaller; 0 without any."""
    return min(values, key=lambda each: (abs(each - wanted), each), default=0)


def stages(config: NetConfig, count: int) -> list[tuple[int, int]]:
    """Divide a decoder into stages, so that the largest one is as small as can be.

    Half layers, attentions and feed-forwards in turn, are kept together in order; the last stage
    has the head as well. What counts is weights that are multiplied with every token, for these are
    what a stage computes; the embedding is looked up.

    Args:
        config: of the decoder.
        count: of stages, at most ``config.layers``.

    Returns:
        (begin, end) of each, in half layers.
    """
    halves = [config.attention_weights, config.feed_weights] * config.layers
    halves[-1] += config.embedding_weights
    return balanced(halves, count)


def balanced(weights: Sequence[int], count: int) -> list[tuple[int, int]]:
    """Divide a row into parts that follow one another, the largest as small as can be.

    Args:
        weights: above zero.
        count: of parts, at most as many as weights.

    Returns:
        (begin, end) of each.
    """
    low, high = max(weights), sum(weights)
    while low < high:  # the least limit under which there is a cut
        middle = (low + high) // 2
        if _cut(weights, count, middle) is None:
            low = middle + 1
        else:
            high = middle
    fits = _cut(weights, count, high)
    assert fits is not None
    return fits


def _cut(weights: Sequence[int], count: int, limit: int) -> list[tuple[int, int]] | None:
    """Cut a row into parts of at most ``limit``, from the end on; None where there is no cut."""
    ends, total = [len(weights)], 0
    for place in range(len(weights) - 1, -1, -1):
        # A part ends where the next weight does not fit, or each that is left must be a part.
        if total and (total + weights[place] > limit or place + 1 == count - len(ends)):
            ends.append(place + 1)
            total = 0
        total += weights[place]
    if len(ends) != count:
        return None
    return list(zip([*ends[1:], 0], ends, strict=True))[::-1]


def own_part(config: NetConfig, begin: int, end: int, tp: int) -> NetConfig:
    """Return the sizes of what a rank keeps keys and values of.

    Args:
        config: of the whole decoder.
        begin: first half layer of its stage.
        end: behind the last one.
        tp: parts of a stage.
    """
    attentions = sum(half % 2 == 0 for half in range(begin, end))
    return replace(
        config,
        width=config.width // tp,
        layers=max(attentions, 1),
        heads=config.heads // tp,
        kv_heads=config.kv_heads // tp,
    )


def own_weights(config: NetConfig, begin: int, end: int, tp: int) -> int:
    """Return the parameters of a rank; see ``own_part``.

    Matrices are cut; norms, embedding and head are whole on every part.
    """
    total = 0
    for half in range(begin, end):
        whole = config.attention_weights if half % 2 == 0 else config.feed_weights
        total += (whole - config.width) // tp + config.width
    first, last = begin == 0, end == 2 * config.layers
    return total + config.embedding_weights * (first or last) + config.width * last


def bubble(stages: int, micro_batches: int) -> float:
    """Return the share of a pipeline's time in which its stages rest at best.

    (p - 1) / (m + p - 1): each of m micro-batches goes through p equal stages once, the first one
    reaches the last stage p - 1 steps after the start. Source: Huang et al., GPipe, 2018, section
    2.3 (there for training).
    """
    return (stages - 1) / (micro_batches + stages - 1)


def bubble_of_loop(stages: int, lanes: int) -> float:
    """Return the same of a token loop, in which micro-batches go round: 1 - m/p, at least 0.

    A micro-batch's next token needs the last one, so m of p equal stages are busy at a time.
    """
    return max(0.0, 1 - lanes / stages)
