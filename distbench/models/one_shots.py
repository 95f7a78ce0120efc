"""One-shot models as stages of a pipeline: ``digits``, and ``sleep`` whose answer is known.

A stage's module maps a micro-batch to what the next stage takes. Each rank makes its own alone.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from distbench.clock import Now, now_ns
from distbench.engines.one_shot import OneShotEngine, OneShotRank, Timed
from distbench.engines.stopwatch import Stopwatch
from distbench.errors import UsageError
from distbench.layout import Layout, balanced
from distbench.models.digits import TARGET_ACCURACY, count_right
from distbench.models.digits_net import DigitsNet, build_net, read_data

if TYPE_CHECKING:
    from distbench.parallel import Placed

Range = tuple[int, int]


@dataclass(frozen=True)
class OneShotModel:
    """A model that is computed once for each sample, before any of it is in memory.

    Attributes:
        samples: shape (total, ...), on the host.
        units: what each of its layers costs, in order; a stage has some that follow one another.
            Empty: it divides into any number of equal stages.
        make: makes the layers from one to before another, of so many, on a device: of a stage, on
            "meta" to learn shapes, and of all layers for the parity check. It must give every rank
            the same weights for the same layers.
        digest: what its weights are called in a result.
        weights: parameters of the whole.
        scored: ``held_out``, ``score`` and ``target_accuracy``, where known.
    """

    samples: Tensor
    units: tuple[int, ...]
    make: Callable[[Range, int, torch.device], nn.Module]
    digest: str
    weights: int
    scored: Mapping[str, Any] = field(default_factory=dict)


class Naps(nn.Module):
    """Takes a known time per sample, to an absolute deadline; returns what it was given.

    Args:
        per_sample_ns: time per sample.
        now: the clock.
    """

    def __init__(self, per_sample_ns: float, now: Now = now_ns) -> None:
        super().__init__()
        self.per_sample_ns, self.now = per_sample_ns, now

    def forward(self, x: Tensor) -> Tensor:
        """Sleep for a micro-batch."""
        if x.device.type != "meta":
            deadline = self.now() + len(x) * self.per_sample_ns
            while (left := deadline - self.now()) > 0:
                time.sleep(left / 1e9)
        return x + 0


def sleep(values: Mapping[str, Any]) -> OneShotModel:
    """Return a model that sleeps, in parts that all sleep as long.

    Args:
        values: per_sample, ns of the whole model.
    """
    whole = values.get("per_sample", 1_000_000)
    return OneShotModel(
        torch.arange(1024, dtype=torch.float32)[:, None],
        (),
        lambda part, count, _: Naps(whole * (part[1] - part[0]) / count),
        "",
        0,
    )


class DigitsPart(nn.Module):
    """Some of the layers of ``DigitsNet``, which is cut between its convolutions.

    Args:
        net: the whole, on any device.
        begin: first convolution of this part, the head counting as the last one.
        end: behind its last one.
    """

    def __init__(self, net: DigitsNet, begin: int, end: int) -> None:
        super().__init__()
        convolutions = len(net.layers) // 2
        self.first, self.last = begin == 0, end > convolutions
        self.layers = net.layers[2 * begin : 2 * min(end, convolutions)]
        self.head = net.head if self.last else None

    def forward(self, x: Tensor) -> Tensor:
        """Map images, or what the part before returned, to the same of the next or to logits."""
        if self.first:
            x = x[:, None] / 16
        x = self.layers(x)
        return x if self.head is None else self.head(x.mean(dim=(2, 3)))


def digits(values: Mapping[str, Any]) -> OneShotModel:
    """Return the digits model.

    Args:
        values: width, depth.

    Raises:
        UsageError: these are out of range, or its embedded files are damaged.
    """
    data = read_data()
    net, digest = build_net(**values)
    pixels = [64] * (len(net.layers) // 2 - 1) + [16]
    convolutions: list[Any] = list(net.layers)[::2]
    costs = [c.weight.numel() * n for c, n in zip(convolutions, pixels, strict=True)]
    labels, scored = data.labels.astype(np.int64), dict[str, Any]()
    if digest.startswith("sha256:"):
        scored = {
            "held_out": data.held_out.astype(np.int64),
            "score": lambda indices, outputs: count_right(labels, indices, outputs),
            "target_accuracy": TARGET_ACCURACY,
        }
    return OneShotModel(
        torch.from_numpy(data.images).float(),
        (*costs, net.head.weight.numel()),
        lambda part, _, device: copy.deepcopy(DigitsPart(net, *part)).to(device).eval(),
        digest,
        sum(each.numel() for each in net.parameters()),
        scored,
    )


def check_one_shot(layout: Layout, model: OneShotModel, lanes: int, batch_size: int) -> None:
    """Refuse a layout that a one-shot model does not have.

    Raises:
        UsageError: it has tensor-parallel parts, too many stages, or micro-batches that do not
            divide the group; names the nearest valid setting.
    """
    if layout.tp > 1:
        raise UsageError(
            f"--shard {layout.name}: this model is cut between its layers alone, give --shard pp"
        )
    if layout.pp > len(model.units) > 0:
        raise UsageError(
            f"a model of {len(model.units)} layers has no {layout.pp} stages: give --shard "
            f"pp{len(model.units)} or fewer stages"
        )
    if batch_size % lanes:
        fits = [each for each in range(1, batch_size + 1) if batch_size % each == 0]
        near = min(fits, key=lambda each: (abs(each - lanes), each))
        raise UsageError(
            f"a group of {batch_size} samples does not divide into {lanes} micro-batches: give "
            f"--micro-batches {near}, or --batch-size {-(-batch_size // lanes) * lanes}"
        )


def build_one_shot(
    model: OneShotModel, placed: Placed, lanes: int, batch_size: int, now: Now = now_ns
) -> Any:
    """Make this rank's stage of a model; all ranks of a replica call it.

    Args:
        model: what to compute.
        placed: where this rank is in its replica.
        lanes: micro-batches of a group.
        batch_size: samples of a full group.
        now: clock for the engine's stamps.

    Returns:
        On the leader the engine, on the others what follows it.
    """
    from distbench.shards import stage_schedule  # noqa: PLC0415

    count, place = placed.layout.pp, placed.stage
    parts = [(each, each + 1) for each in range(count)]
    if model.units:
        parts = balanced(model.units, count)
    total = len(model.units) or count
    x = torch.empty((batch_size // lanes, *model.samples.shape[1:]), device="meta")
    shapes = [x.to(model.samples.dtype)]
    for part in parts:
        shapes.append(model.make(part, total, torch.device("meta"))(shapes[-1]))
    watch = Stopwatch(placed.device, now)
    own = model.make(parts[place], total, placed.device)
    timed = Timed(own, watch)
    schedule = None
    if count > 1:
        schedule = stage_schedule(timed, placed, lanes, shapes[place], shapes[place + 1])
    outputs = torch.empty((batch_size, *shapes[-1].shape[1:]))
    rank = OneShotRank(
        schedule, timed if count == 1 else None, placed.edges, placed.device, outputs, watch
    )
    sut: Any = OneShotEngine(rank, model.samples, batch_size, now)
    if not placed.world.leader:
        sut = OneShotFollower(rank, len(model.samples))
    held = sum(each.numel() for each in own.parameters())
    sut.layout = {
        **placed.told(),
        "lanes": lanes,
        "loop": "one-shot",
        "weights_bytes": 4 * held,
        "whole_bytes": 4 * model.weights,
        "cache_bytes": 0,
    }
    sut.digest, sut.dtype = model.digest, "fp32"
    for name, value in model.scored.items():
        setattr(sut, name, value)
    return sut


class OneShotFollower(OneShotEngine):
    """Any rank of a replica but its leader."""

    def __init__(self, rank: OneShotRank, total: int) -> None:
        super().__init__(rank, torch.zeros(total, 1), 1)

    def follow(self) -> None:
        """Compute what the leader sends, until its ``close``."""
        self.rank.follow()

    def close(self) -> None:
        """Leave it to the leader, whose ``close`` ends ``follow``."""


def compare_one_shot(sut: OneShotEngine, model: OneShotModel, lanes: int) -> dict[str, Any]:
    """Compare a model in stages with the whole one, in the same micro-batches; the leader calls it.

    Returns:
        Largest difference of outputs / largest output.
    """
    samples = model.samples[: sut.batch_size]
    if not model.units:
        return {}
    device = sut.rank.device
    whole = model.make((0, len(model.units)), len(model.units), device)
    ours = sut.compute(samples)
    size = sut.batch_size // lanes
    full = torch.zeros((sut.batch_size, *samples.shape[1:]), dtype=samples.dtype)
    full[: len(samples)] = samples
    with torch.inference_mode():
        full = full.to(device)
        parts = [whole(full[first : first + size]) for first in range(0, len(full), size)]
        theirs = torch.cat(parts)[: len(samples)].float().cpu()
    return {"logit_error": float((ours - theirs).abs().max() / theirs.abs().max())}
