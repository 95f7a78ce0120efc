"""Decoding by several ranks: the leader's token loop, and what stands for the ranks that follow it.

The leader knows which texts are in which lane's slots, and sends each lane on as soon as its tokens
have come back; what is computed, and what goes over which link, is in ``stage``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distbench.clock import Now, now_ns
from distbench.engines.slot_decoder import ROUND
from distbench.engines.slots import Decode, Lane, Prefill, Prompts, Step, check_batching
from distbench.engines.stage import (
    CHECK_DECODE,
    CHECK_PREFILL,
    DECODE,
    FIELDS,
    PREFILL,
    Posted,
    StageRank,
)
from distbench.sut import Done, First, Indices


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
        self.prompts, self.length = prompts, length
        self.total = self.resident = len(prompts)
        self.depth = rank.cache.slots
        self.most_tokens = int(output_lengths.max())
        vocabulary = rank.net.config.vocabulary
        self._prompts = Prompts(prompts, output_lengths, length, vocabulary)
        static = check_batching(batching)
        self._lanes = [Lane(rank.slots, static) for _ in range(rank.lanes)]
        self._resting = deque(range(rank.lanes))
        # Lane, step, its tokens, and where they are still to come the receive of them.
        self._flying: deque[tuple[int, Step, Tensor, Posted | None]] = deque()
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
            lane, step, told, work = self._flying.popleft()
            if work is not None:
                self.watch.begin_wait()
                work.wait()
                self.watch.end_wait(told.numel() * 8)
            tokens: list[int] = told.tolist()
            stamp_ns = self.now()  # they are on the host: what follows is bookkeeping
            self._advance(lane, step, told)
        self._resting.append(lane)
        return self._lanes[lane].landed(tokens, stamp_ns)

    def logits(self, lane: int, prompts: Sequence[bytes], forced: Sequence[bytes]) -> Tensor:
        """Return what the model makes of prompts and of given tokens after them, in one lane.

        Nothing may be in flight, and no text in a slot of the lane.

        Args:
            lane: a micro-batch.
            prompts: no more than a lane has slots.
            forced: after each prompt as many tokens, which are read in place of the model's own.

        Returns:
            Of the token after each prompt and after each given token, in host memory, shape
            (1 + tokens, n, vocabulary), float32.
        """
        with torch.inference_mode():
            head, x = self._prefill(CHECK_PREFILL, lane, range(len(prompts)), prompts)
            found = [self._checked(head, x)]
            at = FIELDS + self.rank.slots
            for step in range(len(forced[0])):
                reach = max(map(len, prompts)) + step + 1
                head = self.rank.header()
                settings = [CHECK_DECODE, lane, len(prompts), 1, self._rounded(reach)]
                head[:FIELDS] = torch.tensor(settings)
                places = [len(prompt) + step for prompt in prompts]
                head[at : at + len(prompts)] = torch.tensor(places)
                x = torch.tensor([[each[step]] for each in forced])
                found.append(self._checked(head, x))
            return torch.stack(found)

    def _checked(self, head: Tensor, x: Tensor) -> Tensor:
        """Let a check go round; returns its logits."""
        out, back = self.rank.run(head, x), self.rank.edges.back
        if back is None:
            return out.cpu()
        told = torch.empty(len(x), self.rank.net.config.vocabulary)
        back.begin(told).wait()
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
            self._flying.append((lane, step, *self._begin(lane, step)))

    def _begin(self, lane: int, step: Step) -> tuple[Tensor, Posted | None]:
        """Compute the leader's layers of a step; returns its tokens, or what receives them."""
        if type(step) is Prefill:
            rows = len(step.slots)
            head, x = self._prefill(PREFILL, lane, step.slots, step.prompts)
        else:
            assert type(step) is Decode
            head, at, rows = self.rank.header(), FIELDS + self.rank.slots, step.top
            x = self._tokens[lane][:rows, None].clone()
            head[:FIELDS] = torch.tensor([DECODE, lane, rows, 1, self._rounded(step.limit)])
            head[at : at + rows] = self._positions[lane][:rows]
        out, back = self.rank.run(head, x), self.rank.edges.back
        if back is None:
            return out.cpu(), None
        told = torch.empty(rows, dtype=torch.int64)
        return told, back.begin(told)

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
