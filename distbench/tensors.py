"""The operations of ``collectives`` on torch tensors: buffers, calls, what they must hold then.

torch 2.13 gave ``all_gather_into_tensor`` and ``reduce_scatter_tensor`` new names and warns about
the old ones; older versions have the old ones alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from distbench.errors import UsageError
from distbench.operations import OPERATIONS, Ints, Part, contents, period, summed

if TYPE_CHECKING:
    from distbench.world import World

TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
POISON = -1
"""Fills outputs before an operation; no content and no sum is below 0."""
TILE = 16_384
"""Elements that are written and compared at once, at the least."""


@dataclass(frozen=True)
class Call:
    """One operation on its buffers.

    Attributes:
        run: runs it once, on a GPU into the current stream.
        reset: puts inputs back that it overwrites, and overwrites its outputs; waits for that.
        fill: writes the inputs for a salt, and then resets.
        check: compares the outputs with what that salt must give, after so many runs since the last
            reset; returns how many elements were compared, and how many are wrong.
    """

    run: Callable[[], Any]
    reset: Callable[[], None]
    fill: Callable[[int], None]
    check: Callable[[int, int], tuple[int, int]]


class HostMarks:
    """On a CPU an operation has ended when its call returns."""

    def begin(self) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""

    def device_ns(self) -> int:
        """Return 0: there is no device."""
        return 0


class CudaMarks:
    """On a GPU an operation is launched, and has ended when its stream comes to the second event.

    Args:
        cuda: ``torch.cuda``; tests pass a stand-in.
        timed: whether device time is read as well, which costs an event before the first operation.
    """

    def __init__(self, cuda: Any, *, timed: bool) -> None:
        self.timed = timed
        self.first, self.last = (cuda.Event(enable_timing=timed) for _ in range(2))

    def begin(self) -> None:
        """Record the first event."""
        if self.timed:
            self.first.record()

    def finish(self) -> None:
        """Record the second event and wait for it."""
        self.last.record()
        self.last.synchronize()

    def device_ns(self) -> int:
        """Return the time between the events, ns."""
        return round(self.first.elapsed_time(self.last) * 1e6) if self.timed else 0


def marks_of(world: World, *, timed: bool) -> HostMarks | CudaMarks:
    """Return what times an operation on the device that the data group runs on."""
    return CudaMarks(torch.cuda, timed=timed) if world.backend == "nccl" else HostMarks()


def tensor_device(world: World) -> torch.device:
    """Return where the buffers lie: NCCL's in the GPU's memory, gloo's in the host's."""
    return (
        torch.device("cuda", world.device.index) if world.backend == "nccl" else torch.device("cpu")
    )


def build(part: Part, dtype: str, world: World) -> Call:
    """Allocate an operation's buffers on this rank.

    Args:
        part: the operation and its size.
        dtype: of the elements.
        world: all ranks.

    Raises:
        UsageError: there is no memory for them.
    """
    kind, n, rank = OPERATIONS[part.operation], world.world_size, world.rank
    device = tensor_device(world)
    lengths = [part.elements * (n if kind.shared else 1), part.elements]
    if part.operation == "all_gather":
        lengths.reverse()
    try:
        send = torch.zeros(lengths[0], dtype=TYPES[dtype], device=device)
        recv = send
        if part.operation != "broadcast":
            recv = torch.zeros(lengths[1], dtype=TYPES[dtype], device=device)
    except (RuntimeError, MemoryError) as error:
        raise UsageError(
            f"no memory for {part.operation} of {part.bytes} B on {device}: give smaller --sizes "
            f"({str(error).splitlines()[0]})"
        ) from error
    given = partial(_given, n, rank, dtype)
    wanted = partial(_wanted, part, n, rank, dtype)
    keeps = part.operation == "broadcast" and rank == 0

    def reset() -> None:
        if part.operation == "all_reduce":
            recv.copy_(send)
        elif not keeps:
            recv.fill_(POISON)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def fill(salt: int) -> None:
        if part.operation != "broadcast" or keeps:
            _write(send, given(salt))
        reset()

    def check(salt: int, runs: int) -> tuple[int, int]:
        # In place an all-reduce sums what it left, which soon is beyond what is exact.
        if part.operation == "all_reduce" and runs > 1:
            return 0, 0
        tiles = wanted(salt)
        pieces = recv.view(len(tiles), -1)
        wrong = sum(_wrong(piece, tile) for piece, tile in zip(pieces, tiles, strict=True))
        return len(recv), wrong

    return Call(_bound(part.operation, send, recv, world), reset, fill, check)


def _bound(operation: str, send: Any, recv: Any, world: World) -> Callable[[], Any]:
    """Return a call of an operation on its buffers, which ends as torch's own does."""
    group, rank, n = world.data, world.rank, world.world_size
    if operation == "all_reduce":
        return lambda: dist.all_reduce(recv, group=group)
    if operation == "all_gather":
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        return lambda: gather(recv, send, group=group)
    if operation == "reduce_scatter":
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        return lambda: scatter(recv, send, group=group)
    if operation == "broadcast":
        return lambda: dist.broadcast(recv, src=0, group=group)
    if operation != "send_recv":
        raise UsageError(f"operation {operation} has no call of torch's here: add it to tensors.py")
    pair = [
        dist.P2POp(dist.isend, send, (rank + 1) % n, group),
        dist.P2POp(dist.irecv, recv, (rank - 1) % n, group),
    ]

    def send_recv() -> None:
        # Both are posted before either is waited for, so that no order of the ranks can block.
        for work in dist.batch_isend_irecv(pair):
            work.wait()

    return send_recv


def _tile(dtype: str, ranks: int) -> int:
    """Return how many elements a tile has: whole periods of the contents."""
    own = period(dtype, ranks)
    return own * max(1, -(-TILE // own))


def _given(ranks: int, rank: int, dtype: str, salt: int) -> Ints:
    """Return a tile of what this rank puts in."""
    return contents(rank, ranks, dtype, salt, 0, _tile(dtype, ranks))


def _wanted(part: Part, ranks: int, rank: int, dtype: str, salt: int) -> list[Ints]:
    """Return a tile of each equal piece of what this rank must hold afterwards."""
    length = _tile(dtype, ranks)
    if OPERATIONS[part.operation].reduces:
        first = rank * part.elements if part.operation == "reduce_scatter" else 0
        return [summed(ranks, dtype, salt, first, length)]
    sources = {"all_gather": range(ranks), "broadcast": [0], "send_recv": [(rank - 1) % ranks]}
    return [contents(r, ranks, dtype, salt, 0, length) for r in sources[part.operation]]


def _pieces(flat: torch.Tensor, tile: Ints) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pair a tensor's whole tiles, and the rest behind them, with the tile."""
    same = torch.from_numpy(tile).to(device=flat.device, dtype=flat.dtype)
    whole = len(flat) - len(flat) % len(same)
    return [(flat[:whole].view(-1, len(same)), same), (flat[whole:], same[: len(flat) - whole])]


def _write(flat: torch.Tensor, tile: Ints) -> None:
    for target, source in _pieces(flat, tile):
        target.copy_(source)


def _wrong(flat: torch.Tensor, tile: Ints) -> int:
    """Count the elements that are not what the tile, again and again, says; NaN is wrong."""
    return sum(int((found != must).sum()) for found, must in _pieces(flat, tile))
