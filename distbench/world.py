"""A rank among ranks: joining, checking, gathering.

``join`` turns torchrun's environment into a ``World``: links of its own between the ranks
(``wire``, ``liveness``), a gloo control group for small values, and a data group (NCCL where every
rank has a GPU, else gloo) for samples. Nothing is pickled: small values travel as JSON, samples as
int64.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from distbench import network
from distbench.clock import Now, now_ns
from distbench.errors import DistbenchError, End, ModelError, UsageError, where
from distbench.findings import Finding
from distbench.gpus import Device, choose_device, lock_gpu
from distbench.liveness import SideThread
from distbench.probe import probe_collectives
from distbench.seating import Place, open_links, read_place

JOIN_TIMEOUT_S = 300.0
COLLECTIVE_TIMEOUT_S = 30.0
PIECE_ELEMENTS = 8 << 20
"""int64 elements a collective carries at once: 64 MiB, which bounds device memory and waiting."""


@dataclass(frozen=True)
class World:
    """This rank's place among all ranks.

    Attributes:
        rank: global rank.
        world_size: number of ranks.
        local_rank: rank within its host.
        local_world_size: ranks on its host.
        node: number of its node.
        hosts: hostname of each rank.
        device: what this rank computes on.
        replica: number of the model copy that this rank belongs to.
        replicas: number of model copies.
        leader: whether this rank is the first of its replica.
        backend: the data group's backend: "nccl", "gloo", or "none" for one rank alone.
        interface: the network interface in use, None for one rank alone.
        side: the side thread, which owns the links.
        now: the clock of this process.
        findings: what joining found out.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node: int
    hosts: tuple[str, ...]
    device: Device
    replica: int
    replicas: int
    leader: bool
    backend: str
    interface: network.Interface | None
    side: SideThread
    now: Now = now_ns
    findings: tuple[Finding, ...] = ()
    control: Any = field(default=None, repr=False)
    data: Any = field(default=None, repr=False)

    @property
    def host(self) -> str:
        """This rank's hostname."""
        return self.hosts[self.rank]

    def check(self, place: str, problem: DistbenchError | None = None) -> None:
        """Stop all ranks with one sentence if any rank has a problem; all ranks must call it.

        Args:
            place: names the step; used once in a run.
            problem: this rank's problem, or None.

        Raises:
            UsageError: a rank had one; every rank raises that of the lowest such rank.
        """
        said = "" if problem is None else str(problem)
        if said and self.world_size > 1 and "rank " not in said:
            said = f"{where(self.rank, self.host)}: {said}"
        code = 0 if problem is None else problem.exit_code
        told = self.side.meet(
            f"check:{place}",
            json.dumps([said, code]).encode(),
            lambda all_: next((p for p in all_ if json.loads(p)[0]), b""),
        )
        if told:
            sentence, code = json.loads(told)
            own = isinstance(problem, ModelError)
            error = ModelError(sentence) if own else UsageError(sentence)
            error.exit_code, error.agreed = code, True
            raise error from (problem.__cause__ if problem else None)

    def agree(self, place: str, values: dict[str, Any], remedy: str) -> None:
        """Refuse to go on unless all ranks hold equal values.

        Args:
            place: names the step.
            values: JSON-able values by name.
            remedy: what to do about a difference, as the end of a sentence.

        Raises:
            UsageError: a value differs; the sentence names it, the ranks and both values.
        """
        gathered = self.gather_json(values)
        for name in dict.fromkeys(key for each in gathered for key in each):
            by_value: dict[str, list[int]] = {}
            for rank, each in enumerate(gathered):
                by_value.setdefault(json.dumps(each.get(name), sort_keys=True), []).append(rank)
            if len(by_value) > 1:
                told = "; ".join(f"{v} on {self._named(r)}" for v, r in by_value.items())
                error = UsageError(f"the ranks differ in {name} ({place}): {told}; {remedy}")
                error.agreed = True
                raise error

    def _named(self, ranks: Sequence[int]) -> str:
        shown = ", ".join(where(r, self.hosts[r]) for r in ranks[:4])
        return shown + (f" and {len(ranks) - 4} more" if len(ranks) > 4 else "")

    def gather_json(self, value: Any) -> list[Any]:
        """Give every rank the JSON-able values of all ranks, in order of rank."""
        data = np.frombuffer(json.dumps(value, allow_nan=False).encode(), np.uint8)
        if self.control is None:
            return [json.loads(data.tobytes())]
        self.side.meet("gather_json")  # a rank may come late; a collective waits 30 s and no more
        parts = _gather(torch.from_numpy(data.copy()), self.control, torch.device("cpu"))
        return [json.loads(part.numpy().tobytes()) for part in parts]

    def reduce(self, values: NDArray[np.int64], how: str) -> NDArray[np.int64]:
        """Return the elementwise "sum" or "max" of int64 values over all ranks."""
        if self.control is None:
            return values
        reduced = torch.from_numpy(values.copy())
        operation = dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX
        dist.all_reduce(reduced, operation, group=self.control)
        return cast("NDArray[np.int64]", reduced.numpy())

    def gather_rows(self, rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """All-gather int64 rows over the data group.

        Args:
            rows: shape (n, k), int64; n may differ between ranks, k may not.

        Returns:
            The rows of each rank, shape (n_rank, k), int64, in order of rank.

        Raises:
            RuntimeError: a rank was lost on the way (from torch, within 30 s).
        """
        if self.data is None:
            return [rows]
        width = rows.shape[1]
        device = torch.device(f"cuda:{self.device.index}" if self.backend == "nccl" else "cpu")
        flat = torch.from_numpy(np.ascontiguousarray(rows).reshape(-1))
        parts = _gather(flat, self.data, device)
        return [cast("NDArray[np.int64]", part.numpy()).reshape(-1, width) for part in parts]


def _gather(flat: torch.Tensor, group: Any, device: torch.device) -> list[torch.Tensor]:
    """All-gather flat tensors of unequal length: each rank broadcasts into its slice of the result.

    No padding and no pickling; in pieces, so that a group on a GPU needs little memory there.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    lengths = torch.zeros(size, dtype=torch.int64, device=device)
    lengths[rank] = len(flat)
    dist.all_reduce(lengths, group=group)
    counts = lengths.tolist()
    parts = [flat if r == rank else torch.empty(n, dtype=flat.dtype) for r, n in enumerate(counts)]
    for start in range(0, max(counts), PIECE_ELEMENTS):
        pieces = [part[start : start + PIECE_ELEMENTS] for part in parts]
        moved = [piece.to(device) for piece in pieces]
        pending = [
            dist.broadcast(piece, group=group, group_src=r, async_op=True)
            for r, piece in enumerate(moved)
            if len(piece)
        ]
        for work in pending:
            work.wait()
        if device.type != "cpu":
            for r, (piece, arrived) in enumerate(zip(pieces, moved, strict=True)):
                if r != rank:
                    piece.copy_(arrived)
    return parts


@contextmanager
def join(
    *,
    backend: str = "auto",
    device: str = "auto",
    timeout_s: float = JOIN_TIMEOUT_S,
    now: Now = now_ns,
) -> Iterator[World]:
    """Join the other ranks that torchrun started, or be one rank alone without torchrun.

    Args:
        backend: of the data group: "auto", "nccl" or "gloo".
        device: "auto", "cpu" or "cuda".
        timeout_s: how long the ranks may take to find each other.
        now: the clock to measure with; tests pass a skewed one.

    Yields:
        The world. On leaving, an error of this rank is told to the others in a sentence.

    Raises:
        UsageError: hosts, devices or network cannot be used as asked; names rank, value, remedy.
    """
    place = read_place()
    with ExitStack() as stack:
        chosen, problem = _take_device(stack, device, place, backend)
        store = None if place.alone else _open_store(place, timeout_s)
        interface, links, seats = open_links(stack, place, store, timeout_s)
        side = SideThread(seats, place.rank, links, now)
        side.on_end = tell_end
        side.start()
        _catch_sigterm(stack, side)
        world = World(
            rank=place.rank,
            world_size=place.world_size,
            local_rank=place.local_rank,
            local_world_size=place.local_world_size,
            node=place.node,
            hosts=tuple(seat.host for seat in seats),
            device=chosen,
            replica=place.rank,
            replicas=place.world_size,
            leader=True,
            backend="none",
            interface=interface,
            side=side,
            now=now,
        )
        try:
            world.check("device", problem)
            if not place.alone:
                world = _with_groups(stack, world, store, backend)
            yield world
            side.meet("bye")
        except BaseException as error:
            if not getattr(error, "agreed", False):
                side.fail(error)
            raise
        finally:
            side.stop()


def _take_device(
    stack: ExitStack, asked: str, place: Place, backend: str
) -> tuple[Device, DistbenchError | None]:
    """Choose and lock this rank's device, or return the problem, which all ranks are told later."""
    try:
        chosen = choose_device(asked, place.local_rank)
        if backend == "nccl" and chosen.type != "cuda":
            raise UsageError("--backend nccl needs a GPU on every rank, and there is none here")
        stack.enter_context(lock_gpu(chosen.uuid))
    except UsageError as error:
        if place.alone:
            raise
        return Device("cpu", 0, "", "", "", ""), error
    return chosen, None


def tell_end(end: End) -> None:
    """Say on stderr, and in torchrun's summary, why this process ends early."""
    with suppress(OSError, ValueError):  # a closed pipe must not keep the process from its end
        sys.stdout.flush()
        sys.stderr.write(f"distbench: {end.sentence}\n")
        sys.stderr.flush()
    record_error(DistbenchError(end.sentence))


def record_error(error: BaseException) -> None:
    """Hand an error to torch elastic, so that torchrun's Root Cause block shows its sentence."""
    if os.environ.get("TORCHELASTIC_ERROR_FILE"):
        from torch.distributed.elastic.multiprocessing.errors import (  # noqa: PLC0415
            get_error_handler,
        )

        try:
            # The handler shows the traceback of what is being handled: let that be the sentence.
            raise error.with_traceback(None) from None
        except BaseException as shown:
            get_error_handler().record_exception(shown)


def _catch_sigterm(stack: ExitStack, side: SideThread) -> None:
    """Let SIGTERM wake the side thread through its descriptor; only a main thread may ask so."""
    try:
        before = signal.signal(signal.SIGTERM, lambda _number, _frame: None)
    except ValueError:
        return
    stack.callback(signal.signal, signal.SIGTERM, before)
    old = signal.set_wakeup_fd(side.wake_on_signals(), warn_on_full_buffer=False)
    stack.callback(signal.set_wakeup_fd, old)


def _open_store(place: Place, timeout_s: float) -> Any:
    master = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        meeting = dist.rendezvous("env://", timeout=timedelta(seconds=timeout_s))  # type: ignore[attr-defined]
        store, _, _ = next(iter(meeting))
        store.set_timeout(timedelta(seconds=timeout_s))
    except (RuntimeError, ValueError) as error:
        raise UsageError(
            f"rank {place.rank} ({socket.gethostname()}) cannot open torchrun's store at {master}: "
            f"{error}"
        ) from error
    return store


def _with_groups(stack: ExitStack, world: World, store: Any, backend: str) -> World:
    """Make the control group and the data group."""
    timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
    if dist.is_initialized():
        control = dist.new_group(backend="gloo", timeout=timeout)
    else:
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore("distbench", store),  # type: ignore[attr-defined]
            rank=world.rank,
            world_size=world.world_size,
            timeout=timeout,
        )
        stack.callback(_destroy_groups)
        control = dist.group.WORLD
    world = replace(world, control=control, data=control, backend="gloo")
    types = world.gather_json(world.device.type)
    if len(set(types)) > 1:
        world.agree("devices", {"device": world.device.type}, "give all ranks --device cpu or cuda")
    if world.device.type != "cuda":
        return world
    torch.cuda.set_device(world.device.index)
    if backend == "gloo":
        return world
    return _with_nccl(world, timeout, required=backend == "nccl")


def _destroy_groups() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _with_nccl(world: World, timeout: timedelta, *, required: bool) -> World:
    """Make the NCCL data group, eagerly, after child processes have shown that NCCL works here."""
    failure = probe_collectives(world, "nccl") if world.world_size > 1 else ""
    failures = [text for text in world.gather_json(failure) if text]
    if not failures:
        device = torch.device("cuda", world.device.index)
        data = dist.new_group(backend="nccl", timeout=timeout, device_id=device)
        return replace(world, data=data, backend="nccl")
    remedy = (
        "try NCCL_IB_DISABLE=1 if an InfiniBand card is half configured, or NCCL_SOCKET_IFNAME="
        f"={world.interface.name if world.interface else 'eth0'} for the interface"
    )
    message = f"NCCL does not work between the ranks: {failures[0]}; {remedy}"
    world.check("nccl", UsageError(message) if required else None)
    finding = Finding(
        "doubtful", "nccl-failed", f"{message}; samples are gathered over gloo", remedy=remedy
    )
    return replace(world, findings=(*world.findings, finding))


def probe_child() -> None:
    """Run in the child: join over ``argv[1]`` and all-reduce 1 MiB on device ``argv[2]``."""
    backend, name = sys.argv[1:3]
    device = torch.device(name)
    bound: dict[str, Any] = {}
    if device.type == "cuda":
        torch.cuda.set_device(device)
        bound["device_id"] = device
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dist.init_process_group(backend, timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S), **bound)
        values = torch.ones(1 << 18, device=device)
        dist.all_reduce(values)
        if int(values[0]) != dist.get_world_size():
            raise DistbenchError(f"{backend} all-reduce of ones gave {values[0]}")
        dist.destroy_process_group()
