"""Placing a model on ranks: the device mesh, the links between stages, and who follows whom.

``lay_out`` numbers the replicas and makes the process groups, ``following`` lets a rank work for
its leader, ``time_links`` tells what a send and an all-reduce take. What is sent are tensors of
known shapes: nothing is pickled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from threading import Thread
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from distbench.clock import Now
from distbench.engines.stage import Edge, Edges
from distbench.layout import Layout, check_world

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from distbench.world import World

FOREVER = timedelta(days=365)
"""A rank that follows waits for the next step as long as it takes: the links of ``wire`` tell who
is lost, and end the process."""
KNOWN_S = 2.0
"""After this long the loss of another rank would be known."""
LEAVE_S = 10.0
"""How long a rank's ``follow`` may take to return after the leader's ``close``."""


@dataclass(frozen=True)
class Way:
    """One direction of one edge: a process group of its own, of two ranks.

    Attributes:
        group: of both.
        peer: the other one's rank in it.
    """

    group: Any
    peer: int

    def post(self, tensor: Tensor) -> Any:
        """Send a tensor; returns at once."""
        return dist.isend(tensor.contiguous(), group=self.group, group_dst=self.peer)

    def begin(self, tensor: Tensor) -> Any:
        """Begin to receive into a tensor; over NCCL ``wait`` lets the current stream wait."""
        return dist.irecv(tensor, group=self.group, group_src=self.peer)


@dataclass(frozen=True)
class Placed:
    """A rank's place in a layout.

    Attributes:
        world: with this rank's replica.
        layout: of every replica.
        mesh: of all ranks; its dimensions are "replica", "pp" and "tp".
        edges: of this rank.
        device: that it computes on.
    """

    world: World
    layout: Layout
    mesh: DeviceMesh
    edges: Edges
    device: torch.device

    @property
    def stage(self) -> int:
        """This rank's stage."""
        return self.layout.stage(self.world.rank)

    def told(self) -> dict[str, Any]:
        """Return what rank.json says of it."""
        return {
            "name": self.layout.name,
            "pp": self.layout.pp,
            "tp": self.layout.tp,
            "replicas": self.world.replicas,
            "stage": self.stage,
            "part": self.layout.part(self.world.rank),
        }


def lay_out(world: World, layout: Layout) -> Placed:
    """Make the mesh and the links of a layout, and warm them; all ranks call it.

    Args:
        world: all ranks.
        layout: of a replica; the other ranks hold more of them.

    Raises:
        UsageError: the ranks are no multiple of a replica's.
    """
    check_world(layout, world.world_size)
    rank, degree = world.rank, layout.degree
    device = torch.device("cpu")
    if world.device.type == "cuda":
        device = torch.device("cuda", world.device.index)
    mesh = _mesh(world, layout)
    first = rank - rank % degree
    laid = replace(
        world,
        replica=rank // degree,
        replicas=world.world_size // degree,
        leader=rank == first,
    )
    edges = Edges()
    for leader in layout.leaders(world.world_size):
        made = _edges(layout, rank, leader, world.backend)
        edges = made if leader == first else edges
    _warm(edges, device)
    return Placed(laid, layout, mesh, edges, device)


def _mesh(world: World, layout: Layout) -> DeviceMesh:
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415  slow to import

    shape = (world.world_size // layout.degree, layout.pp, layout.tp)
    override: Any = None
    if world.backend == "nccl":
        override = {"pp": "nccl", "tp": "nccl"}
    if not dist.is_initialized():  # one rank alone: torch's mesh needs a group all the same
        dist.init_process_group(
            "gloo",
            store=dist.HashStore(),  # type: ignore[attr-defined]
            rank=0,
            world_size=1,
        )
    return init_device_mesh(
        world.device.type,
        shape,
        mesh_dim_names=("replica", "pp", "tp"),
        backend_override=override,
    )


def _edges(layout: Layout, rank: int, first: int, backend: str) -> Edges:
    """Make the links of one replica; all ranks call it, and those of other replicas get none."""
    above, below, back = None, list[Edge](), None
    for upper, lower, tokens in steps_of(layout, first):
        head = _way(upper, lower, rank, "gloo")
        body = _way(upper, lower, rank, "gloo" if tokens else backend)
        if head is not None and body is not None:
            if rank == upper:
                below.append(Edge(head, body, tokens))
            else:
                above = Edge(head, body, tokens)
    last = first + (layout.pp - 1) * layout.tp
    if layout.pp > 1:
        back = _way(last, first, rank, "gloo")
    return Edges(above, tuple(below), back)


def steps_of(layout: Layout, first: int) -> list[tuple[int, int, bool]]:
    """Return the edges on which a replica's steps go down.

    Args:
        layout: of the replica.
        first: its leader's rank.

    Returns:
        Upper rank, lower rank, and whether tokens go over it in place of activations: from the
        leader to the other parts of the first stage, then from each part to that of the next stage.
    """
    tp = layout.tp
    told = [(first, first + part, True) for part in range(1, tp)]
    for upper in range(first, first + (layout.pp - 1) * tp):
        told.append((upper, upper + tp, False))
    return told


def _way(source: int, target: int, rank: int, backend: str) -> Way | None:
    # All ranks make every group: torch names one that its members make alone by the number of
    # groups that each of them has already, which differs between ranks, so that they never meet.
    ranks = sorted((source, target))
    group = dist.new_group(
        ranks, backend=backend, timeout=FOREVER, group_desc=f"distbench {source} to {target}"
    )
    if rank not in ranks:
        return None
    return Way(group, ranks.index(target if rank == source else source))


def _warm(edges: Edges, device: torch.device) -> None:
    """Send one element over each link, so that none connects within a window."""
    posted = []
    host = torch.zeros(1, dtype=torch.int64)
    for edge in edges.below:
        place = torch.device("cpu") if edge.tokens else device
        posted += [edge.head.post(host), edge.body.post(torch.zeros(1, device=place))]
    if edges.back is not None and edges.above is not None:
        posted.append(edges.back.post(host))
    if edges.above is not None:
        place = torch.device("cpu") if edges.above.tokens else device
        edges.above.head.begin(torch.zeros(1, dtype=torch.int64)).wait()
        edges.above.body.begin(torch.zeros(1, device=place)).wait()
    elif edges.back is not None:
        edges.back.begin(torch.zeros(1, dtype=torch.int64)).wait()
    for work in posted:
        work.wait()


def _raise(error: Exception) -> tuple[int, float]:
    raise error


@contextmanager
def following(sut: Any, world: World) -> Iterator[None]:
    """Let a rank follow its leader on a thread of its own; its main thread goes with the others'.

    Args:
        sut: has ``follow`` where the rank follows; others are left alone.
        world: all ranks; they are told if ``follow`` fails.

    Yields:
        While it follows.
    """
    follow = getattr(sut, "follow", None)
    if follow is None or world.leader:
        yield
        return

    def keep_following() -> None:
        if world.device.type == "cuda":
            torch.cuda.set_device(world.device.index)
        try:
            follow()
        except Exception as error:  # whatever it is: the others would wait for this rank
            # A link that broke: the side thread knows in a moment who was lost, and ends.
            if not world.side.ending.wait(KNOWN_S):
                # At its next look it tells all ranks, and ends.
                world.side.progress = partial(_raise, error)

    thread = Thread(target=keep_following, name="distbench-follow", daemon=True)
    thread.start()
    try:
        yield
    finally:
        sut.close()
        thread.join(LEAVE_S)


REPEATS = 15
WIDER = 8
"""The larger message that is timed is at least so many times the smaller one."""


def time_links(
    placed: Placed, sizes: tuple[int, int], now: Now
) -> dict[str, list[tuple[int, list[int]]]]:
    """Time a send between neighbours, there and back, and an all-reduce, in this rank's replica.

    All ranks call it, before any window. Where a layout has no stages, its parts are the
    neighbours, and the other way round.

    Args:
        placed: where this rank is.
        sizes: bytes of the smallest and the largest message that the model sends: a line through
            these two tells what others take, for links are seldom straight over all sizes.
        now: the clock.

    Returns:
        Of "send" and "reduce", for both sizes: bytes, ns of each repeat.
    """
    stages, parts = (placed.mesh[name].get_group() for name in ("pp", "tp"))
    sending = stages if placed.layout.pp > 1 else parts
    reducing = parts if placed.layout.tp > 1 else stages
    return {
        "send": _times(partial(_there_and_back, group=sending), placed, sizes, now),
        "reduce": _times(partial(dist.all_reduce, group=reducing), placed, sizes, now),
    }


def _there_and_back(tensor: Tensor, group: Any) -> None:
    rank = dist.get_rank(group)
    if rank == 0:
        dist.send(tensor, group=group, group_dst=1)
        dist.recv(tensor, group=group, group_src=1)
    elif rank == 1:
        dist.recv(tensor, group=group, group_src=0)
        dist.send(tensor, group=group, group_dst=0)


def _times(
    once: Callable[[Tensor], Any], placed: Placed, sizes: tuple[int, int], now: Now
) -> list[tuple[int, list[int]]]:
    found = []
    for size in (sizes[0], max(sizes[1], WIDER * sizes[0])):
        tensor, times = torch.zeros(size // 4, device=placed.device), list[int]()
        for _ in range(REPEATS):
            before = now()
            once(tensor)
            if placed.device.type == "cuda":
                torch.cuda.synchronize(placed.device)
            times.append(now() - before)
        found.append((tensor.numel() * 4, times))
    return found
