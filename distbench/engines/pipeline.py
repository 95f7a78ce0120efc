"""Decoding by several ranks: the token loop of a pipeline, of tensor-parallel parts, or of both.

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

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distbench.clock import Now, now_ns
from distbench.engines.slot_decoder import ROUND
from distbench.engines.slots import Decode, Lane, Prefill, Prompts, Step, check_batching
from distbench.engines.stopwatch import Stopwatch
from distbench.models.tinylm_net import KVCache, TinyLM
from distbench.sut import Done, First, Indices

STOP, PREFILL, DECODE, CHECK = 0, 1, 2, 3
"""Kinds of steps; a check is a prefill whose logits come back in place of tokens."""
FIELDS = 5
"""Of a header before its slots and positions: kind, lane, rows, length, limit."""


class Posted(Protocol):
    """A send that was posted."""

    def wait(self) -> Any:
        """Wait until it has ended."""


class Link(Protocol):
    """One direction of one edge; everything on it keeps its order."""

    def post(self, tensor: Tensor) -> Posted:
        """Send a tensor; returns at once, and the tensor must stay as it is until it has ended."""

    def take(self, tensor: Tensor) -> None:
        """Receive into a tensor; on a GPU the current stream waits, and the host does not."""


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
        self.watch.begin_work(kind != DECODE, rows)
        slots = numbers = None
        at = head[FIELDS + self.slots : FIELDS + self.slots + rows].to(self.device)
        x = x.to(self.device)
        if kind != DECODE:
            slots = head[FIELDS : FIELDS + rows].to(self.device)
            numbers = at - 1  # of each prompt's last token
            positions = torch.arange(length, device=self.device).expand(rows, length)
        else:
            positions = at[:, None]
        out: Tensor = self.net(x, self.caches[lane], positions, slots, limit)
        if self.net.last:
            last = out[:, 0] if numbers is None else out[range(rows), numbers]
            out = last.float() if kind == CHECK else last.argmax(dim=-1)
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
        above, back = self.edges.above, self.edges.back
        assert above is not None, "the leader follows nobody"
        with torch.inference_mode():
            while True:
                head = self.header()
                self.watch.begin_wait()
                above.head.take(head)
                kind, lane, rows, length, _ = head[:FIELDS].tolist()
                if kind == STOP:
                    self.stop(head)
                    return
                if above.tokens:
                    x = torch.empty(rows, length, dtype=torch.int64)
                else:
                    shape = (rows, length, self.net.config.width)
                    x = torch.empty(shape, dtype=self.dtype, device=self.device)
                above.body.take(x)
                self.watch.end_wait(head.numel() * 8 + x.numel() * x.element_size())
                out = self.run(head, x)
                if back is not None:
                    self._post(lane, back, out.cpu())
                    self.watch.told()

    def stop(self, head: Tensor) -> None:
        """Tell those below that no more steps come."""
        for edge in self.edges.below:
            edge.head.post(head).wait()


class PipelineEngine:
    """The leader's side behind the protocol of a system under test.

    Args:
        rank: what the leader itself computes.
        prompts: by sample index.
        output_lengths: tokens to write after each prompt, shape (total,), int64, at least 1.
        length: positions of a slot.
        batching: "continuous" or "static".
        now: clock for the stamps.

    Attributes:
        most_tokens: of a sample.

    Raises:
        UsageError: ``batching`` is neither.
    """

    def __init__(
        self,
        rank: StageRank,
        prompts: Sequence[bytes],
        output_lengths: NDArray[np.int64],
        length: int,
        batching: str = "continuous",
        now: Now = now_ns,
    ) -> None:
        self.rank, self.watch, self.now = rank, rank.watch, now
        self.length = length
        self.total = self.resident = len(prompts)
        self.depth = rank.cache.slots
        self.most_tokens = int(output_lengths.max())
        vocabulary = rank.net.config.vocabulary
        self._prompts = Prompts(prompts, output_lengths, length, vocabulary)
        static = check_batching(batching)
        self._lanes = [Lane(rank.slots, static) for _ in range(rank.lanes)]
        self._resting = deque(range(rank.lanes))
        self._flying: deque[tuple[int, Step, Tensor]] = deque()  # lane, step, tokens or none yet
        self._tokens = [torch.zeros(rank.slots, dtype=torch.int64) for _ in self._lanes]
        self._positions = [torch.zeros(rank.slots, dtype=torch.int64) for _ in self._lanes]
        self._closed = False

    def load(self, indices: Indices) -> None:
        """All prompts are resident already."""

    def unload(self, indices: Indices) -> None:
        """Prompts stay resident."""

    def issue(self, row: int, indices: Indices, data: Sequence[bytes] | None = None) -> None:
        """Let a row wait for a slot; see ``SlotEngine.issue``."""
        self._prompts.issue(row, indices, data)

    def poll(self, until_ns: int) -> Sequence[Done | First]:
        """Send every lane that rests on its way, and wait for the tokens of the oldest step."""
        with torch.inference_mode():
            self._launch()
            if not self._flying:
                return ()
            lane, step, told = self._flying.popleft()
            back = self.rank.edges.back
            if back is not None:
                self.watch.begin_wait()
                back.take(told)
                self.watch.end_wait(told.numel() * 8)
            tokens: list[int] = told.tolist()
            self._advance(lane, step, told)
        self._resting.append(lane)
        return self._lanes[lane].landed(tokens, self.now())

    def logits(self, prompts: Sequence[bytes]) -> Tensor:
        """Return what the model makes of some prompts; nothing may be in flight.

        Args:
            prompts: no more than a lane has slots.

        Returns:
            Of the token after each, shape (n, vocabulary), float32, in host memory.
        """
        with torch.inference_mode():
            head, x = self._prefill(CHECK, 0, range(len(prompts)), prompts)
            out = self.rank.run(head, x)
            back = self.rank.edges.back
            if back is None:
                return out.cpu()
            told = torch.empty(len(prompts), self.rank.net.config.vocabulary)
            back.take(told)
            return told

    def close(self) -> None:
        """Forget what waits and is being written, and let the other ranks leave ``follow``."""
        self._prompts.waiting.clear()
        if not self._closed:
            self._closed = True
            self.rank.stop(self.rank.header())

    def _launch(self) -> None:
        """Begin a step of every lane that rests and has something to do."""
        free = sum(self._lanes[lane].room > 0 for lane in self._resting)
        for _ in range(len(self._resting)):
            lane = self._resting.popleft()
            # Rows are spread over the lanes: texts that stay in one lane would leave stages idle.
            most = -(-len(self._prompts.waiting) // max(free, 1))
            free -= self._lanes[lane].room > 0
            step = self._lanes[lane].next(self._prompts.waiting, most, self.now)
            if step is None:
                self._resting.append(lane)
                continue
            self._flying.append((lane, step, self._begin(lane, step)))

    def _begin(self, lane: int, step: Step) -> Tensor:
        """Compute the leader's layers of a step; returns its tokens, or room for them."""
        if type(step) is Prefill:
            rows = len(step.slots)
            head, x = self._prefill(PREFILL, lane, step.slots, step.prompts)
        else:
            assert type(step) is Decode
            head, at, rows = self.rank.header(), FIELDS + self.rank.slots, step.top
            x = self._tokens[lane][:rows, None].clone()
            head[:FIELDS] = torch.tensor([DECODE, lane, rows, 1, self._rounded(step.limit)])
            head[at : at + rows] = self._positions[lane][:rows]
        out = self.rank.run(head, x)
        if self.rank.edges.back is not None:
            return torch.empty(rows, dtype=torch.int64)
        return out.cpu()

    def _prefill(
        self, kind: int, lane: int, slots: Sequence[int], prompts: Sequence[bytes]
    ) -> tuple[Tensor, Tensor]:
        """Return header and tokens of prompts, the shorter ones filled up with zeros."""
        head, at = self.rank.header(), FIELDS + self.rank.slots
        rows, longest = len(slots), max(map(len, prompts))
        filled = b"".join(prompt.ljust(longest, b"\0") for prompt in prompts)
        codes = np.frombuffer(filled, np.uint8).reshape(rows, longest).astype(np.int64)
        head[:FIELDS] = torch.tensor([kind, lane, rows, longest, self._rounded(longest)])
        head[FIELDS : FIELDS + rows] = torch.tensor(slots)
        head[at : at + rows] = torch.tensor([len(prompt) for prompt in prompts])
        return head, torch.from_numpy(codes)

    def _advance(self, lane: int, step: Step, told: Tensor) -> None:
        """Note the tokens, and where in their slots the next ones stand."""
        tokens, positions = self._tokens[lane], self._positions[lane]
        if type(step) is Prefill:
            slots = torch.tensor(step.slots)
            tokens[slots] = told
            positions[slots] = torch.tensor([len(prompt) for prompt in step.prompts])
        else:
            tokens[: len(told)] = told
            # A slot without a text is computed along, and must not run out of its cache.
            positions[: len(told)].add_(1).clamp_(max=self.length - 1)

    def _rounded(self, limit: int) -> int:
        return min(self.length, -(-limit // ROUND) * ROUND)


class Follower:
    """Any rank of a replica but its leader, behind what a scenario asks of a system under test.

    Args:
        rank: what it computes.
        total: samples that the leader has.
        depth: groups that the leader accepts.
        most_tokens: of a sample.
    """

    def __init__(self, rank: StageRank, total: int, depth: int, most_tokens: int) -> None:
        self.rank, self.watch = rank, rank.watch
        self.total = self.resident = total
        self.depth, self.most_tokens = depth, most_tokens

    def load(self, indices: Indices) -> None:
        """The leader has the samples."""

    def unload(self, indices: Indices) -> None:
        """The leader has the samples."""

    def issue(self, row: int, indices: Indices, data: Sequence[bytes] | None = None) -> None:
        """Nothing is issued to a rank that follows; raises RuntimeError."""
        raise RuntimeError("only a replica's leader is issued samples")

    def poll(self, until_ns: int) -> Sequence[Done | First]:
        """Return nothing: what ends does so on the leader."""
        return ()

    def follow(self) -> None:
        """Compute what the leader sends, until its ``close``."""
        self.rank.follow()

    def close(self) -> None:
        """Leave it to the leader, whose ``close`` ends ``follow``."""
