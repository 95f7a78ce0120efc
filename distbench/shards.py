"""A rank's own part of a model: some of its layers, or a tensor-parallel part of these.

The decoder's part is made without ever holding the whole; a one-shot model's stage is put into
torch's schedule. What talks is torch.distributed: one all-reduce after each half layer, or what
torch's pipelining sends.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distbench.clock import now_ns
from distbench.engines.stopwatch import Stopwatch
from distbench.models.tinylm_net import TinyLM
from distbench.models.tinylm_weights import Whole, fill
from distbench.parallel import Placed
from distbench.shape import NetConfig


class Reduced(nn.Module):
    """A linear map of which each part holds some columns: computed, then summed over the parts."""

    def __init__(self, weight: Tensor, group: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.group = group
        self.took: list[tuple[int, int]] | None = None
        self.watch: Stopwatch | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Map shape (..., own columns) to shape (..., rows), the same on every part."""
        out = nn.functional.linear(x, self.weight)
        if self.took is not None:
            return self._timed(out, self.took)
        if self.watch is not None:  # whoever waits here for another part does not compute
            self.watch.computing = False
            dist.all_reduce(out, group=self.group)
            self.watch.computing = True
            return out
        dist.all_reduce(out, group=self.group)
        return out

    def _timed(self, out: Tensor, took: list[tuple[int, int]]) -> Tensor:
        """Reduce, and note bytes and ns: never in a window, for a GPU is stopped around it."""
        if out.is_cuda:
            torch.cuda.synchronize(out.device)
        before = now_ns()
        dist.all_reduce(out, group=self.group)
        if out.is_cuda:
            torch.cuda.synchronize(out.device)
        took.append((out.numel() * out.element_size(), now_ns() - before))
        return out


def watch_reduces(net: nn.Module, watch: Stopwatch) -> None:
    """Let a rank's stopwatch know when it waits in an all-reduce: others stand still then."""
    for each in net.modules():
        if isinstance(each, Reduced):
            each.watch = watch


@contextmanager
def timed_reduces(net: nn.Module) -> Iterator[dict[str, list[tuple[int, int]]]]:
    """Time every all-reduce of a network for a while.

    Args:
        net: of this rank.

    Yields:
        Bytes and ns of each, by the name of the matrix that it follows.
    """
    reducing = {name: each for name, each in net.named_modules() if isinstance(each, Reduced)}
    found: dict[str, list[tuple[int, int]]] = {name: [] for name in reducing}
    for name, each in reducing.items():
        each.took = found[name]
    try:
        yield found
    finally:
        for each in reducing.values():
            each.took = None


ROWS = ("attention.q", "attention.k", "attention.v", "feed.gate", "feed.up")
COLUMNS = ("attention.o", "feed.down")
"""Matrices of a layer whose rows or columns are divided among the parts."""


def cut(
    config: NetConfig,
    placed: Placed,
    halves: tuple[int, int],
    whole: Whole,
    dtype: torch.dtype = torch.float32,
) -> TinyLM:
    """Make this rank's part of a decoder.

    The parts are placed by ``parallelize_module``. It leaves DTensors, whose dispatch in Python
    takes longer than a small layer's work; so each part then computes on its local matrices, with
    one all-reduce after each attention and each feed-forward.

    Args:
        config: of the whole decoder.
        placed: where this rank is.
        halves: begin and end of its stage, in half layers.
        whole: its weights, whole parameters of which this rank keeps its part.
        dtype: of the network.

    Returns:
        The network, on the device, in eval mode.
    """
    with torch.device("meta"):
        net = TinyLM(config, *halves).to(dtype)
    if placed.layout.tp == 1:
        return fill(net.to_empty(device=placed.device), whole)
    from torch.distributed.tensor.parallel import (  # noqa: PLC0415  slow to import
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    plan: dict[str, Any] = {}
    for number, block in net.layers.items():
        for name, _ in block.named_modules():
            if name in ROWS:
                plan[f"layers.{number}.{name}"] = ColwiseParallel()
            elif name in COLUMNS:
                plan[f"layers.{number}.{name}"] = RowwiseParallel()
    mesh = placed.mesh["tp"]
    parallelize_module(net, mesh, plan, src_data_rank=None)
    fill(net.to_empty(device=placed.device), whole)
    group = mesh.get_group()
    for name in plan:
        weight = net.get_parameter(f"{name}.weight").to_local()  # type: ignore[attr-defined]
        own: nn.Module = Reduced(weight, group)
        if name.endswith(ROWS):
            own = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            own.weight = nn.Parameter(weight, requires_grad=False)
        net.set_submodule(name, own)
    return net.eval()


def stage_schedule(
    module: nn.Module, placed: Placed, lanes: int, taken: Tensor, given: Tensor
) -> Any:
    """Return torch's schedule of a one-shot pipeline, over this rank's stage.

    Args:
        module: the stage, on the device.
        placed: where this rank is.
        lanes: micro-batches of a group.
        taken: what the stage takes of one micro-batch, on "meta"; given so that torch need not
            exchange shapes, which it would pickle.
        given: what it returns, likewise.
    """
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe  # noqa: PLC0415

    stage = PipelineStage(
        module,
        placed.stage,
        placed.layout.pp,
        placed.device,
        input_args=torch.empty_like(taken, device=placed.device),
        output_args=torch.empty_like(given, device=placed.device),
        group=placed.mesh["pp"].get_group(),
    )
    return ScheduleGPipe(stage, n_microbatches=lanes)
