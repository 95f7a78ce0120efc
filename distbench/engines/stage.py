"""One rank of a decoder that several compute: its layers of each step, and the links to the others.

The slots of a replica are divided into lanes, its micro-batches: while one lane is computed by the
last stage, the next one is by the stage before. The leader, the first part of the first stage,
decides what each lane does next (``slots.Lane``) and sends it on; every other rank does the same
all the time (``follow``): receive a step, compute its layers, pass them on. The last stage sends
the tokens back to the leader.

    leader ---- step, activations ---> stage 1 --- ... ---> last stage
       ^------------------------------ tokens ------------------'

A step is a header of int64 and what its layers compute on: tokens for the parts of the first
stage, activations for the others. Each direction of each edge is a link of its own, on which
everything keeps its order. A send is posted, and waited for only when its receive cannot be still
to come: a lane is sent again after its tokens have come round, and by then its last step has been
received. So nothing hangs where a send ends only with its receive, as NCCL's do.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Thread, get_native_id
from typing import Any, Protocol

import torch
from torch import Tensor

from distbench.engines.stopwatch import Stopwatch
from distbench.models.tinylm_net import KVCache, TinyLM

STOP, PREFILL, DECODE, CHECK_PREFILL, CHECK_DECODE = range(5)
"""Kinds of steps; of a check the logits come back in place of tokens."""
FIELDS = 5
"""Of a header before its slots and positions: kind, lane, rows, length, limit."""


class Posted(Protocol):
    """A send or a receive that was posted."""

    def wait(self) -> Any:
        """Wait until it has ended."""


class Link(Protocol):
    """One direction of one edge; everything on it keeps its order."""

    def post(self, tensor: Tensor) -> Posted:
        """Send a tensor; returns at once, and the tensor must stay as it is until it has ended."""

    def begin(self, tensor: Tensor) -> Posted:
        """Begin to receive into a tensor; on a GPU ``wait`` lets the current stream wait."""


@dataclass(frozen=True)
class Edge:
    """Where steps come from or go to.

    Attributes:
        head: of headers, in host memory.
        body: of tokens, in host memory, or of activations, on the device.
        tokens: whether it is tokens.
    """

    head: Link
    body: Link
    tokens: bool


@dataclass(frozen=True)
class Edges:
    """The edges of one rank.

    Attributes:
        above: where its steps come from; None: it is the leader.
        below: where they go to.
        back: of the last stage and the leader: of the tokens; None where one rank is both.
    """

    above: Edge | None = None
    below: tuple[Edge, ...] = ()
    back: Link | None = None


_Coming = tuple[Tensor, Tensor, Posted]
"""A step on its way: its header, what it computes on, and the receive of that."""


@dataclass
class StageRank:
    """What one rank computes of each step: its layers, over the caches of all lanes.

    Attributes:
        net: its layers.
        cache: keys and values of all lanes, lane by lane.
        lanes: micro-batches.
        edges: of this rank.
        device: of the network.
        watch: what its time went to.
    """

    net: TinyLM
    cache: KVCache
    lanes: int
    edges: Edges
    device: torch.device
    watch: Stopwatch
    _posted: list[list[tuple[Posted, Tensor]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.slots = self.cache.slots // self.lanes
        self.caches = [
            KVCache(self.cache.keys[:, first:end], self.cache.values[:, first:end])
            for first in range(0, self.cache.slots, self.slots)
            for end in (first + self.slots,)
        ]
        self.dtype = next(self.net.parameters()).dtype
        self._posted = [[] for _ in range(self.lanes)]

    def header(self) -> Tensor:
        """Return an empty header, int64, shape (5 + 2 slots,)."""
        return torch.zeros(FIELDS + 2 * self.slots, dtype=torch.int64)

    def run(self, head: Tensor, x: Tensor) -> Tensor:
        """Compute this rank's layers of a step and pass them on.

        Args:
            head: the step's header.
            x: tokens, shape (rows, length), int64, or activations, (rows, length, width).

        Returns:
            Of the last stage the tokens, shape (rows,), int64, on the device, or of a check the
            logits, (rows, vocabulary), float32; of the others activations.
        """
        kind, lane, rows, length, limit = head[:FIELDS].tolist()
        self._pass_tokens(lane, head, x)
        prefill, check = kind in (PREFILL, CHECK_PREFILL), kind >= CHECK_PREFILL
        self.watch.begin_work(prefill, rows)
        slots = numbers = None
        at = head[FIELDS + self.slots : FIELDS + self.slots + rows].to(self.device)
        x = x.to(self.device)
        if prefill:
            slots = head[FIELDS : FIELDS + rows].to(self.device)
            numbers = at - 1  # of each prompt's last token
            positions = torch.arange(length, device=self.device).expand(rows, length)
        else:
            positions = at[:, None]
        out: Tensor = self.net(x, self.caches[lane], positions, slots, limit)
        if self.net.last:
            last = out[:, 0] if numbers is None else out[range(rows), numbers]
            out = last.float() if check else last.argmax(dim=-1)
        self.watch.end_work()
        if not self.net.last:
            self._pass(lane, head, out)
        return out

    def _pass_tokens(self, lane: int, head: Tensor, x: Tensor) -> None:
        """Let the other parts of the first stage begin."""
        for work, _ in self._posted[lane]:
            work.wait()
        self._posted[lane].clear()
        for edge in self.edges.below:
            if edge.tokens:
                self._post(lane, edge.head, head)
                self._post(lane, edge.body, x)

    def _pass(self, lane: int, head: Tensor, out: Tensor) -> None:
        for edge in self.edges.below:
            if not edge.tokens:
                self._post(lane, edge.head, head)
                self._post(lane, edge.body, out)

    def _post(self, lane: int, link: Link, tensor: Tensor) -> None:
        self._posted[lane].append((link.post(tensor), tensor))
        self.watch.sent_bytes += tensor.numel() * tensor.element_size()

    def follow(self) -> None:
        """Compute whatever comes, until the leader's ``close``."""
        back, coming = self.edges.back, SimpleQueue[_Coming | Exception | None]()
        reader = Thread(target=self._read, args=(coming,), name="distbench-steps", daemon=True)
        reader.start()
        self.watch.thread = get_native_id()
        with torch.inference_mode():
            while True:
                self.watch.begin_wait()
                step = coming.get()
                if isinstance(step, Exception):
                    raise step
                if step is None:
                    reader.join()
                    return
                head, x, work = step
                work.wait()
                if x.is_cuda:  # it was allocated for the reader's stream
                    x.record_stream(torch.cuda.current_stream(x.device))
                self.watch.end_wait(head.numel() * 8 + x.numel() * x.element_size())
                out = self.run(head, x)
                if back is not None:
                    self.watch.computing = True  # on a GPU this waits for all that was launched
                    told = out.cpu()
                    self._post(int(head[1]), back, told)
                    self.watch.told()

    def _read(self, coming: SimpleQueue[_Coming | Exception | None]) -> None:
        """Receive steps as they come, ahead of what is being computed.

        A send begins only where its receive was posted, over gloo as over NCCL: on the computing
        thread alone, no step would be on its way while another is computed. No more can come than
        there are lanes.
        """
        above = self.edges.above
        streams = ExitStack()
        try:
            assert above is not None, "the leader follows nobody"
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
                # A receive waits for what its stream has to do, which on the computing one would be
                # every step before it.
                own = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
                streams.enter_context(torch.cuda.stream(own))
            while True:
                head = self.header()
                above.head.begin(head).wait()
                kind, _, rows, length, _ = head[:FIELDS].tolist()
                if kind == STOP:
                    self.stop(head)
                    coming.put(None)
                    return
                if above.tokens:
                    x = torch.empty(rows, length, dtype=torch.int64)
                else:
                    shape = (rows, length, self.net.config.width)
                    x = torch.empty(shape, dtype=self.dtype, device=self.device)
                coming.put((head, x, above.body.begin(x)))
        except Exception as error:  # of torch's: the computing thread tells it
            coming.put(error)
        finally:
            streams.close()

    def stop(self, head: Tensor) -> None:
        """Tell those below that no more steps come."""
        for edge in self.edges.below:
            edge.head.post(head).wait()
