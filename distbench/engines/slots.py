"""Token engine: texts that are written on together, one byte each per step, in slots of their own.

A row waits until it is admitted to a free slot. Its prompt is then read in one call of the decoder
(prefill), which gives its first token; every further step gives one more token to each text in a
slot; a text that has all its tokens leaves its slot. With continuous batching a slot is filled
again at the next step; with static batching only once all slots are free, so that the longest text
of a batch holds up the rest. The tokens are the same either way.

One ``poll`` is one call of the decoder and returns what came of it at once: either the ``First`` of
every row just admitted, or the ``Done`` of every row that has ended. A token's stamp is the clock
read after the tokens of its step are in host memory, so all of one step have the same.

This module decides who is computed and when; a ``Decoder`` computes. It imports no torch. What is
written together is a ``Lane``; a pipeline has several in flight (``lanes``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from distbench.clock import Now, now_ns
from distbench.errors import UsageError
from distbench.sut import Done, First, Indices

BATCHING = ("continuous", "static")
KEPT_STEPS = 1024
"""Steps whose tokens are kept at least before those that no text needs any more are forgotten."""


class Decoder(Protocol):
    """What computes the tokens; it keeps every slot's text so far.

    Attributes:
        slots: texts it holds.
        length: tokens of a slot, prompt included.
        vocabulary: tokens are 0 .. vocabulary-1.
    """

    slots: int
    length: int
    vocabulary: int

    def prefill(self, slots: Sequence[int], prompts: Sequence[bytes]) -> list[int]:
        """Begin a text in each of some slots; returns their first tokens, on the host."""

    def decode(self, top: int, limit: int) -> list[int]:
        """Write one token more in each of the first ``top`` slots; returns them, on the host.

        ``limit`` is the length of the longest text among them. A slot without a text gives a token
        without a meaning.
        """


class Prefill(NamedTuple):
    """A call of the decoder that begins texts.

    Attributes:
        slots: free ones.
        prompts: as many.
    """

    slots: Sequence[int]
    prompts: Sequence[bytes]


class Decode(NamedTuple):
    """A call of the decoder that writes one token more of each text; see ``Decoder.decode``."""

    top: int
    limit: int


Step = Prefill | Decode
Waiting = deque[tuple[int, bytes, int]]
"""Rows without a slot, oldest first: row, prompt, tokens wanted."""


@dataclass(frozen=True)
class _Text:
    """A row in its slot.

    Attributes:
        row: as issued.
        begin: decode steps that came before its prefill.
        reach: its length, prompt and first token included, less ``begin``: with the number of steps
            so far added, that is its length at any time.
        first: its first token.
        started_ns: when its prefill began.
        first_ns: when the first token was there.
    """

    row: int
    begin: int
    reach: int
    first: int
    started_ns: int
    first_ns: int


class Lane:
    """The texts that are written together, one step at a time: who comes next, and what came of it.

    Args:
        slots: texts it holds.
        static: whether it is filled only when it is empty.

    Attributes:
        steps: decode steps so far.
        prefills: calls that admitted rows so far.
    """

    def __init__(self, slots: int, static: bool) -> None:
        self.slots, self.static = slots, static
        self.steps = self.prefills = 0
        self.clear()

    def clear(self) -> None:
        """Forget what is being written."""
        self._texts: dict[int, _Text] = {}
        # The lowest free slot is taken first: the decoder computes the slots up to the highest one.
        self._free = list(range(self.slots))
        self._ends: list[tuple[int, int]] = []  # a heap: steps at which a text ends, its slot
        self._top = self._reach = 0
        self._written: list[list[int]] = []
        self._stamps: list[int] = []
        self._kept_from = self.steps  # the step at which both begin
        self._admitted: list[tuple[int, bytes, int]] = []
        self._begun: tuple[Sequence[int], int] = ((), 0)

    @property
    def room(self) -> int:
        """Rows that can be admitted now."""
        return 0 if self.static and self._texts else len(self._free)

    @property
    def busy(self) -> bool:
        """Whether there are texts to write on."""
        return bool(self._texts)

    def next(self, waiting: Waiting, most: int, now: Now) -> Step | None:
        """Return the next step: admit what can be admitted, or else write one token of each text.

        Args:
            waiting: rows, of which the admitted ones are taken.
            most: rows to admit at most.
            now: the clock: it stamps when texts begin.

        Returns:
            The step, whose tokens ``landed`` must be told before the next one; None: nothing to do.
        """
        count = min(len(waiting), self.room, most)
        if count:
            self._admitted = [waiting.popleft() for _ in range(count)]
            slots = [heappop(self._free) for _ in range(count)]
            self._begun = (slots, now())
            return Prefill(slots, [prompt for _, prompt, _ in self._admitted])
        return Decode(self._top, self._reach + self.steps) if self._texts else None

    def landed(self, tokens: list[int], stamp_ns: int) -> Sequence[Done | First]:
        """Take what came of the step; returns what is to be told of it.

        Args:
            tokens: of its slots, on the host.
            stamp_ns: when they were there.
        """
        if self._admitted:
            return self._admit(tokens, stamp_ns)
        # What is done here for each step is the same for 8 slots and for 800; what a text needs is
        # done once, when it ends.
        self._written.append(tokens)
        self._stamps.append(stamp_ns)
        self.steps += 1
        return self._retire() if self._ends[0][0] == self.steps else []

    def _admit(self, tokens: list[int], stamp_ns: int) -> list[Done | First]:
        rows, (slots, started_ns) = self._admitted, self._begun
        self._admitted = []
        self.prefills += 1
        for slot, token, (row, prompt, wanted) in zip(slots, tokens, rows, strict=True):
            reach = len(prompt) + 1 - self.steps
            self._texts[slot] = _Text(row, self.steps, reach, token, started_ns, stamp_ns)
            heappush(self._ends, (self.steps + wanted - 1, slot))
        told: list[Done | First] = [
            First(row, stamp_ns, token) for token, (row, _, _) in zip(tokens, rows, strict=True)
        ]
        return told + self._retire()

    def _retire(self) -> list[Done]:
        ended = []
        while self._ends and self._ends[0][0] == self.steps:
            slot = heappop(self._ends)[1]
            ended.append(self._done(slot, self._texts.pop(slot)))
            heappush(self._free, slot)
        self._top = max(self._texts, default=-1) + 1
        self._reach = max((text.reach for text in self._texts.values()), default=0)
        if not self._texts or len(self._written) > KEPT_STEPS:
            self._forget(min((text.begin for text in self._texts.values()), default=self.steps))
        return ended

    def _forget(self, before: int) -> None:
        """Drop what was written in the first ``before`` steps."""
        del self._written[: before - self._kept_from]
        del self._stamps[: before - self._kept_from]
        self._kept_from = before

    def _done(self, slot: int, text: _Text) -> Done:
        own = slice(text.begin - self._kept_from, None)
        tokens = [text.first, *(step[slot] for step in self._written[own])]
        token_ns = [text.first_ns, *self._stamps[own]]
        stamps = (text.started_ns, token_ns[-1])
        return Done(text.row, 1, [np.array(tokens, np.int64)], "", *stamps, token_ns=token_ns)


class Prompts:
    """The prompts of a token model, and which of its rows have no slot yet.

    Args:
        prompts: by sample index.
        output_lengths: tokens to write after each prompt, shape (total,), int64, at least 1.
        length: positions of a slot.
        vocabulary: tokens are 0 .. vocabulary-1.
    """

    def __init__(
        self,
        prompts: Sequence[bytes],
        output_lengths: NDArray[np.int64],
        length: int,
        vocabulary: int,
    ) -> None:
        self.prompts = prompts
        self.output_lengths = output_lengths.tolist()
        self.length, self.vocabulary = length, vocabulary
        self.waiting: Waiting = deque()

    def issue(self, row: int, indices: Indices, data: Sequence[bytes] | None) -> None:
        """Let a row wait for a slot; see ``SlotEngine.issue``."""
        if len(indices) != 1:
            raise UsageError(
                f"a token model takes one sample a group, and was issued {len(indices)}: give "
                "--batch-size 1; its slots are what it batches by"
            )
        wanted = self.output_lengths[indices[0]]
        prompt = self.prompts[indices[0]] if data is None else data[0]
        if data is not None:
            self._check(prompt, wanted)
        self.waiting.append((row, prompt, wanted))

    def _check(self, prompt: bytes, wanted: int) -> None:
        room = self.length - wanted
        if not 1 <= len(prompt) <= room or max(prompt) >= self.vocabulary:
            raise UsageError(
                f"a prompt of {len(prompt)} bytes is not between 1 and {room}, or has a byte that "
                f"is not below {self.vocabulary}: send what the model's samples() returns"
            )


def check_batching(batching: str) -> bool:
    """Return whether ``batching`` is the static one; raises UsageError where it is no batching."""
    if batching not in BATCHING:
        raise UsageError(f"batching {batching!r} is neither continuous nor static")
    return batching == "static"


class SlotEngine:
    """A decoder behind the protocol of a system under test; computes in ``poll``.

    Args:
        decoder: computes; its slots are the engine's depth.
        prompts: by sample index.
        output_lengths: tokens to write after each prompt, shape (total,), int64, at least 1.
        batching: "continuous" or "static".
        now: clock for the stamps.

    Attributes:
        most_tokens: of a sample.

    Raises:
        UsageError: ``batching`` is neither.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompts: Sequence[bytes],
        output_lengths: NDArray[np.int64],
        batching: str = "continuous",
        now: Now = now_ns,
    ) -> None:
        self.decoder = decoder
        self.now = now
        self.total = self.resident = len(prompts)
        self.depth = decoder.slots
        self.most_tokens = int(output_lengths.max())
        self._prompts = Prompts(prompts, output_lengths, decoder.length, decoder.vocabulary)
        self.static = check_batching(batching)
        self._lane = Lane(decoder.slots, self.static)

    @property
    def steps(self) -> int:
        """Decode steps so far."""
        return self._lane.steps

    @property
    def prefills(self) -> int:
        """Calls that admitted rows so far."""
        return self._lane.prefills

    def load(self, indices: Indices) -> None:
        """All prompts are resident already."""

    def unload(self, indices: Indices) -> None:
        """Prompts stay resident."""

    def issue(self, row: int, indices: Indices, data: Sequence[bytes] | None = None) -> None:
        """Let a row wait for a slot.

        Args:
            row: of the one sample.
            indices: shape (1,); says how many tokens are to be written.
            data: the prompt, in place of the sample's own.

        Raises:
            UsageError: it is not one sample, or the prompt does not fit.
        """
        self._prompts.issue(row, indices, data)

    def poll(self, until_ns: int) -> Sequence[Done | First]:
        """Admit what can be admitted, or else write one token of each text."""
        step = self._lane.next(self._prompts.waiting, self.depth, self.now)
        if step is None:
            return ()
        if type(step) is Prefill:
            tokens = self.decoder.prefill(step.slots, step.prompts)
        else:
            tokens = self.decoder.decode(*step)
        return self._lane.landed(tokens, self.now())

    def close(self) -> None:
        """Forget what waits and what is being written."""
        self._prompts.waiting.clear()
        self._lane.clear()
